"""From activations to the code, and the gradients."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.backends.cpu.blocks import Encoder, block_width, n_blocks, rows_held
from fastsae.backends.cpu.decode import sparse_decode
from fastsae.backends.cpu.memory import workspace
from fastsae.backends.cpu.screen import screened_topk, screening_pays
from fastsae.backends.cpu.select import group_size, select
from fastsae.backends.cpu.sparse import Destination, weight_gradient
from fastsae.code import feature_order


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, features: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See reference.topk_encode. Holds one chunk of rows of pre-activations, or of their bounds, at a time."""
    x = x.contiguous()
    encoder = Encoder(W_enc, b_enc, features, scale)
    values = x.new_empty(len(x), k)
    ids = torch.empty(len(x), k, dtype=torch.int64, device="cpu")
    if len(x) == 0:
        return values, ids
    left = torch.arange(len(x), device="cpu")
    planned = plan(len(x), x.shape[1], encoder.d_sae, k, x.dtype)
    if planned.screened and W_enc.is_contiguous():  # a plan knows no strides; those of other layouts break alignment
        uncertain = []
        for chunk in left.split(planned.rows):
            values[chunk], ids[chunk], rows = screened_topk(x[chunk], encoder, k)
            uncertain.append(chunk[rows])
        left = torch.cat(uncertain)
    group = group_size(encoder.d_sae, k, x.dtype)
    for chunk in left.split(rows_held(len(x), encoder.d_sae, x.dtype.itemsize)) if len(left) else ():
        blocks, maxima = _pre_activations(x[chunk], encoder, group)
        values[chunk], ids[chunk] = select(blocks, maxima, torch.arange(len(chunk), device="cpu"), k, group)
    return encoder.unscaled(values, ids), encoder.name(ids)


class Plan(NamedTuple):
    """Plan of one batch's encoding."""

    screened: bool
    """Whether bf16 bounds are taken first."""
    rows: int
    """Rows whose pre-activations, or their bounds, are held at once."""
    bytes: int
    """The memory these take."""


def plan(rows: int, d_in: int, d_sae: int, k: int, dtype: torch.dtype) -> Plan:
    """The plan for `rows` activations of width `d_in`."""
    held = rows_held(rows, d_sae, torch.bfloat16.itemsize)
    if screening_pays(held, d_in, d_sae, k, dtype):
        return Plan(True, held, held * d_sae * torch.bfloat16.itemsize)
    held = rows_held(rows, d_sae, dtype.itemsize)
    return Plan(False, held, held * d_sae * dtype.itemsize)


def _pre_activations(x: Tensor, encoder: Encoder, group: int) -> tuple[Tensor, Tensor]:
    """x @ W_enc.T + b_enc, scaled, by blocks of features (n_blocks, B, width), and the maxima of groups of features."""
    rows, width = len(x), block_width(encoder.d_sae, len(x))
    count = n_blocks(encoder.d_sae, width)
    blocks = workspace("pre-activations", (count, rows, width), x.dtype)
    maxima = x.new_empty(rows, count, width // group if group > 1 else 0)
    for i in range(count):
        weight, bias, scale = encoder.block(i, width)
        torch.addmm(bias, x, weight.T, out=blocks[i, :, : len(bias)])
        if scale is not None:
            blocks[i, :, : len(bias)] *= scale
        blocks[i, :, len(bias) :] = -torch.inf  # past d_sae: ranked after every real feature
        if group > 1:
            torch.amax(blocks[i].view(rows, -1, group), dim=2, out=maxima[:, i])
    return blocks, maxima.view(rows, maxima[0].numel())


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
    """d_x (B, d_in), d_W_enc (d_sae, d_in; None if it is written to `out`), d_b_enc (d_sae), d_b_dec (d_in).

    Entries of value 0 receive nothing. d_b_dec = -sum of d_x = -d_b_enc @ W_enc.
    """
    d_pre = d_values.masked_fill(values <= 0, 0)
    d_x = sparse_decode(d_pre, indices, W_enc) if need_x else None
    d_W_enc = None
    if need_W:
        d_W_enc = weight_gradient(feature_order(indices, len(W_enc)), d_pre, x, out)
    # bf16 would lose the small terms of a long sum.
    sums = torch.promote_types(x.dtype, torch.float32)
    d_b_enc = torch.zeros(len(W_enc), dtype=sums, device="cpu").index_add_(
        0, indices.reshape(-1), d_pre.reshape(-1).to(sums)
    )
    d_b_enc = d_b_enc.to(x.dtype)
    return d_x, None if out else d_W_enc, d_b_enc, -(d_b_enc @ W_enc) if need_b_dec else None
