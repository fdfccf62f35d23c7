"""Clamping against recomputation from the changed step on; effects in a planted network; readout and generation."""

from dataclasses import replace

import planted
import pytest
import torch
from test_factorial import secondary
from tiny_lm import hooked, saved, tokenizer

import fastsae
from fastsae import lm
from fastsae.code import SparseCode
from fastsae.config import DataConfig, FactorialConfig
from fastsae.evaluate import Interval, drivers
from fastsae.experiment import Trained
from fastsae.factorial import Carrier, Clamp, Target, effects, generate, run_factorial
from fastsae.factorial.effects import Control, Effect, Mixed
from fastsae.factorial.generate import side_by_side
from fastsae.factorial.readout import Spliced, WordReadout
from fastsae.factorial.responses import tokenized

D, M, E = 12, 40, 6


def saes(linear: bool = True) -> tuple[fastsae.JointSAE, fastsae.SecondarySAE, torch.Tensor]:
    """In fp64, everything random and normalisations far from trivial."""
    torch.manual_seed(2)
    sae = fastsae.JointSAE(D, M, 8, k_integration=5, d_embedding=E, linear=linear).double().eval()
    second = fastsae.SecondarySAE.on(sae, 20, 4).double().eval()
    for module in (sae, second):
        for p in module.parameters():
            torch.nn.init.normal_(p)
    raw = 3 * torch.randn(50, D, dtype=torch.float64) + 1
    sae.normalizer.measure(raw, "zscore")
    with torch.no_grad():
        second.normalizer.measure(sae.hidden(sae.encode(sae.normalizer(raw))), "zscore")
    return sae, second, raw


def changed(code: SparseCode, feature: int, change) -> SparseCode:
    """The code with one active entry changed, the others and their order as they are."""
    values = torch.where(code.indices == feature, change(code.values), code.values)
    return SparseCode(values, code.indices, code.d_sae)


def some_active(code: SparseCode) -> int:
    return int(code.firing_counts().argmax())


@pytest.mark.parametrize("kind", ["identity", "linear", "interaction", "pair", "secondary"])
@pytest.mark.parametrize("operation", ["multiply", "set"])
@torch.no_grad()
def test_a_clamp_is_the_forward_with_one_activation_changed(kind, operation):
    sae, second, raw = saes()
    carrier = Carrier(sae, second, raw)
    feature = some_active(carrier.integration if kind == "secondary" else carrier.seen)
    code, seen = carrier.code, carrier.seen
    active = (seen.indices == feature).any(dim=1)
    change = (lambda v: -2.5 * v) if operation == "multiply" else (lambda v: torch.full_like(v, 0.7))
    scale, parts = sae.normalizer.scale, sae.summands(code)
    if kind == "pair":
        dense = seen.to_dense()
        partner = int((dense[active] > 0).sum(dim=0).index_fill(0, torch.tensor(feature), 0).argmax())
        features = (feature, partner)
        product = dense[:, feature] * dense[:, partner]
        new = change(product)
        s = dense @ sae.V
        z = (s.square() - dense.square() @ sae.V.square()) / 2
        z = z + (new - product).unsqueeze(1) * sae.V[feature] * sae.V[partner]
        expected = sae.interaction_from(z @ sae.W1.T + sae.b1) - parts.interaction
        active = product > 0
    else:
        features = (feature,)
        part = {"identity": code, "secondary": carrier.integration}.get(kind, seen)
        active = (part.indices == feature).any(dim=1) & (part.columns(torch.tensor([feature]))[:, 0] > 0)
        moved = changed(part, feature, change)
        if kind == "identity":
            expected = sae.identity(moved) - sae.identity(code)
        elif kind == "linear":
            expected = sae.summands(moved).linear - parts.linear
        elif kind == "interaction":
            expected = sae.summands(moved).interaction - parts.interaction
        else:
            step = second.normalizer.invert(second.decode(moved)) - second.normalizer.invert(second.decode(part))
            expected = sae.interaction_from(carrier.hidden + step) - parts.interaction
    clamp = Clamp(Target(kind, features), -2.5 if operation == "multiply" else 0.7, operation)
    got = carrier.output_change(carrier.step(clamp))
    assert active.any()
    assert not active.all()
    torch.testing.assert_close(got[active], (expected * scale)[active], rtol=1e-9, atol=1e-9)
    if operation == "multiply":
        assert got[~active].abs().max() == 0
    else:
        assert got[~active].abs().max() > 0  # set, an inactive feature becomes active


@torch.no_grad()
def test_setting_an_inactive_feature_adds_it():
    sae, second, raw = saes()
    carrier = Carrier(sae, second, raw)
    feature = some_active(carrier.seen)
    row = int((carrier.seen.indices != feature).all(dim=1).nonzero()[0])
    values = torch.cat([carrier.seen.values[row], torch.tensor([0.7], dtype=torch.float64)])
    indices = torch.cat([carrier.seen.indices[row], torch.tensor([feature])])
    dense = torch.zeros(M, dtype=torch.float64).scatter(0, indices, values)
    z = ((dense @ sae.V).square() - dense.square() @ sae.V.square()) / 2
    expected = sae.interaction_from(z @ sae.W1.T + sae.b1) - sae.interaction_from(carrier.hidden[row])
    got = carrier.output_change(carrier.step(Clamp(Target("interaction", (feature,)), 0.7, "set")))[row]
    torch.testing.assert_close(got, expected * sae.normalizer.scale, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pathway", ["linear", "interaction"])
@torch.no_grad()
def test_a_whole_pathway(pathway):
    sae, second, raw = saes()
    carrier = Carrier(sae, second, raw)
    got = carrier.output_change(carrier.step(Clamp(Target(pathway), 0.0)))
    expected = -getattr(sae.summands(carrier.code), pathway) * sae.normalizer.scale
    torch.testing.assert_close(got, expected)


@torch.no_grad()
def test_multiplying_by_one_leaves_the_model_untouched_and_splicing_does_not():
    sae, second, raw = saes()
    carrier = Carrier(sae, second, raw)
    for target in ("secondary:3", "pair:1,2", "identity:1", "linear:1", "interaction:1", "linear", "interaction"):
        change = carrier.output_change(carrier.step(Clamp(Target.parse(target), 1.0)))
        torch.testing.assert_close(carrier.replaced(change, splice=False), raw)
    torch.testing.assert_close(carrier.replaced(None, splice=True), sae.reconstruct(raw))


@pytest.mark.parametrize("linear", [True, False], ids=["W_lin", "W_dec"])
@torch.no_grad()
def test_controls_are_as_long_as_the_change_at_every_row(linear):
    sae, second, raw = saes(linear)
    carrier = Carrier(sae, second, raw)
    direction = torch.nn.functional.normalize(torch.randn(D, dtype=torch.float64), dim=0)
    pairs = [(int(i), int(j)) for i, j in carrier.seen.indices[0].view(-1)[:4].view(2, 2)]
    secondaries = carrier.integration.firing_counts().argsort(descending=True)[:2].tolist()
    for target, other, primaries in (
        (Target("pair", pairs[0]), Target("pair", pairs[1]), pairs[0]),
        (Target("secondary", (secondaries[0],)), Target("secondary", (secondaries[1],)), ()),
        (Target("interaction"), None, ()),
    ):
        clamp = Clamp(target, -4.0)
        step = carrier.step(clamp)
        change = carrier.output_change(step)
        length = change.norm(dim=1)
        assert length.max() > 0
        random = carrier.random_control(change, step, direction)
        torch.testing.assert_close(random.norm(dim=1), length)
        at = length > 0
        torch.testing.assert_close(
            random[at] @ direction, step.coefficient.sign()[at] * length[at]
        )  # one direction, with the sign of the step
        linear_control = carrier.linear_control(change, step, primaries)
        torch.testing.assert_close(linear_control.norm(dim=1), length)
        W = sae.W_lin if linear else sae.W_dec
        if primaries:
            assert torch.linalg.matrix_rank(torch.cat([linear_control / sae.normalizer.scale, W[list(primaries)]])) == 2
        if other:
            found = carrier.other_control(change, step, clamp, other)
            torch.testing.assert_close(found.norm(dim=1), length)
            assert (torch.nn.functional.cosine_similarity(found, change)[at] < 0.999).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pair:1", "expected secondary:12, pair:3,45"),
        ("secondary", "expected secondary:12"),
        ("tertiary:1", "got 'tertiary:1'"),
        ("identity:-1", "got 'identity:-1'"),
        ("secondary:20", "there are 20 features, counted from 0"),
        ("pair:3,3", "two different features"),
    ],
)
def test_targets_that_are_none(text, message):
    sae, second, _ = saes()
    with pytest.raises(ValueError, match=message):
        Target.parse(text).check(sae, second)


def test_a_pair_has_one_name():
    """Named the other way round it would be clamped twice, and be compared with itself."""
    assert Target.parse("pair:45,3") == Target.parse("pair:3,45")


def test_targets_need_their_pathway():
    sae = fastsae.TopKSAE(D, M, 4)
    Target.parse("identity:3").check(sae, None)
    for text in ("secondary:1", "pair:1,2", "linear:1", "interaction"):
        with pytest.raises(ValueError, match="and there is none"):
            Target.parse(text).check(sae, None)
    with pytest.raises(ValueError, match="only a feature can be set"):
        Clamp(Target("interaction"), 1.0, "set")


# ---- the readout ----

HOOK = "blocks.1.hook_resid_post"


def test_log_probabilities_of_whole_words():
    model, prompts = hooked(), ["the cat", "a dog ran"]
    words = ["sat", "on the", "sat on", "under"]  # two of them are two tokens
    readout = WordReadout(model, HOOK, prompts, words)
    assert len(readout.spliced.tokens) == 6  # words that begin alike are read at once
    found = readout.scores()
    for p, prompt in enumerate(prompts):
        for w, word in enumerate(words):
            ids = [0, *tokenizer()(f"{prompt} {word}", add_special_tokens=False)["input_ids"]]
            logits = model(torch.tensor([ids]))[0].detach().log_softmax(dim=-1)
            n = len(word.split())
            expected = sum(float(logits[t - 1, ids[t]]) for t in range(len(ids) - n, len(ids)))
            assert float(found[p, w]) == pytest.approx(expected, rel=1e-4)
    same = [readout.spliced.raw(part) for part in readout.spliced.parts]
    torch.testing.assert_close(readout.scores(same), found, rtol=1e-5, atol=1e-5)
    other = readout.scores([rows + 1 + torch.arange(rows.shape[1]) % 3 for rows in same])
    assert (other - found).abs().min() > 1e-4


def test_words_that_join_the_prompt_are_refused(monkeypatch):
    model = hooked()

    class Joining:
        bos_token_id = 0

        def __call__(self, text, **_):
            return {"input_ids": [1, 2] if " " not in text else [3, 4]}

    monkeypatch.setattr(model, "tokenizer", Joining())
    with pytest.raises(ValueError, match="joins its end with the word"):
        WordReadout(model, HOOK, ["ab"], ["cd"])


# ---- effects ----


@pytest.fixture(scope="module")
def found():
    """A whole experiment on the planted network; pair 0, 1 multiplies what makes words of high high likely."""
    torch.manual_seed(0)
    run = Trained(secondary(), DataConfig(hook=planted.HOOK), planted.joint())
    config = FactorialConfig(
        clamp=("linear:0", "identity:1", "secondary:0"), amounts=(-1.0, 3.0), directions=40, others=5, new_tokens=4
    )
    return run_factorial(run, planted.Planted(), planted.stimuli(), config, lambda *_: None)


def test_clamping_the_planted_features_shows_their_interaction(found):
    effects = {e.target: e for e in found.effects}
    assert list(effects)[:2] == [
        "pair:0,1",
        "pair:" + ",".join(map(str, found.discovery.families["pair"].features[1].features)),
    ]
    for target in ("pair:0,1", "secondary:3", "interaction"):
        effect = effects[target]
        interaction = effect.contrasts["interaction"]
        assert interaction.low > 0
        assert effect.p_random == pytest.approx(1 / 41)
        assert effect.mixed is not None
        assert effect.mixed.p < 0.01
        assert effect.mixed.interaction.estimate == pytest.approx(interaction.estimate, rel=0.01)
        assert effect.verdict.endswith("More than random directions do, over prompts and over words.")
        assert effect.linear is not None
        assert abs(effect.linear.interaction) < 0.02 * interaction.estimate  # the linear pathway has none
        assert all(abs(c.interaction) < 0.2 * interaction.estimate for c in effect.other)
    assert effects["pair:0,1"].other != ()
    assert effects["pair:0,1"].linear.matched == pytest.approx(1.0)


def test_an_experiment_holds_its_verdicts_over_all_it_clamps(found):
    assert found.effects == effects.judged(found.effects)
    assert any(e.mixed is not None and e.mixed.p_family > e.mixed.p for e in found.effects)


def test_the_effect_is_what_the_network_does(found):
    """Per unit of dose u_2 gains the product of the markers, and high high reads it at 3 (1 + word / 10)."""
    model, stimuli = planted.Planted(), planted.stimuli()
    expected = []
    for prompt in stimuli.prompts:
        ids = [0, *model.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        x = model.activations(torch.tensor([ids]))[0, -1]
        expected.append(float(x[0] * x[1]) * 3 * 1.15)
    effect = next(e for e in found.effects if e.target == "pair:0,1")
    assert effect.contrasts["interaction"].estimate == pytest.approx(sum(expected) / len(expected), rel=1e-3)
    assert [level.amount for level in effect.levels] == [-1.0, 3.0]
    for level in effect.levels:
        slope = level.contrasts["interaction"].estimate / (level.amount - 1)
        assert slope == pytest.approx(effect.contrasts["interaction"].estimate, rel=1e-6)


def test_clamping_what_is_additive_shows_no_interaction(found):
    effects = {e.target: e for e in found.effects}
    for target in ("linear:0", "identity:1"):
        effect = effects[target]
        main = effect.contrasts["first" if target == "linear:0" else "second"]
        assert main.low > 0
        assert abs(effect.contrasts["interaction"].estimate) < 1e-5 * main.estimate
    assert effects["linear:0"].other != ()


def planted_run() -> Trained:
    return Trained(secondary(), DataConfig(hook=planted.HOOK), planted.joint())


def small(**options) -> FactorialConfig:
    return FactorialConfig(
        **({"clamped": 1, "directions": 2, "others": 1, "new_tokens": 0, "permutations": 99} | options)
    )


@pytest.mark.parametrize("amount", [1e20, 1e300])  # beyond what fp32 can square, beyond fp32
def test_amounts_beyond_what_the_model_can_compute_show_nothing(amount):
    config = small(amounts=(amount,), directions=20)
    found = run_factorial(planted_run(), planted.Planted(), planted.stimuli(6), config, lambda *_: None)
    for effect in found.effects:
        assert "More than random directions" not in effect.verdict
        assert effect.p_random > 0.05


def test_weights_that_are_nan_show_nothing():
    run = planted_run()
    with torch.no_grad():
        run.base.W2[2, 0] = torch.nan
    found = run_factorial(run, planted.Planted(), planted.stimuli(6), small(), lambda *_: None)
    assert all(e.verdict.startswith("Not measured: what the model says") and e.mixed is None for e in found.effects)


@pytest.mark.parametrize("directions", [0, 2])
def test_too_few_random_directions_say_so(directions):
    config = small(directions=directions)
    found = run_factorial(planted_run(), planted.Planted(), planted.stimuli(6), config, lambda *_: None)
    assert f"as {directions} of them are too few for that: 19 are enough" in found.effects[0].verdict
    assert ("the largest of 2 random directions" in found.effects[0].verdict) == (directions == 2)


def test_prompts_that_do_not_fit_are_refused_before_discovery():
    said = []
    with pytest.raises(ValueError, match="1000 tokens after these prompts are more than the model reads; 17 fit"):
        run_factorial(planted_run(), planted.Planted(), planted.stimuli(6), small(new_tokens=1000), said.append)
    stimuli = planted.stimuli(6)
    long = replace(stimuli, prompts=(" ".join(["first"] * 30), *stimuli.prompts))
    with pytest.raises(ValueError, match="a prompt takes 31 tokens, the model reads 24"):
        run_factorial(planted_run(), planted.Planted(), long, small(), said.append)
    assert said == []


def test_nothing_can_be_clamped_without_prompts():
    stimuli = replace(planted.stimuli(6), prompts=())
    with pytest.raises(ValueError, match="stimuli 'planted' have no prompts and words to read an effect from"):
        run_factorial(planted_run(), planted.Planted(), stimuli, small(clamp=("identity:1",)), print)


def test_setting_gives_the_same_effect_per_unit_of_the_product():
    """Whatever the amounts: what they take the place of differs by token, and falls out."""
    run = Trained(secondary(), DataConfig(hook=planted.HOOK), planted.joint())
    for amounts in ((0.5, 1.0), (4.0, 5.0, 9.0), (0.0, 0.5)):
        config = FactorialConfig(
            clamped=0, clamp=("pair:0,1",), amounts=amounts, operation="set", directions=0, others=0, new_tokens=0
        )
        (effect,) = run_factorial(run, planted.Planted(), planted.stimuli(), config, lambda *_: None).effects
        # Every text position with an amount of product more: u_2 gains it, high high reads it at 3 (1 + word / 10).
        assert effect.contrasts["interaction"].estimate == pytest.approx(3 * 1.15, rel=1e-3)


def test_what_is_additive_is_active_together_and_does_nothing():
    """Without the product in the network the pair is still there to be discovered; clamping it changes nothing."""
    run = Trained(secondary(), DataConfig(hook=planted.HOOK), planted.joint(product=0.0))
    config = FactorialConfig(clamped=1, directions=19, others=0, new_tokens=0)
    found = run_factorial(run, planted.Planted(product=0.0), planted.stimuli(), config, lambda *_: None)
    pair = found.discovery.families["pair"]
    assert (pair.features[0].features, pair.crossing) == ((0, 1), 0)
    effects = {e.target: e for e in found.effects}
    assert effects["pair:0,1"].verdict.startswith("Nothing changes")
    assert effects["pair:0,1"].mixed is None
    assert effects["pair:0,1"].active == 0
    assert not any(e.verdict.endswith("over prompts and over words.") for e in found.effects)


def test_words_are_random_in_the_mixed_model():
    """An effect that is there for all prompts, and carried by few words, is not told from none over words."""
    generator = torch.Generator().manual_seed(0)
    stimuli = planted.stimuli()
    told, p = 0, []
    for _ in range(20):
        by_word = torch.randn(1, 16, generator=generator, dtype=torch.float64)
        gains = by_word + 0.05 * torch.randn(8, 16, generator=generator, dtype=torch.float64)
        over_prompts = effects._interval(effects._contrast(gains, stimuli, "interaction"))
        told += not over_prompts.low <= 0 <= over_prompts.high
        mixed = effects._mixed(gains, stimuli)
        assert mixed is not None
        p.append(mixed.p)
    assert told > 15
    assert sum(value <= 0.05 for value in p) <= 4


INTERVAL = Interval(1.0, 0.5, 1.5)
SURE, UNSURE = Mixed(INTERVAL, 0.02, 0.02, True), Mixed(INTERVAL, 0.4, 0.4, True)
FAILED = Mixed(Interval(float("nan")), float("nan"), float("nan"), False)
RANDOM = tuple(Control(f"random {i}", 0.1, 1.0) for i in range(40))
LINEAR = Control("linear pathway", 0.01, 1.0)
WHOLE = Effect("pair:0,1", "multiply", 1.0, (), {"interaction": INTERVAL}, SURE, RANDOM, (), LINEAR, 1 / 41)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "do, over prompts and over words."),
        ({"contrasts": {"interaction": Interval(1.0, -0.1, 2.1)}}, "the interval over prompts holds 0."),
        ({"contrasts": {"interaction": Interval(1.0, float("nan"), 2)}}, "over prompts holds 0."),
        ({"p_random": 0.2}, "Not told from a random direction."),
        ({"random": RANDOM[:10], "p_random": 1 / 11}, "too few for that: 19 are enough."),
        ({"random": (), "p_random": 1.0}, "too few for that: 19 are enough."),
        ({"mixed": UNSURE}, "over words it is not told from none."),
        ({"mixed": FAILED}, "what words differ by, no model fits."),
        ({"mixed": replace(SURE, converged=False), "linear": None}, "no model fits."),
        ({"mixed": None}, "it is active at no token of the prompts."),
        ({"linear": replace(LINEAR, interaction=-1.2)}, "without being combined."),
        ({"linear": Control("", 1.2, 0.5)}, "over prompts and over words."),
        ({"target": "identity:1"}, "one feature's direction combines nothing."),
    ],
)
def test_verdicts(changed, expected):
    (judged,) = effects.judged([replace(WHOLE, **changed)])
    assert judged.verdict.endswith(expected)


def test_the_more_is_clamped_the_less_a_small_p_says():
    """Holm by hand: the smallest of four times 4, the next times 3, and never below one before it."""
    p = [0.02, 0.001, 0.4, 0.0101]
    fits = [replace(SURE, p=value, p_family=value) for value in p]
    among = effects.judged([*(replace(WHOLE, mixed=mixed) for mixed in fits), replace(WHOLE, mixed=FAILED)])
    held = [effect.mixed.p_family for effect in among[:4]]
    assert held == pytest.approx([2 * 0.02, 4 * 0.001, 0.4, 3 * 0.0101])
    assert [effect.mixed.p for effect in among[:4]] == p
    many = effects.judged([WHOLE] * 3)  # 0.02 each
    assert all(effect.verdict.endswith("not told from luck among all that was clamped.") for effect in many)
    assert effects.judged([WHOLE] * 2)[0].verdict.endswith("do, over prompts and over words.")


def test_the_linear_control_has_the_sign_of_the_step():
    sae, second, raw = saes()
    with torch.no_grad():
        carrier = Carrier(sae, second, raw)
        pair = tuple(carrier.seen.indices[0, :2].tolist())
        up, down = (carrier.step(Clamp(Target("pair", pair), amount)) for amount in (3.0, -1.0))
        controls = [carrier.linear_control(carrier.output_change(s), s, pair) for s in (up, down)]
        both = (controls[0].norm(dim=1) > 0) & (controls[1].norm(dim=1) > 0)
        cosine = torch.nn.functional.cosine_similarity(*controls)[both]
        assert both.any()
        torch.testing.assert_close(cosine, -torch.ones_like(cosine))


def test_a_secondary_feature_that_nothing_drives_has_no_linear_control():
    run = Trained(secondary(), DataConfig(hook=planted.HOOK), planted.joint())
    config = FactorialConfig(clamped=0, clamp=("secondary:5",), amounts=(0.0, 3.0), operation="set", directions=2)
    with torch.no_grad():
        run.sae.b_enc[5] = -1000.0
    (effect,) = run_factorial(
        run, planted.Planted(), planted.stimuli(), replace(config, new_tokens=0), lambda *_: None
    ).effects
    assert effect.active > 0
    assert effect.linear is None


def test_text_under_clamps(found):
    assert set(found.texts) == {e.target for e in found.effects}
    assert len(found.prompts) == 5
    for by_edit in found.texts.values():
        assert list(by_edit) == ["untouched", "multiply -1", "multiply 3", "random, as multiply 3"]
    written = found.texts["pair:0,1"]
    # The product makes words of high high, and its opposite makes them never come.
    assert all(text.split()[0].startswith("a") for text in written["multiply 3"])
    assert not any(word.startswith("a") for text in written["multiply -1"] for word in text.split())
    shown = side_by_side(found.prompts, written)
    assert shown.count("\nmultiply 3 ") == 5


def test_generation_is_the_models_own_greedy_text():
    model, prompts = hooked(), ["the cat", "a dog ran under"]
    written = generate(model, HOOK, prompts, {"untouched": None, "zero": torch.zeros_like}, 5)
    for prompt, text in zip(prompts, written["untouched"], strict=True):
        ids = [0, *tokenizer()(prompt, add_special_tokens=False)["input_ids"]]
        for _ in range(5):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert tokenizer().decode(ids[-5:]) == text
    assert written["zero"] != written["untouched"]
    with pytest.raises(ValueError, match="9 tokens after these prompts are more than the model reads; 7 fit"):
        generate(model, HOOK, prompts, {"untouched": None}, 9)


def test_drivers_of_the_planted_feature():
    windows = tokenized(planted.stimuli(), planted.Planted()).windows
    (driver,) = drivers(secondary(), planted.joint(), planted.Planted(), planted.HOOK, windows, [3])
    assert driver.pairs[0].features == (0, 1)
    assert driver.pairs[0].share == pytest.approx(1.0)


def test_a_topk_sae_has_its_own_features_clamped():
    sae = fastsae.TopKSAE(planted.D, 15, 6, pre_bias=False)
    with torch.no_grad():
        sae.W_enc.copy_(planted.joint().W_enc)
        sae.W_dec.copy_(sae.W_enc)
    run = Trained(sae, DataConfig(hook=planted.HOOK))
    config = FactorialConfig(clamped=1, directions=3, others=2, new_tokens=0, permutations=99)
    found = run_factorial(run, planted.Planted(), planted.stimuli(6), config, lambda *_: None)
    assert [e.target.split(":")[0] for e in found.effects] == ["identity"]
    assert found.texts == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amounts": ()}, "amounts: expected different finite numbers"),
        ({"amounts": (1.0,)}, "amounts: expected one that is not 1;"),
        ({"amounts": (0.5,), "operation": "set"}, "amounts: expected at least 2 to set"),
        ({"permutations": 5}, "permutations: expected from 99 to 1000000; got 5"),
        ({"clamped": 13}, "clamped: expected from 0 to 12; got 13"),
        ({"seed": 2**70}, "seed: expected from 0 to"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        FactorialConfig(**options)


def test_prompts_begin_as_the_model_was_trained(tmp_path):
    for kind, begun in {"qwen": [5, 6], "gpt2": [0, 5, 6]}.items():
        model = lm.load(str(saved(tmp_path / kind, kind)))
        spliced = Spliced(model, "blocks.1.hook_resid_post", [[5, 6], [5]])
        assert spliced.tokens[0].tolist() == begun
        assert spliced.is_text.sum() == 3
    bert = lm.load(str(saved(tmp_path / "bert", "bert")))
    with pytest.raises(ValueError, match="reads in both directions, so it predicts no word after a prompt"):
        WordReadout(bert, "blocks.1.hook_resid_post", ["the cat"], ["sat"])
