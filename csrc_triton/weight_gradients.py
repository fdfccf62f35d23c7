"""The gradients, over the feature order: each work item adds up its entries in registers, in order, without atomics.

decode_backward     d_values, and the gradients of W_dec, W_lin and V, in one pass over the gathered rows of d_out
weight_gradient     sum of coefficient * row for one weight, where the coefficients are known (the encoder's)
add_slots           the parts of features that were split, in order
gathered_dot        d_values alone, for rows too wide for registers
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.adam import Destination, absent, finish_row, hyperparameters, is_gradient, is_step
from csrc_triton.feature_order import WorkItems
from csrc_triton.launch import launch
from csrc_triton.plan import SEGMENT, power_of_two

# A program of decode_backward holds whole rows: of each weight, its gradient, and some tokens.
WIDEST = 8192
# One of weight_gradient takes at most so much of a row.
WIDEST_BLOCK = 2048


@triton.jit
def decode_backward_kernel(
    order_ptr,  # [P] item numbers, longest first
    feature_ptr,  # [P]
    start_ptr,  # [P]
    length_ptr,  # [P]
    slot_ptr,  # [P]
    entries_ptr,  # [nnz] int64
    values_ptr,  # [nnz] flattened (B, K)
    d_values_ptr,  # [nnz] out
    d_out_ptr,  # [B, D] or None
    d_s_ptr,  # [B, E] or None
    d_q_ptr,  # [B, E] or None
    w_dec_ptr,  # [M, D] or None
    w_lin_ptr,  # [M, D] or None
    v_ptr,  # [M, E] or None
    dec_out_ptr,  # [M, D] see adam.finish_row; None where no gradient is wanted
    dec_exp_avg_ptr,
    dec_exp_avg_sq_ptr,
    dec_copy_ptr,
    dec_corrections_ptr,
    lin_out_ptr,  # [M, D]
    lin_exp_avg_ptr,
    lin_exp_avg_sq_ptr,
    lin_copy_ptr,
    lin_corrections_ptr,
    v_out_ptr,  # [M, E]
    v_exp_avg_ptr,
    v_exp_avg_sq_ptr,
    v_copy_ptr,
    v_corrections_ptr,
    parts_ptr,  # [slots, WIDTH] fp32: gradients of items of split features, those of W_dec, W_lin, V side by side
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    K,
    N,
    D: tl.constexpr,
    E: tl.constexpr,
    DEC_MODE: tl.constexpr,
    LIN_MODE: tl.constexpr,
    V_MODE: tl.constexpr,
    ADD_VALUES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    VECTOR: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """With g = d_out[token], t = d_s[token], u = d_q[token], over a feature's entries (a, token); linear and V: j < N.

        d_a = g . W_dec + g . W_lin + t . V + 2 a u . V^2
        d_W_dec = sum a g,  d_W_lin = sum a g,  d_V = sum a t + 2 (sum a^2 u) V

    Grid (P,): one work item a program, TOKENS entries at a time; sums in fp32.
    """
    item = tl.load(order_ptr + tl.program_id(0))
    length = tl.load(length_ptr + item)
    if length < 0:
        return
    feature = tl.load(feature_ptr + item).to(tl.int64)
    start = tl.load(start_ptr + item)
    slot = tl.load(slot_ptr + item).to(tl.int64)
    end = start + length
    offs_t = start + tl.arange(0, TOKENS)
    entry = tl.load(entries_ptr + offs_t, mask=offs_t < end, other=0).to(tl.int32)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    if w_dec_ptr is not None:
        d_dec = tl.zeros((BLOCK_D,), tl.float32)
    if w_lin_ptr is not None:
        d_lin = tl.zeros((BLOCK_D,), tl.float32)
    if v_ptr is not None:
        d_v = tl.zeros((BLOCK_E,), tl.float32)
    for position in tl.range(start, end, TOKENS, num_stages=STAGES):
        offs_t = position + tl.arange(0, TOKENS)
        mask_t = offs_t < end
        a = tl.load(values_ptr + entry, mask=mask_t, other=0.0).to(tl.float32)
        # Read ahead: the next rows can be asked for as soon as these are used up.
        offs_t += TOKENS
        next_entry = tl.load(entries_ptr + offs_t, mask=offs_t < end, other=0).to(tl.int32)
        token = (entry // K).to(tl.int64)
        strong = mask_t & (entry % K < N)
        d_a = tl.zeros((TOKENS,), tl.float32)
        if ADD_VALUES:
            d_a += tl.load(d_values_ptr + entry, mask=mask_t, other=0.0).to(tl.float32)
        # All loads before the first sum, which waits for every warp. Weights are read again, from the cache: in
        # registers they would leave room for fewer programs.
        if w_dec_ptr is not None:
            g_ptrs = d_out_ptr + token[:, None] * D + offs_d[None, :]
            g = tl.load(g_ptrs, mask=mask_t[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
            w = tl.load(w_dec_ptr + feature * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
            if w_lin_ptr is not None:
                w_lin = tl.load(w_lin_ptr + feature * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
        if v_ptr is not None:
            offs = token[:, None] * E + offs_e[None, :]
            mask = strong[:, None] & mask_e[None, :]
            t = tl.load(d_s_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            u = tl.load(d_q_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(v_ptr + feature * E + offs_e, mask=mask_e, other=0.0).to(tl.float32)[None, :]
        if w_dec_ptr is not None:
            if w_lin_ptr is not None:
                w += tl.where(strong[:, None], w_lin, 0.0)
            # First what a thread loads at once: for a single sum Triton 3.6 would copy g through shared memory.
            parts = tl.sum(tl.reshape(g * w, (TOKENS, BLOCK_D // VECTOR, VECTOR)), axis=2)
            d_a += tl.sum(parts, axis=1)
            if dec_out_ptr is not None:
                d_dec += tl.sum(a[:, None] * g, axis=0)
            if lin_out_ptr is not None:
                d_lin += tl.sum(tl.where(strong, a, 0.0)[:, None] * g, axis=0)
        if v_ptr is not None:
            t += 2 * a[:, None] * u * v  # the gradient of a V
            d_a += tl.sum(t * v, axis=1)
            if v_out_ptr is not None:
                d_v += tl.sum(a[:, None] * t, axis=0)
        tl.store(d_values_ptr + entry, d_a.to(d_values_ptr.dtype.element_ty), mask=mask_t)
        entry = next_entry
    tl.debug_barrier()  # a step of Adam changes the weights that other warps may still be reading

    # A part of a split feature goes to its slot, the gradients of the three weights side by side.
    part_ptr = parts_ptr + slot * WIDTH
    if dec_out_ptr is not None:
        if slot < 0:
            finish_row(
                d_dec, feature * D + offs_d, mask_d, dec_out_ptr, dec_exp_avg_ptr, dec_exp_avg_sq_ptr, dec_copy_ptr,
                dec_corrections_ptr, beta1, rest1, beta2, rest2, eps, DEC_MODE,
            )  # fmt: skip
        else:
            tl.store(part_ptr + offs_d, d_dec, mask=mask_d)
        part_ptr += D
    if lin_out_ptr is not None:
        if slot < 0:
            finish_row(
                d_lin, feature * D + offs_d, mask_d, lin_out_ptr, lin_exp_avg_ptr, lin_exp_avg_sq_ptr, lin_copy_ptr,
                lin_corrections_ptr, beta1, rest1, beta2, rest2, eps, LIN_MODE,
            )  # fmt: skip
        else:
            tl.store(part_ptr + offs_d, d_lin, mask=mask_d)
        part_ptr += D
    if v_out_ptr is not None:
        if slot < 0:
            finish_row(
                d_v, feature * E + offs_e, mask_e, v_out_ptr, v_exp_avg_ptr, v_exp_avg_sq_ptr, v_copy_ptr,
                v_corrections_ptr, beta1, rest1, beta2, rest2, eps, V_MODE,
            )  # fmt: skip
        else:
            tl.store(part_ptr + offs_e, d_v, mask=mask_e)


@triton.jit
def weight_gradient_kernel(
    order_ptr,  # [P], and so on: see decode_backward_kernel
    feature_ptr,
    start_ptr,
    length_ptr,
    slot_ptr,
    entries_ptr,  # [nnz] int64
    coefficients_ptr,  # [nnz] flattened (B, K)
    rows_ptr,  # [B, D]
    w_out_ptr,  # [M, D] see adam.finish_row
    w_exp_avg_ptr,
    w_exp_avg_sq_ptr,
    w_copy_ptr,
    w_corrections_ptr,
    parts_ptr,  # [slots, D] fp32
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    K,
    N,
    D: tl.constexpr,
    W_MODE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """gradient = sum of coefficient * rows[token] over a feature's entries with j < N. Grid (P, blocks of D); fp32."""
    item = tl.load(order_ptr + tl.program_id(0))
    length = tl.load(length_ptr + item)
    if length < 0:
        return
    feature = tl.load(feature_ptr + item).to(tl.int64)
    start = tl.load(start_ptr + item)
    slot = tl.load(slot_ptr + item).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    grad = tl.zeros((BLOCK_D,), tl.float32)
    for position in tl.range(start, start + length, TOKENS, num_stages=STAGES):
        offs_t = position + tl.arange(0, TOKENS)
        mask_t = offs_t < start + length
        entry = tl.load(entries_ptr + offs_t, mask=mask_t, other=0).to(tl.int32)
        mask_t = mask_t & (entry % K < N)
        coefficient = tl.load(coefficients_ptr + entry, mask=mask_t, other=0.0).to(tl.float32)
        rows_ptrs = rows_ptr + (entry // K).to(tl.int64)[:, None] * D + offs_d[None, :]
        rows = tl.load(rows_ptrs, mask=mask_t[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
        grad += tl.sum(coefficient[:, None] * rows, axis=0)
    if slot < 0:
        finish_row(
            grad, feature * D + offs_d, mask_d, w_out_ptr, w_exp_avg_ptr, w_exp_avg_sq_ptr, w_copy_ptr,
            w_corrections_ptr, beta1, rest1, beta2, rest2, eps, W_MODE,
        )  # fmt: skip
    else:
        tl.store(parts_ptr + slot * D + offs_d, grad, mask=mask_d)


@triton.jit
def feature_sums_kernel(
    offsets_ptr,  # [M + 1] int32: feature f owns entries offsets[f] ... offsets[f + 1]
    entries_ptr,  # [nnz] int64
    coefficients_ptr,  # [nnz] flattened (B, K)
    sums_ptr,  # [M] fp32 out
    M,
    FEATURES: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """sums[f] = the coefficients of f's entries, added up in fp32. Grid (cdiv(M, FEATURES),)."""
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    mask_m = feature < M
    start = tl.load(offsets_ptr + feature, mask=mask_m, other=0)
    end = tl.load(offsets_ptr + feature + 1, mask=mask_m, other=0)
    acc = tl.zeros((FEATURES, ENTRIES), tl.float32)
    for position in range(0, tl.max(end - start, axis=0), ENTRIES):
        offs = start[:, None] + position + tl.arange(0, ENTRIES)[None, :]
        mask = offs < end[:, None]
        entry = tl.load(entries_ptr + offs, mask=mask, other=0)
        acc += tl.load(coefficients_ptr + entry, mask=mask, other=0.0).to(tl.float32)
    tl.store(sums_ptr + feature, tl.sum(acc, axis=1), mask=mask_m)


@triton.jit
def add_slots_kernel(
    slot_feature_ptr,  # [slots]: the feature whose first slot this is, or -1
    parts_ptr,  # [slots, stride_parts] fp32
    w_out_ptr,  # [M, width] see adam.finish_row
    w_exp_avg_ptr,
    w_exp_avg_sq_ptr,
    w_copy_ptr,
    w_corrections_ptr,
    offsets_ptr,  # [M + 1] int32: entries of features
    stride_parts,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    width,
    W_MODE: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """gradient[f] = the parts of f, added in order. Grid (slots, blocks of the width); only first slots do anything."""
    slot = tl.program_id(0).to(tl.int64)
    feature = tl.load(slot_feature_ptr + slot).to(tl.int64)
    if feature < 0:
        return
    count = tl.load(offsets_ptr + feature + 1) - tl.load(offsets_ptr + feature)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < width
    grad = tl.zeros((BLOCK,), tl.float32)
    for part in range(0, tl.cdiv(count, SEGMENT)):
        grad += tl.load(parts_ptr + (slot + part) * stride_parts + offs, mask=mask, other=0.0)
    finish_row(
        grad, feature * width + offs, mask, w_out_ptr, w_exp_avg_ptr, w_exp_avg_sq_ptr, w_copy_ptr,
        w_corrections_ptr, beta1, rest1, beta2, rest2, eps, W_MODE,
    )  # fmt: skip


@triton.jit
def gathered_dot_kernel(
    indices_ptr,  # [B, K] int64
    rows_ptr,  # [B, D]
    w_dec_ptr,  # [M, D]
    w_lin_ptr,  # [M, D] or None
    d_values_ptr,  # [B, K] out
    K,
    N,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """d_values = rows . W_dec[i_j] + (j < N) rows . W_lin[i_j]. Grid (B, cdiv(K, FEATURES)); fp32."""
    row = tl.program_id(0).to(tl.int64)
    offs_k = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    mask_k = offs_k < K
    feature = tl.load(indices_ptr + row * K + offs_k, mask=mask_k, other=0)
    acc = tl.zeros((FEATURES,), tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        rows = tl.load(rows_ptr + row * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        mask = mask_k[:, None] & mask_d[None, :]
        w = tl.load(w_dec_ptr + feature[:, None] * D + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        if w_lin_ptr is not None:
            mask = mask & (offs_k < N)[:, None]
            w += tl.load(w_lin_ptr + feature[:, None] * D + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += tl.sum(w * rows[None, :], axis=1)
    tl.store(d_values_ptr + row * K + offs_k, acc.to(d_values_ptr.dtype.element_ty), mask=mask_k)


class Decoder(NamedTuple):
    """One weight of the decoder and where its gradient goes (None: it gets none)."""

    weight: Tensor
    destination: Destination | None


def decode_backward(
    items: WorkItems,
    values: Tensor,
    n: int,
    d_out: Tensor | None,
    d_s: Tensor | None,
    d_q: Tensor | None,
    dec: Decoder | None,
    lin: Decoder | None,
    v: Decoder | None,
    d_values: Tensor,
    add_values: bool,
) -> None:
    """Write d_values (B, K), or add to it, and the gradients of the weights given. D up to WIDEST.

    values (B, K); d_out (B, D) with dec or lin, d_s and d_q (B, E) with v: all contiguous. Parts of features that are
    split take B * K / 32 bytes for each column of the weights: 134 MB at B=8192 K=64 D=4096.
    """
    K = values.shape[1]
    D, E = 0 if d_out is None else d_out.shape[1], 0 if d_s is None else d_s.shape[1]
    wanted = [w for w in (dec, lin, v) if w is not None and w.destination is not None]
    width = sum(w.weight.shape[1] for w in wanted)
    parts = torch.empty(items.n_slots, width, dtype=torch.float32, device=values.device)
    block_d = power_of_two(max(D, 16))
    gathered = [(d_out, K), (d_s, n), (d_q, n)]
    launch(
        decode_backward_kernel,
        (len(items.feature),),
        {
            **_item_arguments(items),
            "values_ptr": values,
            "d_values_ptr": d_values,
            "d_out_ptr": d_out,
            "d_s_ptr": d_s,
            "d_q_ptr": d_q,
            "w_dec_ptr": None if dec is None else dec.weight,
            "w_lin_ptr": None if lin is None else lin.weight,
            "v_ptr": None if v is None else v.weight,
            **_destination_arguments("dec", dec),
            **_destination_arguments("lin", lin),
            **_destination_arguments("v", v),
            "parts_ptr": parts,
            **hyperparameters(*(w.destination for w in wanted)),
            "D": D,
            "E": E,
            "K": K,
            "N": n,
            "ADD_VALUES": add_values,
            "WIDTH": width,
            "BLOCK_D": block_d,
            "BLOCK_E": power_of_two(max(E, 16)),
            "VECTOR": 1 if v is None else max(1, min(16 // values.element_size(), D & -D)),
            "TOKENS": 2,
            "STAGES": 1,
        },
        num_warps=max(2, block_d // 512),
        bytes_moved=len(values) * sum(t.shape[1] * t.element_size() * k for t, k in gathered if t is not None)
        + values.numel() * (8 + 2 * values.element_size())
        + sum(_bytes_of(w) for w in (dec, lin, v)),
    )
    column = 0
    for weight in wanted:
        _add_slots(items, parts[:, column:], weight.weight.shape[1], weight.destination)
        column += weight.weight.shape[1]


def weight_gradient(
    items: WorkItems, coefficients: Tensor, rows: Tensor, destination: Destination, n: int | None = None
) -> None:
    """sum of coefficients (B, K) * rows (B, D) over each feature's entries; of the n strongest, if given.

    Both contiguous.
    """
    K, D = coefficients.shape[1], rows.shape[1]
    parts = torch.empty(items.n_slots, D, dtype=torch.float32, device=rows.device)
    block_d = min(power_of_two(max(D, 16)), WIDEST_BLOCK)
    launch(
        weight_gradient_kernel,
        (len(items.feature), triton.cdiv(D, block_d)),
        {
            **_item_arguments(items),
            "coefficients_ptr": coefficients,
            "rows_ptr": rows,
            **destination.arguments("w"),
            "parts_ptr": parts,
            **hyperparameters(destination),
            "D": D,
            "K": K,
            "N": K if n is None else n,
            "BLOCK_D": block_d,
            "TOKENS": 2,
            "STAGES": 4,
        },
        num_warps=8 if block_d > 1024 else 4,
        bytes_moved=rows.element_size() * coefficients.numel() * D
        + coefficients.numel() * (8 + coefficients.element_size())
        + _bytes_written(destination),
    )
    _add_slots(items, parts, D, destination)


def feature_sums(items: WorkItems, coefficients: Tensor, d_sae: int) -> Tensor:
    """The sum of each feature's coefficients (B, K): (d_sae) in fp32."""
    sums = torch.empty(d_sae, dtype=torch.float32, device=coefficients.device)
    features = 16
    launch(
        feature_sums_kernel,
        (triton.cdiv(d_sae, features),),
        {
            "offsets_ptr": items.offsets,
            "entries_ptr": items.entries,
            "coefficients_ptr": coefficients,
            "sums_ptr": sums,
            "M": d_sae,
            "FEATURES": features,
            "ENTRIES": 32,
        },
        num_warps=4,
        bytes_moved=coefficients.numel() * (8 + coefficients.element_size()) + 8 * d_sae,
    )
    return sums


def gathered_dot(indices: Tensor, rows: Tensor, W_dec: Tensor, W_lin: Tensor | None, n: int, d_values: Tensor) -> None:
    """d_values (B, K) = rows . W_dec[i_j], for the n strongest + rows . W_lin[i_j]; any width. All contiguous."""
    (B, K), D = indices.shape, rows.shape[1]
    launch(
        gathered_dot_kernel,
        (B, triton.cdiv(K, 4)),
        {
            "indices_ptr": indices,
            "rows_ptr": rows,
            "w_dec_ptr": W_dec,
            "w_lin_ptr": W_lin,
            "d_values_ptr": d_values,
            "D": D,
            "K": K,
            "N": n,
            "BLOCK_D": 1024,
            "FEATURES": 4,
        },
        num_warps=4,
        bytes_moved=B
        * D
        * ((K + (n if W_lin is not None else 0)) * W_dec.element_size() + K // 4 * rows.element_size()),
    )


def _item_arguments(items: WorkItems) -> dict[str, object]:
    names = ("order", "feature", "start", "length", "slot", "entries")
    return {f"{name}_ptr": getattr(items, name) for name in names}


def _destination_arguments(name: str, weight: Decoder | None) -> dict[str, object]:
    return absent(name) if weight is None or weight.destination is None else weight.destination.arguments(name)


def _add_slots(items: WorkItems, parts: Tensor, width: int, destination: Destination) -> None:
    """Finish the gradients of split features from their parts (slots, >= width)."""
    whole = is_step(destination) and destination.unit_norm
    block = max(1024, power_of_two(width)) if whole else 1024  # a norm is that of a whole row
    launch(
        add_slots_kernel,
        (items.n_slots, triton.cdiv(width, block)),
        {
            "slot_feature_ptr": items.slot_feature,
            "parts_ptr": parts,
            **destination.arguments("w"),
            "offsets_ptr": items.offsets,
            "stride_parts": parts.stride(0),
            **hyperparameters(destination),
            "width": width,
            "SEGMENT": SEGMENT,
            "BLOCK": block,
        },
        num_warps=8 if block > 1024 else 4,
        bytes_moved=items.n_slots * width * 4,
    )


def _bytes_written(destination: Destination) -> int:
    """By a gradient, or by a step of Adam: the weight and its moments read and written, the copy written."""
    if is_gradient(destination):
        return destination.out.numel() * destination.out.element_size() * (1 + int(destination.add))
    assert is_step(destination)
    each = 2 * sum(t.element_size() for t in (destination.weight, destination.exp_avg, destination.exp_avg_sq))
    return destination.weight.numel() * (each + (0 if destination.copy is None else destination.copy.element_size()))


def _bytes_of(weight: Decoder | None) -> int:
    if weight is None:
        return 0
    read = weight.weight.numel() * weight.weight.element_size()
    return read + (0 if weight.destination is None else _bytes_written(weight.destination))
