"""The bars of the CUDA backend and the rows its dispatch is fitted from, the most important first."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases import SHAPES, Shape
from benchmarks.gpu.measures import kernels, roofs, steps, sweeps
from benchmarks.gpu.place import place
from benchmarks.gpu.stage import Stage

# Sizes of a rehearsal, in place of every one below.
SMOKE = Shape("smoke", B=4, D=16, M=64, K=4, N=2, E=8)
WIDTHS = (768, 1024, 4096)
SWEPT = (16, 64, 128, 192, 256, 384, 512, 1024)


def run(stage: Stage) -> None:
    where = place(stage.smoke)
    modern, paper, million = (SMOKE if stage.smoke else SHAPES[n] for n in ("modern", "paper", "million"))

    def case(
        name: str,
        measured: Callable[[], dict[str, Any]],
        bars: Callable[[Any], dict[str, float]] | None = None,
        theirs: bool = False,
    ) -> dict[str, Any] | None:
        """A row of `measured`; `bars` picks from its facts what the bars are about."""

        def with_bars() -> dict[str, Any]:
            facts = measured()
            return facts | ({"bars": bars(facts)} if bars else {})

        return stage.attempt(name, with_bars, limit=120, needs=0 if stage.smoke else 5, theirs=theirs)

    def beside(ours: dict[str, Any] | None, shape: Shape) -> Callable[[Any], dict[str, float]]:
        """The bars of a dense step, beside our row of the same shape."""

        def compare(dense: dict[str, Any]) -> dict[str, float]:
            if ours is None:
                return {}
            found = {f"dense / JointSAE, {shape.name}": _over(dense, ours)}
            if ours["activation_bytes"] and dense["activation_bytes"]:
                found[f"memory, {shape.name}"] = round(ours["activation_bytes"] / dense["activation_bytes"], 4)
            return found

        return compare

    case("copy", lambda: roofs.copy(1 if stage.smoke else 2048, where))
    case(
        "encode, modern",
        lambda: kernels.encode(modern, where),
        lambda f: {k: f[k] for k in ("encode / GEMM", "topk / encode")},
    )
    case("TopKSAE step, modern", lambda: steps.topk(modern, where), lambda f: {"TopKSAE / GEMM": f["step / GEMM"]})
    ours = case("JointSAE step, modern", lambda: steps.joint(modern, where))
    case("dense joint step, modern", lambda: steps.dense(modern, where), beside(ours, modern), theirs=True)
    ours_paper = case("JointSAE step, paper", lambda: steps.joint(paper, where))
    case("dense joint step, paper", lambda: steps.dense(paper, where), beside(ours_paper, paper), theirs=True)
    case(
        "TopKSAE step in backward, modern",
        lambda: steps.topk_in_backward(modern, where),
        lambda f: {"TopKSAE in backward / GEMM": f["step / GEMM"]},
    )
    case("million features", lambda: steps.million(million, where), lambda _: {"million": million.M})
    case(
        "sparsify step, modern",
        lambda: steps.sparsify(modern, where),
        lambda f: {"sparsify / TopKSAE": f["sparsify / step"]},
        theirs=True,
    )
    for dtype in (torch.bfloat16, torch.float32):
        case(f"GEMM, modern, {str(dtype)[6:]}", lambda d=dtype: roofs.gemm(modern, d, where))
    for shape, name in ((modern, "modern"), (paper, "paper")):
        for joint in (False, True):
            case(
                f"decode and backwards, {'joint' if joint else 'topk'}, {name}",
                lambda s=shape, j=joint: kernels.decode(s, j, where),
            )
    case("encode, paper", lambda: kernels.encode(paper, where))
    case("Adam, modern", lambda: kernels.adam(modern, where))
    for D in WIDTHS[: 1 if stage.smoke else None]:
        shape = SMOKE if stage.smoke else Shape(f"D={D}", B=8192, D=D, M=32768, K=32, N=16, E=128)
        case(f"encode's GEMM, D={D}", lambda s=shape: sweeps.encode_gemm(s, where))
    for D in (4096, 768):
        for K in SWEPT[: 1 if stage.smoke else None]:
            shape = SMOKE if stage.smoke else Shape(f"K={K}", B=4096, D=D, M=32768, K=K, N=K // 2, E=128)
            case(f"gather or dense, D={D} K={K}", lambda s=shape: sweeps.decode_ways(s, where))
    case("TopKSAE step, modern, uneven features", lambda: steps.topk(modern, where, uneven=True))
    case("JointSAE step in backward, modern", lambda: steps.joint(modern, where, in_backward=True))
    if not stage.smoke:
        for shape in (paper, modern):
            name = f"dense joint step compiled, {shape.name}"
            stage.attempt(name, lambda s=shape: steps.dense(s, where, compiled=True), limit=180, needs=45, theirs=True)


def _over(dense: dict[str, Any], ours: dict[str, Any]) -> float:
    return round(dense["ms"]["step"]["median"] / ours["ms"]["step"]["median"], 3)
