"""Whole training steps (forward, backward, Adam), each first compared with the others at its very shape."""

import gc
from typing import Any

import torch

from benchmarks.cases import Shape
from benchmarks.gpu.candidates import DenseJoint, EagerTopK, Ours, Sparsify, batches, weights
from benchmarks.gpu.exact import joint_reconstruction, relative_error
from benchmarks.gpu.measures.kernels import ratio
from benchmarks.gpu.place import Place
from benchmarks.gpu.timing import activation_bytes, measure
from benchmarks.providers import Provider

CHECKED = 16
# Times eager PyTorch's own error in bf16, which takes a few other features than fp64 does.
SLACK = 2.0


def compare(candidates: list[Provider], shape: Shape, place: Place) -> dict[str, float]:
    """Relative errors of the reconstructions of some rows, the first candidate being eager PyTorch and the scale.

    Candidates reconstruct the whole batch. Raises AssertionError when one computes another function.
    """
    x = batches(shape, place, 1)()
    rows = torch.linspace(0, shape.B - 1, CHECKED, device=place.device).long()
    joint = isinstance(candidates[0], DenseJoint)
    exact = joint_reconstruction(weights(shape, place, joint), x[rows], shape.K, shape.N)
    errors = {c.name: relative_error(c.reconstruct(x)[rows], exact) for c in candidates}
    eager = errors[candidates[0].name]
    for name, error in errors.items():
        if not error <= SLACK * eager + 1e-3:
            raise AssertionError(
                f"{name} computes another function: error {error:.3f}, eager's is {eager:.3f}; not timed"
            )
    return errors


def topk(shape: Shape, place: Place, uneven: bool = False) -> dict[str, Any]:
    """TopKSAE's step beside the bare encoder product, in one round.

    uneven: some features are active on nearly every token and most on none, as in real dictionaries.
    """
    draw = batches(shape, place)
    eager = EagerTopK(shape, place)
    plain = Ours(shape, place, joint=False)
    errors = compare([eager, plain], shape, place)
    del eager
    gc.collect()
    if uneven:
        with torch.no_grad():
            plain.sae.b_enc.normal_(generator=place.generator(3))
    x = draw().bfloat16()
    W = plain.sae.W_enc.detach().bfloat16()
    y = torch.empty(shape.B, shape.M, dtype=torch.bfloat16, device=place.device)
    times = measure(
        {
            "step": lambda: plain.step(draw()),
            "forward": lambda: plain.forward(draw()),
            "GEMM": lambda: torch.mm(x, W.T, out=y),
        },
        place,
    )
    held = sum(p.numel() * p.element_size() for p in plain.sae.parameters())
    return {
        "shape": shape.name,
        "candidate": plain.name,
        "relative_errors": errors,
        "ms": times,
        "activation_bytes": activation_bytes(lambda: plain.step(draw()), held, place),
        "step / GEMM": ratio(times, "step", "GEMM"),
    }


def topk_in_backward(shape: Shape, place: Place) -> dict[str, Any]:
    """The same with Adam inside the backward: no gradient of a large weight is written."""
    draw = batches(shape, place)
    eager = EagerTopK(shape, place)
    ours = Ours(shape, place, joint=False, in_backward=True)
    errors = compare([eager, ours], shape, place)
    del eager
    gc.collect()
    x = draw().bfloat16()
    W = ours.sae.W_enc.detach().bfloat16()
    y = torch.empty(shape.B, shape.M, dtype=torch.bfloat16, device=place.device)
    times = measure({"step": lambda: ours.step(draw()), "GEMM": lambda: torch.mm(x, W.T, out=y)}, place)
    return {
        "shape": shape.name,
        "candidate": ours.name,
        "relative_errors": errors,
        "ms": times,
        "step / GEMM": ratio(times, "step", "GEMM"),
    }


def sparsify(shape: Shape, place: Place) -> dict[str, Any]:
    """sparsify's module beside ours, in one round."""
    draw = batches(shape, place)
    theirs = Sparsify(shape, place)  # first: where it is missing nothing else is made
    eager = EagerTopK(shape, place)
    ours = Ours(shape, place, joint=False)
    errors = compare([eager, ours, theirs], shape, place)
    del eager
    gc.collect()
    times = measure(
        {
            "step": lambda: ours.step(draw()),
            "sparsify": lambda: theirs.step(draw()),
            "sparsify, as its Trainer": lambda: theirs.trainer_step(draw()),
        },
        place,
    )
    return {
        "shape": shape.name,
        "candidate": theirs.name,
        "relative_errors": errors,
        "ms": times,
        "sparsify / step": ratio(times, "sparsify", "step"),
    }


def joint(shape: Shape, place: Place, in_backward: bool = False) -> dict[str, Any]:
    """JointSAE's step, and what it needs at its peak."""
    draw = batches(shape, place)
    ours = Ours(shape, place, joint=True, in_backward=in_backward)
    errors = compare([DenseJoint(shape, place), ours], shape, place)
    gc.collect()
    times = measure({"step": lambda: ours.step(draw())}, place)
    held = 0 if in_backward else sum(p.numel() * p.element_size() for p in ours.sae.parameters())
    return {
        "shape": shape.name,
        "candidate": ours.name,
        "relative_errors": errors,
        "ms": times,
        "activation_bytes": activation_bytes(lambda: ours.step(draw()), held, place),
    }


def dense(shape: Shape, place: Place, compiled: bool = False) -> dict[str, Any]:
    """The same architecture with dense codes. By itself: with ours beside it the memory of a GPU would not do."""
    draw = batches(shape, place)
    dense = DenseJoint(shape, place, compiled)
    errors = compare([DenseJoint(shape, place), dense], shape, place) if compiled else {}
    gc.collect()
    times = measure({"step": lambda: dense.step(draw())}, place)
    held = sum(p.numel() * p.element_size() for p in dense.w.values())
    return {
        "shape": shape.name,
        "candidate": dense.name,
        "relative_errors": errors,
        "ms": times,
        "activation_bytes": activation_bytes(lambda: dense.step(draw()), held, place),
    }


def million(shape: Shape, place: Place) -> dict[str, Any]:
    """Steps on one batch; the loss must fall. With Adam inside the backward, so that no gradients take memory."""
    x = batches(shape, place, 1)()
    ours = Ours(shape, place, joint=False, in_backward=True)
    if place.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    losses = [ours.step(x).item() for _ in range(6)]
    if not losses[-1] < losses[0]:
        raise AssertionError(f"the loss does not fall: {losses}")
    times = measure({"step": lambda: ours.step(x)}, place, seconds=1.0)
    peak = torch.cuda.max_memory_allocated() if place.on_gpu else None
    return {"shape": shape.name, "candidate": ours.name, "losses": losses, "ms": times, "peak_bytes": peak}
