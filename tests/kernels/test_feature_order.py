"""Work items: every entry in exactly one, in order, none longer than a segment, the longest first."""

import pytest
import torch

from csrc_triton import feature_order


@pytest.mark.parametrize("segment", [1, 4, 256])
@pytest.mark.parametrize(("rows", "k", "d_sae"), [(20, 3, 7), (1, 1, 1), (0, 3, 5), (9, 4, 300), (40, 1, 2)])
def test_work_items(rows: int, k: int, d_sae: int, segment: int, device: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(feature_order, "SEGMENT", segment)
    indices = (torch.rand(rows, k) ** 3 * d_sae).long().to(device)
    items = feature_order.work_items(indices, d_sae)
    entries, flat = items.entries.tolist(), indices.flatten().tolist()
    order, lengths = items.order.tolist(), items.length.tolist()
    assert sorted(order) == list(range(d_sae + rows * k // segment))
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True)

    slots, seen = {}, {f: [] for f in range(d_sae)}
    for i in range(len(lengths)):
        if lengths[i] < 0:
            continue
        feature, start, slot = (int(t[i]) for t in (items.feature, items.start, items.slot))
        assert lengths[i] <= segment
        mine = entries[start : start + lengths[i]]
        assert all(flat[e] == feature for e in mine)
        seen[feature].append(mine)
        if slot >= 0:
            slots[slot] = feature
    for feature, parts in seen.items():
        assert parts, "a feature without an item gets no gradient written"
        together = [e for part in parts for e in part]
        assert together == [e for e, f in enumerate(flat) if f == feature]
        mine = sorted(s for s, f in slots.items() if f == feature)
        assert len(mine) == (len(parts) if len(parts) > 1 else 0)
        assert mine == list(range(mine[0], mine[0] + len(mine))) if mine else True
        assert (items.slot_feature == feature).sum() == (1 if mine else 0)
        if mine:
            assert items.slot_feature[mine[0]] == feature
    assert len(slots) <= items.n_slots
