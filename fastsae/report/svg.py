"""matplotlib figures as SVG that takes its colours from the page: one drawing for light and dark."""

import html
import io
import re
from collections.abc import Callable
from typing import Any

from fastsae import packages
from fastsae.extras import LAB

# Colours that stand for the page's variables; each is replaced wherever matplotlib writes it.
INK, GRID = "#010101", "#020202"
COLORS = ("#030303", "#040404", "#050505", "#060606", "#070707")
_VARIABLES = {INK: "--ink", GRID: "--grid", **{color: f"--c{i}" for i, color in enumerate(COLORS)}}


def figure(title: str, draw: Callable[[Any], None], size: tuple[float, float] = (4.2, 2.8)) -> str:
    """The SVG of what `draw` puts into its axes. Small, so that it stays legible as wide as a telephone."""
    packages.need("matplotlib", "a report with its plots")
    try:
        from cycler import cycler
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"a report has plots and needs matplotlib: {LAB}") from error

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,  # ids of their own: all figures share one page
        "font.family": "sans-serif",
        "font.size": 8.5,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "axes.prop_cycle": cycler(color=COLORS),
    }
    with rc_context(style):
        canvas = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(canvas)
        draw(canvas.subplots())
        out = io.StringIO()
        nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.savefig(out, format="svg", transparent=True, metadata=nothing)
    drawn = out.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    for color, variable in _VARIABLES.items():
        drawn = drawn.replace(color, f"var({variable})")
    drawn = re.sub(r'<svg ([^>]*?)width="[^"]*" ', r"<svg \1", drawn)
    drawn = re.sub(r'<svg ([^>]*?)height="[^"]*" ', r"<svg \1", drawn, count=1)
    label = html.escape(title, quote=True)
    return drawn.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
