"""`make gpu`: what can only be shown on an NVIDIA GPU. `python -m benchmarks.gpu --help` lists the stages."""
