"""The course of a training run: its log, and the curves of several runs in one picture."""

import json
from collections.abc import Mapping
from pathlib import Path


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl. Raises FileNotFoundError, or ValueError naming a line that is not JSON."""
    path = run_dir / "metrics.jsonl"
    metrics = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            metrics.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: line {number} is not valid JSON ({error})") from error
    return metrics


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
