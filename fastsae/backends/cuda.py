"""The CUDA backend: Triton kernels beside cuBLAS, chosen by csrc_triton/plan.py. fp32, fp16 and bf16.

Weights may be fp32 beside a code in fp16 or bf16 (autocast): kernels read them as they are, products take a copy.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from csrc_triton import interaction_mlp as mlp
from csrc_triton import plan
from csrc_triton.adam import AdamStep, Gradient
from csrc_triton.adam import Destination as Finish
from csrc_triton.dense_code import dense_decode, dense_decode_backward, dense_weight_gradient
from csrc_triton.feature_order import WorkItems, work_items
from csrc_triton.joint_decode import joint_decode as launch_joint_decode
from csrc_triton.topk_encode import topk_encode as launch_topk_encode
from csrc_triton.weight_gradients import WIDEST, Decoder, decode_backward, gathered_dot, weight_gradient

Destination = tuple[Tensor, bool] | AdamStep

PRE_ACTIVATION_BYTES: int | None = None


def set_pre_activation_bytes(limit: int | None) -> None:
    """How much memory pre-activations, or a dense code, may take at once; None: 3 % of the device's memory."""
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
    return int(0.03 * torch.cuda.get_device_properties(device).total_memory)


# ---- encode ---------------------------------------------------------------------------------------------------------


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, features: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See reference.topk_encode."""
    d_sae = len(W_enc) if features is None else len(features)
    chosen = plan.encode(len(x), x.shape[1], d_sae, k, x.element_size(), budget(x.device))
    return launch_topk_encode(x, W_enc.to(x.dtype), b_enc.to(x.dtype), k, features, chosen)


def topk_encode_backward(
    d_values: Tensor,
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    W_enc: Tensor,
    need_x: bool,
    need_W: bool,
    out: Destination | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """d_x (B, d_in), d_W_enc (d_sae, d_in), d_b_enc (d_sae); entries of value 0 receive nothing."""
    d_pre = torch.where(values > 0, d_values, 0)
    x = x.contiguous()
    d_x = _decode(d_pre, indices, W_enc, None, values.shape[1]).to(x.dtype) if need_x else None
    d_b_enc = torch.empty(len(W_enc), dtype=torch.float32, device=x.device)
    items = _take_order(indices, len(W_enc))
    if need_W and _plan(d_pre, W_enc, False, d_pre.shape[1]).encoder_backward == "dense":
        finish, d_W_enc = _gradient(out, W_enc)
        dense_weight_gradient(d_pre, indices, x, finish, budget(x.device))
        sums = torch.zeros_like(x[:, :1])  # a weight of width 1 whose rows are all 1
        weight_gradient(items, d_pre, None, sums, None, d_b_enc)
    else:
        finish, d_W_enc = _finish(out, W_enc) if need_W else (None, None)
        weight_gradient(items, d_pre, None, x if need_W else x[:, :1].contiguous(), finish, d_b_enc)
    return d_x, d_W_enc, d_b_enc.to(W_enc.dtype)


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
        error = None if target is None else (out.float() - target).square().sum()
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
    weights = [None if w is None else w.contiguous() for w in (W_dec, W_lin, V)]
    d_out, d_s, d_q = _rows(d_out, values, weights[0]), _rows(d_s, values, weights[2]), _rows(d_q, values, weights[2])
    d_values = torch.zeros_like(values)
    needs, gradients = (need_W_dec, need_W_lin, need_V), [None, None, None]
    order = _keep_order(indices, next(len(w) for w in weights if w is not None))
    dense = d_out is not None and weights[0] is not None
    dense = dense and _plan(values, weights[0], W_lin is not None, n).backward == "dense"
    finishes: list[Finish | None] = [None, None, None]
    for i, (weight, need) in enumerate(zip(weights, needs, strict=True)):
        if weight is not None and need:
            written = dense and i < 2
            finishes[i], gradients[i] = _gradient(out[i], weight) if written else _finish(out[i], weight)
    dec, lin, v = (None if w is None else Decoder(w, f) for w, f in zip(weights, finishes, strict=True))
    if V is not None and n == 1:  # one entry makes no pairs
        d_s, d_q = torch.zeros_like(d_s), torch.zeros_like(d_q)
    add = False
    if dense:
        memory = budget(values.device)
        d_values = dense_decode_backward(values, indices, d_out, dec.weight, finishes[0], memory)
        if lin is not None:
            strong, which = values[:, :n], indices[:, :n]
            d_values[:, :n] += dense_decode_backward(strong, which, d_out, lin.weight, finishes[1], memory)
        dec, lin, d_out, add = None, None, None, True
    elif d_out is not None and d_out.shape[1] > WIDEST:
        gathered_dot(values, indices, d_out, dec.weight, None if lin is None else lin.weight, n, d_values)
        if finishes[0] is not None:
            weight_gradient(order, values, None, d_out, finishes[0])
        if finishes[1] is not None:
            weight_gradient(order, values, None, d_out, finishes[1], n=n)
        dec, lin, d_out, add = None, None, None, True
    if dec is not None or v is not None:
        decode_backward(order, values, n, d_out, d_s, d_q, dec, lin, v, d_values, add)
    return d_values, *gradients


def _decode(values: Tensor, indices: Tensor, W: Tensor, W_lin: Tensor | None, n: int) -> Tensor:
    return joint_decode(values, indices, W, W_lin, None, None, None, n)[0]


def _plan(values: Tensor, W: Tensor, linear: bool, n: int) -> plan.DecodePlan:
    return plan.decode(len(values), W.shape[1], len(W), values.shape[1], n, linear, values.element_size())


def _rows(gradient: Tensor | None, values: Tensor, weight: Tensor | None) -> Tensor | None:
    """A gradient as rows to gather: contiguous, in the dtype of the code, zeros where autograd has none."""
    if weight is None:
        return None
    if gradient is None:
        return values.new_zeros(len(values), weight.shape[1])
    return gradient.to(values.dtype).contiguous()


def _finish(destination: Destination | None, weight: Tensor) -> tuple[Finish, Tensor | None]:
    """What kernels do with a gradient, and what is returned to autograd."""
    if isinstance(destination, AdamStep):
        return destination, None
    return _gradient(destination, weight)


def _gradient(destination: Destination | None, weight: Tensor) -> tuple[Gradient, Tensor | None]:
    """The same where a gradient must be written: a step of Adam cannot be made there, and its gradient is returned."""
    if isinstance(destination, tuple) and not isinstance(destination, AdamStep):
        return Gradient(*destination), None
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
    narrow = [t.to(compute) for t in (W1, b1, W2, bias)]
    path, _ = _interaction_path(len(base), base.shape[1], s.shape[1], compute)
    out, error = mlp.interaction_mlp(base, s, q, *narrow, target, dropout, seed, path)
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
    narrow = [t.to(compute) for t in (W1, b1, W2)]
    path, _ = _interaction_path(len(d_out), d_out.shape[1], s.shape[1], compute)
    d_s, d_q, *d_weights = mlp.interaction_mlp_backward(d_out, s, q, *narrow, dropout, seed, need_weights, path)
    return d_s, d_q, *(None if g is None else g.to(W1.dtype) for g in d_weights)  # type: ignore[return-value]


def _interaction_path(rows: int, d_in: int, d_embedding: int, compute: torch.dtype) -> tuple[str, str]:
    itemsize = compute.itemsize
    return plan.cheapest(mlp.cost(rows, d_in, d_embedding, itemsize, training=True), itemsize)


# ---- the feature order, made once for the decoder's backward and the encoder's --------------------------------------


class _Kept(NamedTuple):
    indices: Tensor
    version: int
    d_sae: int
    items: WorkItems


_kept: _Kept | None = None


def _keep_order(indices: Tensor, d_sae: int) -> WorkItems:
    global _kept
    _kept = None
    items = work_items(indices, d_sae)
    if not _capturing(indices):  # a graph must hold its own: what is kept now is gone when it is replayed
        _kept = _Kept(indices, indices._version, d_sae, items)
    return items


def _take_order(indices: Tensor, d_sae: int) -> WorkItems:
    global _kept
    kept, _kept = _kept, None
    same = (
        kept is not None
        and not _capturing(indices)
        and kept.indices.data_ptr() == indices.data_ptr()
        and (kept.indices.shape, kept.version, kept.d_sae) == (indices.shape, indices._version, d_sae)
    )
    return kept.items if kept is not None and same else work_items(indices, d_sae)


def _capturing(t: Tensor) -> bool:
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


# ---- what will run --------------------------------------------------------------------------------------------------


def explain(rows: int, sae: Any, device: torch.device) -> list[str]:
    """The plan for `sae` on so many rows, line by line."""
    dtype = sae.W_enc.dtype
    if dtype == torch.float32 and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    d_in, d_sae, k, itemsize = sae.W_enc.shape[1], sae.d_sae, sae.k, dtype.itemsize
    encode = plan.encode(rows, d_in, d_sae, k, itemsize, budget(device))
    W_lin, V = getattr(sae, "W_lin", None), getattr(sae, "V", None)
    n = getattr(sae, "k_integration", k)
    decode = plan.decode(rows, d_in, d_sae, k, n, W_lin is not None, itemsize)
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
