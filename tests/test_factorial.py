"""2x2 stimuli and discovery: against statsmodels, in planted networks, and where there is nothing to find."""

import dataclasses
import itertools
import json
import math
from dataclasses import replace

import planted
import pytest
import torch
from scipy import stats

import fastsae
from fastsae.config import DataConfig, FactorialConfig
from fastsae.evaluate import record
from fastsae.experiment import Trained
from fastsae.factorial import SHIPPED, Stimuli, anova, discover, run_factorial
from fastsae.factorial.responses import responses, tokenized
from fastsae.factorial.stimuli import LEVELS, Cell, Factor
from fastsae.modules import SecondarySAE
from fastsae.report.factorial import section

SIZES = (7, 9, 5, 8)
CELLS = torch.repeat_interleave(torch.arange(4), torch.tensor(SIZES))
FIRST, SECOND = (CELLS < 2).double(), (CELLS % 2 == 0).double()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def values(features: int, seed: int = 0, interaction: float = 0.0, main: float = 0.0) -> torch.Tensor:
    noise = torch.randn(len(CELLS), features, dtype=torch.float64, generator=generator(seed))
    return noise + (main * (FIRST + 2 * SECOND) + interaction * FIRST * SECOND).unsqueeze(1)


# ---- the statistics ----


def test_F_and_contrast_are_those_of_statsmodels():
    y = values(4, interaction=1.0, main=2.0)
    fit = anova.fit(y, CELLS)
    for f in range(4):
        found = anova.table(y[:, f], CELLS, ("a", "b"))
        assert float(fit.F[f]) == pytest.approx(found["interaction"]["F"], rel=1e-9)
        m = [y[c == CELLS, f].mean().item() for c in range(4)]
        assert float(fit.contrast[f]) == pytest.approx(m[0] - m[1] - m[2] + m[3])
        assert float(fit.error[f]) == pytest.approx(abs(float(fit.contrast[f])) / found["interaction"]["F"] ** 0.5)
        assert {name: row["p"] for name, row in found.items()}.keys() == {"a", "b", "interaction"}
    assert float(anova.fit(3 + 0 * y, CELLS).F.abs().max()) == 0  # constant features show nothing


@pytest.mark.parametrize("size", [3, 7, 10, 49])
def test_the_mean_of_whole_numbers_that_are_alike_is_that_number(size):
    whole = torch.arange(1.0, 200, dtype=torch.float64).expand(4 * size, -1)
    means = anova.fit(whole, torch.arange(4).repeat_interleave(size)).means
    assert means.tolist() == whole[:4].tolist()


def test_main_effects_of_statsmodels_go_by_their_names():
    y = values(1) + 5 * SECOND.unsqueeze(1)
    found = anova.table(y[:, 0], CELLS, ("a", "b"))
    assert found["b"]["p"] < 1e-6 < 0.01 < found["a"]["p"]


@pytest.mark.parametrize("kind", ["normal", "skewed", "mostly zero"])
def test_permutation_p_is_uniform_where_effects_are_additive(kind):
    """With main effects ten times the noise, which free permutations of the texts would count as noise."""
    noise = values(600, seed=1)
    if kind == "skewed":
        noise = noise.exp()
    if kind == "mostly zero":
        noise = noise.clamp(min=0.8)
    p = anova.permute(noise + 10 * FIRST.unsqueeze(1) + 10 * SECOND.unsqueeze(1), CELLS, 199, generator()).p
    assert 0.03 < float((p <= 0.05).double().mean()) < 0.075
    assert 0.42 < float((p <= 0.5).double().mean()) < 0.58


def test_permutation_p_of_an_interaction_is_as_small_as_it_must_be_to_be_discovered():
    y = torch.cat([values(1, interaction=6.0), values(300, seed=2)], dim=1)
    found = anova.permute(y, CELLS, 199, generator())
    assert float(found.p[0]) < 0.05 / 301 / 2
    assert float(found.p_family[0]) == 1 / 200
    q = anova.discovery_rates(found.p)
    assert float(q[0]) < 0.03
    order = found.p.sort().values
    steps = order * len(order) / torch.arange(1, len(order) + 1)
    expected = steps.flip(0).cummin(0).values.flip(0).clamp(max=1)
    torch.testing.assert_close(q.sort().values, expected)


def test_features_without_spread_within_cells():
    """Such as one of a token that all texts of a cell share. Its residuals are 6 times r and 6 times -r, and 2 of the
    924 ways to place them give the cells no spread again, and an interaction."""
    cells = torch.arange(4).repeat_interleave(3)
    y = torch.stack([(cells == 0).double() * 0.1 + 0.3, torch.full((12,), 0.1, dtype=torch.float64)], dim=1)
    fit = anova.fit(y, cells)
    assert float(fit.F[0]) > 1e20
    assert fit.d[1].tolist() == fit.F[1].tolist() == 0
    assert fit.partial_eta_squared.tolist() == [1, 0]
    p = anova.permute(y, cells, 50_000, generator()).p
    assert float(p[0]) == pytest.approx(2 / 924, rel=0.3)
    assert float(p[1]) == 1


def test_p_of_the_family_holds_for_the_largest_of_all():
    """About one in twenty of 200 families of 20 features without interaction has a p_family of at most 0.05."""
    least = [
        float(anova.permute(values(20, seed=100 + s, main=3.0), CELLS, 99, generator(s)).p_family.min())
        for s in range(200)
    ]
    assert 2 <= sum(p <= 0.05 for p in least) <= 20


def test_detectable_effects_are_detected_in_four_of_five_cases():
    d = anova.detectable(CELLS, tests=1)
    y = values(4000, interaction=d)
    fit = anova.fit(y, CELLS)
    t = fastsae.evaluate.intervals.student_t(fit.df)
    assert float((t**2 < fit.F).double().mean()) == pytest.approx(0.8, abs=0.02)
    assert anova.detectable(CELLS, tests=100) > d


def test_p_is_never_0_and_what_ties_with_the_data_counts():
    y = torch.zeros(len(CELLS), 2, dtype=torch.float64)
    y[CELLS == 0, 1] = 1.0  # as large as an F can be
    found = anova.permute(y, CELLS, 99, generator())
    assert float(found.p[0]) == 1
    assert 0 < float(found.p[1]) < 0.02
    two = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])  # of so few texts many permutations are the data itself
    tied = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0], dtype=torch.float64).unsqueeze(1)
    assert float(anova.permute(tied, two, 999, generator()).p[0]) > 0.02


def test_a_small_p_is_known_as_well_as_a_large_one():
    """Those left after the first permutations get more until ten exceed: the p of one feature, drawn again and again,
    varies by a third of itself."""
    y = torch.cat([values(1, seed=5, interaction=2.6), values(100, seed=6)], dim=1)
    p = torch.tensor([float(anova.permute(y, CELLS, 99, generator(s)).p[0]) for s in range(20)])
    assert 1e-4 < float(p.mean()) < 0.02
    assert float(p.std() / p.mean()) < 0.5


def test_effects_without_spread_are_none():
    fit = anova.fit(torch.ones(len(CELLS), 1, dtype=torch.float64), CELLS)
    assert (float(fit.d), float(fit.F), float(fit.partial_eta_squared)) == (0, 0, 0)


def test_more_tests_than_texts_can_serve_detect_nothing():
    assert anova.detectable(torch.arange(8) // 2, tests=10**6) == float("inf")


def test_cells_of_different_size_are_warned_of():
    stimuli = planted.stimuli(6)
    stimuli.cells["low low"] = replace(stimuli.cells["low low"], texts=stimuli.cells["low low"].texts[:3])
    with pytest.warns(UserWarning, match=r"cells hold \[6, 6, 6, 3\] texts"):
        discover(planted.joint(), None, planted.Planted(), planted.HOOK, stimuli, permutations=99)


def test_intervals_of_cell_means_are_those_of_the_anova():
    found = discover(planted.joint(), None, planted.Planted(), planted.HOOK, planted.stimuli())
    feature = found.families["pair"].features[0]
    texts = tokenized(planted.stimuli(), planted.Planted())
    (pair,) = [
        r for r in responses(planted.joint(), None, planted.Planted(), planted.HOOK, texts) if r.family == "pair"
    ]
    y = pair.values[:, pair.features.tolist().index([0, 1])]
    within = torch.cat([y[texts.cells == c] - y[texts.cells == c].mean() for c in range(4)])
    half = stats.t.ppf(0.975, 44) * float((within.square().sum() / 44).sqrt()) / 12**0.5
    for c, level in enumerate(LEVELS):
        mean = float(y[texts.cells == c].mean())
        assert feature.means[level].low == pytest.approx(mean - half)
        assert feature.means[level].high == pytest.approx(mean + half)
    ps = [f.p for f in found.families["pair"].features]
    assert ps == sorted(ps)
    first = [f.anova["interaction"]["F"] for f in found.families["pair"].features if f.p == ps[0]]
    assert first == sorted(first, reverse=True)


def test_cells_too_small():
    with pytest.raises(ValueError, match=r"at least 2 texts in each of 4 cells; got \[2, 2, 2, 1\]"):
        anova.fit(torch.randn(7, 1), torch.tensor([0, 0, 1, 1, 2, 2, 3]))


# ---- stimuli ----


def written(tmp_path, change=None):
    found = {
        "format": 1,
        "name": "mine",
        "description": "",
        "factors": [{"name": "a", "high": "x", "low": "y"}, {"name": "b", "high": "v", "low": "w"}],
        "cells": {
            level: {"texts": [f"{level} 1", f"{level} 2"], "words": [f"{level}1", f"{level}2"]} for level in LEVELS
        },
        "prompts": ["p", "q"],
    }
    if change:
        change(found)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(found))
    return path


def test_stimuli_are_read(tmp_path):
    found = Stimuli.load(written(tmp_path))
    assert (found.name, found.clampable, found.label("low high")) == ("mine", True, "y, v")
    assert list(found.cells) == list(LEVELS)

    def bare(s):
        del s["prompts"], s["description"]
        for cell in s["cells"].values():
            del cell["words"]

    assert not Stimuli.load(written(tmp_path, bare)).clampable


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(format=2), "format is 2, this fastsae reads 1"),
        (lambda s: s.update(promts=[]), "unknown key 'promts'. Did you mean 'prompts'"),
        (lambda s: s.pop("cells"), r"\['cells'\] missing"),
        (lambda s: s.update(factors=[1]), r"factors: expected a list of two; got \[1\]"),
        (lambda s: s["factors"][1].pop("low"), r"factors\[1\]: \['low'\] missing"),
        (lambda s: s["cells"].pop("low low"), r"cells: \['low low'\] missing"),
        (lambda s: s["cells"]["low low"].update(texts="abc"), r"cells\['low low'\].texts: expected a list of texts"),
        (lambda s: s["cells"]["low low"].update(texts=["a", " "]), "none of them empty"),
        (lambda s: s["cells"]["low low"].update(texts=["a"]), "at least 2 texts; got 1"),
        (lambda s: s["cells"]["low low"]["texts"].append("high high 1"), "texts: expected each in one cell and once"),
        (lambda s: s["cells"]["low low"]["words"].append("high high1"), "words: expected each in one cell and once"),
        (lambda s: s["cells"]["low low"].update(words=[]), "clamping needs prompts, and words in every cell"),
        (lambda s: s["cells"]["low low"].update(words=["one"]), "words: expected at least 2 in every cell"),
        (lambda s: s.update(prompts=[]), "clamping needs prompts, and words in every cell; there are 0 prompts"),
        (lambda s: s.update(prompts=["p"]), "prompts: expected at least 2"),
        (lambda s: s.update(name="../up"), "name: expected letters, digits"),
        (lambda s: s.update(name=3), "name: expected text; got 3"),
        (
            lambda s: s.update(name="n" * 250),
            "name: expected letters, digits.* 100 at most",
        ),  # found out after hours, else
        (lambda s: s["factors"][1].update(name="a"), r"two names, neither of them 'interaction'; got \['a', 'a'\]"),
        (lambda s: s["factors"][1].update(name="interaction"), "two names, neither of them 'interaction'"),
        (lambda s: s["factors"][1].update(high="w"), "factors: expected levels that differ"),
        (lambda s: s.update(prompts=["p", "q", "p"]), r"prompts: expected each once, .*; got \['p'\]"),
        (lambda s: s["cells"]["low low"]["texts"].append("high high 1 "), "texts: expected each in one cell and once"),
        (lambda s: s["cells"]["low low"]["words"].append(" sad"), r"no blanks around a word, .*; got \[' sad'\]"),
        (lambda s: s["cells"]["low low"]["texts"].append("a \ud800"), "texts: expected text of whole characters"),
    ],
)
def test_stimuli_that_are_wrong_say_where(change, message, tmp_path):
    with pytest.raises(ValueError, match=message) as raised:
        Stimuli.load(written(tmp_path, change))
    assert "mine.json" in str(raised.value)


def test_a_file_of_nested_lists_is_named(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ValueError, match=r"mine.json is damaged: not valid JSON \(maximum recursion depth"):
        Stimuli.load(path)


def test_stimuli_that_are_not_there():
    with pytest.raises(FileNotFoundError, match=r"neither a file nor a set of ours .*formality_emotion"):
        Stimuli.load("nowhere.json")


@pytest.mark.parametrize("name", SHIPPED)
def test_the_sets_of_ours_are_large_and_matched_in_length(name):
    from fastsae import lm

    found = Stimuli.load(name)
    assert all(len(cell.texts) >= 40 for cell in found.cells.values())
    assert len(found.prompts) >= 16
    count = {"formality_emotion": lambda text: len(text.split())}
    tokenizer = lm.load().tokenizer if name not in count else None
    lengths = [
        sorted(count[name](t) if tokenizer is None else len(tokenizer(t)["input_ids"]) for t in cell.texts)
        for cell in found.cells.values()
    ]
    assert all(one == lengths[0] for one in lengths)


# ---- discovery ----


def secondary() -> SecondarySAE:
    """Its feature 3 is the product of the markers, the others are what pairs of fillers make."""
    sae = SecondarySAE(planted.PAIRED + 5, 6, 4)
    with torch.no_grad():
        for p in sae.parameters():
            p.zero_()
        sae.W_enc[3, 0], sae.b_enc[3] = 1.0, -planted.OFFSET
        sae.W_enc[[0, 1, 2, 4, 5], [1, 2, 3, 4, 5]] = 1.0
        sae.W_dec.copy_(sae.W_enc)
    return sae


def test_the_planted_pair_is_found_first():
    found = discover(planted.joint(), secondary(), planted.Planted(), planted.HOOK, planted.stimuli())
    assert list(found.families) == ["identity", "pair", "secondary"]
    pair, second = found.families["pair"], found.families["secondary"]
    assert pair.features[0].features == (0, 1)
    assert second.features[0].features == (3,)
    for family in (pair, second):
        assert family.features[0].q < 0.02
        assert family.features[0].contrast.low > 0
        assert family.features[0].partial_eta_squared > 0.3
        assert family.features[0].anova["interaction"]["p"] < 1e-4
        assert family.discoveries >= 1
    assert pair.unlike != ()
    assert not {f.features for f in pair.features if f.p <= 0.5} & set(pair.unlike)
    markers = {f.features: f for f in found.families["identity"].features}
    for marker in ((0,), (1,)):  # they have main effects, and no interaction
        assert marker not in markers or markers[marker].q > 0.05
    assert found.families["identity"].discoveries == 0
    assert found.tokens == dict.fromkeys(LEVELS, 10.0)
    assert found.tokens_p == {}


def test_nothing_is_found_where_effects_are_additive():
    """Activations that are linear in the markers, k = d_sae and all of them positive: p is small as often as it should
    be, and of 40 sets about two have a discovery at most."""
    torch.manual_seed(0)
    sae = fastsae.TopKSAE(planted.D, 20, 20, pre_bias=False)
    with torch.no_grad():
        torch.nn.init.normal_(sae.W_enc)
        sae.b_enc += 20
    model, shares, discoveries = planted.Planted(product=0.0), [], 0
    for seed in range(40):
        found = discover(sae, None, model, planted.HOOK, planted.stimuli(8, seed), permutations=199, seed=seed)
        family = found.families["identity"]
        assert family.tested == 20
        shares.append(family.small_p)
        discoveries += family.discoveries > 0
    assert 0.02 < sum(shares) / len(shares) < 0.085
    assert discoveries <= 6  # 5 % of 40 are 2; more than 6 come once in 300 times


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_responses_by_definition(pool):
    sae, model, texts = planted.joint(), planted.Planted(), tokenized(planted.stimuli(3), planted.Planted())
    second = secondary()
    found = {r.family: r for r in responses(sae, second, model, planted.HOOK, texts, pool)}
    tokens = texts.windows.tokens
    with torch.no_grad():
        code = sae.encode(model.activations(tokens)[:, 1:])
        hidden = sae.hidden(code)
        dense = {
            "identity": code.to_dense(),
            "secondary": second.encode(hidden).to_dense(),
        }
        seen = sae.strongest(code).to_dense()
    pairs = list(itertools.combinations(range(sae.d_sae), 2))
    dense["pair"] = torch.stack([seen[..., i] * seen[..., j] for i, j in pairs], dim=-1)
    for family, activations in dense.items():
        pooled = activations.double().mean(dim=1) if pool == "mean" else activations.double().amax(dim=1)
        kept = ((activations > 0).any(dim=1).sum(dim=0) >= 2).nonzero().squeeze(1)
        names = [list(pairs[i]) if family == "pair" else [i] for i in kept.tolist()]
        assert found[family].features.tolist() == names
        torch.testing.assert_close(found[family].values, pooled[:, kept], rtol=1e-6, atol=1e-9)


def hostile() -> Stimuli:
    """Texts that all begin alike, so that features of their first token have no spread; names made to be markup."""
    stimuli, markers = planted.stimuli(3), ("first second", "first filler1", "filler1 second", "filler1 filler2")
    cells = {
        level: Cell(tuple(f"{marker} filler{i} filler3" for i in range(4)), cell.words)
        for (level, cell), marker in zip(stimuli.cells.items(), markers, strict=True)
    }
    cells["low low"] = Cell((*cells["low low"].texts[:3], "filler1 filler2"), cells["low low"].words)  # lengths differ
    factors = (Factor("<b>one</b>", "$a_{$ <i>", "none"), Factor("$\\frac$", "x", "y"))
    prompts = ("first second <u>", *stimuli.prompts[:2])
    return dataclasses.replace(stimuli, description="<p>", factors=factors, cells=cells, prompts=prompts)


@pytest.mark.parametrize("amount", [1e20, 1e300])  # beyond what fp32 can square, beyond fp32
def test_a_page_of_what_has_no_spread_and_of_names_that_are_markup(amount):
    run = Trained(secondary(), DataConfig(hook=planted.HOOK), planted.joint())
    config = FactorialConfig(
        pool="max", amounts=(amount,), clamped=0, clamp=("pair:0,1",), permutations=99, directions=1, new_tokens=1
    )
    found = run_factorial(run, planted.Planted(), hostile(), config, lambda *_: None)
    endless = {name: dataclasses.replace(f, detectable_d=math.inf) for name, f in found.discovery.families.items()}
    found = dataclasses.replace(found, discovery=dataclasses.replace(found.discovery, families=endless))
    page = section(json.loads(json.dumps(record.plain(found) | {"options": {"pool": "max"}})))
    assert "d ∞" in page
    assert "An interaction of ∞ standard deviations" in page
    for markup in ("<b>one", "<i>", "<p>\n", "<u>"):
        assert markup not in page
    assert "first second &lt;u&gt;" in page


def test_a_text_that_does_not_fit_is_named():
    model = planted.Planted()
    model.cfg.n_ctx = 6
    with pytest.raises(ValueError, match="does not fit into the 6 tokens the model reads"):
        tokenized(planted.stimuli(2), model)
