"""Every kernel in other block shapes, warps and stages: what the constants of its launcher are chosen from."""

import torch

from benchmarks.gpu.ahead import compiled, job
from benchmarks.gpu.measures import variants
from benchmarks.gpu.measures.launches import rehearsed
from benchmarks.gpu.stage import Stage, excused
from benchmarks.place import Place, place
from csrc_triton.cases import Part, parts
from csrc_triton.launch import Launch


def run(stage: Stage) -> None:
    where = place(stage.smoke)
    for part in rehearsed() if stage.smoke else _chosen():
        needs = 0 if stage.smoke else 40
        stage.attempt(part.title, lambda p=part: {"launches": _swept(p, where)}, limit=300, needs=needs)


def _chosen() -> list[Part]:
    """List the parts to tune: first those that take most of a step's time, and the product with its maxima, which only
    narrow inputs use."""
    found = {(part.name, part.case): part for part in parts("modern", "million", "paper")}
    of_modern = [found["modern", case] for case in ("gradients", "decode", "encode")]
    narrow = next(p for p in parts("narrow") if (p.dtype, p.case) == (torch.bfloat16, "encode"))
    others = [("million", "gradients"), ("paper", "decode"), ("paper", "gradients"), ("million", "encode")]
    return [*of_modern, narrow, *(found[other] for other in others), found["modern", "integrate"]]


def _swept(part: Part, where: Place) -> list[dict]:
    results = {}
    if where.on_gpu:
        started = [other for launch in part.launches() for other in variants.variants(launch)]
        results = compiled(started)
        print(f"{len(results)} kernels compiled for {part.title}", flush=True)  # noqa: T201  # the stage's log

    def fits(launch: Launch) -> bool:
        if not results:
            return True
        result = results.get(job(launch).key)
        return result is not None and not result.violations

    with excused(torch.cuda.OutOfMemoryError):
        return variants.swept(part, where, fits)
