"""Every public operation on any shape, dtype, stride and device: exact, or refused by name.

Inputs are small whole numbers, so that sums are exact in whatever order they are taken, and ties abound: results and
gradients are those of the specification in fp64 to the bit, in bf16 to its rounding.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from fastsae import ops
from fastsae.backends.cpu import blocks, screen

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WAYS = ("contiguous", "every second column", "every second row", "transposed", "offset", "one row for all")


def laid(t: Tensor, way: str) -> Tensor:
    """A tensor like t in another order in memory; "one row for all" gives other numbers."""
    if way == "every second column":
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), 7).to(t)
        wide[..., ::2] = t
        return wide[..., ::2]
    if way == "every second row":
        tall = torch.full((2 * len(t), *t.shape[1:]), 7).to(t)
        tall[::2] = t
        return tall[::2]
    if way == "transposed" and t.dim() == 2:
        return t.T.contiguous().T
    if way == "offset":
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
    if way == "one row for all" and len(t):
        return t[:1].expand_as(t)
    return t


class Draw:
    """One case: tensors of whole numbers in any layout, and what was drawn."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
        self.device = data.draw(st.sampled_from(DEVICES), label="device")
        self.dtype = data.draw(st.sampled_from(FLOATS), label="dtype")
        self.backend = data.draw(st.sampled_from(("auto", "reference", "fast")), label="backend")
        if self.backend == "fast":
            assume(self.dtype != torch.float16 or self.device == "cuda")
            self.backend = "cpu" if self.device == "cpu" else "cuda"

    def size(self, name: str, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high), label=name)

    def maybe(self, name: str) -> bool:
        return self.data.draw(st.booleans(), label=name)

    def numbers(self, name: str, *shape: int, low: int = -1, high: int = 1) -> Tensor:
        t = torch.randint(low, high + 1, shape).to(self.device, self.dtype)
        return laid(t, self.data.draw(st.sampled_from(WAYS), label=name))

    def indices(self, B: int, k: int, M: int) -> Tensor:
        return laid(
            torch.randint(M, (B, k), device=self.device), self.data.draw(st.sampled_from(WAYS), label="indices")
        )

    @contextlib.contextmanager
    def any_path(self) -> Iterator[None]:
        """With bounds in bf16 first or without, and pre-activations in one chunk or in many."""
        screened, memory = self.maybe("screened"), self.data.draw(st.sampled_from((1, 50_000, 2**28)), label="memory")
        screening = mock.patch.object(screen, "_saves_time", return_value=screened)
        with screening, mock.patch.object(blocks, "PRE_ACTIVATION_BYTES", memory):
            yield


def assert_exact(
    draw: Draw, floats: dict[str, Tensor | None], call: Callable[..., tuple[Tensor, ...]], exact_to: float = 0.0
) -> None:
    """call(backend, **floats) and the gradients of all floats are those of the specification in fp64."""

    def run(backend: str, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor | None]]:
        # Leaves keep their strides: a clone would be contiguous.
        leaves = {n: None if t is None else t.detach() if dtype == t.dtype else t.to(dtype) for n, t in floats.items()}
        for t in leaves.values():
            if t is not None:
                t.requires_grad_()
        out = list(call(backend, **leaves))
        differentiable = [t for t in out if t.requires_grad]
        if differentiable:
            torch.autograd.backward(differentiable, [g.to(dtype) for g in gradients[: len(differentiable)]])
        return [t.detach() for t in out], {n: None if t is None else t.grad for n, t in leaves.items()}

    gradients: list[Tensor] = []
    with torch.no_grad():
        shapes = [t.shape for t in call("reference", **floats) if t.is_floating_point()]
    gradients = [draw.numbers("gradient", *shape) if shape else torch.ones(()).to(draw.device) for shape in shapes]
    with draw.any_path():
        ours, our_grads = run(draw.backend, draw.dtype)
    exact, exact_grads = run("reference", torch.float64)
    rounding = {torch.bfloat16: 4 * 2**-8, torch.float16: 4 * 2**-11}.get(draw.dtype, exact_to)
    for number, (got, want) in enumerate(zip(ours, exact, strict=True)):
        assert got.dtype in (draw.dtype, torch.int64, torch.promote_types(draw.dtype, torch.float32))
        close(f"result {number}", got, want, rounding, exact_to)
    for name, want in exact_grads.items():
        got = our_grads[name]
        assert (got is None) == (want is None), f"d_{name}"
        if got is not None and want is not None:
            close(f"d_{name}", got, want, rounding, exact_to)


def close(name: str, got: Tensor, want: Tensor, rounding: float, least: float) -> None:
    largest = want[want.isfinite()].abs().max().item() if want.isfinite().any() else 0.0
    torch.testing.assert_close(
        got.double(),
        want.double(),
        rtol=0,
        atol=max(rounding * largest, least),
        equal_nan=True,
        msg=lambda m: f"{name}: {m}",
    )


@given(st.data())
def test_topk_encode(data: st.DataObject):
    draw = Draw(data)
    B, D = draw.size("B", 0, 6), draw.size("d_in", 1, 33)
    M = draw.size("d_sae", 1, data.draw(st.sampled_from((3, 40, 300, 3000)), label="at most"))
    k = draw.size("k", 1, min(M, 40))
    floats: dict[str, Tensor | None] = {
        "x": draw.numbers("x", B, D, low=-2, high=2),
        "W_enc": draw.numbers("W_enc", M, D),
        "b_enc": draw.numbers("b_enc", M, low=-3, high=2),
        "b_dec": draw.numbers("b_dec", D) if draw.maybe("with b_dec") else None,
    }
    features = torch.randperm(M)[: draw.size("features", k, M)].sort().values if draw.maybe("only some") else None
    scale = 2.0 ** torch.randint(-1, 2, (M,)) * (torch.rand(M) > 0.1) if draw.maybe("scaled") else None
    if features is not None:
        features = features.to(draw.device)

    def call(backend: str, **p: Any) -> tuple[Tensor, ...]:
        by = None if scale is None else scale.to(draw.device, p["x"].dtype)
        return ops.topk_encode(p["x"], p["W_enc"], p["b_enc"], k, backend, features, p["b_dec"], by)

    assert_exact(draw, floats, call)
    # The same features, where equal numbers go to the lower index and NaN comes first.
    x = floats["x"]
    assert x is not None
    # Infinity times a scale of 0 is NaN on some paths and left out on others.
    if B and scale is None and draw.maybe("not finite"):
        x = x.clone()
        x[draw.size("row", 0, B - 1), draw.size("column", 0, D - 1)] = data.draw(
            st.sampled_from((torch.nan, torch.inf, -torch.inf)), label="what"
        )
    with draw.any_path():
        values, indices = call(draw.backend, **floats | {"x": x})
    exact = call("reference", **{n: None if t is None else t.double() for n, t in floats.items()} | {"x": x.double()})
    torch.testing.assert_close(indices, exact[1], rtol=0, atol=0)
    torch.testing.assert_close(values.double(), exact[0], rtol=0, atol=0, equal_nan=True)


def code(draw: Draw) -> tuple[dict[str, Tensor | None], Tensor, tuple[int, int, int, int, int]]:
    B, k, M = draw.size("B", 0, 7), draw.size("k", 1, 9), draw.size("d_sae", 1, 40)
    D, E = draw.size("d_in", 1, 20), draw.size("d_embedding", 1, 6)
    return {"values": draw.numbers("values", B, k, low=0, high=2)}, draw.indices(B, k, M), (B, k, M, D, E)


@given(st.data())
def test_sparse_decode(data: st.DataObject):
    draw = Draw(data)
    floats, indices, (_, _, M, D, _) = code(draw)
    floats["W_dec"] = draw.numbers("W_dec", M, D)
    assert_exact(draw, floats, lambda backend, values, W_dec: (ops.sparse_decode(values, indices, W_dec, backend),))


@given(st.data())
def test_pairwise_interaction(data: st.DataObject):
    draw = Draw(data)
    floats, indices, (_, _, M, _, E) = code(draw)
    floats["V"] = draw.numbers("V", M, E)
    assert_exact(draw, floats, lambda backend, values, V: (ops.pairwise_interaction(values, indices, V, backend),))


@given(st.data())
def test_joint_decode(data: st.DataObject):
    draw = Draw(data)
    floats, indices, (_, k, M, D, E) = code(draw)
    n = draw.size("n", 1, k)
    floats |= {
        "W_dec": draw.numbers("W_dec", M, D),
        "W_lin": draw.numbers("W_lin", M, D) if draw.maybe("linear") else None,
        "V": draw.numbers("V", M, E) if draw.maybe("interaction") else None,
    }

    def call(backend: str, values: Tensor, W_dec: Tensor, W_lin: Tensor | None, V: Tensor | None) -> Any:
        return ops.joint_decode(values, indices, W_dec, W_lin, V, n, backend)

    assert_exact(draw, floats, call)


@given(st.data())
def test_reconstruct(data: st.DataObject):
    draw = Draw(data)
    assume(draw.dtype in (torch.float32, torch.float64))  # the mean divides, which narrow floats round at every step
    floats, indices, (B, k, M, D, E) = code(draw)
    assume(B)
    n, interaction = draw.size("n", 1, k), draw.maybe("interaction")
    floats |= {
        "W_dec": draw.numbers("W_dec", M, D),
        "W_lin": draw.numbers("W_lin", M, D) if draw.maybe("linear") else None,
        "V": draw.numbers("V", M, E) if interaction else None,
        "W1": draw.numbers("W1", E, E) if interaction else None,
        "b1": draw.numbers("b1", E) if interaction else None,
        "W2": draw.numbers("W2", D, E) if interaction else None,
        "bias": draw.numbers("bias", D) if draw.maybe("with bias") else None,
        "target": draw.numbers("target", B, D) if draw.maybe("with target") else None,
    }

    def call(
        backend: str, values: Tensor, W_dec: Tensor, W_lin: Any, V: Any, bias: Any, target: Any, **mlp: Any
    ) -> Any:
        network = tuple(mlp.values()) if interaction else None
        return ops.reconstruct(
            values, indices, W_dec, W_lin, V, n, bias=bias, mlp=network, target=target, backend=backend
        )

    assert_exact(draw, floats, call, exact_to=1e-5)  # the mean divides; terms of size 1 cancel to less


@given(st.data())
def test_interaction_mlp(data: st.DataObject):
    draw = Draw(data)
    B, D, E = draw.size("B", 0, 7), draw.size("d_in", 1, 20), draw.size("d_embedding", 1, 6)
    floats: dict[str, Tensor | None] = {
        "z": draw.numbers("z", B, E),
        "W1": draw.numbers("W1", E, E),
        "b1": draw.numbers("b1", E),
        "W2": draw.numbers("W2", D, E),
        "b2": draw.numbers("b2", D) if draw.maybe("with b2") else None,
    }

    def call(_: str, z: Tensor, W1: Tensor, b1: Tensor, W2: Tensor, b2: Tensor | None) -> tuple[Tensor]:
        return (ops.interaction_mlp(z, W1, b1, W2, b2, 0.4, training=False),)

    assert_exact(draw, floats, call)


SPOILED: dict[str, Callable[[Tensor], Tensor]] = {
    "narrower": lambda t: t[..., :-1],
    "a row more": lambda t: torch.cat([t, t[-1:]]),
    "a dimension more": lambda t: t.unsqueeze(0),
    "a dimension less": lambda t: t[0],
    "no dimension": lambda t: t.new_zeros(()),
    "whole numbers": lambda t: t.int(),
    "yes and no": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "another float": lambda t: t.double() if t.dtype != torch.float64 else t.float(),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "no tensor": lambda t: t.tolist(),  # type: ignore[arg-type,return-value]
}


B, D, M, k, E = 4, 8, 20, 3, 5
GIVEN = {
    "x": (B, D),
    "W_enc": (M, D),
    "b_enc": (M,),
    "b_dec": (D,),
    "scale": (M,),
    "values": (B, k),
    "W_dec": (M, D),
    "W_lin": (M, D),
    "V": (M, E),
    "z": (B, E),
    "W1": (E, E),
    "b1": (E,),
    "W2": (D, E),
    "b2": (D,),
    "bias": (D,),
    "target": (B, D),
}
CALLS: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "topk_encode": (
        ("x", "W_enc", "b_enc", "features", "b_dec", "scale"),
        lambda x, W_enc, b_enc, *optional, backend: ops.topk_encode(x, W_enc, b_enc, k, backend, *optional),
    ),
    "sparse_decode": (("values", "indices", "W_dec"), lambda *a, backend: ops.sparse_decode(*a, backend)),
    "pairwise_interaction": (("values", "indices", "V"), lambda *a, backend: ops.pairwise_interaction(*a, backend)),
    "joint_decode": (
        ("values", "indices", "W_dec", "W_lin", "V"),
        lambda *a, backend: ops.joint_decode(*a, 2, backend),
    ),
    "reconstruct": (
        ("values", "indices", "W_dec", "W_lin", "V", "W1", "b1", "W2", "bias", "target"),
        lambda *a, backend: ops.reconstruct(*a[:5], 2, mlp=a[5:8], bias=a[8], target=a[9], backend=backend),
    ),
    "interaction_mlp": (("z", "W1", "b1", "W2", "b2"), lambda *a, backend: ops.interaction_mlp(*a)),
}
# More rows are rows as well, and so are fewer features that compete; a dictionary of narrower rows is one too.
FITS = {
    ("topk_encode", "x", "a row more"),
    ("topk_encode", "features", "narrower"),
    ("sparse_decode", "W_dec", "narrower"),
    ("sparse_decode", "W_dec", "a row more"),
    ("pairwise_interaction", "V", "narrower"),
    ("pairwise_interaction", "V", "a row more"),
    ("joint_decode", "V", "narrower"),
    ("reconstruct", "target", "another float"),  # as x is under autocast
    ("interaction_mlp", "z", "a row more"),
}


def test_no_operation_is_left_out():
    assert set(CALLS) == set(ops.__all__)


@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_what_does_not_fit_is_refused_by_name(op: str, how: str, backend: str):
    """One argument of a call that was right is spoiled; nothing is computed of it, and nothing breaks inside."""
    names, call = CALLS[op]
    given = {name: torch.rand(shape) for name, shape in GIVEN.items()}
    given |= {"indices": torch.randint(M, (B, k)), "features": torch.arange(M)}
    call(*(given[name] for name in names), backend=backend)
    for spoiled in names:
        if (op, spoiled, how) in FITS:
            continue
        arguments = [SPOILED[how](given[name]) if name == spoiled else given[name] for name in names]
        with pytest.raises((ValueError, TypeError), match=f"{op}: "):
            call(*arguments, backend=backend)
