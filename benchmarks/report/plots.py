"""Plots of one results file of a CPU, each with the sha256 of the rows it was drawn from in its metadata.

Bytes of a PNG differ between versions of matplotlib; that text does not, and tells whether a plot is up to date.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report.drawing import draw_memory, draw_phases, draw_quality, draw_scaling
from benchmarks.report.rows import Results, Row, phase_shapes, select, who

PLOTS = "docs/benchmarks"


@dataclass(frozen=True)
class Plot:
    """What is drawn from which rows."""

    rows: list[Row]
    draw: Callable[[Any, list[Row]], None]
    """Fills a matplotlib figure."""
    size: tuple[float, float]

    def told(self) -> str:
        """What the PNG's metadata say of its rows."""
        return f"rows sha256 {hashlib.sha256(json.dumps(self.rows, sort_keys=True).encode()).hexdigest()}"

    def save(self, path: Path) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=self.size, layout="constrained")
        FigureCanvasAgg(figure)
        self.draw(figure, self.rows)
        figure.savefig(path, dpi=130, metadata={"Description": self.told()})

    def is_in(self, path: Path) -> bool:
        """Whether the PNG there was drawn from these rows."""
        from PIL import Image

        try:
            with Image.open(path) as image:
                return image.info.get("Description") == self.told()
        except OSError:  # none, or no image
            return False


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
