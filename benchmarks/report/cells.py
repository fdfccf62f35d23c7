"""Cells of tables: figures, spreads and providers as text."""

import math

from benchmarks.report.rows import Row, is_ours


def figures(value: float) -> str:
    """Three of them, without an exponent."""
    if not math.isfinite(value):
        return str(value)
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{digits}f}"


def spread(row: Row, scale: float = 1.0) -> str:
    return f"{figures(scale * row['min'])} to {figures(scale * row['max'])}"


def shown(row: Row) -> str:
    """A provider with its version; ours bold."""
    name = row["provider"] + (f" ({row['version']})" if row.get("version") else "")
    return f"**{name}**" if is_ours(name) else name
