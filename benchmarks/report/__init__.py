"""Report of the committed results: the README's table, docs/benchmarks.md and its plots."""
