"""The course of a training run: its log, and the curves of several runs in one picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsae import files
from fastsae.report import png


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl. Raises FileNotFoundError, or ValueError naming a line that is damaged."""
    path = run_dir / "metrics.jsonl"
    metrics = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            metrics.append(files.read_numbers(line, ("rows",), ("fvu", "dead_share")))
        except ValueError as error:
            advice = "Delete the line; to train on with --resume drops it too"
            raise ValueError(f"{path} is damaged: line {number} {error}. {advice}") from error
    return metrics


def plot_training(runs: Mapping[str, Path], path: Path) -> None:
    """Draw FVU and dead share over training rows, a curve per run (name -> run_dir), into a PNG."""
    curves = {name: read_metrics(run_dir) for name, run_dir in runs.items()}
    labels = {"fvu": "fraction of variance unexplained", "dead_share": "dead share"}

    def draw(figure: Any) -> None:
        for axes, (key, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
            for name, lines in curves.items():
                axes.plot([line["rows"] for line in lines], [line[key] for line in lines], label=name, linewidth=1.2)
            axes.set(xlabel="activations trained on", ylabel=label)
            axes.grid(alpha=0.3)
            axes.legend()
        figure.axes[0].set_yscale("log")

    png.save(path, (10, 4), draw)
