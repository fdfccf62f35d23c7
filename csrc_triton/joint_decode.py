"""From the code to the reconstruction: every sum over active features in one kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.launch import launch
from csrc_triton.plan import power_of_two


@triton.jit
def _entries(values_ptr, indices_ptr, row, offs_k, end, K):
    """The values and features of these entries of a row, 0 from `end` on; int64: feature * D passes 2**31."""
    a = tl.load(values_ptr + row * K + offs_k, mask=offs_k < end, other=0.0).to(tl.float32)
    return a, tl.load(indices_ptr + row * K + offs_k, mask=offs_k < end, other=0).to(tl.int64)


@triton.jit
def _terms(a, feature, w_ptr, offs, mask, WIDTH: tl.constexpr):
    """a * w[feature] in fp32; fillers, whose value is 0, read nothing."""
    w = tl.load(w_ptr + feature[:, None] * WIDTH + offs[None, :], mask=(a != 0)[:, None] & mask[None, :], other=0.0)
    return a[:, None] * w.to(tl.float32)


@triton.jit
def joint_decode_kernel(
    values_ptr,  # [B, K]
    indices_ptr,  # [B, K] int64
    w_dec_ptr,  # [M, D] or None
    w_lin_ptr,  # [M, D] or None
    v_ptr,  # [M, E] or None
    bias_ptr,  # [D] or None
    target_ptr,  # [B, D] or None
    out_ptr,  # [B, D] out
    s_ptr,  # [B, E] out, fp32
    q_ptr,  # [B, E] out, fp32
    error_ptr,  # [B, blocks of D] out, fp32: squared error of this program's part of a row
    K,
    N,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out = sum_{j<K} a_j W_dec[i_j] + sum_{j<N} a_j W_lin[i_j] + bias; s = sum_{j<N} a_j V[i_j], q of squares.

    Grid (B, blocks of D); sums in fp32. ROWS rows of a weight are added while the next STAGES - 2 times ROWS are on
    their way to shared memory. The programs of the first block of D make s and q too.
    """
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs_d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    acc = tl.zeros((BLOCK_D,), tl.float32)
    first = 0
    if w_lin_ptr is not None:
        for start in tl.range(0, N, ROWS, num_stages=STAGES):
            a, feature = _entries(values_ptr, indices_ptr, row, start + tl.arange(0, ROWS), N, K)
            acc += tl.sum(_terms(a, feature, w_dec_ptr, offs_d, mask_d, D), axis=0)
            acc += tl.sum(_terms(a, feature, w_lin_ptr, offs_d, mask_d, D), axis=0)
        first = N
    if w_dec_ptr is not None:
        for start in tl.range(first, K, ROWS, num_stages=STAGES):
            a, feature = _entries(values_ptr, indices_ptr, row, start + tl.arange(0, ROWS), K, K)
            acc += tl.sum(_terms(a, feature, w_dec_ptr, offs_d, mask_d, D), axis=0)
    if v_ptr is not None:
        if block == 0:
            offs_e = tl.arange(0, BLOCK_E)
            mask_e = offs_e < E
            s = tl.zeros((BLOCK_E,), tl.float32)
            q = tl.zeros((BLOCK_E,), tl.float32)
            for start in tl.range(0, N, ROWS, num_stages=STAGES):
                a, feature = _entries(values_ptr, indices_ptr, row, start + tl.arange(0, ROWS), N, K)
                term = _terms(a, feature, v_ptr, offs_e, mask_e, E)
                s += tl.sum(term, axis=0)
                q += tl.sum(term * term, axis=0)
            tl.store(s_ptr + row * E + offs_e, s, mask=mask_e)
            tl.store(q_ptr + row * E + offs_e, q, mask=mask_e)
    if w_dec_ptr is not None:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * D + offs_d, acc.to(out_ptr.dtype.element_ty), mask=mask_d)
        if target_ptr is not None:
            target = tl.load(target_ptr + row * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
            residual = tl.where(mask_d, acc - target, 0.0)
            tl.store(error_ptr + row * tl.num_programs(1) + block, tl.sum(residual * residual, axis=0))


def joint_decode(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor | None,
    W_lin: Tensor | None,
    V: Tensor | None,
    bias: Tensor | None,
    target: Tensor | None,
    n: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """out (B, D) in the dtype of W_dec, s and q (B, E) in fp32, and the squared error against target, summed, fp32.

    values (B, K), indices (B, K) int64; W_dec, W_lin (M, D), V (M, E), bias (D), target (B, D). A weight that is None
    leaves its sum out (width 0). One entry makes no pairs: n = 1 gives s = q = 0.
    """
    values, indices = values.contiguous(), indices.contiguous()
    (rows, K), D, E = values.shape, 0 if W_dec is None else W_dec.shape[1], 0 if V is None else V.shape[1]
    weights = tuple(None if w is None else w.contiguous() for w in (W_dec, W_lin, V if n > 1 else None))
    out = values.new_empty(rows, 0) if W_dec is None else W_dec.new_empty(rows, D)
    make = torch.empty if n > 1 else torch.zeros
    s, q = (make(rows, E, dtype=torch.float32, device=values.device) for _ in range(2))
    wide = any(w is not None and w.element_size() == 4 for w in weights)
    block_d = min(power_of_two(max(D, 16)), 1024)
    blocks = max(1, triton.cdiv(D, block_d))
    error = None if target is None else torch.empty(rows, blocks, dtype=torch.float32, device=values.device)
    gathered = [(weights[0], K), (weights[1], n), (weights[2], n)]
    launch(
        joint_decode_kernel,
        (rows, blocks),
        {
            "values_ptr": values,
            "indices_ptr": indices,
            "w_dec_ptr": weights[0],
            "w_lin_ptr": weights[1],
            "v_ptr": weights[2],
            "bias_ptr": None if bias is None else bias.contiguous(),
            "target_ptr": None if target is None else target.contiguous(),
            "out_ptr": out,
            "s_ptr": s,
            "q_ptr": q,
            "error_ptr": error,
            "D": D,
            "E": E,
            "K": K,
            "N": n,
            "BLOCK_D": block_d,
            "BLOCK_E": power_of_two(max(E, 16)),
            "ROWS": 2 if wide else 4,
            "STAGES": 3,
        },
        num_warps=4,
        bytes_moved=rows * sum(w.shape[1] * w.element_size() * count for w, count in gathered if w is not None)
        + rows * (K * (8 + values.element_size()) + D * (out.element_size() + (0 if target is None else 4)) + 8 * E),
    )
    return out, s, q, None if error is None else error.sum()
