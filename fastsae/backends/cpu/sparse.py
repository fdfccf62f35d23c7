"""Products with the rows of a dictionary, and their gradients, over a code in feature order."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsae.backends.cpu.memory import recycled
from fastsae.code import FeatureOrder

Destination = tuple[Tensor, bool]  # a gradient buffer, and whether to add to what it holds


def gathered_dot(order: FeatureOrder, rows: Tensor, weight: Tensor) -> Tensor:
    """rows[b] . weight[indices[b, j]] for every entry of a flattened code: (B * k). Reads `weight` once, in order."""
    n = len(order.entries)
    dots = rows.new_empty(n)
    if n:
        dots[order.entries] = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            rows.contiguous(), weight, order.features, order.offsets, order.tokens, 0
        )
    return dots


def weight_gradient(order: FeatureOrder, coefficients: Tensor, rows: Tensor, out: Destination | None) -> Tensor:
    """sum over a feature's entries of coefficient * rows[token]: (d_sae, width), in `out` if given."""
    d_sae = len(order.offsets) - 1
    weights = coefficients.reshape(-1)[order.entries]
    rows = rows.contiguous()
    if rows.dtype == torch.bfloat16:  # MKL's sparse product has no bf16; embedding_bag sums it in fp32
        grad = F.embedding_bag(order.tokens, rows, order.offsets[:-1], per_sample_weights=weights, mode="sum")
        if out is None:
            return grad
        buffer, add = out
        return buffer.add_(grad) if add else buffer.copy_(grad)
    buffer, add = out or (recycled((d_sae, rows.shape[1]), rows.dtype), False)
    if weights.numel() == 0:
        return buffer if add else buffer.zero_()
    return torch.addmm(buffer, _csr(order, weights, len(rows)), rows, beta=int(add), out=buffer)


def _csr(order: FeatureOrder, weights: Tensor, n_tokens: int) -> Tensor:
    with warnings.catch_warnings():  # torch announces once per process that CSR tensors are in beta
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            order.offsets, order.tokens, weights, (len(order.offsets) - 1, n_tokens), check_invariants=False
        )
