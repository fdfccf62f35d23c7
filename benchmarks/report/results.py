"""Results files: reading those that are committed, and refusing those of which nothing can be made."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import SHAPES
from benchmarks.report.rows import Results, select, unique

RESULTS = "benchmarks/results"

TIMES = ("median", "min", "max", "seconds")
# What a row of a CPU's results says of what was measured, and what of the measurement.
ABOUT = {
    "gemm": ("shape",),
    "copy": (),
    "step": ("phase", "shape", "provider", "architecture", "recipe"),
    "op": ("op", "direction", "shape", "provider"),
    "scaling": ("axis", "size", "shape", "provider", "architecture"),
    "quality": ("provider", "architecture", "recipe", "shape", "order"),
    "trainer": ("trainer", "who", "shape"),
    "harvest": ("tokens", "d_in"),
}
MEASURED = {
    "gemm": ("flops_per_second", *TIMES),
    "copy": ("bytes_per_second", *TIMES),
    "step": ("version", "errors", "compared_rows", "gemm_seconds", *TIMES),
    "op": ("error", *TIMES),
    "scaling": TIMES,
    "quality": ("fvu", "final"),
    "trainer": ("version", "rows_per_second", "sae_median", "gemm_seconds", *TIMES),
    "harvest": TIMES,
}


class Unusable(ValueError):
    """Nothing can be made of what is committed; the message says which file, and what to do."""


def read_results(folder: Path) -> dict[str, Results]:
    """By the stems of the files. Raises Unusable if there are none, or one of an older form."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise Unusable(f"no results in {folder}: run `make bench`, or `make gpu` on a machine with an NVIDIA GPU")
    return {file.stem: _read(file) for file in files}


def is_of_gpu(results: Results) -> bool:
    """Whether `make gpu` wrote them, and not `make bench`."""
    return "stages" in results


def of_cpus(found: dict[str, Results]) -> dict[str, Results]:
    return {name: results for name, results in found.items() if not is_of_gpu(results)}


def _read(file: Path) -> Results:
    try:
        found = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise Unusable(f"{file} is no JSON ({error}): take it from git again, or delete it") from error
    if lacking := _lacking(found):
        command = "make gpu" if is_of_gpu(found) else "make bench"
        raise Unusable(f"{file} is of an older form ({lacking}): run `{command}` on that machine, or delete it")
    return found


def _lacking(results: Results) -> str | None:
    """The first thing that the report needs and does not find."""
    if is_of_gpu(results):
        return _absent("results", results, ("hardware", "versions", "rows")) or next(
            filter(None, (_absent("a row", r, ("stage", "case", "status")) for r in results["rows"])), None
        )
    if lacking := _absent("results", results, ("hardware", "versions", "suite", "seconds", "rows")):
        return lacking
    lacking = _absent("hardware", results["hardware"], ("cpu", "threads", "instructions", "date"))
    lacking = lacking or _absent("versions", results["versions"], ("torch", "commit"))
    for row in results["rows"]:
        kind = row.get("benchmark")
        if kind not in ABOUT:
            return f"rows of benchmark {kind}, which there is no more"
        needed = ABOUT[kind] + (() if "missing" in row else MEASURED[kind])
        lacking = lacking or _absent(f"a row of benchmark {kind}", row, needed)
    return lacking or _lacking_roof(results)


def _lacking_roof(results: Results) -> str | None:
    if not select(results, "step", phase="step"):
        return "no training step"
    for name in unique(r["shape"] for r in select(results, "step")):
        if name not in SHAPES:
            return f"shape {name}, which is not in benchmarks/cases.py"
        if not select(results, "gemm", shape=name):
            return f"no bare GEMM at shape {name}"
    return None if select(results, "copy") else "no copy of memory"


def _absent(what: str, found: dict[str, Any], needed: Sequence[str]) -> str | None:
    absent = [key for key in needed if key not in found]
    return f"{what} without {', '.join(absent)}" if absent else None
