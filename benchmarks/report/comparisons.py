"""Comparisons of a measured row: with the bare GEMM, the counted floor, our Trainer, the standard of its recipe."""

import math
import statistics
from collections.abc import Iterable

from benchmarks.cases import Shape, floor_seconds, work
from benchmarks.report.rows import Results, Row, our_trainer, select

# The specification, which who trains in the plain way is compared with.
REFERENCES = {"topk": "fastsae TopKSAE, reference backend", "joint": "fastsae JointSAE, reference backend"}


def over_gemm(row: Row) -> float:
    """A row's time over that of the bare GEMM before each of its rounds: the machine drifts."""
    return row["median"] / statistics.median(row["gemm_seconds"])


def over_trainer(results: Results, row: Row) -> float | None:
    """A row's time over that of our Trainer at the same shape, phase, architecture and recipe, both in bare GEMMs."""
    named = {"phase": row["phase"], "shape": row["shape"], "provider": our_trainer(row)}
    ours = select(results, "step", **named)
    return over_gemm(row) / over_gemm(ours[0]) if ours else None


def floors(rows: Iterable[Row], shape: Shape, joint: bool) -> dict[str, float]:
    """Seconds that each phase, and the step, take at least, by the rates among `rows`."""
    flops = next(r["flops_per_second"] for r in rows if r["benchmark"] == "gemm" and r["shape"] == shape.name)
    bytes_ = next(r["bytes_per_second"] for r in rows if r["benchmark"] == "copy")
    found = {phase: w.seconds(flops, bytes_) for phase, w in work(shape, joint).items()}
    return found | {"step": floor_seconds(shape, joint, flops, bytes_)}


def standard(rows: Iterable[Row], row: Row) -> Row | None:
    """Find the row to learn like: the reference backend's, or our Trainer's with the row's recipe; None if missing."""
    name = REFERENCES[row["architecture"]] if row["recipe"] == "plain" else our_trainer(row)
    return next((r for r in rows if r["provider"] == name and r["order"] == 0), None)


def noise(rows: Iterable[Row], architecture: str) -> float | None:
    """Compute the spread of the final FVU of one provider on the same batches in several orders: highest / lowest - 1.

    It is the largest of all providers, and None if no provider has several orders.
    """
    finals: dict[str, list[float]] = {}
    for row in rows:
        if row["architecture"] == architecture and math.isfinite(row["final"]):
            finals.setdefault(row["provider"], []).append(row["final"])
    return max((max(f) / min(f) - 1 for f in finals.values() if len(f) > 1), default=None)
