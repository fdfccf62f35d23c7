"""Results as plain text."""

from collections.abc import Mapping, Sequence


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of cells by column name, as aligned text; the first column to the left, the others to the right."""
    columns = list(rows[0])
    widths = {c: max(len(c), *(len(row[c]) for row in rows)) for c in columns}

    def line(cells: Mapping[str, str]) -> str:
        first, *others = columns
        return "  ".join([cells[first].ljust(widths[first]), *(cells[c].rjust(widths[c]) for c in others)])

    header = line({c: c for c in columns})
    return "\n".join([header, "-" * len(header), *(line(row) for row in rows)])


def interval(value: Mapping[str, float | None]) -> str:
    """An interval of a results file: "0.1234 [0.1200, 0.1268]", without its ends where it has none."""
    estimate, low, high = value["estimate"], value["low"], value["high"]
    if estimate is None:
        return "none"
    return f"{estimate:.4f}" if low is None else f"{estimate:.4f} [{low:.4f}, {high:.4f}]"
