"""What the committed results say: the README's table, docs/benchmarks.md and its plots."""
