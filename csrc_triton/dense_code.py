"""Decoding and its gradients as products with a dense code matrix, for codes that are not sparse enough to gather.

The dense code exists one block at a time: a block of rows where the sum runs over features, a block of features where
it runs over rows. So no sum is cut in two and rounded in between. Its rows begin at whole 128-byte lines, because
products of matrices with odd strides run without the fast instructions (wgmma, TMA).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from csrc_triton.adam import Gradient

_ALIGNED = 64  # 16-bit numbers of 128 bytes


def _wide(features: int) -> int:
    """Columns of a buffer for so many features, with at least one more, which takes what belongs to no column."""
    return -(-(features + 1) // _ALIGNED) * _ALIGNED


def _scattered(coefficients: Tensor, indices: Tensor, first: int, width: int, buffer: Tensor) -> Tensor:
    """The code as a dense matrix (B, width) for features first, first + 1, ...; buffer (B, _wide(width)) holds it."""
    columns = indices - first
    columns = torch.where((columns >= 0) & (columns < width), columns, width)
    # add: a feature may be in a row twice
    return buffer.zero_().scatter_add_(1, columns, coefficients.to(buffer.dtype))[:, :width]


def _feature_blocks(rows: int, d_sae: int, itemsize: int, budget: int) -> Iterator[tuple[int, int]]:
    """Blocks of features that `budget` bytes hold, but at least one line; all begin at whole lines."""
    width = max(_ALIGNED, budget // max(1, rows * itemsize) // _ALIGNED * _ALIGNED)
    for first in range(0, d_sae, width):
        yield first, min(first + width, d_sae)


def dense_decode(values: Tensor, indices: Tensor, W_dec: Tensor, W_lin: Tensor | None, n: int, budget: int) -> Tensor:
    """sum_j a_j W_dec[i_j] + sum_{j<n} a_j W_lin[i_j]: (B, D). `budget` bytes of dense code may be held."""
    out = W_dec.new_empty(len(values), W_dec.shape[1])
    d_sae = len(W_dec)
    narrow = [None if w is None else w.to(values.dtype) for w in (W_dec, W_lin)]
    rows = max(1, budget // (_wide(d_sae) * values.element_size()))
    for a, i, part in zip(values.split(rows), indices.split(rows), out.split(rows), strict=True):
        buffer = values.new_empty(len(a), _wide(d_sae))
        result = _scattered(a, i, 0, d_sae, buffer) @ narrow[0]
        if narrow[1] is not None:
            result += _scattered(a[:, :n], i[:, :n], 0, d_sae, buffer) @ narrow[1]
        part.copy_(result)
    return out


def dense_decode_backward(
    values: Tensor, indices: Tensor, d_out: Tensor, weight: Tensor, gradient: Gradient | None, budget: int
) -> Tensor:
    """d_values (B, k) of sum_j a_j weight[i_j], and the gradient of the weight."""
    d_values = torch.zeros_like(values)
    for first, last in _feature_blocks(len(values), len(weight), 2 * values.element_size(), budget):
        d_code = d_out.new_empty(len(values), _wide(last - first))[:, : last - first]
        torch.mm(d_out, weight[first:last].to(d_out.dtype).T, out=d_code)
        inside = (indices >= first) & (indices < last)
        d_values += torch.where(inside, d_code.gather(1, (indices - first).clamp(0, last - first - 1)), 0)
        if gradient is not None:
            _block_gradient(values, indices, d_out, gradient, first, last)
    return d_values


def dense_weight_gradient(coefficients: Tensor, indices: Tensor, rows: Tensor, gradient: Gradient, budget: int) -> None:
    """sum of coefficients (B, k) * rows (B, D) over each feature's entries."""
    for first, last in _feature_blocks(len(rows), len(gradient.out), coefficients.element_size(), budget):
        _block_gradient(coefficients, indices, rows, gradient, first, last)


def _block_gradient(
    coefficients: Tensor, indices: Tensor, rows: Tensor, gradient: Gradient, first: int, last: int
) -> None:
    buffer = rows.new_empty(len(rows), _wide(last - first))
    product = _scattered(coefficients, indices, first, last - first, buffer).T @ rows
    part = gradient.out[first:last]
    if gradient.add:
        part += product
    else:
        part.copy_(product)
