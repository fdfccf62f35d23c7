"""The operations one by one, forward and backward, beside what PyTorch offers for them.

All differentiate by plain autograd; a backward goes from gradients of the outputs to those of all inputs but x.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import correct
from benchmarks.cases import SHAPES, Shape
from benchmarks.conftest import suite_of
from benchmarks.latest import Latest
from benchmarks.measured import why_too_large
from benchmarks.outcomes import WrongAnswer
from benchmarks.place import CPU
from benchmarks.providers.base import weights
from benchmarks.timing import timed, wall
from fastsae import ops
from fastsae.backends import reference

Inputs = dict[str, Tensor]
Way = Callable[[Inputs, Tensor, Shape], tuple[Tensor, ...]]


def _bag(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    return F.embedding_bag(indices, W, per_sample_weights=values, mode="sum")


def _dense(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    return torch.zeros(len(values), len(W)).scatter(1, indices, values) @ W


def _pairs(product: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def z(values: Tensor, indices: Tensor, V: Tensor) -> Tensor:
        return (product(values, indices, V).square() - product(values.square(), indices, V.square())) / 2

    return z


def _joint(product: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Way:
    def way(p: Inputs, i: Tensor, s: Shape) -> tuple[Tensor, Tensor]:
        values, strongest = p["values"], p["values"][:, : s.N].contiguous()
        theirs = i[:, : s.N].contiguous()
        out = product(values, i, p["W_dec"]) + product(strongest, theirs, p["W_lin"])
        return out, _pairs(product)(strongest, theirs, p["V"])

    return way


# Operation to the inputs it differentiates and the ways to do it; the reference backend in fp64 says what is right.
LEAVES = {
    "topk_encode": ("W_enc", "b_enc"),
    "sparse_decode": ("values", "W_dec"),
    "pairwise_interaction": ("values", "V"),
    "joint_decode": ("values", "W_dec", "W_lin", "V"),
}
WAYS: dict[str, dict[str, Way]] = {
    "topk_encode": {
        "fastsae": lambda p, i, s: ops.topk_encode(p["x"], p["W_enc"], p["b_enc"], s.K, backend="cpu")[:1],
        "linear + relu + torch.topk": lambda p, i, s: (
            torch.relu(F.linear(p["x"], p["W_enc"], p["b_enc"])).topk(s.K, dim=1).values,
        ),
    },
    "sparse_decode": {
        "fastsae": lambda p, i, s: (ops.sparse_decode(p["values"], i, p["W_dec"], backend="cpu"),),
        "embedding_bag": lambda p, i, s: (_bag(p["values"], i, p["W_dec"]),),
        "scatter + matrix product": lambda p, i, s: (_dense(p["values"], i, p["W_dec"]),),
    },
    "pairwise_interaction": {
        "fastsae": lambda p, i, s: (ops.pairwise_interaction(p["values"], i, p["V"], backend="cpu"),),
        "embedding_bag": lambda p, i, s: (_pairs(_bag)(p["values"], i, p["V"]),),
        "scatter + matrix product": lambda p, i, s: (_pairs(_dense)(p["values"], i, p["V"]),),
    },
    "joint_decode": {
        "fastsae": lambda p, i, s: ops.joint_decode(p["values"], i, p["W_dec"], p["W_lin"], p["V"], s.N, backend="cpu"),
        "embedding_bag": _joint(_bag),
        "scatter + matrix product": _joint(_dense),
    },
}
TRUTH: dict[str, Way] = {
    "topk_encode": lambda p, i, s: reference.topk_encode(p["x"], p["W_enc"], p["b_enc"], s.K)[:1],
    "sparse_decode": lambda p, i, s: (reference.sparse_decode(p["values"], i, p["W_dec"]),),
    "pairwise_interaction": lambda p, i, s: (reference.pairwise_interaction(p["values"], i, p["V"]),),
    "joint_decode": lambda p, i, s: reference.joint_decode(p["values"], i, p["W_dec"], p["W_lin"], p["V"], s.N),
}
CHECKED_ROWS = 128


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    suite = suite_of(metafunc.config)
    chosen = [
        (SHAPES[n], op, way, direction)
        for n in suite.phases
        for op, ways in WAYS.items()
        for direction in ("forward", "backward")
        for way in ways
    ]
    metafunc.parametrize(
        ("shape", "op", "way", "direction"), chosen, ids=[f"{s.name}-{op}-{d}-{way}" for s, op, way, d in chosen]
    )


def test_op(shape: Shape, op: str, way: str, direction: str, benchmark, rows, suite):
    benchmark.group = f"{shape.name}, {op}: {direction}"
    if too_large := why_too_large(shape, joint=True):
        pytest.skip(f"{shape.name}: {too_large}")
    inputs, indices = _inputs(shape)
    error = _compare(WAYS[op][way], op, shape)
    leaves = [inputs[name] for name in LEAVES[op]]
    if direction == "forward":
        with torch.no_grad():
            found = _time(benchmark, lambda: WAYS[op][way](inputs, indices, shape), suite.seconds)
    else:
        outputs = WAYS[op][way](inputs, indices, shape)
        grads = _gradients_of(outputs)
        found = _time(benchmark, lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True), suite.seconds)
    about = {"op": op, "direction": direction, "shape": shape.name, "provider": way, "error": float(f"{error:.1e}")}
    rows.append({"benchmark": "op", **about, **found})


def _time(benchmark, function: Callable[[], object], seconds: float) -> dict:
    function()
    return timed(benchmark, function, seconds / 2, wall(function))


@Latest
def _inputs(shape: Shape) -> tuple[Inputs, Tensor]:
    right = correct.truth(shape, CPU, True)
    made = {"x": right.x} | weights(shape, CPU, joint=True)
    values, indices = ops.topk_encode(made["x"], made["W_enc"], made["b_enc"], shape.K, backend="cpu")
    made["values"] = values
    return {name: t.requires_grad_(name != "x") for name, t in made.items()}, indices


def _compare(way: Way, op: str, shape: Shape) -> float:
    """The largest relative error of outputs and gradients on some rows of the batch, the dictionary whole."""
    pairs = zip(_of_batch(way, op, shape), _exact(op, shape), strict=True)
    error = max(correct.relative(got, want) for got, want in pairs)
    if not error <= correct.TOLERANCE:
        raise WrongAnswer(f"{op}: off by {error:.1e} of the norm, allowed {correct.TOLERANCE:.1e}; not timed")
    return error


def _of_batch(way: Way, op: str, shape: Shape) -> list[Tensor]:
    """Run the whole batch, as it is timed: give the outputs of the checked rows, and the gradients with all other rows'
    upstream gradients at zero."""
    inputs, indices = _inputs(shape)
    given = {name: t.detach().requires_grad_(name != "x") for name, t in inputs.items()}
    outputs = way(given, indices, shape)
    found = [out[:CHECKED_ROWS].detach() for out in outputs]
    upstream = [torch.zeros_like(out) for out in outputs]
    for whole, some in zip(upstream, _gradients_of(found), strict=True):
        whole[:CHECKED_ROWS] = some
    grads = torch.autograd.grad(outputs, [given[name] for name in LEAVES[op]], upstream)
    return found + [g[:CHECKED_ROWS] if name == "values" else g for name, g in zip(LEAVES[op], grads, strict=True)]


@Latest
def _exact(op: str, shape: Shape) -> list[Tensor]:
    """Compute the outputs and gradients of the checked rows alone, by the reference backend in fp64."""
    inputs, indices = _inputs(shape)
    rows = slice(0, CHECKED_ROWS)
    given = {name: (t[rows] if name in ("x", "values") else t).detach().double() for name, t in inputs.items()}
    leaves = [given[name].requires_grad_() for name in LEAVES[op]]
    outputs = TRUTH[op](given, indices[rows], shape)
    grads = torch.autograd.grad(outputs, leaves, [g.double() for g in _gradients_of(outputs)])
    return [t.detach() for t in (*outputs, *grads)]


def _gradients_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(out.shape, generator=g) for out in outputs]
