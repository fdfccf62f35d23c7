"""Drawing of the plots: phases, scaling, memory and quality, each from its rows into a matplotlib figure."""

import math
import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks.cases import PHASES, SHAPES
from benchmarks.report.comparisons import floors, noise, standard
from benchmarks.report.rows import ARCHITECTURES, Row, architectures, is_ours, unique, who

# Okabe and Ito's, told apart by the colour-blind; their yellow is too pale for a line.
BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
LINES = {"topk": BLUE, "joint": VERMILLION}
OTHERS = (GREEN, ORANGE, PURPLE, SKY)
MARKERS = "s^DvPX"
_SMOOTHED = 9
"""Steps of a curve that are averaged."""
SIZES = {"M": "d_sae", "K": "k", "B": "batch rows B", "D": "d_in"}


# Phases


def draw_phases(figure: Any, rows: list[Row]) -> None:
    """A bar a provider, its phases one after another; a mark where the whole step was measured."""
    steps = [r for r in rows if r["benchmark"] == "step"]
    shape = SHAPES[steps[0]["shape"]]
    kinds = architectures(steps)
    counts = [len({r["provider"] for r in steps if r["architecture"] == a}) for a in kinds]
    panels = figure.subplots(len(kinds), 1, squeeze=False, height_ratios=[n + 0.6 for n in counts])[:, 0]
    gemm = next(r["median"] for r in rows if r["benchmark"] == "gemm")
    for axes, kind in zip(panels, kinds, strict=True):
        _phase_bars(axes, [r for r in steps if r["architecture"] == kind])
        floor = floors(rows, shape, kind == "joint")["step"]
        axes.axvline(1e3 * gemm, color="black", linestyle="--", linewidth=1.3, label="bare GEMM")
        axes.axvline(1e3 * floor, color="black", linestyle=":", linewidth=1.6, label="counted floor")
        axes.set_title(f"{ARCHITECTURES[kind]}: {sizes_of(vars(shape), 'BDMK')}", loc="left", fontsize=10)
    panels[-1].set_xlabel("milliseconds")
    _legend(figure, panels, columns=4)


def _phase_bars(axes: Any, rows: list[Row]) -> None:
    names = unique(r["provider"] for r in rows)
    ms = {(r["provider"], r["phase"]): 1e3 * r["median"] for r in rows}
    left = dict.fromkeys(names, 0.0)
    for phase, colour in zip(PHASES, (BLUE, ORANGE, GREEN, PURPLE), strict=True):
        widths = [ms.get((name, phase), 0.0) for name in names]
        axes.barh(names, widths, left=list(left.values()), color=colour, label=phase, height=0.68)
        left = {name: left[name] + width for name, width in zip(names, widths, strict=True)}
    whole = {name: ms[name, "step"] for name in names if (name, "step") in ms}
    axes.plot(list(whole.values()), list(whole), "D", color="black", markersize=4.5, linestyle="", label="whole step")
    ends = {name: max(left[name], whole.get(name, 0.0)) for name in names}
    for name, step in whole.items():
        axes.annotate(f"{step:,.0f}", (ends[name], name), (8, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xlim(0, 1.1 * max(ends.values()))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if is_ours(name) else "normal")


# Scaling


def draw_scaling(figure: Any, rows: list[Row]) -> None:
    """Seconds of a step over each size, a line a provider, its band from the fastest round to the slowest."""
    styles = _styles(rows)
    panels = figure.subplots(2, 2).flat
    for axes, axis in zip(panels, SIZES, strict=True):
        of_axis = [r for r in rows if r["axis"] == axis]
        for provider, style in styles.items():
            line = _line(of_axis, provider)
            sizes = [r["size"] for r in line]
            axes.plot(sizes, [r["median"] for r in line], label=provider, **style)
            low, high = [r["min"] for r in line], [r["max"] for r in line]
            axes.fill_between(sizes, low, high, color=style["color"], alpha=0.18, linewidth=0)
        _log_axes(axes, of_axis, axis, "seconds of a step")
    _legend(figure, list(figure.axes), columns=3)


def draw_memory(figure: Any, rows: list[Row]) -> None:
    """Peak memory of a step, parameters and optimizer with it, over the batch and the dictionary."""
    styles = _styles(rows)
    for axes, axis in zip(figure.subplots(1, 2), ("B", "M"), strict=True):
        of_axis = [r for r in rows if r["axis"] == axis]
        for provider, style in styles.items():
            line = _line(of_axis, provider)
            axes.plot([r["size"] for r in line], [r["peak_bytes"] / 1e6 for r in line], label=provider, **style)
        _log_axes(axes, of_axis, axis, "peak memory of a step, MB")
    _legend(figure, list(figure.axes), columns=3)


def _line(rows: list[Row], provider: str) -> list[Row]:
    """Its rows from the smallest size to the largest."""
    return sorted((r for r in rows if r["provider"] == provider), key=lambda r: r["size"])


def _log_axes(axes: Any, rows: list[Row], axis: str, y: str) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set(xscale="log", xlabel=SIZES[axis], ylabel=y)
    axes.xaxis.set_major_locator(FixedLocator(sorted({r["size"] for r in rows})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    _log_y(axes)
    axes.grid(alpha=0.3)
    if rows:
        fixed = [size for size in "BDMK" if size != axis]
        axes.set_title(f"over {SIZES[axis]}, at {sizes_of(rows[0]['shape'], fixed)}", loc="left", fontsize=10)


def _log_y(axes: Any) -> None:
    """Powers of ten hardly fit into these ranges: 1, 2 and 5 of each, written out."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def sizes_of(shape: dict[str, Any], which: Iterable[str]) -> str:
    """As in B=512 d_in=512."""
    return " ".join(f"{'B' if size == 'B' else SIZES[size]}={shape[size]}" for size in which)


def _styles(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """Choose the look of each provider's line: ours heavier, the bare GEMM dashed."""
    styles, others = {}, 0
    for kind, provider in unique(who(r) for r in rows):
        if kind is None:
            styles[provider] = {"color": "black", "linestyle": "--", "linewidth": 1.3}
        elif is_ours(provider):
            styles[provider] = {"color": LINES[kind], "linewidth": 2.8, "marker": "o", "markersize": 6, "zorder": 3}
        else:
            colour, marker = OTHERS[others % len(OTHERS)], MARKERS[others % len(MARKERS)]
            styles[provider] = {"color": colour, "linewidth": 1.3, "marker": marker, "markersize": 4.5}
            others += 1
    return styles


# Quality


def draw_quality(figure: Any, rows: list[Row]) -> None:
    """FVU over steps, and below it relative to the standard; in grey what the order of batches changes."""
    first = [r for r in rows if r["order"] == 0]
    kinds = architectures(first)
    panels = figure.subplots(2, len(kinds), squeeze=False, sharex="col")
    for column, kind in enumerate(kinds):
        above, below = panels[:, column]
        runs = [r for r in first if r["architecture"] == kind]
        late = [r for n, run in enumerate(runs) for r in _fvu_curves(above, below, run, standard(runs, run), n)]
        if chance := noise(rows, kind):
            late += [1 - chance, 1 + chance]
            below.axhspan(*late[-2:], color="black", alpha=0.12, linewidth=0, label="noise")
        late = [r for r in late if math.isfinite(r)] or [1.0]
        margin = 0.05 * (max(late) - min(late)) or 0.01
        below.set_ylim(min(late) - margin, max(late) + margin)  # what the first steps do would hide the last
        _log_y(above)
        above.set_title(f"{ARCHITECTURES[kind]}: {sizes_of(runs[0]['shape'], 'BDMK')}", loc="left", fontsize=10)
        above.set_ylabel("fraction of variance unexplained" if column == 0 else "")
        below.set(xlabel="step", ylabel="FVU / that of the standard\nof its recipe")
        for axes in (above, below):
            axes.grid(alpha=0.3)
        below.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=1, fontsize=8.5, frameon=False)


def _fvu_curves(above: Any, below: Any, run: Row, against: Row | None, number: int) -> list[float]:
    """Returns the relative FVUs of the second half; none without what the run is compared with."""
    colours, dashes = (BLUE, VERMILLION, *OTHERS, "black"), ("-", "--", ":")
    ours = is_ours(run["provider"])
    style = {
        "color": colours[number % len(colours)],
        "linestyle": dashes[number % len(dashes)],
        "linewidth": 2.6 if ours else 1.3,
        "alpha": 0.75 if ours else 1.0,
    }
    steps = range(1, len(run["fvu"]) + 1)
    above.plot(steps, run["fvu"], **style)
    others = smooth(against["fvu"]) if against else []
    relative = [f / a for f, a in zip(smooth(run["fvu"]), others, strict=False)]  # one may have ended early
    below.plot(steps[: len(relative)], relative, label=run["provider"], **style)
    return relative[len(relative) // 2 :]


def smooth(curve: list[float]) -> list[float]:
    """Means of the last few steps at each."""
    return [statistics.fmean(curve[max(0, end - _SMOOTHED) : end]) for end in range(1, len(curve) + 1)]


def _legend(figure: Any, panels: Iterable[Any], columns: int) -> None:
    """One for all panels, below them; bars, which come last of an axes, first."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    labels = sorted(found, key=lambda label: label not in PHASES)
    figure.legend([found[label] for label in labels], labels, loc="outside lower center", ncols=columns, frameon=False)
