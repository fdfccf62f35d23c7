"""The encoder's matrix product with the group maxima taken on the way, so that nothing reads it once more for them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.dot import dot
from csrc_triton.keys import sort_key
from csrc_triton.launch import launch

# Rows and features of a tile, and how much of the sum at a time. Square tiles stay clean where strides are odd.
_TILE = {"BLOCK_R": 128, "BLOCK_M": 128, "BLOCK_D": 64, "ORDER": 8}


@triton.jit
def encode_gemm_kernel(
    x_ptr,  # [R, D]
    w_enc_ptr,  # [M, D]
    b_enc_ptr,  # [M]
    y_ptr,  # [R, NG * GROUP] out: pre-activations; columns past M are left as they are
    maxima_ptr,  # [R, NG] out: sort keys of groups of GROUP features
    R,
    M,
    NG,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ORDER: tl.constexpr,
):
    """y = x @ W_enc.T + b_enc, summed in fp32 and rounded once; the maxima are of the rounded values.

    Grid (tiles,), ordered so that ORDER tiles of rows share the same rows of W_enc while these are in cache.
    """
    n_r, n_m = tl.cdiv(R, BLOCK_R), tl.cdiv(M, BLOCK_M)
    tile = tl.program_id(0)
    band = tile // (ORDER * n_m)
    height = tl.minimum(n_r - band * ORDER, ORDER)
    tile_r = band * ORDER + (tile % (ORDER * n_m)) % height
    tile_m = (tile % (ORDER * n_m)) // height

    offs_r = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    # Rows past the end read the first ones: a mask would cost more, and what they give is not stored.
    x_ptrs = x_ptr + (offs_r % R).to(tl.int64)[:, None] * D + offs_d[None, :]
    w_ptrs = w_enc_ptr + (offs_m % M).to(tl.int64)[None, :] * D + offs_d[:, None]
    acc = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    for start in range(0, D, BLOCK_D):
        x = tl.load(x_ptrs, mask=offs_d[None, :] < D - start, other=0.0)
        w = tl.load(w_ptrs, mask=offs_d[:, None] < D - start, other=0.0)
        acc = dot(x, w, acc, "ieee")
        x_ptrs += BLOCK_D
        w_ptrs += BLOCK_D
    mask_m = offs_m < M
    acc += tl.load(b_enc_ptr + offs_m, mask=mask_m, other=0.0).to(tl.float32)[None, :]
    y = acc.to(y_ptr.dtype.element_ty)
    mask_r = offs_r < R
    y_ptrs = y_ptr + offs_r.to(tl.int64)[:, None] * NG * GROUP + offs_m[None, :]
    tl.store(y_ptrs, y, mask=mask_r[:, None] & mask_m[None, :])

    key = tl.where(mask_m[None, :], sort_key(y), 0)
    maxima = tl.max(tl.reshape(key, (BLOCK_R, BLOCK_M // GROUP, GROUP)), axis=2)
    offs_g = tile_m * (BLOCK_M // GROUP) + tl.arange(0, BLOCK_M // GROUP)
    maxima_ptrs = maxima_ptr + offs_r.to(tl.int64)[:, None] * NG + offs_g[None, :]
    tl.store(maxima_ptrs, maxima.to(tl.int16), mask=mask_r[:, None] & (offs_g < NG)[None, :])


def encode_gemm(x: Tensor, W_enc: Tensor, b_enc: Tensor, y: Tensor, group: int) -> Tensor:
    """Write x @ W_enc.T + b_enc into y [R, NG * group], and return the group maxima as sort keys (R, NG); 16-bit."""
    (rows, D), M = x.shape, len(W_enc)
    NG = y.shape[1] // group
    maxima = torch.empty(rows, NG, dtype=torch.int16, device=x.device)
    launch(
        encode_gemm_kernel,
        (triton.cdiv(rows, _TILE["BLOCK_R"]) * triton.cdiv(M, _TILE["BLOCK_M"]),),
        {
            "x_ptr": x,
            "w_enc_ptr": W_enc.contiguous(),
            "b_enc_ptr": b_enc.contiguous(),
            "y_ptr": y,
            "maxima_ptr": maxima,
            "R": rows,
            "M": M,
            "NG": NG,
            "D": D,
            "GROUP": group,
            **_TILE,
        },
        num_warps=8,
        num_stages=3,
        bytes_moved=((rows + M) * D + rows * (M + NG)) * x.element_size(),
        flops=2 * rows * M * D,
    )
    return maxima
