"""Report of the GPUs' results: the bars beside each other, and each kernel beside its roof."""

from collections.abc import Iterable
from typing import Any

from benchmarks.gpu.bars import BARS, measured
from benchmarks.report.cells import figures
from benchmarks.report.results import is_of_gpu
from benchmarks.report.rows import Results, Row
from fastsae.report import markdown

NONE = "No GPU has been measured yet: `make gpu` is ready to run, and its results will stand here."


def of_gpus(found: dict[str, Results]) -> dict[str, Results]:
    return {name: results for name, results in found.items() if is_of_gpu(results)}


def readme_section(found: dict[str, Results]) -> str:
    """Each bar the CUDA backend is built to, beside what each GPU reached of it; and of what versions."""
    gpus = of_gpus(found)
    if not gpus:
        return NONE
    reached = [measured(results["rows"]) for results in gpus.values()]
    body = []
    for bar in BARS:
        cells = [
            _verdict(bar.reached(values[bar.key]), values[bar.key]) if bar.key in values else "" for values in reached
        ]
        body.append([bar.text, f"{'at most' if bar.at_most else 'at least'} {bar.limit:,.7g}", *cells])
    names = [results["hardware"].get("gpu", name) for name, results in gpus.items()]
    versions = [
        f"{name}: torch {v.get('torch')}, triton {v.get('triton')}, commit {v.get('commit')}, {v.get('date')}"
        for name, v in zip(names, (results["versions"] for results in gpus.values()), strict=True)
    ]
    return "\n".join(
        [markdown.table(["bf16", "bar", *names], body, words=2), "", f"{'; '.join(versions)}; `make gpu`."]
    )


def _verdict(reached: bool, value: float) -> str:
    return f"{value:,.7g}" if reached else f"{value:,.7g} (not reached)"


def kernels(rows: Iterable[Row]) -> list[str]:
    """Tables of the launches of a step, those that take longest first; nothing where they were not timed."""
    parts = []
    for row in rows:
        if row["stage"] == "launches" and row["status"] == "ok" and "launches" in row:
            parts += [f"`{row['case']}`:", _launches(n for n in row["launches"] if "ms" in n)]
    return ["### Kernels", ROOF, *parts] if parts else []


ROOF = """\
Each launch of `csrc_triton/cases.py`, replayed from a CUDA graph. *roof*: the counted bytes at the rate of a large
copy, or the operations at that of the encoder's product, both measured in the same run, whichever takes longer. A share
over 100 % is of rows that are gathered more than once, and come from the cache; of a few µs it says little, which a
start takes too."""


def _launches(launches: Iterable[dict[str, Any]]) -> str:
    body = [
        [
            n["kernel"],
            n["config"],
            f"{n['warps']}, {n['stages']}",
            f"{n['bytes'] / 1e6:,.0f}",
            figures(n["ms"]["median"]),
            figures(n["roof_ms"]),
            f"{n['share']:.0%}",
        ]
        for n in sorted(launches, key=lambda n: -n["ms"]["median"])
    ]
    header = ["kernel", "configuration", "warps, stages", "MB counted", "ms", "roof, ms", "of its roof"]
    return markdown.table(header, body, words=3)
