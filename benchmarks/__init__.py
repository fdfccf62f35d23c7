"""Every speed and memory claim of the project: `pytest benchmarks`, or `make bench` for the committed results."""
