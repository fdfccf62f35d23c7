"""The drawings of a run's report, each from one of its result files."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import isfinite
from typing import Any

from fastsae.report.svg import COLORS, GRID, INK, figure

Interval = Mapping[str, float | None]
_GROUPS = ("dead", "rare", "middle", "common")


def curve(lines: Sequence[Mapping[str, float]], key: str, label: str, log: bool = False) -> str:
    """One column of metrics.jsonl over the activations trained on."""

    from matplotlib.ticker import EngFormatter

    def draw(axes: Any) -> None:
        drawn = [(line["rows"], line.get(key)) for line in lines]
        known = [(rows, value) for rows, value in drawn if value is not None and isfinite(value)]
        axes.plot([x for x, _ in known], [y for _, y in known], color=COLORS[0], linewidth=1.2)
        axes.set(xlabel="activations trained on", ylabel=label)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if log and any(y > 0 for _, y in known):
            axes.set_yscale("log")
        elif known:
            axes.set_ylim(0, 1.05 * max(y for _, y in known) or 1)  # from 0: a constant would be drawn as its noise

    return figure(label, draw, (3.6, 2.3))


def bars(title: str, groups: Mapping[str, Mapping[str, Interval]], label: str) -> str:
    """Bars with their intervals: a cluster a name, a bar in it a series (series -> name -> interval)."""

    def draw(axes: Any) -> None:
        names = list(next(iter(groups.values())))
        height = 0.8 / len(groups)
        for i, (series, values) in enumerate(groups.items()):
            places = [j + i * height for j in range(len(names))]
            estimates = [values[name]["estimate"] or 0.0 for name in names]
            axes.barh(places, estimates, height * 0.92, color=COLORS[i], label=series)
            for place, name in zip(places, names, strict=True):
                low, high = values[name]["low"], values[name]["high"]
                if low is not None and high is not None:
                    axes.plot([low, high], [place, place], color=INK, linewidth=1.4, solid_capstyle="butt")
        axes.set_yticks([j + 0.4 - height / 2 for j in range(len(names))], [n.replace(" + ", "\n+ ") for n in names])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel=label)
        if len(groups) > 1:
            axes.legend(loc="upper center", bbox_to_anchor=(0.4, 1.22), ncols=len(groups), fontsize=8)

    names = next(iter(groups.values()))
    return figure(title, draw, (4.2, 1.3 + 0.24 * len(names) * max(2, len(groups))))


def norm_histogram(title: str, norms: Mapping[str, Any]) -> str:
    """Squared norms of a weight's rows by firing-rate group, beside those of as many untrained rows."""

    def draw(axes: Any) -> None:
        edges = norms["edges"]
        below = [0.0] * (len(edges) - 1)
        for color, group in zip(COLORS, _GROUPS, strict=False):
            if norms["groups"].get(group) is None:
                continue
            counts = norms["groups"][group]["histogram"]
            widths = [high - low for low, high in pairwise(edges)]
            axes.bar(edges[:-1], counts, widths, bottom=below, align="edge", color=color, label=group)
            below = [a + b for a, b in zip(below, counts, strict=True)]
        axes.stairs(norms["at_init_histogram"], edges, color=INK, linewidth=1, linestyle="--", label="untrained")
        axes.set_ylim(0, 1.15 * max(below))  # untrained norms are much alike: a spike that may leave the frame
        axes.set(xlabel="squared norm", ylabel="features")
        axes.legend(fontsize=7.5)

    return figure(title, draw)


def beside_null(title: str, found: Mapping[str, Mapping[str, float]], label: str) -> str:
    """Values as dots, and the range of the random baseline as bands behind them."""

    def draw(axes: Any) -> None:
        for place, value in enumerate(found.values()):
            low, high = value["null_min"], value["null_max"]
            axes.plot([low, high], [place, place], color=COLORS[1], linewidth=9, solid_capstyle="butt")
            axes.plot([value["null_mean"]], [place], "|", color=INK, markersize=9)
            axes.plot([value["value"]], [place], "o", color=COLORS[0], markersize=6)
        axes.axvline(0, color=GRID, linewidth=1)
        axes.set_yticks(range(len(found)), list(found))
        axes.set(xlabel=label, xlim=(-1.05, 1.05), ylim=(max(1, len(found)) - 0.5, -0.5))
        axes.plot([], [], "o", color=COLORS[0], label="trained")
        axes.plot([], [], color=COLORS[1], linewidth=9, label="random baseline")
        axes.legend(loc="upper center", bbox_to_anchor=(0.4, 1.25), ncols=2, fontsize=8)

    return figure(title, draw, (4.2, 1.1 + 0.34 * len(found)))


def interaction_plot(title: str, factors: Sequence[Mapping[str, str]], means: Mapping[str, Interval]) -> str:
    """The four cell means with their intervals: a line a level of the second factor, over levels of the first."""
    first, second = factors

    def draw(axes: Any) -> None:
        for color, other in zip(COLORS, ("high", "low"), strict=False):
            levels = [f"{one} {other}" for one in ("low", "high")]
            y = [means[level]["estimate"] or 0.0 for level in levels]
            axes.plot([0, 1], y, "o-", color=color, linewidth=1.4, label=second[other])
            for x, level in enumerate(levels):
                low, high = means[level]["low"], means[level]["high"]
                if low is not None and high is not None:
                    axes.plot([x, x], [low, high], color=color, linewidth=1.2)
        axes.set_xticks([0, 1], [first["low"], first["high"]])
        axes.set(xlim=(-0.3, 1.3), xlabel=first["name"], ylabel="activation")
        axes.legend(fontsize=7.5, title=second["name"], title_fontsize=7.5)

    return figure(title, draw, (3.4, 2.5))


def heat_map(title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]]) -> str:
    """Values from -1 to 1 as shades: one colour for positive ones, another for negative ones."""

    def draw(axes: Any) -> None:
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                color = COLORS[0] if value >= 0 else COLORS[1]
                axes.bar(x, 0.94, 0.94, y - 0.47, color=color, alpha=min(1.0, abs(value)) * 0.85, linewidth=0)
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7)
        axes.set_xticks(range(len(columns)), [name.replace(", ", ",\n") for name in columns], fontsize=7.5)
        axes.set_yticks(range(len(rows)), list(rows), fontsize=7.5)
        axes.grid(visible=False)
        axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))

    return figure(title, draw, (4.2, 1.0 + 0.24 * len(rows)))


def beside_controls(title: str, found: Interval, controls: Mapping[str, Sequence[float]]) -> str:
    """An effect with its interval, and the effects of each kind of control as dots."""

    def draw(axes: Any) -> None:
        names = ["clamped", *controls]
        if found["low"] is not None:
            axes.plot([found["low"], found["high"]], [0, 0], color=COLORS[0], linewidth=2)
        axes.plot([found["estimate"]], [0], "o", color=COLORS[0], markersize=6)
        for place, values in enumerate(controls.values(), start=1):
            axes.plot(values, [place] * len(values), "o", color=COLORS[1], markersize=4, alpha=0.6)
        axes.axvline(0, color=GRID, linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="interaction, nats per unit of amount", ylim=(len(names) - 0.5, -0.5))
        axes.locator_params(axis="x", nbins=5)
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))

    return figure(title, draw, (4.2, 1.9))
