"""Every launch of a training step beside its roof: which kernels are as fast as the device lets them be."""

import torch

from benchmarks.cases import SHAPES
from benchmarks.gpu.ahead import compiled
from benchmarks.gpu.measures import launches, roofs
from benchmarks.gpu.stage import Stage, excused
from benchmarks.place import Place, place
from csrc_triton.cases import Part, parts

SHOWN = ("modern", "million", "paper", "precise")


def run(stage: Stage) -> None:
    where = place(stage.smoke)
    chosen = launches.rehearsed() if stage.smoke else parts(*SHOWN)
    measured = stage.attempt("roofs", lambda: _roofs(where, stage.smoke))
    if measured is None:
        return
    best = launches.Roofs(measured["bytes_per_second"], {2: measured["flops"], 4: measured["flops, fp32"]})
    if not stage.smoke:
        compiled([launch for part in chosen for launch in part.launches()])
    for part in chosen:
        stage.attempt(part.title, lambda p=part: {"launches": _timed(p, where, best)}, limit=120)


def _roofs(where: Place, smoke: bool) -> dict[str, float]:
    shape = SHAPES["smoke" if smoke else "modern"]
    return {
        "bytes_per_second": roofs.copy(where)["bytes_per_second"],
        "flops": roofs.gemm(shape, torch.bfloat16, where)["flops"],
        "flops, fp32": roofs.gemm(shape, torch.float32, where)["flops"],
    }


def _timed(part: Part, where: Place, best: launches.Roofs) -> list[dict]:
    with excused(torch.cuda.OutOfMemoryError):
        return launches.timed(part, where, best)
