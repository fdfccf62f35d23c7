"""The entries of a code by feature, cut into work items: what every gradient of a weight is summed over.

Stable, so that a feature's sum has one order and the same bits at each run. A feature with more entries than SEGMENT
becomes several items, whose sums go to numbered slots of a workspace and are added in order afterwards. Every feature
has at least one item, if an empty one: its gradient is zero and must be written too. The longest items go first.
All of it happens on the device with shapes that the host knows: nobody waits for a number.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.launch import launch
from csrc_triton.plan import SEGMENT

_BLOCK = 256


class WorkItems(NamedTuple):
    """P items over M features and nnz entries; P and the number of slots are bounds, what is past the end is empty."""

    entries: Tensor
    """(nnz) int64: positions in the flattened code, by feature."""
    offsets: Tensor
    """(M + 1) int32: feature f owns entries[offsets[f]:offsets[f + 1]]."""
    order: Tensor
    """(P) int64: item numbers, longest first."""
    feature: Tensor
    """(P) int32: whose gradient the item adds to."""
    start: Tensor
    """(P) int32: its first entry."""
    length: Tensor
    """(P) int32: how many; -1 past the last item."""
    slot: Tensor
    """(P) int32: where its sum goes; -1 to the gradient itself."""
    slot_feature: Tensor
    """(slots) int32: the feature whose first slot this is; -1 for its other slots and past the end."""

    @property
    def n_slots(self) -> int:
        return len(self.slot_feature)


@triton.jit
def work_items_kernel(
    offsets_ptr,  # [M + 1] int32: feature f owns entries offsets[f] ... offsets[f + 1]
    item_ends_ptr,  # [M] int64: items of features 0 ... f
    slot_ends_ptr,  # [M] int64: slots of features 0 ... f
    feature_ptr,  # [P] out, see WorkItems
    start_ptr,  # [P] out
    length_ptr,  # [P] out, -1 before
    slot_ptr,  # [P] out
    slot_feature_ptr,  # [slots] out, -1 before
    M,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the items of BLOCK features. Grid (cdiv(M, BLOCK),)."""
    feature = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = feature < M
    start = tl.load(offsets_ptr + feature, mask=mask, other=0)
    count = tl.load(offsets_ptr + feature + 1, mask=mask, other=0) - start
    n = tl.maximum(tl.cdiv(count, SEGMENT), 1)
    item = tl.load(item_ends_ptr + feature, mask=mask, other=0) - n
    slot = tl.load(slot_ends_ptr + feature, mask=mask, other=0) - n
    split = mask & (n > 1)
    tl.store(slot_feature_ptr + slot, feature, mask=split)
    for segment in range(0, tl.max(tl.where(mask, n, 0), axis=0)):
        mine = mask & (segment < n)
        tl.store(feature_ptr + item + segment, feature, mask=mine)
        tl.store(start_ptr + item + segment, start + segment * SEGMENT, mask=mine)
        tl.store(length_ptr + item + segment, tl.minimum(count - segment * SEGMENT, SEGMENT), mask=mine)
        tl.store(slot_ptr + item + segment, tl.where(split, slot + segment, -1).to(tl.int32), mask=mine)


def work_items(indices: Tensor, d_sae: int) -> WorkItems:
    """The items of a code with indices (B, K) int64 in [0, d_sae)."""
    nnz, device = indices.numel(), indices.device
    if nnz >= 2**31:
        raise ValueError(
            f"work_items: {nnz} entries, {indices.shape[0]} rows of {indices.shape[1]}, pass what int32 can "
            "count; take fewer rows at once"
        )
    features, entries = indices.reshape(-1).to(torch.int32).sort(stable=True)
    edges = torch.arange(d_sae + 1, dtype=torch.int32, device=device)
    offsets = torch.searchsorted(features, edges, out_int32=True)
    n = (offsets.diff() + (SEGMENT - 1)).div(SEGMENT, rounding_mode="floor").clamp(min=1)
    item_ends, slot_ends = n.cumsum(0), torch.where(n > 1, n, 0).cumsum(0)
    n_items, n_slots = d_sae + nnz // SEGMENT, 2 * (nnz // SEGMENT)
    feature, start, slot = (torch.empty(n_items, dtype=torch.int32, device=device) for _ in range(3))
    length = torch.full((n_items,), -1, dtype=torch.int32, device=device)
    slot_feature = torch.full((n_slots,), -1, dtype=torch.int32, device=device)
    launch(
        work_items_kernel,
        (triton.cdiv(d_sae, _BLOCK),),
        {
            "offsets_ptr": offsets,
            "item_ends_ptr": item_ends,
            "slot_ends_ptr": slot_ends,
            "feature_ptr": feature,
            "start_ptr": start,
            "length_ptr": length,
            "slot_ptr": slot,
            "slot_feature_ptr": slot_feature,
            "M": d_sae,
            "SEGMENT": SEGMENT,
            "BLOCK": _BLOCK,
        },
        num_warps=4,
        bytes_moved=d_sae * (4 + 2 * 8) + n_items * 4 * 4,
    )
    # Two bytes of key are two passes of the device's sort, four would be four.
    order = length.to(torch.int16).sort(descending=True, stable=True).indices
    return WorkItems(entries, offsets, order, feature, start, length, slot, slot_feature)
