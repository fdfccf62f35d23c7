"""Cells: figures, spreads and providers as text, and the Markdown table that holds them."""

import math
from collections.abc import Iterable, Sequence

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


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """The first columns are `words`, the others numbers, which go to the right."""
    lines = [list(header), ["---"] * words + ["---:"] * (len(header) - words)]
    lines += [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
