"""The strongest features of each row, exactly, from pre-activations that lie in blocks of features."""

import itertools

import torch
from torch import Tensor

SELECTION_BYTES = 64 * 2**20


def group_size(d_sae: int, k: int, dtype: torch.dtype) -> int:
    """About twice the square root of d_sae / k: ranking the group maxima then costs what ranking the members does."""
    if dtype == torch.float64 or d_sae < 16 * k:
        return 1
    group = 8
    while group < 64 and group * group * k < 2 * d_sae:
        group *= 2
    return group


def select(blocks: Tensor, maxima: Tensor, rows: Tensor, k: int, group: int) -> tuple[Tensor, Tensor]:
    """The k largest of relu(pre) of some rows with their features, strongest first, ties to the lower feature.

    blocks (n_blocks, B, width) holds pre by blocks of features, maxima (B, n_groups) the maximum of each group, unless
    groups are single features; rows (n,) int64 says which of the B rows.
    """
    n_blocks, _, width = blocks.shape
    ranked = k * group if group > 1 else n_blocks * width
    # Each number that is ranked is held as such, twice as an id and twice as a key.
    at_once = max(1, SELECTION_BYTES // (40 * ranked))
    values, ids = zip(*(_select_rows(blocks, maxima, part, k, group) for part in rows.split(at_once)), strict=True)
    return torch.cat(values), torch.cat(ids)


def _select_rows(blocks: Tensor, maxima: Tensor, rows: Tensor, k: int, group: int) -> tuple[Tensor, Tensor]:
    """Ranks groups, then the parts of the kept groups, then their features.

    The k groups that come first by (maximum descending, id ascending) hold all k features that come first by (value
    descending, index ascending): before a feature of any other group there are k, one in each of these.
    """
    _, n, width = blocks.shape
    if group == 1:
        return strongest(blocks[:, rows].transpose(0, 1).reshape(len(rows), -1), None, k)
    candidates, ids = maxima[rows], None
    sizes = (group, 8, 1) if group > 16 else (group, 1)
    for size, part in itertools.pairwise(sizes):
        _, kept = strongest(candidates, ids, k)
        per_block = width // size
        place = (kept // per_block * n + rows.unsqueeze(1)) * per_block + kept % per_block
        members = blocks.view(-1, size).index_select(0, place.view(-1)).view(len(rows), k * size)
        ids = (kept.unsqueeze(-1) * (size // part) + torch.arange(size // part, device="cpu")).flatten(1)
        candidates = members.view(len(rows), -1, part).amax(dim=2) if part > 1 else members
    return strongest(candidates, ids, k)


def strongest(candidates: Tensor, ids: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of relu(candidates) (rows, c) with their ids, strongest first, ties to the lower id.

    candidates float or int16; ids (rows, c) int64 below 2**32, None numbers the columns. NaN ranks first, so that it
    reaches the loss.
    """
    activations = candidates.relu()
    if candidates.dtype == torch.float64:
        values, columns = activations.sort(dim=1, descending=True, stable=True)
        return values[:, :k], columns[:, :k]
    # One int64 key per candidate: the bits of a non-negative float order like the float, the lower half breaks ties.
    # The mask drops the sign of -0.0 and of NaN.
    if ids is None:
        ids = torch.arange(candidates.shape[1], device="cpu")
    bits = activations.float().view(torch.int32).bitwise_and_(0x7FFFFFFF)
    keys = bits.to(torch.int64).bitwise_left_shift_(32).add_(0xFFFFFFFF - ids)
    keys = keys.topk(k, dim=1, sorted=True).values
    values = (keys >> 32).to(torch.int32).view(torch.float32).to(candidates.dtype)
    return values, 0xFFFFFFFF - (keys & 0xFFFFFFFF)
