"""Plots of one results file of a CPU, each with the sha256 of the rows it was drawn from in its metadata."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report.drawing import draw_memory, draw_phases, draw_quality, draw_scaling
from benchmarks.report.rows import Results, Row, phase_shapes, select, who
from fastsae.report import png

PLOTS = "docs/benchmarks"


@dataclass(frozen=True)
class Plot:
    """A plot: its rows, and the function that draws them."""

    rows: list[Row]
    draw: Callable[[Any, list[Row]], None]
    """Fills a matplotlib figure."""
    size: tuple[float, float]

    def told(self) -> str:
        """Describe the rows for the PNG's metadata."""
        return png.told("rows", self.rows)

    def save(self, path: Path) -> None:
        png.save(path, self.size, lambda figure: self.draw(figure, self.rows), self.told())

    def is_in(self, path: Path) -> bool:
        """Whether the PNG there was drawn from these rows."""
        return png.description(path) == self.told()


def plots(results: Results) -> dict[str, Plot]:
    """By name; only those that the results have rows for."""
    made = {}
    for shape in phase_shapes(results):
        rows = select(results, "step", shape=shape.name)
        rows += select(results, "gemm", shape=shape.name) + select(results, "copy")
        made[f"phases-{shape.name}"] = Plot(rows, draw_phases, (10, 2.4 + 0.36 * len({who(r) for r in rows})))
    if scaling := select(results, "scaling"):
        made["scaling"] = Plot(scaling, draw_scaling, (11, 8.5))
    if peaks := [r for r in scaling if r.get("peak_bytes") and r["axis"] in ("B", "M")]:
        made["memory"] = Plot(peaks, draw_memory, (11, 4.8))
    quality = select(results, "quality")
    if any(r["order"] == 0 for r in quality):
        made["quality"] = Plot(quality, draw_quality, (11, 9))
    return made
