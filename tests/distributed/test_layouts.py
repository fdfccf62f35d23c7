"""Ranks in every layout train as one process does: losses, weights, counters, to rounding; codes to the bit."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crew import Crew
from ranked import B, D, K, M, Recording, activations, assert_equal_to_rounding, config, new, trained, whole
from torch import Tensor

import fastsae
from fastsae import distributed, ops
from fastsae.code import SparseCode
from fastsae.distributed.layout import BY_FEATURE

LAYOUTS = [("two", 1), ("two", 2), ("four", 1), ("four", 2), ("four", 4)]
IDS = [f"{2 if crew == 'two' else 4} ranks, {features} of them for features" for crew, features in LAYOUTS]


@pytest.fixture(params=LAYOUTS, ids=IDS)
def layout(request: pytest.FixtureRequest) -> tuple[Crew, int]:
    crew, features = request.param
    return request.getfixturevalue(crew), features


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("topk", {}),
        ("topk", {"auxk": 5, "dead_after_tokens": 24, "clip_grad_norm": 0.05, "unit_norm_decoder": True}),
        ("joint", {"warmup_steps": 2, "decay_steps": 2, "k_anneal_from": 20, "k_anneal_steps": 3}),
        ("joint", {"auxk": 40, "dead_after_tokens": 24, "clip_grad_norm": 0.05, "unit_norm_decoder": True}),
    ],
    ids=["topk", "topk with everything", "joint", "joint with everything"],
)
def test_as_one_process(layout, name, options):
    crew, features = layout
    assert_equal_to_rounding(crew(trained, name, features, options), features, trained(name, 0, options))


@pytest.mark.parametrize("name", ["one pair", "no pairs", "all", "linear", "interaction", "sequential"])
def test_every_pathway(four, name):
    assert_equal_to_rounding(four(trained, name, 2, {}), 2, trained(name, 0, {}))


# ---- codes ----------------------------------------------------------------------------------------------------------


def awkward(dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows with mass ties (small whole numbers: exact in every dtype), with few positives, with none, with NaN."""
    generator = torch.Generator().manual_seed(1)
    x, W_enc = (torch.randint(-1, 2, shape, generator=generator).to(dtype) for shape in ((20, D), (M, D)))
    b_enc = torch.randint(-1, 2, (M,), generator=generator).to(dtype)
    b_enc[M // 4 : M // 2] = -1e4  # a rank with nothing to offer
    x[3], x[5] = 0, torch.nan
    return {"x": x, "W_enc": W_enc, "b_enc": b_enc}


def encoded(features: int, k: int, backend: str, dtype: torch.dtype, dead: Tensor | None):
    made = awkward(dtype)
    if not features:
        values, indices = ops.topk_encode(made["x"], made["W_enc"], made["b_enc"], k, backend, dead)
        return values, indices
    ranks = distributed.start(features)
    with torch.no_grad():
        sae = fastsae.TopKSAE(D, M, K, backend=backend, dtype=dtype)
        sae.W_enc.copy_(made["W_enc"])
        sae.b_enc.copy_(made["b_enc"])
    part = distributed.shard(sae, ranks)
    if dead is not None:
        place = ranks.own_features(dead, -1)
        dead = place[place >= 0]
    values, indices = part.ops.topk_encode(made["x"], part.W_enc, part.b_enc, k, backend, dead)
    return values.detach(), indices


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("k", [1, K, 20, M // 4 + 1, M])
def test_codes_are_identical_with_ties(four, k, backend):
    expected = encoded(0, k, backend, torch.float32, None)
    for found in four(encoded, 4, k, backend, torch.float32, None):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_codes_are_identical_in_every_dtype(two, dtype):
    expected = encoded(0, K, "auto", dtype, None)
    for found in two(encoded, 2, K, "auto", dtype, None):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("k", [1, 3, 9])
def test_some_features_compete_and_some_ranks_have_none(four, k):
    dead = torch.tensor([0, 1, 2, 7, 50, 51, 52, 60, 63])
    expected = encoded(0, k, "auto", torch.float64, dead)
    for found in four(encoded, 4, k, "auto", torch.float64, dead):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def revived(name: str, features: int) -> dict[str, Any]:
    """Steps while features 50 and up are dead, all of which one of four ranks holds."""
    sae = new(name)
    if features:
        sae = distributed.shard(sae, distributed.start(features))
    trainer = Recording(sae, config(auxk=3, dead_after_tokens=1000, normalize="none"))
    own = sae.ranks.own_features(torch.arange(50, M), M)
    trainer._rows_since_fired[own[own < M]] = 5000
    for x in activations(2):
        trainer._train_step(sae.ranks.own_rows(x))
    return {"weights": sae.state_dict(), "counters": trainer._rows_since_fired[:-1], "lines": []}


@pytest.mark.parametrize("name", ["topk", "linear"])
def test_ranks_without_dead_features_take_part_in_reviving_those_of_others(four, name):
    """They too add up the gradient of b_dec, where there is one, or the others would wait for them."""
    alone = revived(name, 0)
    assert (alone["counters"] >= 5000).any()
    assert_equal_to_rounding(four(revived, name, 4), 4, alone)


# ---- the SAE itself -------------------------------------------------------------------------------------------------


def used(name: str, features: int, backend: str) -> dict[str, Tensor]:
    """Everything an SAE can do, and its gradients, those of its input too."""
    sae = new(name, backend=backend).eval()
    ranks = distributed.start(features) if features else None
    sae = distributed.shard(sae, ranks) if ranks else sae
    x = torch.randn(2, 3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    parts = sae.components(x)
    output = sae(x)
    code = torch.randn(4, K, dtype=torch.float64), torch.arange(4 * K).view(4, K) * 2
    (output.loss + output.reconstruction.square().sum() + 0.1 * output.code.values.sum()).backward()
    found = {
        "identity": parts.identity,
        "linear": parts.linear,
        "interaction": parts.interaction,
        "decode": sae.decode(SparseCode(*code, M)),
        "reconstruct": sae.reconstruct(x.detach()),
        "dx": x.grad,
        "loss": output.loss,
        "values": output.code.values,
        "indices": output.code.indices,
    }
    for n, p in sae.named_parameters():
        grad = p.grad.detach()
        if ranks and n in BY_FEATURE:  # where they belong, for all to see
            before = ranks.first_feature
            padded = grad.new_zeros(M, *grad.shape[1:])
            padded[before : before + len(grad)] = grad
            torch.distributed.all_reduce(padded, group=ranks.feature_group)
            grad = padded
        found["d_" + n] = grad
    return {n: t.detach() for n, t in found.items() if t is not None}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["topk", "joint", "no pairs", "linear", "interaction"])
def test_everything_an_sae_does(four, name, backend):
    expected = used(name, 0, backend)
    for found in four(used, name, 4, backend):
        assert found.keys() == expected.keys()
        for n, t in found.items():
            torch.testing.assert_close(t, expected[n], rtol=1e-10, atol=1e-10, msg=lambda m, n=n: f"{n}: {m}")


# ---- batches --------------------------------------------------------------------------------------------------------


def test_rows_that_cannot_be_split_evenly(four):
    assert_equal_to_rounding(four(trained, "joint", 1, {}, 27), 1, trained("joint", 0, {}, 27))


def test_bad_batches_are_skipped_by_all(four):
    options = {"nonfinite": "skip", "normalize": "none"}
    results, alone = four(spoiled, 2, options), spoiled(0, options)
    assert alone["lines"][-1]["rows_skipped"] == 1
    assert_equal_to_rounding(results, 2, alone)


def test_outliers_are_left_out_by_all(four):
    options = {"outliers": "skip", "normalize": "none"}
    results, alone = four(with_a_sink, 2, options), with_a_sink(0, options)
    assert alone["lines"][-1]["outliers_skipped"] == 6
    assert_equal_to_rounding(results, 2, alone)


def with_a_sink(features: int, options: dict[str, Any]) -> dict[str, Any]:
    stream = (torch.cat([x, 1000 * x[:1]]) for x in activations())
    return trained("topk", features, options, stream=stream)


def test_a_batch_with_too_few_good_rows_for_all_ranks_is_skipped(two):
    results = two(nearly_all_bad)
    whole(results, 1)
    for result in results:
        assert result["lines"][-1]["batches_skipped"] == 1
        assert result["lines"][-1]["rows_skipped"] == B - 1


def nearly_all_bad() -> dict[str, Any]:
    def stream() -> Iterator[Tensor]:
        for i, x in enumerate(activations()):
            if i == 2:
                x[:-1, 3] = torch.nan
            yield x

    return trained("topk", 1, {"nonfinite": "skip", "normalize": "none"}, stream=stream())


def spoiled(features: int, options: dict[str, Any]) -> dict[str, Any]:
    def stream() -> Iterator[Tensor]:
        for i, x in enumerate(activations()):
            if i == 2:
                x[-1, 3] = torch.nan  # the last rank's row
            yield x

    return trained("topk", features, options, stream=stream())


def test_a_bad_batch_stops_all_and_is_named_by_its_row_in_the_batch(four):
    for said in four(stopped_by_nan, 2):
        assert (
            "batch 3 of the activations holds 1 values that are NaN or infinite, the first at row 23, dimension 3"
            in said
        )


def stopped_by_nan(features: int) -> str:
    try:
        spoiled(features, {"normalize": "none"})
    except FloatingPointError as error:
        return str(error)
    return "not stopped"


def test_a_stream_that_fails_on_one_rank_stops_all_with_what_was_trained_saved(two, tmp_path):
    first, second = two(failing, tmp_path)
    assert "batch 4 of the activations: another rank could not draw it" in first
    assert second == "the disk is gone"
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]


def failing(run_dir: Path) -> str:
    def stream() -> Iterator[Tensor]:
        for i, x in enumerate(activations()):
            if i == 3 and torch.distributed.get_rank() == 1:
                raise OSError("the disk is gone")
            yield x

    try:
        trained("topk", 2, {"run_dir": run_dir}, stream=stream())
    except (OSError, RuntimeError) as error:
        return str(error)
    return "not stopped"


def test_ctrl_c_on_one_rank_stops_all_at_one_step(two, tmp_path):
    said = two(interrupted, tmp_path)
    assert said == [f"training stopped at step 3; saved, continue with resume (in {tmp_path})"] * 2
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]


def interrupted(run_dir: Path) -> str:
    def stream() -> Iterator[Tensor]:
        for i, x in enumerate(activations()):
            if i == 2 and torch.distributed.get_rank() == 1:
                signal.raise_signal(signal.SIGINT)
            yield x

    try:
        trained("topk", 1, {"run_dir": run_dir}, stream=stream())
    except KeyboardInterrupt as stop:
        return str(stop)
    return "not stopped"


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("features", "2 ranks cannot be split into groups of 3 feature ranks"),
        ("d_sae", "d_sae = 63 cannot be split evenly over 2 feature ranks; near ones that can: 62 and 64"),
        ("rows", "a batch of 1 rows cannot be split over 2 data ranks"),
        ("adam", "adam_in_backward holds no gradients, and 2 data ranks must add theirs"),
        ("folder", "already holds a run"),
        ("twice", "this SAE is spread over 2 ranks already"),
        ("share", "of which batch? Take its rows by own_rows"),
        ("group", "the process group that is there (cuda:nccl) has nothing for tensors on the CPU"),
    ],
)
def test_refusals(two, what, message, tmp_path):
    for said in two(refused, what, tmp_path):
        assert message in said


def refused(what: str, folder: Path) -> str:
    try:
        if what == "features":
            distributed.start(3)
        if what == "d_sae":
            distributed.shard(fastsae.TopKSAE(D, 63, K), distributed.start(2))
        if what == "twice":
            distributed.shard(distributed.shard(new("topk"), distributed.start(2)), distributed.start(2))
        if what == "rows":
            trained("topk", 1, {"normalize": "none"}, 1)
        if what == "share":
            distributed.start(1).share(torch.ones(()))
        if what == "group":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.distributed, "get_backend_config", lambda: "cuda:nccl")
                distributed.start(2)
        if what == "adam":
            trained("topk", 1, {"adam_in_backward": True})
        if what == "folder":
            trained("topk", 2, {"run_dir": folder})
            trained("topk", 2, {"run_dir": folder})
    except (ValueError, FileExistsError, RuntimeError) as error:
        return str(error)
    return "not refused"


def test_groups_are_made_once(four):
    """Each holds connections, and memory of the GPU."""
    assert four(groups) == [(True, False)] * 4


def groups() -> tuple[bool, bool]:
    first, again, other = (distributed.start(n).feature_group for n in (2, 2, 1))
    return first is again, first is other


def test_each_rank_has_a_gpu_of_its_own_in_a_process_group_that_is_there(two):
    assert two(gpus_of_one_that_is_there) == [([0], []), ([1], [])]


def gpus_of_one_that_is_there() -> tuple[list[int], ...]:
    """The GPUs that start() takes, where this process has taken none before and where it has."""
    mesh, found = distributed.start(2).mesh, ([], [])
    for taken, before in zip(found, (False, True), strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fastsae.distributed.ranks._mesh", lambda *_: mesh)
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "device_count", lambda: 2)
            patch.setattr(torch.cuda, "is_initialized", lambda before=before: before)
            patch.setattr(torch.cuda, "set_device", taken.append)
            distributed.start(2)
    return found


def test_without_torchrun():
    with pytest.raises(RuntimeError, match=r"this process is no rank of a run. Start it with torchrun"):
        distributed.start()


# ---- how an SAE comes to its ranks ----------------------------------------------------------------------------------


def made(features: int, config: fastsae.TopKSAEConfig, dtype: torch.dtype, at_once: int) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastsae.distributed.sharding._DRAWN_AT_ONCE", at_once)
        torch.manual_seed(9)
        sae = distributed.new(config, distributed.start(features), dtype)
    return {"weights": sae.state_dict(), "counters": torch.zeros(0), "next": torch.rand(3)}


@pytest.mark.parametrize("at_once", [1, 64 * 7, 1 << 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init", ["paper", "unit"])
def test_new_is_the_whole_one_of_the_same_seed(four, init, dtype, at_once):
    """3 and 7 numbers a row, 68 rows: what is left over after whole sixteens is less than sixteen numbers, or more."""
    config = fastsae.JointSAEConfig(d_in=7, d_sae=68, k=4, d_embedding=3, pre_bias=True, init=init)
    torch.manual_seed(9)
    alone = fastsae.JointSAE(7, 68, 4, d_embedding=3, pre_bias=True, init=init, dtype=dtype)
    after = torch.rand(3)
    results = four(made, 4, config, dtype, at_once)
    found = whole(results, 4)
    del found["rows_since_fired"]
    assert found.keys() == alone.state_dict().keys()
    assert [n for n, t in alone.state_dict().items() if not torch.equal(found[n], t)] == []
    assert all(torch.equal(r["next"], after) for r in results)


def differing(features: int) -> dict[str, Any]:
    sae = new("joint")
    with torch.no_grad():
        sae.W1 += torch.distributed.get_rank()
    part = distributed.shard(sae, distributed.start(features))
    return {"weights": part.state_dict(), "counters": torch.zeros(0), "requires": part.W1.requires_grad}


def test_whole_tensors_are_those_of_the_first_rank(two):
    results = two(differing, 2)
    assert torch.equal(whole(results, 2)["W1"], new("joint").W1.detach())
    assert all(r["requires"] for r in results)


def test_data_ranks_begin_alike_whatever_each_was_given(two):
    results = two(of_own_seed, 1)
    whole(results, 1)  # asserts that ranks with the same part hold the same bits
    assert torch.equal(results[0]["weights"]["W_enc"], results[0]["given"])


def of_own_seed(features: int) -> dict[str, Any]:
    torch.manual_seed(torch.distributed.get_rank())
    sae = fastsae.TopKSAE(D, M, K)
    part = distributed.shard(sae, distributed.start(features))
    return {"weights": part.state_dict(), "counters": torch.zeros(0), "given": sae.W_enc.detach()}


def test_frozen_stays_frozen(two):
    assert two(frozen, 2) == [["V", "W1", "W2", "W_lin", "b1", "b2", "b_lin"]] * 2


def frozen(features: int) -> list[str]:
    part = distributed.shard(new("sequential"), distributed.start(features))
    return sorted(n for n, p in part.named_parameters() if p.requires_grad)


def own_loop(features: int, small: int = 1 << 18) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastsae.distributed.ranks._SMALL", small)
        return _own_loop(features)


def _own_loop(features: int) -> dict[str, Any]:
    sae, ranks = new("joint").eval(), None
    if features:
        ranks = distributed.start(features)
        sae = distributed.shard(sae, ranks)
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.01)
    for x in activations(3):
        loss = sae(ranks.own_rows(x) if ranks else x).loss
        (ranks.share(loss) if ranks else loss).backward()
        if ranks:
            ranks.add_gradients(dict(sae.named_parameters()))
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": sae.state_dict(), "counters": torch.zeros(0), "lines": []}


@pytest.mark.parametrize("small", [1 << 18, 100, 0], ids=["together", "the large ones alone", "each alone"])
def test_a_loop_of_ones_own(four, small):
    assert_equal_to_rounding(four(own_loop, 2, small), 2, own_loop(0))
