"""The operations as torch.library ops with autograd and fakes, and the functions users call.

Each public function checks its arguments, picks a backend, and calls the op (or, for "reference", the specification,
which autograd differentiates by itself). Each op's backward is an op of its own; inside `GradientBuffers` it writes
weight gradients in place instead. Gradients of gradients exist on the reference backend only.
"""

from typing import Any

import torch
from torch import Tensor

from fastsae import gradients
from fastsae.backends import choose, implementation, reference
from fastsae.backends.reference import interaction_mlp

__all__ = ["interaction_mlp", "joint_decode", "pairwise_interaction", "sparse_decode", "topk_encode"]

_library = torch.library.Library("fastsae", "DEF")


# ---- public functions -----------------------------------------------------------------------------------------------


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, backend: str = "auto", features: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest of relu(x @ W_enc.T + b_enc) per row, without ever holding all of it.

    x         float (B, d_in)       gets a gradient
    W_enc     float (d_sae, d_in)   gets a gradient
    b_enc     float (d_sae)         gets a gradient
    features  int64 (n,) ascending, optional: only these features compete
    Returns values (B, k) in the dtype of x, indices (B, k) int64: strongest first, distinct, ties to the lower index.
    Rows with fewer than k positive pre-activations are filled with entries of value 0, which pass no gradient. NaN
    ranks first, so it is seen and not lost. Exact and deterministic.
    """
    where = "topk_encode"
    _check_floats(where, x=x, W_enc=W_enc, b_enc=b_enc)
    _check_shape(where, "W_enc", W_enc, (None, None), "(d_sae, d_in)")
    _check_shape(where, "x", x, (None, W_enc.shape[-1]), "(B, d_in) with d_in of W_enc")
    _check_shape(where, "b_enc", b_enc, (len(W_enc),), "(d_sae,) of W_enc")
    if features is not None:
        _check_shape(where, "features", features, (None,), "(n,)")
        if features.dtype != torch.int64:
            raise TypeError(f"{where}: features must be int64 indices; got {features.dtype}. Of a mask: .nonzero().")
        if features.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere a look would be a wait
            inside = len(features) == 0 or (features[0] >= 0 and features[-1] < len(W_enc))
            if not (inside and (features.diff() > 0).all()):
                raise ValueError(f"{where}: features must be ascending, without repeats, in [0, {len(W_enc)})")
    competing, what = (len(W_enc), "d_sae") if features is None else (len(features), "the number of features")
    if not 1 <= k <= competing:
        raise ValueError(f"{where}: k must be between 1 and {what} = {competing}; got {k}")
    name = choose(backend, x.device, x.dtype)
    if name == "reference":
        return reference.topk_encode(x, W_enc, b_enc, k, features)
    return torch.ops.fastsae.topk_encode(x, W_enc, b_enc, k, features, name)


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor, backend: str = "auto") -> Tensor:
    """identity[b] = sum_j values[b, j] * W_dec[indices[b, j]].

    values   float (B, k)          gets a gradient
    indices  int64 (B, k) in [0, d_sae); may repeat within a row
    W_dec    float (d_sae, d_in)   gets a gradient
    Returns (B, d_in). The backward sums over each feature's tokens in one fixed order: the same bits every run.
    """
    _check_code("sparse_decode", values, indices)
    _check_floats("sparse_decode", values=values, W_dec=W_dec)
    _check_shape("sparse_decode", "W_dec", W_dec, (None, None), "(d_sae, d_in)")
    name = choose(backend, values.device, values.dtype)
    if name == "reference":
        return reference.sparse_decode(values, indices, W_dec)
    return torch.ops.fastsae.sparse_decode(values, indices, W_dec, name)


def pairwise_interaction(values: Tensor, indices: Tensor, V: Tensor, backend: str = "auto") -> Tensor:
    """z = (s^2 - q) / 2 with s = sum_j a_j V[i_j], q = sum_j (a_j V[i_j])^2: all pairwise products of active features.

    values (B, k) and V (d_sae, E) float, both get gradients; indices (B, k) int64. Returns z (B, E).
    """
    _check_code("pairwise_interaction", values, indices)
    _check_floats("pairwise_interaction", values=values, V=V)
    _check_shape("pairwise_interaction", "V", V, (None, None), "(d_sae, E)")
    name = choose(backend, values.device, values.dtype)
    if name == "reference":
        return reference.pairwise_interaction(values, indices, V)
    return torch.ops.fastsae.pairwise_interaction(values, indices, V, name)[0]


def joint_decode(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    W_lin: Tensor | None,
    V: Tensor | None,
    n: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """identity + linear sum (B, d_in), and z (B, E), in one pass over the code.

    values (B, k), indices (B, k) int64, strongest first as topk_encode returns them; W_dec and W_lin (d_sae, d_in),
    V (d_sae, E). The linear sum and z see the first n entries only. W_lin = None leaves the linear sum out; V = None
    makes z (B, 0). Biases are the caller's. All float arguments get gradients.
    """
    where = "joint_decode"
    _check_code(where, values, indices)
    _check_floats(where, values=values, W_dec=W_dec, W_lin=W_lin, V=V)
    _check_shape(where, "W_dec", W_dec, (None, None), "(d_sae, d_in)")
    if W_lin is not None:
        _check_shape(where, "W_lin", W_lin, tuple(W_dec.shape), "that of W_dec")
    if V is not None:
        _check_shape(where, "V", V, (len(W_dec), None), "(d_sae, E) with d_sae of W_dec")
    if not 1 <= n <= values.shape[1]:
        raise ValueError(f"{where}: n must be between 1 and k = {values.shape[1]}; got {n}")
    name = choose(backend, values.device, values.dtype)
    if name == "reference":
        return reference.joint_decode(values, indices, W_dec, W_lin, V, n)
    out, z, _ = torch.ops.fastsae.joint_decode(values, indices, W_dec, W_lin, V, n, name)
    return out, z


# ---- topk_encode ----------------------------------------------------------------------------------------------------

_library.define(
    "topk_encode(Tensor x, Tensor W_enc, Tensor b_enc, int k, Tensor? features, str backend) -> (Tensor, Tensor)"
)
_library.define(
    "topk_encode_backward(Tensor d_values, Tensor values, Tensor indices, Tensor x, Tensor W_enc, bool need_x, "
    "bool need_W, str backend) -> (Tensor?, Tensor?, Tensor)"
)


def _topk_encode_fake(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, features: Tensor | None, backend: str) -> Any:
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int64)


def _topk_encode_save(ctx: Any, inputs: Any, output: Any) -> None:
    x, W_enc, _, _, _, ctx.backend = inputs
    values, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(values, indices, x, W_enc)


def _topk_encode_grad(ctx: Any, d_values: Tensor, _: Tensor) -> Any:
    values, indices, x, W_enc = ctx.saved_tensors
    need_x, need_W = ctx.needs_input_grad[:2]
    if need_W and (out := _claim(W_enc)):
        backward = implementation(ctx.backend).topk_encode_backward
        d_x, _, d_b = backward(d_values, values, indices, x, W_enc, need_x, True, out)
        return d_x, None, d_b, None, None, None
    grads = torch.ops.fastsae.topk_encode_backward(d_values, values, indices, x, W_enc, need_x, need_W, ctx.backend)
    return *grads, None, None, None


def _topk_encode_backward_fake(
    d_values: Tensor,
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    W_enc: Tensor,
    need_x: bool,
    need_W: bool,
    backend: str,
) -> Any:
    d_x = x.new_empty(x.shape) if need_x else None
    d_W = W_enc.new_empty(W_enc.shape) if need_W else None
    return d_x, d_W, x.new_empty(W_enc.shape[0])


# ---- sparse_decode --------------------------------------------------------------------------------------------------

_library.define("sparse_decode(Tensor values, Tensor indices, Tensor W_dec, str backend) -> Tensor")
_library.define(
    "sparse_decode_backward(Tensor d_out, Tensor values, Tensor indices, Tensor W_dec, bool need_W, str backend)"
    " -> (Tensor, Tensor?)"
)


def _sparse_decode_fake(values: Tensor, indices: Tensor, W_dec: Tensor, backend: str) -> Tensor:
    return values.new_empty(values.shape[0], W_dec.shape[1])


def _sparse_decode_save(ctx: Any, inputs: Any, output: Any) -> None:
    values, indices, W_dec, ctx.backend = inputs
    ctx.save_for_backward(values, indices, W_dec)


def _sparse_decode_grad(ctx: Any, d_out: Tensor) -> Any:
    values, indices, W_dec = ctx.saved_tensors
    need_W = ctx.needs_input_grad[2]
    if need_W and (out := _claim(W_dec)):
        backward = implementation(ctx.backend).sparse_decode_backward
        return backward(d_out, values, indices, W_dec, True, out)[0], None, None, None
    d_values, d_W = torch.ops.fastsae.sparse_decode_backward(d_out, values, indices, W_dec, need_W, ctx.backend)
    return d_values, None, d_W, None


def _sparse_decode_backward_fake(
    d_out: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, need_W: bool, backend: str
) -> Any:
    return values.new_empty(values.shape), W_dec.new_empty(W_dec.shape) if need_W else None


# ---- pairwise_interaction -------------------------------------------------------------------------------------------

_library.define("pairwise_interaction(Tensor values, Tensor indices, Tensor V, str backend) -> (Tensor, Tensor)")
_library.define(
    "pairwise_interaction_backward(Tensor d_z, Tensor s, Tensor values, Tensor indices, Tensor V, bool need_V, "
    "str backend) -> (Tensor, Tensor?)"
)


def _pairwise_interaction_fake(values: Tensor, indices: Tensor, V: Tensor, backend: str) -> Any:
    return values.new_empty(values.shape[0], V.shape[1]), values.new_empty(values.shape[0], V.shape[1])


def _pairwise_interaction_save(ctx: Any, inputs: Any, output: Any) -> None:
    values, indices, V, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], values, indices, V)


def _pairwise_interaction_grad(ctx: Any, d_z: Tensor, _: Tensor) -> Any:
    s, values, indices, V = ctx.saved_tensors
    need_V = ctx.needs_input_grad[2]
    if need_V and (out := _claim(V)):
        backward = implementation(ctx.backend).pairwise_interaction_backward
        return backward(d_z, s, values, indices, V, True, out)[0], None, None, None
    d_values, d_V = torch.ops.fastsae.pairwise_interaction_backward(d_z, s, values, indices, V, need_V, ctx.backend)
    return d_values, None, d_V, None


def _pairwise_interaction_backward_fake(
    d_z: Tensor, s: Tensor, values: Tensor, indices: Tensor, V: Tensor, need_V: bool, backend: str
) -> Any:
    return values.new_empty(values.shape), V.new_empty(V.shape) if need_V else None


# ---- joint_decode ---------------------------------------------------------------------------------------------------

_library.define(
    "joint_decode(Tensor values, Tensor indices, Tensor W_dec, Tensor? W_lin, Tensor? V, int n, str backend)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "joint_decode_backward(Tensor d_out, Tensor d_z, Tensor s, Tensor values, Tensor indices, Tensor W_dec, "
    "Tensor? W_lin, Tensor? V, int n, bool need_W_dec, bool need_W_lin, bool need_V, str backend)"
    " -> (Tensor, Tensor?, Tensor?, Tensor?)"
)


def _joint_decode_fake(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    W_lin: Tensor | None,
    V: Tensor | None,
    n: int,
    backend: str,
) -> Any:
    rows, width = values.shape[0], 0 if V is None else V.shape[1]
    return (
        values.new_empty(rows, W_dec.shape[1]),
        values.new_empty(rows, width),
        values.new_empty(rows, width),
    )


def _joint_decode_save(ctx: Any, inputs: Any, output: Any) -> None:
    values, indices, W_dec, W_lin, V, ctx.n, ctx.backend = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(output[2], values, indices, W_dec, W_lin, V)


def _joint_decode_grad(ctx: Any, d_out: Tensor, d_z: Tensor, _: Tensor) -> Any:
    s, values, indices, W_dec, W_lin, V = ctx.saved_tensors
    need = ctx.needs_input_grad[2:5]
    arguments = (d_out, d_z, s, values, indices, W_dec, W_lin, V, ctx.n, *need)
    weights = zip((W_dec, W_lin, V), need, strict=True)
    out = tuple(_claim(w) if w is not None and needed else None for w, needed in weights)
    if any(out):
        d_values, *d_weights = implementation(ctx.backend).joint_decode_backward(*arguments, out)
        d_weights = [None if claimed else grad for claimed, grad in zip(out, d_weights, strict=True)]
    else:
        d_values, *d_weights = torch.ops.fastsae.joint_decode_backward(*arguments, ctx.backend)
    return d_values, None, *d_weights, None, None


def _joint_decode_backward_fake(
    d_out: Tensor,
    d_z: Tensor,
    s: Tensor,
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    W_lin: Tensor | None,
    V: Tensor | None,
    n: int,
    need_W_dec: bool,
    need_W_lin: bool,
    need_V: bool,
    backend: str,
) -> Any:
    weights = zip((W_dec, W_lin, V), (need_W_dec, need_W_lin, need_V), strict=True)
    return values.new_empty(values.shape), *(
        w.new_empty(w.shape) if w is not None and needed else None for w, needed in weights
    )


# ---- registration ---------------------------------------------------------------------------------------------------


def _dispatch(op: str) -> Any:
    """Every op's last argument names the backend, whose function of the same name takes the rest."""
    return lambda *arguments: getattr(implementation(arguments[-1]), op)(*arguments[:-1])


def _register(name: str, fake: Any, backward_fake: Any, save: Any, grad: Any) -> None:
    for op, shapes in ((name, fake), (f"{name}_backward", backward_fake)):
        _library.impl(op, _dispatch(op), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastsae::{op}", shapes, lib=_library)
    torch.library.register_autograd(f"fastsae::{name}", grad, setup_context=save, lib=_library)


_register("topk_encode", _topk_encode_fake, _topk_encode_backward_fake, _topk_encode_save, _topk_encode_grad)
_register(
    "sparse_decode",
    _sparse_decode_fake,
    _sparse_decode_backward_fake,
    _sparse_decode_save,
    _sparse_decode_grad,
)
_register(
    "pairwise_interaction",
    _pairwise_interaction_fake,
    _pairwise_interaction_backward_fake,
    _pairwise_interaction_save,
    _pairwise_interaction_grad,
)
_register("joint_decode", _joint_decode_fake, _joint_decode_backward_fake, _joint_decode_save, _joint_decode_grad)


def _claim(weight: Tensor) -> tuple[Tensor, bool] | None:
    buffers = gradients.active()
    if buffers is None or torch.compiler.is_compiling():  # a weight that is being traced has no memory to look up
        return None
    return buffers.claim(weight)


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check_floats(where: str, **tensors: Tensor | None) -> None:
    given = {name: t for name, t in tensors.items() if t is not None}
    first_name, first = next(iter(given.items()))
    for name, t in given.items():
        if not t.is_floating_point():
            raise TypeError(f"{where}: {name} must be a float tensor; got {t.dtype}. Convert it with .float().")
        if t.device.type == "meta":
            raise TypeError(
                f"{where}: {name} is on the meta device and holds no numbers; materialise it with .to_empty()."
            )
        if t.device != first.device:
            raise ValueError(
                f"{where}: {first_name} is on {first.device} but {name} on {t.device}; move them to one device."
            )
        if t.dtype != first.dtype:
            raise TypeError(
                f"{where}: {first_name} is {first.dtype} but {name} is {t.dtype}; convert one of them with .to()."
            )


def _check_shape(where: str, name: str, tensor: Tensor, expected: tuple[int | None, ...], meaning: str) -> None:
    fits = len(tensor.shape) == len(expected) and all(
        e is None or e == s for e, s in zip(expected, tensor.shape, strict=True)
    )
    if not fits:
        shape = ", ".join("*" if e is None else str(e) for e in expected)
        raise ValueError(f"{where}: {name} must have shape ({shape}), {meaning}; got {tuple(tensor.shape)}")


def _check_code(where: str, values: Tensor, indices: Tensor) -> None:
    if values.dim() != 2 or values.shape != indices.shape:
        raise ValueError(
            f"{where}: values and indices must both be (B, k); got {tuple(values.shape)} and {tuple(indices.shape)}. "
            "Pass the pair that topk_encode returns."
        )
    if indices.dtype != torch.int64:
        raise TypeError(f"{where}: indices must be int64; got {indices.dtype}")
