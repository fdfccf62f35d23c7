"""Geometry against planted structure, and against definitions written out by hand."""

import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

import fastsae
from fastsae.code import SparseCode
from fastsae.evaluate.contribution import contributions, shares_of, trained
from fastsae.evaluate.directions import components, concentration, directions, effective_rank, gini, pairs
from fastsae.evaluate.geometry import dip, firing_groups, geometry

GROUPS = ["all", "dead", "rare", "middle", "common"]


def small_sae(**options) -> fastsae.JointSAE:
    torch.manual_seed(2)
    sae = fastsae.JointSAE(16, 64, 6, k_integration=4, d_embedding=8, **options)
    for parameter in sae.parameters():  # larger than at the start, where the interaction would hardly show
        torch.nn.init.normal_(parameter, std=0.3)
    sae.normalizer.measure(torch.randn(50, 16) * 2 + 1, "zscore")
    return sae


def set_squared_norms(sae: fastsae.JointSAE, size: torch.Tensor) -> None:
    with torch.no_grad():
        sae.W_dec.copy_(F.normalize(torch.randn_like(sae.W_dec), dim=1) * size.sqrt()[:, None])


def by_hand(share: torch.Tensor, size: torch.Tensor) -> float:
    return float(spearmanr(share.double().numpy(), size.double().numpy()).statistic)


def test_the_papers_correlation_is_built_in():
    """Untouched W_lin and V give the published rank correlation, so its null does too."""
    sae = fastsae.JointSAE(3200, 300, 8, k_integration=8, d_embedding=300)
    size = torch.cat([0.03 + 0.02 * torch.rand(150), 0.4 + 0.3 * torch.rand(150)])
    set_squared_norms(sae, size)
    g = geometry(sae, [torch.randn(20, 3200)])
    w = g.weight_norm_share
    assert w is not None
    norms = [weight.detach().norm(dim=1) for weight in (sae.W_dec, sae.W_lin, sae.V)]
    for i, pathway in enumerate(("identity", "linear", "interaction")):
        assert w.spearman[pathway].value == pytest.approx(by_hand(norms[i] / sum(norms), size), abs=1e-3)
    found = w.spearman["integration"]
    assert found.value < -0.98
    assert found.value == pytest.approx(-w.spearman["identity"].value)
    assert found.null_min <= found.null_mean <= found.null_max
    assert found.null_mean == pytest.approx(found.value, abs=0.005)
    for split in (w.by_median, w.by_paper_threshold):
        assert (split.features_low, split.features_high) == (150, 150)
        for side, chosen in ((split.low, size < 0.2), (split.high, size > 0.2)):
            for i, pathway in enumerate(("identity", "linear", "interaction")):
                by_definition = float((norms[i] / sum(norms))[chosen].mean())
                assert side[pathway].value == pytest.approx(by_definition, rel=1e-5)
                assert side[pathway].null_mean == pytest.approx(by_definition, rel=0.01)
    of_contribution = g.contribution.spearman["all"]
    assert of_contribution.value < -0.9
    assert of_contribution.null_mean == pytest.approx(of_contribution.value, abs=0.01)


def test_what_was_learned_stands_out_from_the_null():
    sae = small_sae()
    size = torch.rand(64) + 0.1
    set_squared_norms(sae, size)
    with torch.no_grad():  # strong features have the strongest integration: against what is built in
        sae.W_lin.copy_(F.normalize(sae.W_lin, dim=1) * (10 * size)[:, None])
        sae.V.mul_(0.01)
    g = geometry(sae, [torch.randn(300, 16)])
    for found in (g.weight_norm_share.spearman["integration"], g.contribution.spearman["all"]):
        assert found.value > 0.5
        assert found.null_max < 0.3
    assert g.weight_norm_share.by_paper_threshold is not None
    set_squared_norms(sae, torch.full((64,), 1.0) + size)
    assert geometry(sae, [torch.randn(300, 16)]).weight_norm_share.by_paper_threshold is None


def test_contribution_is_what_leaving_the_feature_out_changes(monkeypatch):
    monkeypatch.setattr("fastsae.evaluate.contribution.CHUNK", 3 * 4 * 8)  # several chunks, the last one shorter
    sae = small_sae().eval().double()
    sae.normalizer.dtype = torch.float64
    x = torch.randn(20, 16, dtype=torch.float64)
    with torch.no_grad():
        code = sae.encode(x)
        found = contributions(sae, trained(sae), code)
        whole = sae.components(x)
        for feature in range(64):
            without = SparseCode(code.values * (code.indices != feature), code.indices, 64)
            sae.encode = lambda x, without=without: without
            parts = sae.components(x)
            del sae.encode
            for pathway in ("identity", "linear", "interaction"):
                change = (getattr(whole, pathway) - getattr(parts, pathway)).square().sum()
                assert found[pathway][feature].item() == pytest.approx(change.item(), rel=1e-9, abs=1e-12)
    assert (found["interaction"] > 0).sum() > 20


def test_contribution_by_group():
    sae = small_sae()
    raw = torch.randn(90, 16) * 2 + 1
    g = geometry(sae, raw.split(40), max_rows=70)
    assert g.rows == 90
    assert g.contribution.rows == 70
    sae.eval()
    with torch.no_grad():
        parts = contributions(sae, trained(sae), sae.encode(sae.normalizer(raw[:70])))
        groups = firing_groups(sae.encode(sae.normalizer(raw)).firing_counts())
        size = sae.W_dec.double().square().sum(1)
    total = sum(parts.values())
    assert g.contribution.features == int((total > 0).sum())
    for name, group in groups.items():
        if total[group].sum() == 0:
            assert g.contribution.share[name] is g.contribution.spearman[name] is None
            continue
        for pathway, part in parts.items():
            expected = float(part[group].sum() / total[group].sum())
            assert g.contribution.share[name][pathway] == pytest.approx(expected, rel=1e-5)
        assert g.contribution.share[name]["integration"] == pytest.approx(1 - g.contribution.share[name]["identity"])
        among = group[total[group] > 0]
        integration = ((parts["linear"] + parts["interaction"]) / total)[among]
        assert g.contribution.spearman[name].value == pytest.approx(by_hand(integration, size[among]), abs=1e-3)


def test_two_modes_that_are_firing_rates():
    """Two modes by the dip test, one within each group."""
    size = torch.cat([1 + 0.1 * torch.randn(100), 3 + 0.1 * torch.randn(200)])
    fired = torch.cat([torch.arange(1, 101), torch.arange(1001, 1201)])
    shuffled = torch.randperm(300)
    groups = firing_groups(fired[shuffled])
    found = {name: dip(size[shuffled][group]) for name, group in groups.items()}
    assert found["all"].p < 0.001
    assert found["all"].dip > 0.1
    assert min(found[name].p for name in ("rare", "middle", "common")) > 0.05
    assert found["dead"] is None
    assert dip(1 + 0.1 * torch.randn(100)).p > 0.5


def test_dip_is_reported_by_group():
    sae = small_sae()
    sae.b_enc.data[:24] = -1e3
    set_squared_norms(sae, torch.cat([1 + 0.1 * torch.randn(24), 3 + 0.1 * torch.randn(40)]))
    d = geometry(sae, [torch.randn(300, 16)]).dip_W_dec
    assert sorted(d) == sorted([*GROUPS, "alive"])
    assert d["all"].p < 0.001
    assert d["alive"].p > 0.05
    assert d["dead"].p > 0.05


def test_firing_groups_by_definition():
    sae = small_sae()
    sae.b_enc.data[[3, 7]] = -1e3
    raw = torch.randn(200, 16) * 2 + 1
    g = geometry(sae, raw.split(33))
    assert sae.training, "the mode was not restored"
    sae.eval()
    fired = (sae.encode(sae.normalizer(raw)).to_dense() > 0).sum(0)
    assert g.firing_rate == [n / 200 for n in fired.tolist()]
    assert list(g.groups) == GROUPS
    dead = int((fired == 0).sum())
    assert dead >= 2
    assert g.groups["dead"].features == dead
    assert g.groups["dead"].highest_rate == 0
    alive = fired.sort().values[dead:]
    for name, expected in zip(("rare", "middle", "common"), alive.tensor_split(3), strict=True):
        group = g.groups[name]
        assert group.features == len(expected)
        assert group.share == pytest.approx(len(expected) / 64)
        lowest, mean, highest = expected[0].item(), expected.sum().item() / len(expected), expected[-1].item()
        assert (group.lowest_rate, group.highest_rate) == (lowest / 200, highest / 200)
        assert group.mean_rate == pytest.approx(mean / 200, rel=1e-15)
    members = firing_groups(torch.tensor([5, 0, 2, 9, 0, 2, 7]))
    assert {name: group.tolist() for name, group in members.items()} == {
        "all": [0, 1, 2, 3, 4, 5, 6],
        "dead": [1, 4],
        "rare": [2, 5],
        "middle": [0, 6],
        "common": [3],
    }


def test_squared_norms_by_definition():
    sae = small_sae()
    sae.b_enc.data[:5] = -1e3
    raw = torch.randn(100, 16)
    g = geometry(sae, [raw])
    sae.eval()
    groups = firing_groups(sae.encode(sae.normalizer(raw)).firing_counts())
    assert list(g.squared_norms) == ["W_enc", "W_dec", "W_lin", "V"]
    for name, found in g.squared_norms.items():
        size = getattr(sae, name).detach().double().square().sum(1)
        assert len(found.edges) == 61
        for group, members in groups.items():
            one = found.groups[group]
            assert one.mean == pytest.approx(size[members].mean().item())
            assert one.median == pytest.approx(np.median(size[members].numpy()))
            assert one.share == pytest.approx((size[members].sum() / size.sum()).item())
            assert sum(one.histogram) == len(members)
    parts = [np.array(g.squared_norms["W_dec"].groups[name].histogram) for name in GROUPS]
    assert (parts[0] == sum(parts[1:])).all()


@pytest.mark.parametrize("init", ["paper", "unit"])
def test_untrained_norms_follow_the_laws(init):
    g = geometry(fastsae.JointSAE(200, 500, 4, d_embedding=50, init=init), [torch.randn(10, 200)])
    for name, found in g.squared_norms.items():
        assert found.groups["all"].mean == pytest.approx(found.at_init, rel=0.03), name
        drawn, trained = (np.cumsum(h) / 500 for h in (found.at_init_histogram, found.groups["all"].histogram))
        assert drawn[-1] == 1, "rows left out of the bins"
        if init == "paper" or name not in ("W_enc", "W_dec"):  # those are all 1 to rounding
            assert np.abs(drawn - trained).max() < 0.1, name  # a difference of 0.1 has p = 0.01 in Kolmogorov's test
    assert g.squared_norms["W_dec"].at_init == pytest.approx(1 if init == "unit" else 200 / 1500)


def test_angles_by_definition(monkeypatch):
    monkeypatch.setattr("fastsae.evaluate.directions.BLOCK", 7)
    rows = torch.randn(40, 12) * torch.rand(40, 1)
    gram, other = rows @ rows.T, ~torch.eye(40, dtype=torch.bool)
    cosine = torch.cosine_similarity(rows[:, None], rows[None], dim=2)
    assert pairs(rows) == pytest.approx((cosine[other].abs().mean().item(), gram[other].abs().mean().item()), rel=1e-4)
    energy = torch.linalg.svdvals(rows.double()).square().cumsum(0)
    expected = tuple(int((energy / energy[-1]).numpy().searchsorted(share)) + 1 for share in (0.9, 0.95))
    assert components(rows.split(7)) == expected
    d = directions(torch.cat([rows, torch.zeros(3, 12)]), np.random.default_rng(0))
    assert d.features_paired == 40
    assert (d.mean_abs_cosine, d.mean_abs_gram) == pytest.approx(pairs(rows))
    assert (d.components_90, d.components_95) == expected
    assert directions(torch.zeros(3, 4), np.random.default_rng(0)) is None


def test_random_directions_are_at_chance(monkeypatch):
    monkeypatch.setattr("fastsae.evaluate.directions.PAIRED", 500)
    rows = torch.randn(800, 60) * (torch.rand(800, 1) + 0.1)
    d = directions(rows, np.random.default_rng(1))
    assert d.features_paired == 500
    assert d.mean_abs_cosine_expected == pytest.approx(math.sqrt(2 / (math.pi * 60)))
    for found in (d.mean_abs_cosine, d.mean_abs_cosine_random):
        assert found == pytest.approx(d.mean_abs_cosine_expected, rel=0.02)
    assert d.mean_abs_gram == pytest.approx(d.mean_abs_gram_random, rel=0.05)
    assert abs(d.components_90 - d.components_90_random) <= 1
    planted = directions(torch.randn(800, 5) @ torch.randn(5, 60), np.random.default_rng(1))
    assert planted.components_95 <= 5
    assert planted.components_95_random > 40
    assert planted.mean_abs_cosine > 2 * planted.mean_abs_cosine_random


def test_concentration_by_definition():
    row = torch.tensor([[3.0, -1.0, 0.0, 2.0]])
    differences = (row.abs().T - row.abs()).abs().sum().item()  # Gini: mean |difference| over twice the mean
    assert gini(row).item() == pytest.approx(differences / (2 * 4 * 6))
    p = [0.5, 1 / 6, 1 / 3]
    assert effective_rank(row).item() == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))
    assert gini(torch.ones(1, 9)).item() == pytest.approx(0, abs=1e-12)
    assert effective_rank(torch.ones(1, 9)).item() == pytest.approx(9)
    rows = torch.randn(500, 100)
    rows[0, 1:] = 0
    rows[1] = 0
    c = concentration(rows, np.random.default_rng(0))
    assert (c.gini.max, c.effective_rank.min) == pytest.approx((0.99, 1))
    assert c.gini.mean == pytest.approx(c.gini_random.mean, rel=0.02)
    assert c.effective_rank.mean == pytest.approx(c.effective_rank_random.mean, rel=0.02)
    assert c.gini_random.max < 0.6
    assert concentration(torch.zeros(2, 3), np.random.default_rng(0)) is None


def test_without_integration():
    sae = fastsae.TopKSAE(16, 64, 4)
    g = geometry(sae, [torch.randn(50, 16)])
    assert list(g.squared_norms) == ["W_enc", "W_dec"]
    assert g.weight_norm_share is g.contribution is g.concentration_V is None
    assert g.directions.features_paired == 64
    assert g.groups["all"].features == 64


@pytest.mark.parametrize(("left", "gone"), [("linear", "interaction"), ("interaction", "linear")])
def test_with_one_pathway(left, gone):
    g = geometry(small_sae(**{gone: False}), [torch.randn(50, 16)])
    assert set(g.weight_norm_share.spearman) == {"identity", left, "integration"}
    assert set(g.contribution.share["all"]) == {"identity", left, "integration"}
    assert (g.concentration_V is None) == (gone == "interaction")


def test_the_seed_decides_and_the_result_is_json():
    sae, raw = small_sae(), torch.randn(60, 16)
    first, again, other = (geometry(sae, [raw], seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first.dip_W_dec == other.dip_W_dec
    written = json.dumps(dataclasses.asdict(first), allow_nan=False)
    assert json.loads(written)["contribution"]["rows"] == 60


def test_shares_of():
    shares = shares_of({"identity": torch.tensor([1.0]), "linear": torch.tensor([2.0]), "interaction": torch.ones(1)})
    assert {name: share.item() for name, share in shares.items()} == {
        "identity": 0.25,
        "linear": 0.5,
        "interaction": 0.25,
        "integration": 0.75,
    }


def test_bf16_weights():
    sae = fastsae.JointSAE(16, 64, 4, d_embedding=8, dtype=torch.bfloat16)
    g = geometry(sae, [torch.randn(50, 16)])
    json.dumps(dataclasses.asdict(g), allow_nan=False)
    assert g.contribution.share["all"]["linear"] > 0


def test_no_rows_and_no_packages(monkeypatch):
    with pytest.raises(ValueError, match="at least 1 row"):
        geometry(small_sae(), [])
    monkeypatch.setitem(sys.modules, "diptest", None)
    with pytest.raises(ImportError, match=r"pip install \"\.\[lab\]\""):
        geometry(small_sae(), [torch.randn(4, 16)])
