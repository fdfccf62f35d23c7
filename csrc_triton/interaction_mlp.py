"""The MLP on pooled pairwise products, its error against a target, and the gradients: kernels and launchers.

    z = (s^2 - q) / 2,  zt = dropout(z),  h = relu(zt @ W1.T + b1),  reconstruction = base + h @ W2.T + bias

Path "triton" forms z where it is read and keeps nothing for the backward, which computes h once more. Path "cublas"
leaves the products to torch. Both drop the same entries and sum in one fixed order: the same bits every run.
"""

from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.dot import dot, precision
from csrc_triton.launch import launch

Path = Literal["triton", "cublas"]


class _Tile(NamedTuple):
    """Part of a matrix that one program makes, the depth of each step of a product, and the compile options."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# By bytes per number. Kernels that form z or the dropout mask hold more in registers: shallower steps.
_PRODUCT = {2: _Tile(64, 128, 64, 8, 3), 4: _Tile(64, 64, 16, 8, 2)}
# Less deep, it takes 8 bytes of stack on sm_120.
_D_PRODUCT = {2: _PRODUCT[2], 4: _Tile(64, 64, 32, 8, 2)}
_POOLED = {2: _Tile(64, 128, 32, 8, 3), 4: _Tile(64, 64, 16, 8, 2)}
# The dropout mask and s meet the finished sums: 128 columns of them spill where strides are odd.
_D_POOLED = {2: _Tile(64, 64, 32, 8, 3), 4: _POOLED[4]}
_ELEMENTWISE = _Tile(16, 128, 0, 4, 1)
# Two for each processor of an H200: what a product summed over tokens is cut into.
_PROGRAMS = 264


# ---- helpers --------------------------------------------------------------------------------------------------------


@triton.jit
def _own_rows(WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Rows of this program's tile, int64: times the width they pass 2**31. Tiles of the same rows meet in L2."""
    row = tl.program_id(0) // tl.cdiv(WIDTH, BLOCK_COLUMNS)
    return row.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)


@triton.jit
def _own_columns(WIDTH: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Columns of this program's tile."""
    column = tl.program_id(0) % tl.cdiv(WIDTH, BLOCK_COLUMNS)
    return column * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)


@triton.jit
def _dropout(z, seed_ptr, offs_b, offs_e, E: tl.constexpr, DROPOUT: tl.constexpr):
    """z (rows, columns) times mask / (1 - DROPOUT); the mask depends on the seed and the place in (B, E) only."""
    if DROPOUT > 0:
        draw = tl.rand(tl.load(seed_ptr), offs_b[:, None] * E + offs_e[None, :])
        z *= tl.where(draw >= DROPOUT, 1 / (1 - DROPOUT), 0.0)
    return z


@triton.jit
def _pooled(s_ptr, q_ptr, seed_ptr, offs_b, offs_e, B, E: tl.constexpr, DROPOUT: tl.constexpr):
    """zt = dropout((s^2 - q) / 2) at rows offs_b and columns offs_e, fp32; 0 outside (B, E)."""
    offs = offs_b[:, None] * E + offs_e[None, :]
    mask = (offs_b < B)[:, None] & (offs_e < E)[None, :]
    s = tl.load(s_ptr + offs, mask=mask, other=0.0)
    q = tl.load(q_ptr + offs, mask=mask, other=0.0)
    return _dropout((s * s - q) * 0.5, seed_ptr, offs_b, offs_e, E, DROPOUT)


@triton.jit
def _pre_activation(
    s_ptr,
    q_ptr,
    W1_ptr,
    b1_ptr,
    seed_ptr,
    offs_b,
    offs_e,
    B,
    E: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """zt @ W1.T + b1 at rows offs_b and columns offs_e, fp32."""
    acc = tl.zeros([offs_b.shape[0], offs_e.shape[0]], tl.float32)
    for start in range(0, E, BLOCK_DEPTH):
        offs_k = start + tl.arange(0, BLOCK_DEPTH)
        zt = _pooled(s_ptr, q_ptr, seed_ptr, offs_b, offs_k, B, E, DROPOUT)
        mask = (offs_e < E)[:, None] & (offs_k < E)[None, :]
        W1 = tl.load(W1_ptr + offs_e[:, None] * E + offs_k[None, :], mask=mask, other=0.0)
        acc = dot(zt.to(W1.dtype), W1.T, acc, PRECISION)
    return acc + tl.load(b1_ptr + offs_e, mask=offs_e < E, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _finish(interaction, base_ptr, bias_ptr, target_ptr, out_ptr, errors_ptr, offs_b, offs_d, B, D: tl.constexpr):
    """Stores base + interaction + bias at rows offs_b and columns offs_d, and the tile's squared error unrounded."""
    offs = offs_b[:, None] * D + offs_d[None, :]
    mask = (offs_b < B)[:, None] & (offs_d < D)[None, :]
    out = interaction + tl.load(bias_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)[None, :]
    out += tl.load(base_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)
    if target_ptr is not None:
        error = out - tl.load(target_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(errors_ptr + tl.program_id(0), tl.sum(tl.where(mask, error * error, 0.0)))


@triton.jit
def _finish_backward(dzt, s_ptr, seed_ptr, d_s_ptr, d_q_ptr, offs_b, offs_e, B, E: tl.constexpr, DROPOUT: tl.constexpr):
    """Stores d_s = dz * s and d_q = -dz / 2 at rows offs_b and columns offs_e, where dz = dropout(dzt)."""
    offs = offs_b[:, None] * E + offs_e[None, :]
    mask = (offs_b < B)[:, None] & (offs_e < E)[None, :]
    dz = _dropout(dzt, seed_ptr, offs_b, offs_e, E, DROPOUT)
    tl.store(d_s_ptr + offs, dz * tl.load(s_ptr + offs, mask=mask, other=0.0), mask=mask)
    tl.store(d_q_ptr + offs, dz * -0.5, mask=mask)


# ---- kernels of path "triton" ---------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["B"])
def hidden_kernel(
    s_ptr,  # (B, E) fp32
    q_ptr,  # (B, E) fp32
    W1_ptr,  # (E, E)
    b1_ptr,  # (E)
    seed_ptr,  # (1) int64
    h_ptr,  # (B, E) out
    B,
    E: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h = relu(zt @ W1.T + b1). Grid (tiles of h); accumulates in fp32."""
    offs_b = _own_rows(E, BLOCK_ROWS, BLOCK_COLUMNS)
    offs_e = _own_columns(E, BLOCK_COLUMNS)
    pre = _pre_activation(s_ptr, q_ptr, W1_ptr, b1_ptr, seed_ptr, offs_b, offs_e, B, E, DROPOUT, BLOCK_DEPTH, PRECISION)
    mask = (offs_b < B)[:, None] & (offs_e < E)[None, :]
    h = tl.where(pre <= 0, 0.0, pre)  # unlike maximum, lets NaN through
    tl.store(h_ptr + offs_b[:, None] * E + offs_e[None, :], h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B"])
def output_kernel(
    h_ptr,  # (B, E)
    W2_ptr,  # (D, E)
    base_ptr,  # (B, D)
    bias_ptr,  # (D)
    target_ptr,  # (B, D) or None
    out_ptr,  # (B, D) out
    errors_ptr,  # (programs) fp32 out, or None
    B,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = base + h @ W2.T + bias, errors = sum((out - target)^2) per tile.

    Grid (tiles of out); accumulates in fp32.
    """
    offs_b = _own_rows(D, BLOCK_ROWS, BLOCK_COLUMNS)
    offs_d = _own_columns(D, BLOCK_COLUMNS)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, E, BLOCK_DEPTH):
        offs_e = start + tl.arange(0, BLOCK_DEPTH)
        mask_e = (offs_e < E)[None, :]
        h = tl.load(h_ptr + offs_b[:, None] * E + offs_e[None, :], mask=(offs_b < B)[:, None] & mask_e, other=0.0)
        W2 = tl.load(W2_ptr + offs_d[:, None] * E + offs_e[None, :], mask=(offs_d < D)[:, None] & mask_e, other=0.0)
        acc = dot(h, W2.T, acc, PRECISION)
    _finish(acc, base_ptr, bias_ptr, target_ptr, out_ptr, errors_ptr, offs_b, offs_d, B, D)


@triton.jit(do_not_specialize=["B"])
def d_hidden_kernel(
    delta_ptr,  # (B, D)
    W2_ptr,  # (D, E)
    s_ptr,  # (B, E) fp32
    q_ptr,  # (B, E) fp32
    W1_ptr,  # (E, E)
    b1_ptr,  # (E)
    seed_ptr,  # (1) int64
    h_ptr,  # (B, E) out, or None
    dh_ptr,  # (B, E) out
    B,
    D: tl.constexpr,
    E: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dh = (delta @ W2) * (pre > 0), and h = relu(pre) once more. Grid (tiles of dh); accumulates in fp32."""
    offs_b = _own_rows(E, BLOCK_ROWS, BLOCK_COLUMNS)
    offs_e = _own_columns(E, BLOCK_COLUMNS)
    mask_b, mask_e = (offs_b < B)[:, None], (offs_e < E)[None, :]
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, D, BLOCK_DEPTH):
        offs_d = start + tl.arange(0, BLOCK_DEPTH)
        mask_d = offs_d < D
        delta = tl.load(delta_ptr + offs_b[:, None] * D + offs_d[None, :], mask=mask_b & mask_d[None, :], other=0.0)
        W2 = tl.load(W2_ptr + offs_d[:, None] * E + offs_e[None, :], mask=mask_d[:, None] & mask_e, other=0.0)
        acc = dot(delta, W2, acc, PRECISION)
    pre = _pre_activation(s_ptr, q_ptr, W1_ptr, b1_ptr, seed_ptr, offs_b, offs_e, B, E, DROPOUT, BLOCK_DEPTH, PRECISION)
    offs = offs_b[:, None] * E + offs_e[None, :]
    if h_ptr is not None:
        tl.store(h_ptr + offs, tl.where(pre <= 0, 0.0, pre).to(h_ptr.dtype.element_ty), mask=mask_b & mask_e)
    tl.store(dh_ptr + offs, tl.where(pre <= 0, 0.0, acc).to(dh_ptr.dtype.element_ty), mask=mask_b & mask_e)


@triton.jit(do_not_specialize=["B"])
def d_pooled_kernel(
    dh_ptr,  # (B, E)
    W1_ptr,  # (E, E)
    s_ptr,  # (B, E) fp32
    seed_ptr,  # (1) int64
    d_s_ptr,  # (B, E) fp32 out
    d_q_ptr,  # (B, E) fp32 out
    B,
    E: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dz = dropout(dh @ W1), d_s = dz * s, d_q = -dz / 2. Grid (tiles of dz); accumulates in fp32."""
    offs_b = _own_rows(E, BLOCK_ROWS, BLOCK_COLUMNS)
    offs_e = _own_columns(E, BLOCK_COLUMNS)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, E, BLOCK_DEPTH):
        offs_k = start + tl.arange(0, BLOCK_DEPTH)
        mask_k = offs_k < E
        dh = tl.load(
            dh_ptr + offs_b[:, None] * E + offs_k[None, :], mask=(offs_b < B)[:, None] & mask_k[None, :], other=0.0
        )
        W1 = tl.load(
            W1_ptr + offs_k[:, None] * E + offs_e[None, :], mask=mask_k[:, None] & (offs_e < E)[None, :], other=0.0
        )
        acc = dot(dh, W1, acc, PRECISION)
    _finish_backward(acc, s_ptr, seed_ptr, d_s_ptr, d_q_ptr, offs_b, offs_e, B, E, DROPOUT)


@triton.jit(do_not_specialize=["B"])
def d_weight_kernel(
    d_out_ptr,  # (B, M)
    input_ptr,  # (B, E), or None with POOL
    s_ptr,  # (B, E) fp32
    q_ptr,  # (B, E) fp32
    seed_ptr,  # (1) int64
    d_weight_ptr,  # (segments, M, E) fp32 out
    d_bias_ptr,  # (segments, M) fp32 out
    B,
    segment,  # tokens per segment, a multiple of BLOCK_DEPTH
    M: tl.constexpr,
    E: tl.constexpr,
    DROPOUT: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_weight = d_out.T @ input, d_bias = column sums of d_out, per segment of tokens; with POOL, input is zt.

    Grid (tiles of d_weight, segments); accumulates in fp32.
    """
    offs_m = _own_rows(E, BLOCK_ROWS, BLOCK_COLUMNS)
    offs_e = _own_columns(E, BLOCK_COLUMNS)
    pid_segment = tl.program_id(1).to(tl.int64)
    mask_m, mask_e = offs_m < M, offs_e < E
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    sums = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, segment, BLOCK_DEPTH):
        offs_b = pid_segment * segment + start + tl.arange(0, BLOCK_DEPTH)
        mask_b = offs_b < B
        d_out = tl.load(
            d_out_ptr + offs_b[:, None] * M + offs_m[None, :], mask=mask_b[:, None] & mask_m[None, :], other=0.0
        )
        if POOL:
            value = _pooled(s_ptr, q_ptr, seed_ptr, offs_b, offs_e, B, E, DROPOUT).to(d_out.dtype)
        else:
            value = tl.load(
                input_ptr + offs_b[:, None] * E + offs_e[None, :], mask=mask_b[:, None] & mask_e[None, :], other=0.0
            )
        acc = dot(d_out.T, value, acc, PRECISION)
        sums += tl.sum(d_out.to(tl.float32), axis=0)
    offs = (pid_segment * M + offs_m)[:, None] * E + offs_e[None, :]
    tl.store(d_weight_ptr + offs, acc, mask=mask_m[:, None] & mask_e[None, :])
    if tl.program_id(0) % tl.cdiv(E, BLOCK_COLUMNS) == 0:
        tl.store(d_bias_ptr + pid_segment * M + offs_m, sums, mask=mask_m)


# ---- kernels of path "cublas" ---------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["B"])
def pool_kernel(
    s_ptr,  # (B, E) fp32
    q_ptr,  # (B, E) fp32
    seed_ptr,  # (1) int64
    zt_ptr,  # (B, E) out
    B,
    E: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """zt = dropout((s^2 - q) / 2). Grid (tiles of zt); computes in fp32."""
    offs_b = _own_rows(E, BLOCK_ROWS, BLOCK_COLUMNS)
    offs_e = _own_columns(E, BLOCK_COLUMNS)
    zt = _pooled(s_ptr, q_ptr, seed_ptr, offs_b, offs_e, B, E, DROPOUT)
    mask = (offs_b < B)[:, None] & (offs_e < E)[None, :]
    tl.store(zt_ptr + offs_b[:, None] * E + offs_e[None, :], zt.to(zt_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B"])
def add_kernel(
    interaction_ptr,  # (B, D)
    base_ptr,  # (B, D)
    bias_ptr,  # (D)
    target_ptr,  # (B, D) or None
    out_ptr,  # (B, D) out
    errors_ptr,  # (programs) fp32 out, or None
    B,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """out = base + interaction + bias, errors = sum((out - target)^2) per tile. Grid (tiles of out); adds in fp32."""
    offs_b = _own_rows(D, BLOCK_ROWS, BLOCK_COLUMNS)
    offs_d = _own_columns(D, BLOCK_COLUMNS)
    mask = (offs_b < B)[:, None] & (offs_d < D)[None, :]
    interaction = tl.load(interaction_ptr + offs_b[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    _finish(interaction.to(tl.float32), base_ptr, bias_ptr, target_ptr, out_ptr, errors_ptr, offs_b, offs_d, B, D)


@triton.jit(do_not_specialize=["B"])
def d_pool_kernel(
    dzt_ptr,  # (B, E)
    s_ptr,  # (B, E) fp32
    seed_ptr,  # (1) int64
    d_s_ptr,  # (B, E) fp32 out
    d_q_ptr,  # (B, E) fp32 out
    B,
    E: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """dz = dropout(dzt), d_s = dz * s, d_q = -dz / 2. Grid (tiles of dz); computes in fp32."""
    offs_b = _own_rows(E, BLOCK_ROWS, BLOCK_COLUMNS)
    offs_e = _own_columns(E, BLOCK_COLUMNS)
    mask = (offs_b < B)[:, None] & (offs_e < E)[None, :]
    dzt = tl.load(dzt_ptr + offs_b[:, None] * E + offs_e[None, :], mask=mask, other=0.0).to(tl.float32)
    _finish_backward(dzt, s_ptr, seed_ptr, d_s_ptr, d_q_ptr, offs_b, offs_e, B, E, DROPOUT)


# ---- launchers ------------------------------------------------------------------------------------------------------


def interaction_mlp(
    base: Tensor,
    s: Tensor,
    q: Tensor,
    W1: Tensor,
    b1: Tensor,
    W2: Tensor,
    bias: Tensor,
    target: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    path: Path,
) -> tuple[Tensor, Tensor | None]:
    """base + W2 relu(W1 dropout((s^2 - q) / 2) + b1) + bias in the dtype of base, and its squared error, summed.

    base, target (B, D) float; s, q (B, E) fp32; W1 (E, E), b1 (E), W2 (D, E), bias (D) in the dtype of the products.
    seed: one int64 on the device, None without dropout. The error is taken before rounding, fp32; None without target.
    """
    base, s, q, W1, b1, W2, bias = (t.contiguous() for t in (base, s, q, W1, b1, W2, bias))
    target = None if target is None else target.contiguous()
    (B, D), E = base.shape, len(W1)
    out = torch.empty_like(base)
    tile = _ELEMENTWISE if path == "cublas" else _PRODUCT[W2.itemsize]
    errors = None if target is None else s.new_empty(_tiles(B, D, tile))
    ends: dict[str, Any] = dict(base_ptr=base, bias_ptr=bias, target_ptr=target, out_ptr=out, errors_ptr=errors)
    if path == "cublas":
        h = torch.addmm(b1, pool(s, q, dropout, seed, W1.dtype), W1.T).relu_()
        _start(add_kernel, (B, D), tile, interaction_ptr=h @ W2.T, **ends, B=B, D=D)
    else:
        h = W1.new_empty(B, E)
        z: dict[str, Any] = dict(s_ptr=s, q_ptr=q, seed_ptr=seed, DROPOUT=dropout)
        weights: dict[str, Any] = dict(W1_ptr=W1, b1_ptr=b1)
        _start(hidden_kernel, (B, E), _POOLED[W1.itemsize], 2 * B * E * E, **z, **weights, h_ptr=h, B=B, E=E)
        _start(output_kernel, (B, D), tile, 2 * B * D * E, h_ptr=h, W2_ptr=W2, **ends, B=B, D=D, E=E)
    return out, None if errors is None else errors.sum()


def interaction_mlp_backward(
    delta: Tensor,
    s: Tensor,
    q: Tensor,
    W1: Tensor,
    b1: Tensor,
    W2: Tensor,
    dropout: float,
    seed: Tensor | None,
    need_weights: bool,
    path: Path,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """d_s, d_q (B, E) fp32, and d_W1, d_b1, d_W2, d_bias in the dtype of the weights, None unless needed.

    delta (B, D), the gradient of the reconstruction: any strides, any float dtype.
    """
    delta = delta.to(W2.dtype).contiguous()
    s, q, W1, b1, W2 = (t.contiguous() for t in (s, q, W1, b1, W2))
    (B, D), E = delta.shape, len(W1)
    d_s, d_q = torch.empty_like(s), torch.empty_like(s)
    ends: dict[str, Any] = dict(s_ptr=s, seed_ptr=seed, d_s_ptr=d_s, d_q_ptr=d_q, B=B, E=E, DROPOUT=dropout)
    if path == "cublas":
        zt = pool(s, q, dropout, seed, W1.dtype)
        h = torch.addmm(b1, zt, W1.T).relu_()
        dh = (delta @ W2).masked_fill_(h <= 0, 0)
        _start(d_pool_kernel, (B, E), _ELEMENTWISE, dzt_ptr=dh @ W1, **ends)
        if not need_weights:
            return d_s, d_q, None, None, None, None
        d_b1, d_bias = (t.sum(0, dtype=torch.float32).to(t.dtype) for t in (dh, delta))
        return d_s, d_q, dh.T @ zt, d_b1, delta.T @ h, d_bias
    tile = _POOLED[W1.itemsize]
    h = W1.new_empty(B, E) if need_weights else None
    dh = W1.new_empty(B, E)
    z: dict[str, Any] = dict(s_ptr=s, q_ptr=q, seed_ptr=seed, DROPOUT=dropout)
    inputs: dict[str, Any] = dict(delta_ptr=delta, W2_ptr=W2, W1_ptr=W1, b1_ptr=b1)
    flops = 2 * B * D * E + 2 * B * E * E
    _start(d_hidden_kernel, (B, E), tile, flops, **z, **inputs, h_ptr=h, dh_ptr=dh, B=B, D=D, E=E)
    _start(d_pooled_kernel, (B, E), _D_POOLED[W1.itemsize], 2 * B * E * E, dh_ptr=dh, W1_ptr=W1, **ends)
    if not need_weights:
        return d_s, d_q, None, None, None, None
    no_z: dict[str, Any] = dict(s_ptr=None, q_ptr=None, seed_ptr=None, DROPOUT=0.0)
    d_W2, d_bias = _d_weight(delta, E, _D_PRODUCT[W2.itemsize], input_ptr=h, **no_z, POOL=False)
    d_W1, d_b1 = _d_weight(dh, E, tile, input_ptr=None, **z, POOL=True)
    return d_s, d_q, d_W1, d_b1, d_W2, d_bias


def pool(s: Tensor, q: Tensor, dropout: float, seed: Tensor | None, dtype: torch.dtype) -> Tensor:
    """zt = dropout((s^2 - q) / 2) (B, E) in `dtype`, of contiguous s and q."""
    zt, (B, E) = torch.empty_like(s, dtype=dtype), s.shape
    z: dict[str, Any] = dict(s_ptr=s, q_ptr=q, seed_ptr=seed, DROPOUT=dropout)
    _start(pool_kernel, (B, E), _ELEMENTWISE, **z, zt_ptr=zt, B=B, E=E)
    return zt


def _d_weight(d_out: Tensor, E: int, tile: _Tile, **inputs: Any) -> tuple[Tensor, Tensor]:
    """d_weight (M, E) and d_bias (M) of a layer from the gradient d_out (B, M) of what it gave."""
    B, M = d_out.shape
    n, segment = _segments(B, M, E, tile)
    d_weight = d_out.new_empty(n, M, E, dtype=torch.float32)
    d_bias = d_out.new_empty(n, M, dtype=torch.float32)
    outputs: dict[str, Any] = dict(d_weight_ptr=d_weight, d_bias_ptr=d_bias)
    sizes = {"B": B, "segment": segment, "M": M, "E": E}
    _start(d_weight_kernel, (M, E), tile, 2 * B * M * E, n, d_out_ptr=d_out, **inputs, **outputs, **sizes)
    return d_weight.sum(0).to(d_out.dtype), d_bias.sum(0).to(d_out.dtype)


def _start(
    kernel: Any, shape: tuple[int, int], tile: _Tile, flops: int = 0, segments: int = 1, **arguments: Any
) -> None:
    """Start `kernel` on the tiles of a matrix of `shape`. Each of its tensors is read or written once."""
    blocks: dict[str, Any] = dict(BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns)
    if tile.depth:
        blocks |= {"BLOCK_DEPTH": tile.depth, "PRECISION": precision()}
    launch(
        kernel,
        (_tiles(*shape, tile), segments),
        arguments | blocks,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        bytes_moved=sum(t.nbytes for t in arguments.values() if isinstance(t, Tensor)),
        flops=flops,
    )


def _tiles(rows: int, columns: int, tile: _Tile) -> int:
    return -(-rows // tile.rows) * -(-columns // tile.columns)


def _segments(B: int, M: int, E: int, tile: _Tile) -> tuple[int, int]:
    """Into how many segments the tokens behind an (M, E) gradient are cut, and how long one is."""
    most = max(1, _PROGRAMS // _tiles(M, E, tile))
    segment = max(1, -(-B // (most * tile.depth))) * tile.depth
    return -(-B // segment), segment


def cost(B: int, D: int, E: int, itemsize: int) -> dict[Path, tuple[int, int]]:
    """Counted (bytes, flops) of each path, forward and backward.

    `itemsize`: bytes of a number in the weights, base, target and delta. A matrix counts once for each kernel that
    reads or writes it; vectors are left out.
    """
    BE, BD, DE, EE = B * E, B * D, D * E, E * E
    s_q = 4 * 2 * BE  # or their gradients
    pool, pre = s_q + itemsize * BE, itemsize * (2 * BE + EE)  # pre: any (B, E) @ (E, E)
    triton_bytes = s_q + itemsize * (EE + BE) + itemsize * (BE + DE + 3 * BD)  # base, out, and target
    # After the product with W1, relu in place.
    cublas_bytes = pool + pre + itemsize * 2 * BE + itemsize * (BE + DE + BD) + itemsize * 4 * BD
    flops = 2 * BE * (E + D)
    n_W1, _ = _segments(B, E, E, _POOLED[itemsize])
    n_W2, _ = _segments(B, D, E, _D_PRODUCT[itemsize])
    d_pool = s_q + 4 * BE
    triton_bytes += s_q + itemsize * (BD + DE + EE + 2 * BE)  # d_hidden
    triton_bytes += d_pool + itemsize * (BE + EE)
    triton_bytes += s_q + itemsize * (BD + 2 * BE)  # d_weight, twice
    triton_bytes += 8 * (n_W2 * DE + n_W1 * EE) + itemsize * (DE + EE)  # its partials, written and read
    cublas_bytes += pool + pre + itemsize * 2 * BE  # h once more
    cublas_bytes += itemsize * (BD + DE + BE) + (itemsize * 3 + 2) * BE  # dh, and its mask
    cublas_bytes += pre + d_pool + itemsize * BE
    cublas_bytes += pre + itemsize * (BD + DE + BE) + itemsize * (BE + BD)  # weights, biases
    flops += 2 * BE * (3 * E + 2 * D)
    return {"triton": (triton_bytes, flops), "cublas": (cublas_bytes, flops)}
