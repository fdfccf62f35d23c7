"""The bars of the CUDA backend and the rows its dispatch is fitted from, the most important first."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases import SHAPES, Shape, floor_seconds
from benchmarks.gpu.measures import kernels, roofs, steps, sweeps
from benchmarks.gpu.stage import Stage, excused
from benchmarks.place import place
from benchmarks.providers.base import Candidate

# Sizes of a rehearsal, in place of every one below.
SMOKE = Shape("smoke", B=4, D=16, M=64, K=4, N=2, E=8)
WIDTHS = (768, 1024, 4096)
SWEPT = (16, 64, 128, 192, 256, 384, 512, 1024)
LATE = (
    "PyTorch TopK, dense",
    "dictionary_learning",
    "SAELens",
    "SAELens, use_sparse_activations",
    "fastsae TopKSAE, Trainer",
    "fastsae JointSAE, Trainer",
    "PyTorch TopK, topk + embedding_bag",
)
# Last: each is compiled for half a minute, and may fail in code that is not ours.
COMPILED = (
    ("fastsae TopKSAE, torch.compile", "modern"),
    ("fastsae JointSAE, torch.compile", "modern"),
    ("PyTorch joint, dense, torch.compile", "paper"),
    ("PyTorch joint, dense, torch.compile", "modern"),
    ("PyTorch TopK, dense, torch.compile", "modern"),
)


def run(stage: Stage) -> None:
    where = place(stage.smoke)
    modern, paper, million, laptop = (
        SMOKE if stage.smoke else SHAPES[name] for name in ("modern", "paper", "million", "laptop")
    )

    def case(
        name: str,
        measured: Callable[[], dict[str, Any]],
        bars: Callable[[Any], dict[str, float]] | None = None,
        theirs: bool = False,
        limit: float = 120,
        needs: float = 5,
    ) -> dict[str, Any] | None:
        """A row of `measured`; `bars` picks from its facts what the bars are about."""

        def with_bars() -> dict[str, Any]:
            facts = measured()
            return facts | ({"bars": bars(facts)} if bars else {})

        return stage.attempt(name, with_bars, limit=limit, needs=0 if stage.smoke else needs, theirs=theirs)

    def step(
        name: str,
        candidate: Candidate,
        shape: Shape,
        bars: Callable[[Any], dict[str, float]] | None = None,
        uneven: bool = False,
        **how: Any,
    ) -> dict[str, Any] | None:
        """A row of a candidate's step; beside what its work takes at the rates of the roofs, if they were measured."""

        plain = candidate.name.startswith("PyTorch")  # our code too, which may need more memory than there is

        def measured() -> dict[str, Any]:
            with excused(*([torch.cuda.OutOfMemoryError] if plain else [])):
                facts = steps.step(candidate, shape, where, uneven)
            if copied is None or product is None or candidate in steps.WITHOUT_FLOOR:
                return facts
            floor = 1e3 * floor_seconds(shape, candidate.joint, product["flops"], copied["bytes_per_second"])
            return facts | {
                "floor_ms": round(floor, 5),
                "step / floor": round(facts["ms"]["step"]["median"] / floor, 3),
            }

        return case(name, measured, bars, theirs=not (candidate.ours or plain), **how)

    def beside(ours: dict[str, Any] | None, shape: str) -> Callable[[Any], dict[str, float]]:
        """The bars of a dense step, beside our row of the same shape."""

        def compare(dense: dict[str, Any]) -> dict[str, float]:
            if ours is None:
                return {}
            found = {f"dense / JointSAE, {shape}": _over(dense, ours)}
            if ours["activation_bytes"] and dense["activation_bytes"]:
                found[f"memory, {shape}"] = round(ours["activation_bytes"] / dense["activation_bytes"], 4)
            return found

        return compare

    copied = case("copy", lambda: roofs.copy(where))
    product = case("GEMM, modern, bfloat16", lambda: roofs.gemm(modern, torch.bfloat16, where))
    case(
        "encode, modern",
        lambda: kernels.encode(modern, where),
        lambda f: {k: f[k] for k in ("encode / GEMM", "topk / encode")},
    )
    step("TopKSAE step, modern", steps.TOPK, modern, lambda f: {"TopKSAE / GEMM": f["step / GEMM"]})
    for shape, name in ((modern, "modern"), (paper, "paper")):
        ours = step(f"JointSAE step, {name}", steps.JOINT, shape)
        step(f"dense joint step, {name}", steps.DENSE_JOINT, shape, beside(ours, name))
    step(
        "TopKSAE step in backward, modern",
        steps.TOPK_IN_BACKWARD,
        modern,
        lambda f: {"TopKSAE in backward / GEMM": f["step / GEMM"]},
    )
    case("million features", lambda: steps.million(million, where), lambda _: {"million": million.M})
    case(
        "sparsify step, modern",
        lambda: steps.sparsify(modern, where),
        lambda f: {"sparsify / TopKSAE": f["sparsify / step"]},
    )
    case("GEMM, modern, float32", lambda: roofs.gemm(modern, torch.float32, where))
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
    for candidate, kind in ((steps.TOPK, "TopKSAE"), (steps.JOINT, "JointSAE")):
        for shape, name in ((modern, "modern"), (laptop, "laptop")):
            case(f"{kind} step in a CUDA graph, {name}", lambda c=candidate, s=shape: steps.graph(c, s, where))
    step("TopKSAE step, modern, uneven features", steps.TOPK, modern, uneven=True)
    step("JointSAE step in backward, modern", steps.JOINT_IN_BACKWARD, modern)
    for name in LATE:
        step(f"{name} step, modern", steps.NAMED[name], modern, needs=15)
    if not stage.smoke:
        for name, shape in COMPILED:
            step(f"{name}, {shape}", steps.NAMED[name], SHAPES[shape], limit=180, needs=45)


def _over(dense: dict[str, Any], ours: dict[str, Any]) -> float:
    return round(dense["ms"]["step"]["median"] / ours["ms"]["step"]["median"], 3)
