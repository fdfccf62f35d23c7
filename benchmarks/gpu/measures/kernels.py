"""The operations one by one, in bf16: encoding beside its baselines, decoding, both backwards, the optimizer."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from helpers import assert_matches
from torch import Tensor

from benchmarks.cases import Shape
from benchmarks.gpu.exact import check_encode
from benchmarks.gpu.timing import measure
from benchmarks.place import Place
from fastsae import ops
from fastsae.backends import reference

DTYPE = torch.bfloat16
CHECKED = 16


def inputs(shape: Shape, place: Place) -> dict[str, Tensor]:
    """x, W_enc, b_enc, W_dec, W_lin, V in bf16."""
    g = place.generator(0)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=g, dtype=DTYPE, device=place.device).mul_(std)

    return {
        "x": normal(shape.B, shape.D),
        "W_enc": normal(shape.M, shape.D, std=shape.D**-0.5),
        "b_enc": normal(shape.M, std=0.1),
        "W_dec": normal(shape.M, shape.D, std=shape.D**-0.5),
        "W_lin": normal(shape.M, shape.D, std=shape.D**-0.5),
        "V": normal(shape.M, shape.E, std=0.05),
    }


def encode(shape: Shape, place: Place) -> dict[str, Any]:
    """Encoding beside the bare product, and beside linear + relu + torch.topk."""
    p = inputs(shape, place)
    x, W, b = p["x"], p["W_enc"], p["b_enc"]
    y = torch.empty(shape.B, shape.M, dtype=DTYPE, device=place.device)
    with torch.no_grad():
        values, indices = ops.topk_encode(x, W, b, shape.K, backend=place.backend)
        rows = torch.linspace(0, shape.B - 1, CHECKED, device=place.device).long()
        error = check_encode(x[rows], W, b, values[rows], indices[rows])
        times = measure(
            {
                "encode": lambda: ops.topk_encode(x, W, b, shape.K, backend=place.backend),
                "GEMM": lambda: torch.mm(x, W.T, out=y),
                "linear + relu + topk": lambda: torch.relu(F.linear(x, W, b)).topk(shape.K, dim=1),
            },
            place,
        )
    return {
        "shape": shape.name,
        "value_error": error,
        "ms": times,
        "encode / GEMM": ratio(times, "encode", "GEMM"),
        "topk / encode": ratio(times, "linear + relu + topk", "encode"),
    }


def ratio(times: dict[str, dict[str, Any]], above: str, below: str) -> float:
    return round(times[above]["median"] / times[below]["median"], 3)


def decode(shape: Shape, joint: bool, place: Place) -> dict[str, Any]:
    """Decoding of a code of this shape, its backward, and the encoder's backward."""
    p = {name: t.requires_grad_() for name, t in inputs(shape, place).items()}
    values, indices = ops.topk_encode(p["x"], p["W_enc"], p["b_enc"], shape.K, backend=place.backend)
    code = values.detach().requires_grad_()
    W = (p["W_dec"], p["W_lin"], p["V"]) if joint else (p["W_dec"], None, None)

    def forward() -> tuple[Tensor, Tensor]:
        return ops.joint_decode(code, indices, *W, shape.N, backend=place.backend)

    out, z = forward()
    with torch.no_grad():
        rows = torch.linspace(0, shape.B - 1, CHECKED, device=place.device).long()
        used, local = torch.unique(indices[rows], return_inverse=True)

        def expected(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            weights = [None if w is None else w[used].to(dtype) for w in W]
            return reference.joint_decode(values[rows].to(dtype), local, *weights, shape.N)  # type: ignore[arg-type]

        for name, got, exact, eager in zip(
            ("reconstruction", "z"), (out, z), expected(torch.float64), expected(DTYPE), strict=True
        ):
            assert_matches(name, got[rows], exact, eager)
    outputs = [out, z] if joint else [out]
    gradients = [torch.randn_like(t) for t in outputs]
    leaves = [code, *(w for w in W if w is not None)]

    def backward(of: list[Tensor], to: list[Tensor], grads: list[Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(of, to, grads, retain_graph=True)

    def no_grad_forward() -> None:
        with torch.no_grad():
            forward()

    times = measure(
        {
            "decode": no_grad_forward,
            "decode backward": backward(outputs, leaves, gradients),
            "encode backward, weights": backward([values], [p["W_enc"], p["b_enc"]], [torch.randn_like(values)]),
        },
        place,
        seconds=0.8,
    )
    return {"shape": shape.name, "joint": joint, "ms": times}


def adam(shape: Shape, place: Place) -> dict[str, Any]:
    """torch's fused Adam over W_enc and W_dec in fp32."""
    weights = [torch.zeros(shape.M, shape.D, device=place.device, requires_grad=True) for _ in range(2)]
    for w in weights:
        w.grad = torch.ones_like(w)
    optimizer = torch.optim.Adam(weights, fused=True)
    times = measure({"adam": optimizer.step}, place, seconds=0.8)
    moved = 28 * sum(w.numel() for w in weights)  # gradient read; weight and two moments read and written
    return {"shape": shape.name, "ms": times, "bytes_per_second": moved / (times["adam"]["median"] / 1e3)}
