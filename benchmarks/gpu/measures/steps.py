"""Whole training steps (forward, backward, Adam), each first compared with the specification at its very shape."""

import dataclasses
import functools
import gc
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import correct
from benchmarks.cases import Shape
from benchmarks.gpu.measures.kernels import ratio
from benchmarks.gpu.stage import excused
from benchmarks.gpu.timing import activation_bytes, measure
from benchmarks.outcomes import Missing
from benchmarks.place import Place
from benchmarks.providers import CANDIDATES
from benchmarks.providers.base import LR, Candidate, Provider, batch
from benchmarks.providers.eleuther import Sparsify
from benchmarks.providers.ours import InBackward, TrainerStep
from benchmarks.providers.roofs import BareGemm

NAMED = {candidate.name: candidate for candidate in CANDIDATES}
TOPK, JOINT = NAMED["fastsae TopKSAE, autograd"], NAMED["fastsae JointSAE, autograd"]
TOPK_IN_BACKWARD = NAMED["fastsae TopKSAE, AdamInBackward"]
JOINT_IN_BACKWARD = NAMED["fastsae JointSAE, AdamInBackward"]
# Their large gradients are never written, which the counted floor charges for.
WITHOUT_FLOOR = (TOPK_IN_BACKWARD, JOINT_IN_BACKWARD)
DENSE_JOINT = NAMED["PyTorch joint, dense"]
EAGER = {"topk": NAMED["PyTorch TopK, topk + embedding_bag"], "joint": DENSE_JOINT}

# The graph of plain PyTorch holds (B, d_sae) tensors; more numbers than this in each and a GPU is too small.
MOST = 2**30


def checked(
    candidate: Candidate, shape: Shape, place: Place, without: tuple[str, ...] = ()
) -> tuple[Provider, dict[str, float]]:
    """The candidate made, and its errors; what it was compared with is freed again.

    Raises WrongAnswer if its reconstruction or a gradient is wrong or absent.
    """
    torch.compiler.reset()  # what was compiled before holds memory
    try:
        eager = scale(shape, place, candidate.architecture, without)  # first: there is no memory for both at once
        provider = candidate.make(shape, place)
        errors = correct.check(provider, candidate, shape, place, eager, without)
    finally:
        correct.truth.forget()
    if provider.used_up:
        provider.update()  # ends the step that the backward began, which would be counted twice
    return provider, errors


@functools.cache
def scale(shape: Shape, place: Place, architecture: str, without: tuple[str, ...]) -> dict[str, float]:
    """The errors of plain PyTorch in bf16. They are of the norm, and so nearly the same on fewer rows."""
    fewer = dataclasses.replace(shape, B=min(shape.B, max(1, MOST // shape.M)))
    eager = EAGER[architecture]
    try:
        return correct.errors(eager.make(fewer, place), eager, fewer, place, without)
    finally:
        gc.collect()  # providers hold themselves, by a method of theirs


def batches(shape: Shape, place: Place) -> Callable[[], Tensor]:
    """A function that returns one of three batches in turn."""
    return itertools.cycle([batch(shape, place, number) for number in range(3)]).__next__


def step(candidate: Candidate, shape: Shape, place: Place, uneven: bool = False) -> dict[str, Any]:
    """The candidate's step beside the bare encoder product, in one round, and what it needs at its peak.

    uneven: some features are active on nearly every token and most on none, as in real dictionaries.
    """
    provider, errors = checked(candidate, shape, place)
    if uneven:
        with torch.no_grad():
            provider.sae.b_enc.normal_(generator=place.generator(3))  # type: ignore[attr-defined]  # one of ours
    draw, roof = batches(shape, place), BareGemm(shape, place)
    x = draw().to(roof.W.dtype)
    forward = {"forward": lambda: provider.loss(draw())} if candidate.ours else {}
    times = measure({"step": lambda: provider.step(draw()), **forward, "GEMM": lambda: roof.step(x)}, place)
    kept = isinstance(provider, TrainerStep)  # from step to step, and so there before
    gradients = 0 if provider.used_up or kept else provider.parameter_bytes()
    return about(candidate, provider, shape, errors) | {
        "ms": times,
        "activation_bytes": activation_bytes(provider, draw(), gradients, place),
        "step / GEMM": ratio(times, "step", "GEMM"),
    }


def about(candidate: Candidate, provider: Provider, shape: Shape, errors: dict[str, float]) -> dict[str, Any]:
    """Collect the facts of a row other than times."""
    rounded = {name: float(f"{error:.1e}") for name, error in errors.items()}
    version = {"version": provider.version} if provider.version else {}
    return {"shape": shape.name, "candidate": candidate.name, **version, "errors": rounded}


def sparsify(shape: Shape, place: Place) -> dict[str, Any]:
    """sparsify's module beside ours, in one round. Raises Missing for errors of theirs, and of theirs alone."""
    candidate = Candidate("sparsify's module", "topk", partial(Sparsify, unit_norm=False))
    ours, _ = checked(TOPK, shape, place)  # first, and so with all that both are compared with
    with excused(Exception):
        theirs, errors = checked(candidate, shape, place)
    draw = batches(shape, place)

    def sparsify_step(unit_norm: bool) -> None:
        with excused(Exception):
            theirs.unit_norm = unit_norm  # type: ignore[attr-defined]
            theirs.step(draw())

    times = measure(
        {
            "step": lambda: ours.step(draw()),
            "sparsify": lambda: sparsify_step(unit_norm=False),
            "sparsify, as its Trainer": lambda: sparsify_step(unit_norm=True),  # keeps decoder rows at norm 1
        },
        place,
    )
    found = {"ms": times, "sparsify / step": ratio(times, "sparsify", "step")}
    return about(candidate, theirs, shape, errors) | found


def graph(candidate: Candidate, shape: Shape, place: Place) -> dict[str, Any]:
    """The candidate's step beside itself replayed from a CUDA graph, which needs an Adam that counts on the device.

    In the graph the feature order is made twice: what is kept between two calls is gone when it is replayed.
    """
    if not place.on_gpu:
        raise Missing("a CUDA graph needs an NVIDIA GPU")
    provider, errors = checked(candidate, shape, place)
    provider.optimizer = torch.optim.Adam(provider.parameters().values(), lr=LR, fused=True, capturable=True)
    draw, x = batches(shape, place), batch(shape, place, 3)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # as torch wants it: what is made once is made before, on another stream
        for _ in range(3):
            provider.step(x)
    torch.cuda.current_stream().wait_stream(aside)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        loss = provider.step(x)

    def replay() -> None:
        x.copy_(draw())
        recorded.replay()

    losses = []
    for _ in range(6):
        recorded.replay()
        losses.append(loss.item())
    if not losses[-1] < losses[0]:
        raise AssertionError(f"the loss of replayed steps on one batch does not fall: {losses}")
    # Eager steps after all replays: they make gradients of their own, which the graph does not write to.
    times = measure({"graph": replay}, place) | measure({"step": lambda: provider.step(draw())}, place)
    found = {"losses": losses, "ms": times, "graph / step": ratio(times, "graph", "step")}
    return about(candidate, provider, shape, errors) | found


def million(shape: Shape, place: Place) -> dict[str, Any]:
    """Steps on one batch; the loss must fall. With Adam inside the backward, so that no gradients take memory."""
    ours, errors = checked(TOPK_IN_BACKWARD, shape, place, without=InBackward.used_up)
    x = batch(shape, place, 0)
    if place.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    losses = [ours.step(x).item() for _ in range(6)]
    if not losses[-1] < losses[0]:
        raise AssertionError(f"the loss does not fall: {losses}")
    times = measure({"step": lambda: ours.step(x)}, place, seconds=1.0)
    peak = torch.cuda.max_memory_allocated() if place.on_gpu else None
    return about(TOPK_IN_BACKWARD, ours, shape, errors) | {"losses": losses, "ms": times, "peak_bytes": peak}
