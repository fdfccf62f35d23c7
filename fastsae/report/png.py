"""Plots as PNG files that say what they were drawn from.

Bytes of a PNG differ between versions of matplotlib; what stands in its metadata does not, and tells whether a plot is
up to date.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastsae import packages


def told(what: str, data: Any) -> str:
    """Describe the data that a plot is drawn from, in one line."""
    return f"{what} sha256 {hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()}"


def save(path: Path, size: tuple[float, float], draw: Callable[[Any], object], description: str = "") -> None:
    """size: width and height in inches. draw: fills a matplotlib figure. description: goes into the metadata."""
    packages.need("matplotlib", f"drawing {path}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    figure.savefig(path, dpi=130, metadata={"Description": description})


def description(path: Path) -> str | None:
    """Read the description in a PNG; None if there is no file or no description."""
    from PIL import Image  # which comes with matplotlib

    try:
        with Image.open(path) as image:
            return image.info.get("Description")
    except OSError:
        return None
