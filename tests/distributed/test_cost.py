"""The cost model counts what is sent, byte for byte; and the page says what it says."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranked import B, D, Recording, activations, config, new

from fastsae import cli, distributed
from fastsae.config import JointSAEConfig, TopKSAEConfig
from fastsae.distributed import Layout, cost
from fastsae.report import markdown

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


def sent(name: str, features: int, auxk: int) -> list[tuple[str, int, int]]:
    """The collectives of one training step that is neither logged nor saved: kind, ranks, bytes put in."""
    ranks = distributed.start(features)
    sae = distributed.shard(new(name, dtype=torch.float32), ranks)
    trainer = Recording(sae, config(auxk=auxk, dead_after_tokens=1, normalize="none"))
    x = ranks.own_rows(next(activations()).float())
    seen = []

    def counted(kind: str, collective: Any, which: int):
        def call(*arguments: Any, **options: Any):
            t = arguments[which]
            if t.numel() > 4:  # flags, and counts of dead features
                seen.append((kind, dist.get_world_size(options.get("group")), t.numel() * t.itemsize))
            return collective(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted("all-reduce", dist.all_reduce, 0))
        patch.setattr(dist, "all_gather", counted("all-gather", dist.all_gather, 1))
        trainer._rows_since_fired += 5  # all are dead
        trainer._train_step(x)
    return sorted(seen)


@pytest.mark.parametrize("name", ["topk", "many", "joint", "no pairs", "linear"])
@pytest.mark.parametrize(("features", "auxk"), [(1, 7), (2, 0), (2, 7), (4, 7), (4, 40)])
def test_bytes_are_those_that_are_sent(four, name, features, auxk):
    model = cost.cost(new(name).config, B, Layout(4 // features, features), auxk)
    for found in four(sent, name, features, auxk):
        assert found == sorted((m.kind, m.ranks, m.payload) for m in model.messages)


def test_the_bytes_of_a_ring():
    gather = cost.cost(TopKSAEConfig(d_in=D, d_sae=640, k=10), 100, Layout(1, 4)).messages[0]
    assert (gather.payload, gather.moved) == (100 * 10 * 8, 3 * 100 * 10 * 8)
    gradients = cost.cost(TopKSAEConfig(d_in=D, d_sae=640, k=10), 100, Layout(4, 1)).messages[-1]
    assert gradients.payload == 4 * (2 * 640 * D + 640 + D)
    assert gradients.moved == round(1.5 * gradients.payload)


def test_one_rank_sends_nothing():
    alone = cost.cost(JointSAEConfig(d_in=64, d_sae=640, k=10), 100, Layout())
    assert alone.messages == ()
    assert alone.step == alone.working > 0


def test_a_group_within_a_machine_is_faster():
    within, across = (cost.seconds("all-reduce", "features", 10**9, Layout(1, n)) for n in (8, 16))
    assert within == pytest.approx(1.75 * 10**9 / cost.NVLINK + 70e-6)
    assert across == pytest.approx(1.875 * 10**9 / (8 * cost.NETWORK) + 150e-6)
    # Two of a machine's GPUs hold the same features: the group has two adapters there.
    shared = cost.seconds("all-reduce", "data", 10**9, Layout(16, 4))
    assert shared == pytest.approx(1.875 * 10**9 / (2 * cost.NETWORK) + 150e-6)


def test_layouts_are_all_there_is_and_sorted():
    found = cost.layouts(TopKSAEConfig(d_in=4096, d_sae=1 << 20, k=64), 65536, 8)
    assert {(c.layout.data, c.layout.features) for c in found} == {(8, 1), (4, 2), (2, 4), (1, 8)}
    assert [c.memory <= cost.MEMORY for c in found] == [True, True, True, False]
    assert [c.step for c in found[:3]] == sorted(c.step for c in found[:3])


@pytest.mark.parametrize("over", ["data", "features"])
def test_scaling_stops_where_ranks_spend_more_time_on_one_another(over):
    sae = TopKSAEConfig(d_in=4096, d_sae=1 << 20, k=64)
    turn = cost.stops_scaling(sae, 65536, Layout(), over)
    before = Layout(turn.data // 2, 1) if over == "data" else Layout(1, turn.features // 2)
    after, until = cost.cost(sae, 65536, turn), cost.cost(sae, 65536, before)
    assert after.sending + after.ranking > after.working
    assert until.sending + until.ranking <= until.working


def test_the_page_has_the_table_of_the_code():
    """`python -m fastsae.distributed.cost docs/distributed.md` writes it."""
    text = PAGE.read_text()
    assert text == markdown.with_section(text, "predicted", cost.table())


@pytest.mark.parametrize(
    ("layout", "message"),
    [((0, 1), "at least 1 data and 1 feature rank; got 0, 1"), ((1, 3), "near ones that can: 639 and 642")],
)
def test_layouts_that_cannot_be(layout, message):
    with pytest.raises(ValueError, match=message):
        cost.cost(TopKSAEConfig(d_in=D, d_sae=640, k=10), 100, Layout(*layout))


def test_plan_says_what_a_layout_sends(monkeypatch, capsys):
    shape = ["plan", "joint", "--d-in", "64", "--d-sae", "640", "--k", "8", "--d-embedding", "4", "--batch-size", "100"]
    monkeypatch.setattr("sys.argv", ["fastsae", *shape])
    cli.main()
    assert "sends" not in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["fastsae", *shape, "--data-ranks", "2", "--feature-ranks", "4"])
    cli.main()
    out = capsys.readouterr().out
    assert "Predicted, not measured, for 2 data x 4 feature ranks" in out
    for m in cost.cost(JointSAEConfig(d_in=64, d_sae=640, k=8, d_embedding=4), 100, Layout(2, 4)).messages:
        assert f"{m.what} " in out
        assert f"{m.moved / 2**20:,.1f}" in out
