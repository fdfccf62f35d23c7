"""The CUDA backend: Triton kernels beside cuBLAS, chosen by csrc_triton/plan.py. fp32, fp16 and bf16.

Weights may be fp32 beside a code in fp16 or bf16 (autocast): kernels read them as they are, products take a copy.
Kernels sum in fp32. So do products, unless cuBLAS splits a long sum and torch lets it add the parts in bf16 or fp16
(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction, on by default).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from csrc_triton import interaction_mlp as mlp
from csrc_triton import plan
from csrc_triton.adam import AdamStep, Gradient, is_gradient, is_step
from csrc_triton.adam import Destination as Finish
from csrc_triton.dense_code import dense_decode, dense_decode_backward, dense_weight_gradient
from csrc_triton.dot import precision
from csrc_triton.feature_order import WorkItems, work_items
from csrc_triton.joint_decode import joint_decode as launch_joint_decode
from csrc_triton.topk_encode import topk_encode as launch_topk_encode
from csrc_triton.weight_gradients import (
    WIDEST,
    WIDEST_BLOCK,
    Decoder,
    decode_backward,
    feature_sums,
    gathered_dot,
    weight_gradient,
)

Destination = tuple[Tensor, bool] | AdamStep

PRE_ACTIVATION_BYTES: int | None = None


def set_pre_activation_bytes(limit: int | None) -> None:
    """Set the bytes pre-activations, or a dense code, may take at once; None: 3 % of the device's memory."""
    global PRE_ACTIVATION_BYTES
    if limit is not None and limit < 1:
        raise ValueError(f"set_pre_activation_bytes: expected None or at least 1; got {limit}")
    PRE_ACTIVATION_BYTES = limit


def budget(device: torch.device) -> int:
    """The bytes that pre-activations may take on this device."""
    if PRE_ACTIVATION_BYTES is not None:
        return PRE_ACTIVATION_BYTES
    if device.type != "cuda":  # the interpreter
        return 256 * 2**20
    return int(plan.PRE_ACTIVATIONS * torch.cuda.get_device_properties(device).total_memory)


# ---- encode ---------------------------------------------------------------------------------------------------------


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, features: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See reference.topk_encode."""
    d_sae = len(W_enc) if features is None else len(features)
    copied = features is not None or W_enc.dtype != x.dtype
    chosen = plan.encode(len(x), x.shape[1], d_sae, k, x.element_size(), budget(x.device), _tf32(), copied)
    return launch_topk_encode(x, W_enc, b_enc, k, features, chosen, scale)


def topk_encode_backward(
    d_values: Tensor,
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    W_enc: Tensor,
    need_x: bool,
    need_W: bool,
    need_b_dec: bool,
    out: Destination | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """d_x (B, d_in), d_W_enc (d_sae, d_in), d_b_enc (d_sae), d_b_dec (d_in); entries of value 0 receive nothing.

    d_b_dec = -sum of d_x = -d_b_enc @ W_enc, which reads the dictionary once and gathers nothing.
    """
    d_pre, x = torch.where(values <= 0, 0, d_values), x.contiguous()
    # All that reads W_enc comes before its gradient, whose step of Adam may change it.
    k = values.shape[1]
    d_x = joint_decode(d_pre, indices, W_enc, None, None, None, None, k)[0] if need_x else None
    items = _take_order(indices, len(W_enc))
    d_b_enc = feature_sums(items, d_pre, len(W_enc)).to(W_enc.dtype)
    d_b_dec = -(d_b_enc @ W_enc) if need_b_dec else None
    d_W_enc = None
    if need_W:
        dense = _plan(d_pre, W_enc, False, k).encoder_backward == "dense"
        finish, d_W_enc = _finish(out, W_enc, dense or _cuts_rows(out, W_enc))
        if dense and is_gradient(finish):
            dense_weight_gradient(d_pre, indices, x, finish, budget(x.device))
        else:
            weight_gradient(items, d_pre, x, finish)
    return d_x, d_W_enc, d_b_enc, d_b_dec


# ---- decode ---------------------------------------------------------------------------------------------------------


def joint_decode(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor | None,
    W_lin: Tensor | None,
    V: Tensor | None,
    bias: Tensor | None,
    target: Tensor | None,
    n: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """identity + linear sum + bias (B, d_in), s and q (B, E), and the mean squared error; see ops.joint_decode."""
    dense = None
    if W_dec is not None:
        chosen = _plan(values, W_dec, W_lin is not None, n)
        if W_lin is not None and chosen.shared:
            W_dec, W_lin = W_dec + W_lin, None
        if chosen.forward == "dense":
            dense, W_dec, W_lin = dense_decode(values, indices, W_dec, W_lin, n, budget(values.device)), None, None
    fused = dense is None
    out, s, q, error = launch_joint_decode(
        values, indices, W_dec, W_lin, V, bias if fused else None, target if fused else None, n
    )
    if dense is not None:
        out = dense if bias is None else dense.add_(bias)
        error = None if target is None else (out.float() - target).square().sum().float()
    return out, s, q, s.new_zeros(()) if error is None else error / out.numel()


def joint_decode_backward(
    d_out: Tensor | None,
    d_s: Tensor | None,
    d_q: Tensor | None,
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor | None,
    W_lin: Tensor | None,
    V: Tensor | None,
    n: int,
    need_W_dec: bool,
    need_W_lin: bool,
    need_V: bool,
    out: tuple[Destination | None, Destination | None, Destination | None] = (None, None, None),
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """d_values (B, k), d_W_dec, d_W_lin (d_sae, d_in), d_V (d_sae, E)."""
    values, indices = values.contiguous(), indices.contiguous()
    dense = W_dec is not None and _plan(values, W_dec, W_lin is not None, n).backward == "dense"
    wide = W_dec is not None and W_dec.shape[1] > WIDEST
    dec, d_W_dec = _decoder(W_dec, need_W_dec, out[0], dense or (wide and _cuts_rows(out[0], W_dec)))
    lin, d_W_lin = _decoder(W_lin, need_W_lin, out[1], dense or (wide and _cuts_rows(out[1], W_lin)))
    v, d_V = _decoder(V, need_V, out[2], False)
    d_out, d_s, d_q = _rows(d_out, values, dec), _rows(d_s, values, v), _rows(d_q, values, v)
    if d_s is not None and d_q is not None and n == 1:  # one entry makes no pairs
        d_s, d_q = torch.zeros_like(d_s), torch.zeros_like(d_q)
    d_values = torch.zeros_like(values)
    items = _keep_order(indices, next(len(w) for w in (W_dec, V) if w is not None))
    apart = dense or wide
    if apart and dec is not None and d_out is not None:
        if dense:
            _dense_backward(values, indices, d_out, dec, lin, n, d_values)
        else:
            _wide_backward(items, values, indices, d_out, dec, lin, n, d_values)
        d_out = dec = lin = None
    if dec is not None or v is not None:
        decode_backward(items, values, n, d_out, d_s, d_q, dec, lin, v, d_values, apart)
    return d_values, d_W_dec, d_W_lin, d_V


def _dense_backward(
    values: Tensor,
    indices: Tensor,
    d_out: Tensor,
    dec: Decoder,
    lin: Decoder | None,
    n: int,
    d_values: Tensor,
) -> None:
    """Products with the code as a dense matrix, where it is not sparse."""
    memory = budget(values.device)
    for weight, k in ((dec, values.shape[1]), (lin, n)):
        if weight is not None:
            gradient = weight.destination if is_gradient(weight.destination) else None
            strong, which = values[:, :k], indices[:, :k]
            d_values[:, :k] += dense_decode_backward(strong, which, d_out, weight.weight, gradient, memory)


def _wide_backward(
    items: WorkItems,
    values: Tensor,
    indices: Tensor,
    d_out: Tensor,
    dec: Decoder,
    lin: Decoder | None,
    n: int,
    d_values: Tensor,
) -> None:
    """Two passes, where rows do not fit in registers: d_values, then the weights by blocks of d_in."""
    gathered_dot(indices, d_out, dec.weight, None if lin is None else lin.weight, n, d_values)
    for weight, k in ((dec, values.shape[1]), (lin, n)):
        if weight is not None and weight.destination is not None:
            weight_gradient(items, values, d_out, weight.destination, k)


def _plan(values: Tensor, W: Tensor, linear: bool, n: int) -> plan.DecodePlan:
    (rows, k), (d_sae, d_in) = values.shape, W.shape
    sizes = values.element_size(), W.element_size()
    return plan.decode(rows, d_in, d_sae, k, n, linear, *sizes, budget(values.device), _tf32())


def _tf32() -> bool:
    return precision() == "tf32"


def _rows(gradient: Tensor | None, values: Tensor, weight: Decoder | None) -> Tensor | None:
    """A gradient as rows to gather: contiguous, in the dtype of the code, zeros where autograd has none."""
    if weight is None:
        return None
    if gradient is None:
        return values.new_zeros(len(values), weight.weight.shape[1])
    return gradient.to(values.dtype).contiguous()


def _decoder(
    weight: Tensor | None, need: bool, out: Destination | None, written: bool
) -> tuple[Decoder | None, Tensor | None]:
    """Pair a weight with the destination of its gradient; also give the tensor that autograd gets for it, or None."""
    if weight is None:
        return None, None
    finish, grad = _finish(out, weight, written) if need else (None, None)
    return Decoder(weight.contiguous(), finish), grad


def _cuts_rows(out: Destination | None, weight: Tensor | None) -> bool:
    """Whether weight_gradient would take rows apart that a step needs whole."""
    wide = weight is not None and weight.shape[1] > WIDEST_BLOCK
    return wide and is_step(out) and out.unit_norm


def _finish(out: Destination | None, weight: Tensor, written: bool) -> tuple[Finish, Tensor | None]:
    """Choose the destination of a gradient; also give the tensor that autograd gets for it, or None.

    written: products write it whole, so no step of Adam can be made row by row, and the gradient is returned.
    """
    if is_step(out):
        if not written:
            out.made.append(True)
            return out, None
    elif out is not None:
        return Gradient(*out), None  # type: ignore[arg-type]  # a TypeGuard says nothing of what is left
    made = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return Gradient(made, add=False), made


# ---- integrate ------------------------------------------------------------------------------------------------------


def integrate(
    base: Tensor,
    s: Tensor,
    q: Tensor,
    W1: Tensor,
    b1: Tensor,
    W2: Tensor,
    bias: Tensor,
    target: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """base + W2 relu(W1 dropout((s^2 - q) / 2) + b1) + bias, and its mean squared error."""
    W1, b1, W2, bias = (t.to(compute) for t in (W1, b1, W2, bias))
    path, _ = _interaction_path(len(base), base.shape[1], s.shape[1], compute)
    out, error = mlp.interaction_mlp(base, s, q, W1, b1, W2, bias, target, dropout, seed, path)
    return out, s.new_zeros(()) if error is None else error / out.numel()


def integrate_backward(
    d_out: Tensor,
    s: Tensor,
    q: Tensor,
    W1: Tensor,
    b1: Tensor,
    W2: Tensor,
    seed: Tensor | None,
    dropout: float,
    compute: torch.dtype,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """d_s, d_q (B, E), d_W1, d_b1, d_W2, d_bias."""
    path, _ = _interaction_path(len(d_out), d_out.shape[1], s.shape[1], compute)
    dtype = W1.dtype
    W1, b1, W2 = (t.to(compute) for t in (W1, b1, W2))
    d_s, d_q, *grads = mlp.interaction_mlp_backward(d_out, s, q, W1, b1, W2, dropout, seed, need_weights, path)
    d_W1, d_b1, d_W2, d_bias = (None if grad is None else grad.to(dtype) for grad in grads)
    return d_s, d_q, d_W1, d_b1, d_W2, d_bias


def _interaction_path(rows: int, d_in: int, d_embedding: int, compute: torch.dtype) -> tuple[mlp.Path, str]:
    itemsize = compute.itemsize
    return plan.cheapest(mlp.cost(rows, d_in, d_embedding, itemsize), itemsize, _tf32())


# ---- the feature order, made once for the decoder's backward and the encoder's --------------------------------------


class _Kept(NamedTuple):
    indices: Tensor
    version: int
    d_sae: int
    stream: int
    """The stream it is made on: on another one it may not be there yet."""
    items: WorkItems


_kept: _Kept | None = None


def _keep_order(indices: Tensor, d_sae: int) -> WorkItems:
    global _kept
    _kept = None
    items = work_items(indices, d_sae)
    if not _capturing(indices):  # a graph must hold its own: what is kept now is gone when it is replayed
        _kept = _Kept(indices, indices._version, d_sae, _stream(indices), items)
    return items


def _take_order(indices: Tensor, d_sae: int) -> WorkItems:
    global _kept
    kept, _kept = _kept, None
    same = (
        kept is not None
        and not _capturing(indices)
        and kept.indices.data_ptr() == indices.data_ptr()
        and kept.indices.shape == indices.shape
        and (kept.version, kept.d_sae, kept.stream) == (indices._version, d_sae, _stream(indices))
    )
    return kept.items if kept is not None and same else work_items(indices, d_sae)


def _stream(t: Tensor) -> int:
    return torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else 0


def _capturing(t: Tensor) -> bool:
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


# ---- what will run --------------------------------------------------------------------------------------------------


def explain(rows: int, sae: Any, device: torch.device) -> list[str]:
    """The plan for `sae` on so many rows, line by line."""
    dtype = sae.W_enc.dtype
    if dtype == torch.float32 and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    d_in, d_sae, k, itemsize = sae.W_enc.shape[1], sae.d_sae, sae.k, dtype.itemsize
    copied = dtype != sae.W_enc.dtype
    encode = plan.encode(rows, d_in, d_sae, k, itemsize, budget(device), _tf32(), copied)
    W_lin, V = getattr(sae, "W_lin", None), getattr(sae, "V", None)
    n = getattr(sae, "k_integration", k)
    sizes = itemsize, sae.W_enc.element_size()
    decode = plan.decode(rows, d_in, d_sae, k, n, W_lin is not None, *sizes, budget(device), _tf32())
    lines = [
        f"plan: {rows} rows in chunks of {encode.rows}; {encode.bytes / 2**20:.0f} MiB of pre-activations held",
        f"encode: {encode.gemm} product, {encode.select} selection; {encode.reason}",
        f"decode: forward {decode.forward}, backward {decode.backward}, encoder's weights "
        f"{decode.encoder_backward}; {decode.reason}",
    ]
    if V is not None:
        path, reason = _interaction_path(rows, d_in, V.shape[1], dtype)
        lines.append(f"integration: {path}; {reason}")
    return lines
