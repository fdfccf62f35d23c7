"""fp32 encoding, exact, at the price of a bf16 matrix product.

Every pre-activation s = x.w + b is first bounded from above. With ~ for rounding to bf16,

    s  <=  x~.w~  +  |x - x~| |w|  +  |x~| |w - w~|  +  b        (Cauchy-Schwarz)

and the right side is one inner product of bf16 rows, (x~, |x - x~|, |x|, 1, 1) with (w~, |w|, |w - w~|, b~, b - b~),
the norms and b - b~ rounded up by so much that |x| serves for |x~|. The features of the largest bounds are then
computed in fp32, and a row is certain if the k-th largest of their values exceeds the bound of every feature left out.
Other rows are left to the plain path.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor

from fastsae.backends.cpu.blocks import Encoder, block_width, n_blocks
from fastsae.backends.cpu.memory import workspace
from fastsae.backends.cpu.select import SELECTION_BYTES, group_size, select, strongest
from fastsae.backends.cpu.sparse import gathered_dot
from fastsae.code import feature_order

# So many times k features are computed in fp32; the second time for the rows that the first one leaves uncertain.
_CANDIDATES = (2, 8)
# Columns added for the four bounds; a whole cache line keeps the rows aligned.
_EXTRA = 32


def screening_pays(rows: int, d_in: int, d_sae: int, k: int, dtype: torch.dtype) -> bool:
    """Whether bounds in bf16 are cheaper than pre-activations in fp32, by shape and by the processor."""
    # Rows of W_enc that do not begin at the same place in a cache line are summed in different orders: equal features
    # would get values that differ, and their tie would be decided by that.
    aligned = d_in * dtype.itemsize % 64 == 0
    return dtype == torch.float32 and aligned and _group(d_sae, k) > 1 and _saves_time(rows, d_in, d_sae, k)


def _saves_time(rows: int, d_in: int, d_sae: int, k: int) -> bool:
    # Measured on a Zen 4 core pair: seconds saved by a multiply-add in bf16, and spent on an entry of W_enc to convert
    # and on each of the k places of a row.
    saved, spent = 10e-12 * rows * d_in * d_sae, 0.8e-9 * d_in * d_sae + 0.8e-6 * rows * k
    return bf16_is_faster() and saved > spent


def _group(d_sae: int, k: int) -> int:
    # amax over 64 int16, two cache lines, takes a quarter of the time of groups of 32 or fewer.
    return 64 if d_sae >= 64 * _CANDIDATES[-1] * k else group_size(d_sae, _CANDIDATES[0] * k, torch.bfloat16)


@functools.cache
def bf16_is_faster() -> bool:
    """Whether this processor multiplies bf16 faster than fp32: by what it is and not by a clock.

    Values differ in their last bits with the way they were found, and a run that is resumed must find them alike.
    """
    able = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not tell
    # In avx512_bf16 Zen 4 takes a third of the time, an Intel processor took up to twice as long (docs/decisions.md).
    return able.get("amx_bf16", False) or (able.get("avx512_bf16", False) and _is_amd())


def _is_amd() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()


def screened_topk(x: Tensor, encoder: Encoder, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """values and ids (B, k) as `strongest` gives them, and the rows that are uncertain, where both hold anything."""
    group = _group(encoder.d_sae, k)
    blocks, maxima, largest_norm = _upper_bounds(x, encoder, group)
    values, ids = x.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.int64, device="cpu")
    left = torch.arange(len(x), device="cpu")
    for candidates in (factor * k for factor in _CANDIDATES):
        if candidates > maxima.shape[1]:
            break
        uncertain = [left[:0]]
        for rows in left.split(max(1, SELECTION_BYTES // (64 * candidates))) if len(left) else ():
            part = x[rows]
            bounds, found = select(blocks, maxima, rows, candidates, group)
            values[rows], ids[rows] = _strongest_in_fp32(part, encoder, found, k)
            # What was left out lies below the last bound.
            exceeded = values[rows, -1] > _ceiling(bounds[:, -1].view(torch.bfloat16), part, largest_norm)
            uncertain.append(rows[~exceeded])
        left = torch.cat(uncertain)
    return values, ids, left


def _strongest_in_fp32(x: Tensor, encoder: Encoder, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    features = encoder.name(ids)
    dots = gathered_dot(feature_order(features, len(encoder.W_enc)), x, encoder.W_enc)
    return strongest(encoder.pre_activations(dots.view_as(ids), ids), ids, k)


def _ceiling(bound: Tensor, x: Tensor, largest_norm: Tensor) -> Tensor:
    """Compute what no pre-activation with a smaller bound can exceed: bf16 rounded the bound, perhaps down."""
    # NaN, which nothing exceeds, where the sums behind the bounds may have overflowed.
    return bound.float() * (256 / 255) + 0 * (4 * _norm(x) * largest_norm)


def _upper_bounds(x: Tensor, encoder: Encoder, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """The bounds as int16 that order like them (n_blocks, B, width), their group maxima, and the largest |w|.

    The bits of non-negative bf16 numbers order like int16, and negative ones come out below zero, as relu wants it.
    """
    (rows, d_in), width = x.shape, block_width(encoder.d_sae)
    count = n_blocks(encoder.d_sae, width)
    wide = d_in + _EXTRA
    low_x = torch.zeros(rows, wide, dtype=torch.bfloat16, device="cpu")
    low_x[:, :d_in] = x
    # Sums of d_in products, in fp32 in whatever order, err by at most this share of |x| |w|; thrice: ours and theirs.
    slack = 3 * (d_in + _EXTRA) * 2.0**-24
    norm, error = _norm(x), _norm(x - low_x[:, :d_in])
    one = torch.ones_like(norm)
    low_x[:, d_in : d_in + 4] = torch.stack([_up(error + slack * norm), _up(norm), one, one], dim=1)
    blocks = workspace("pre-activations", (count, rows, width), torch.bfloat16)
    order = blocks.view(torch.int16)
    maxima = torch.empty(rows, count, width // group, dtype=torch.int16, device="cpu")
    low_W = workspace("screened_W", (width, wide), torch.bfloat16).zero_()
    difference = workspace("screened_difference", (width, d_in), torch.float32)
    largest_norm = torch.zeros((), device="cpu")
    for i in range(count):
        W, b = encoder.scaled_block(i, width)
        n = len(W)
        low_W[:n, :d_in] = W
        torch.sub(difference[:n].copy_(low_W[:n, :d_in]), W, out=difference[:n])
        norms = _norm(W)
        low_b = b.bfloat16()
        rest = b - low_b + slack * b.abs()
        bounds = [_up(norms), _up(_norm(difference[:n])), low_b, _up(rest)]
        low_W[:n, d_in : d_in + 4] = torch.stack(bounds, dim=1)
        largest_norm = torch.maximum(largest_norm, norms.max() + 0 * low_b.abs().max())
        torch.mm(low_x, low_W[:n].T, out=blocks[i, :, :n])
        blocks[i, :, n:] = -torch.inf  # past d_sae: ranked after every real feature
        torch.amax(order[i].view(rows, -1, group), dim=2, out=maxima[:, i])
    return order, maxima.view(rows, -1), largest_norm


def _norm(t: Tensor) -> Tensor:
    """At least the norm of each row, but for rounding: the squares of entries below 2**-63 are lost.

    What is added for them also outweighs denormal products, which bf16 instructions take for zero.
    """
    return t.norm(dim=1) + t.shape[1] * 2.0**-63


def _up(t: Tensor) -> Tensor:
    """At least t, also after rounding to bf16."""
    return t + t.abs() * 2.0**-7
