"""Results for people: plain-text tables and plots."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of cells by column name, as aligned text; the first column to the left, the others to the right."""
    columns = list(rows[0])
    widths = {c: max(len(c), *(len(row[c]) for row in rows)) for c in columns}

    def line(cells: Mapping[str, str]) -> str:
        first, *others = columns
        return "  ".join([cells[first].ljust(widths[first]), *(cells[c].rjust(widths[c]) for c in others)])

    header = line({c: c for c in columns})
    return "\n".join([header, "-" * len(header), *(line(row) for row in rows)])


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def plot_training(runs: Mapping[str, Path], path: Path) -> None:
    """Draw FVU and dead share over training rows, a curve per run (name -> run_dir), into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, key, label in zip(
        figure.subplots(1, 2), ("fvu", "dead_share"), ("fraction of variance unexplained", "dead share"), strict=True
    ):
        for name, run_dir in runs.items():
            lines = read_metrics(run_dir)
            axes.plot([line["rows"] for line in lines], [line[key] for line in lines], label=name, linewidth=1.2)
        axes.set(xlabel="activations trained on", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[0].set_yscale("log")
    figure.savefig(path, dpi=150)
