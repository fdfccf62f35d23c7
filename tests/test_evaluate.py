"""Evaluation against definitions written out by hand."""

import math

import pytest
import torch
from tiny_lm import bridge, hooked, saved, tokenizer

import fastsae
from fastsae import lm
from fastsae.activations import Document, ModelActivations, tokenize
from fastsae.activations.store import Rows
from fastsae.evaluate import behavior, geometry, reconstruction
from fastsae.evaluate.behavior import Behavior
from fastsae.modules import Components

HOOK = "blocks.1.hook_resid_post"
TEXT = [
    Document("a", "the cat sat on the mat . the dog ran under a tree and then sat"),
    Document("b", "a dog , a cat ."),
    Document("c", "the tree ran quickly and then slowly . a mat sat"),
]


def small_sae(make=fastsae.JointSAE, **options) -> fastsae.JointSAE:
    torch.manual_seed(2)
    sae = make(16, 64, 4, **options)
    for parameter in sae.parameters():  # larger than at the start, where dropout would hardly show
        torch.nn.init.normal_(parameter, std=0.3)
    sae.normalizer.measure(torch.randn(50, 16) * 2 + 1, "zscore")
    return sae


def perfect_sae() -> fastsae.TopKSAE:
    sae = small_sae(fastsae.TopKSAE)
    sae.components = lambda x: Components(x, torch.zeros_like(x), torch.zeros_like(x))
    return sae


def windows(context: int = 12):
    return tokenize(TEXT, tokenizer(), context, held_out=None)


# ---- reconstruction -------------------------------------------------------------------------------------------------


def test_reconstruction_by_definition():
    sae = small_sae()
    raw = torch.randn(100, 16) * 3 + 50
    r = reconstruction(sae, raw.split(7))
    assert sae.training, "the mode was not restored"
    sae.eval()
    x = sae.normalizer(raw)
    y = sae(x).reconstruction
    restored = sae.reconstruct(raw)
    active = sae.encode(x).to_dense() > 0
    assert (r.rows, r.documents) == (100, 0)
    assert r.mse.estimate == pytest.approx((x - y).square().mean().item(), rel=1e-5)
    assert r.fvu.estimate == pytest.approx(((x - y).square().sum() / (x - x.mean(0)).square().sum()).item(), rel=1e-5)
    assert r.fvu_raw.estimate == pytest.approx(
        ((raw - restored).square().sum() / (raw - raw.mean(0)).square().sum()).item(), rel=1e-4
    )
    assert r.cosine.estimate == pytest.approx(torch.cosine_similarity(raw, restored, dim=1).mean().item(), rel=1e-5)
    assert r.l0.estimate == pytest.approx(active.sum(1).double().mean().item())
    assert r.dead_share == pytest.approx((~active.any(0)).double().mean().item())
    assert math.isnan(r.fvu.low), "an interval without documents"


def test_pathways_by_definition():
    sae = small_sae()
    raw = torch.randn(90, 16) * 3 + 5
    r = reconstruction(sae, raw.split(11))
    sae.eval()
    with torch.no_grad():
        x = sae.normalizer(raw)
        parts = sae.components(x)
    y, variance = sum(vars(parts).values()), (x - x.mean(0)).square().sum()

    def fvu(z):
        return ((x - z).square().sum() / variance).item()

    kept = {
        "identity": parts.identity,
        "identity + linear": parts.identity + parts.linear,
        "identity + interaction": parts.identity + parts.interaction,
        "full": y,
    }
    assert list(r.conditions) == list(kept)
    for name, z in kept.items():
        assert r.conditions[name].estimate == pytest.approx(fvu(z), rel=1e-4)
    for name, part in vars(parts).items():
        centred = part - part.mean(0)
        share = r.pathways[name]
        assert share.variance_share.estimate == pytest.approx((centred.square().sum() / variance).item(), rel=1e-4)
        assert share.unique_share.estimate == pytest.approx(fvu(y - centred) - fvu(y), rel=1e-3, abs=1e-5)
        assert share.mean_abs == pytest.approx(part.abs().mean().item(), rel=1e-5)
    own = r.error_reduction_against_own_identity_pathway
    assert own.estimate == pytest.approx(1 - fvu(y) / fvu(parts.identity), rel=1e-4)
    linear, interaction = parts.linear.abs().mean(), parts.interaction.abs().mean()
    assert r.interaction_share_of_mean_abs == pytest.approx((interaction / (linear + interaction)).item(), rel=1e-4)


@pytest.mark.parametrize(
    ("make", "options", "conditions"),
    [
        (fastsae.TopKSAE, {}, ["full"]),
        (fastsae.JointSAE, {"interaction": False}, ["identity", "full"]),
        (fastsae.JointSAE, {"linear": False}, ["identity", "full"]),
        (fastsae.JointSAE, {"linear": False, "interaction": False}, ["full"]),
    ],
)
def test_pathways_that_are_not_there(make, options, conditions):
    sae = small_sae(make, **options)
    r, b = reconstruction(sae, [torch.randn(20, 16)]), behavior(sae, hooked(), HOOK, windows())
    assert list(r.conditions) == list(b.conditions) == conditions
    assert r.interaction_share_of_mean_abs is None
    assert (r.error_reduction_against_own_identity_pathway is None) == (len(conditions) == 1)
    assert len(b.kl_reduction_against_own_identity_pathway) == len(conditions) - 1


def test_intervals_are_over_documents():
    """Rows of one document that say the same thing twice must not narrow an interval."""
    sae = small_sae()
    raw, documents = torch.randn(60, 16) * 3, torch.arange(60) // 10
    names = tuple("abcdefg")  # of the last one nothing is seen

    def measured(copies: int):
        rows = Rows(raw.repeat(copies, 1), documents.repeat(copies), torch.zeros(60 * copies))
        return reconstruction(sae, [rows], names)

    once, twice = measured(1), measured(2)
    assert once.documents == 6
    assert once.sums.names == tuple("abcdef")
    assert once.fvu.low < once.fvu.estimate < once.fvu.high
    assert vars(twice.fvu) == pytest.approx(vars(once.fvu), rel=1e-6)
    split = [Rows(raw[i : i + 7], documents[i : i + 7], documents[i : i + 7]) for i in range(0, 60, 7)]
    assert vars(reconstruction(sae, split, names).fvu) == pytest.approx(vars(once.fvu), rel=1e-6)


def test_reconstruction_of_what_it_cannot_measure():
    sae = small_sae()
    with pytest.raises(ValueError, match="at least 2 rows"):
        reconstruction(sae, [])
    with pytest.raises(TypeError, match="Rows with the names of their documents, or plain tensors without"):
        reconstruction(sae, [torch.randn(4, 16)], ("a",))
    with pytest.raises(ValueError, match="must end in d_in"):
        reconstruction(sae, [torch.randn(4, 5)])
    assert sae.training, "the mode was not restored"


# ---- behavior -------------------------------------------------------------------------------------------------------


def by_hand(m, sae, replace, bos: bool = False) -> torch.Tensor:
    """KL, and the cross-entropy clean, with `replace`, and with zeros: (predictions, 4)."""
    found, texts = [], windows()
    for i in range(len(texts)):
        tokens = texts.tokens[i : i + 1, : texts.lengths[i]]
        first = 0 if bos else 1  # what an untouched BOS predicts does not count: no splicing can change it

        def logprobs(change, tokens=tokens, first=first):
            def hook(activation, hook):
                activation = activation.clone()
                activation[:, first:] = change(activation[:, first:])
                return activation

            with torch.no_grad():
                logits = m.run_with_hooks(tokens, fwd_hooks=[(HOOK, hook)], return_type="logits")
            return logits[0, first:-1].double().log_softmax(-1)

        p, q, zero = (logprobs(f) for f in (lambda a: a, replace, torch.zeros_like))
        ce = [-d.gather(1, tokens[0, first + 1 :, None])[:, 0] for d in (p, q, zero)]
        found.append(torch.stack([(p.exp() * (p - q)).sum(1), *ce], dim=1))
    return torch.cat(found)


def kept_of(sae, names):
    def replace(raw):
        with torch.no_grad():
            parts = sae.components(sae.normalizer(raw))
        return sae.normalizer.invert(sum(getattr(parts, name) for name in names))

    return replace


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("model", [hooked, bridge], ids=["HookedTransformer", "TransformerBridge"])
def test_behavior_by_definition(model, bos):
    m, sae = model(), small_sae()
    b = behavior(sae, m, HOOK, windows(), batch_windows=2, bos=bos)
    assert sae.training, "the mode was not restored"
    sae.eval()
    kept = {
        "identity": ["identity"],
        "identity + linear": ["identity", "linear"],
        "identity + interaction": ["identity", "interaction"],
        "full": ["identity", "linear", "interaction"],
    }
    assert list(b.conditions) == list(kept)
    means = {}
    for name, names in kept.items():
        rows = by_hand(m, sae, kept_of(sae, names), bos)
        means[name] = kl, clean, spliced, ablated = rows.mean(dim=0).tolist()
        condition = b.conditions[name]
        assert b.tokens == len(rows) == windows().n_tokens - (0 if bos else len(windows()))
        assert condition.kl.estimate == pytest.approx(kl, rel=1e-4)
        assert (b.ce_clean.estimate, condition.ce.estimate, b.ce_ablated.estimate) == pytest.approx(
            (clean, spliced, ablated), rel=1e-5
        )
        assert condition.ce_increase.estimate == pytest.approx(spliced - clean, rel=1e-3)
        assert condition.loss_recovered.estimate == pytest.approx((ablated - spliced) / (ablated - clean), rel=1e-3)
    assert b.documents == 3
    assert b.full.kl.estimate > 1e-3
    for index, reductions in enumerate(
        (b.kl_reduction_against_own_identity_pathway, b.ce_reduction_against_own_identity_pathway)
    ):
        place = 2 * index
        assert {name: i.estimate for name, i in reductions.items()} == pytest.approx(
            {name: 1 - means[name][place] / means["identity"][place] for name in list(kept)[1:]}, rel=1e-3
        )


def test_epsilon_moves_each_token_as_far_as_its_own_error():
    m, sae = hooked(), small_sae()
    moves: dict[str, list[torch.Tensor]] = {}
    run = m.run_with_hooks

    class Watched:
        cfg, hook_dict, eval = m.cfg, m.hook_dict, m.eval

        @staticmethod
        def run_with_hooks(tokens, fwd_hooks, return_type):
            ((name, splice),) = fwd_hooks

            def watch(activation, hook):
                after = splice(activation, hook)
                moves.setdefault("all", []).append((after - activation)[:, 1:])
                return after

            return run(tokens, fwd_hooks=[(name, watch)], return_type=return_type)

    behavior(sae, Watched, HOOK, windows(), batch_windows=100, draws=2)
    clean, _, *rest = moves["all"]
    assert clean.abs().max() == 0
    for spliced, first, second in zip(rest[0::3], rest[1::3], rest[2::3], strict=True):
        torch.testing.assert_close(first.norm(dim=-1), spliced.norm(dim=-1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(second.norm(dim=-1), spliced.norm(dim=-1), rtol=1e-4, atol=1e-5)
        there = spliced.norm(dim=-1) > 0
        assert torch.cosine_similarity(first, second, dim=-1)[there].abs().mean() < 0.5, "one direction, not two"
        assert torch.cosine_similarity(first, spliced, dim=-1)[there].abs().mean() < 0.5
    assert len(rest) == 4 * 3


def test_a_random_error_is_as_harmful_as_epsilon():
    """An SAE whose error is itself a random direction: the ratio to the control is 1, up to its interval."""
    sae = perfect_sae()

    def noisy(x):
        error = torch.nn.functional.normalize(torch.randn(x.shape), dim=-1)
        return Components(x + error / sae.normalizer.scale, torch.zeros_like(x), torch.zeros_like(x))

    sae.components = noisy
    texts = tokenize([Document(str(i), TEXT[0].text) for i in range(40)], tokenizer(), 12, held_out=None)
    ratio = behavior(sae, hooked(), HOOK, texts).full.kl_over_epsilon
    assert ratio.low < 1 < ratio.high
    assert ratio.high - ratio.low < 0.5


def test_a_perfect_reconstruction_changes_nothing():
    b = behavior(perfect_sae(), hooked(), HOOK, windows())
    assert b.full.kl.estimate == pytest.approx(0, abs=1e-6)
    assert b.full.ce.estimate == pytest.approx(b.ce_clean.estimate)
    gained = b.ce_ablated.estimate - b.ce_clean.estimate  # the last line's tolerance, over what is recovered
    assert b.full.loss_recovered.estimate == pytest.approx(1, abs=1e-6 * b.ce_clean.estimate / abs(gained))


def test_separators_are_neither_replaced_nor_predicted_until_bos_is_in():
    m, sae = hooked(), small_sae()
    sae.eval()
    texts = tokenize([Document("a", "the cat <bos> sat on the mat <bos> .")], tokenizer(), 12, held_out=None)
    ids = texts.tokens[:, : texts.lengths[0]]
    text = ids[0] != tokenizer().bos_token_id
    assert text.tolist() == [False, True, True, False, True, True, True, True, False, True]
    replace = kept_of(sae, ["identity", "linear", "interaction"])
    for bos, replaced in {False: text, True: torch.ones_like(text)}.items():

        def hook(activation, hook, replaced=replaced):
            return torch.where(replaced[:, None], replace(activation), activation)

        with torch.no_grad():
            clean, spliced = (
                m.run_with_hooks(ids, fwd_hooks=hooks, return_type="logits")[0].double().log_softmax(-1)
                for hooks in ([], [(HOOK, hook)])
            )
        counts = replaced[:-1] & text[1:]
        b = behavior(sae, m, HOOK, texts, bos=bos)
        assert b.tokens == int(counts.sum()) == (4 if not bos else 7)
        kl = (clean.exp() * (clean - spliced)).sum(-1)[:-1][counts].mean()
        assert b.full.kl.estimate == pytest.approx(kl.item(), rel=1e-4)
        if not bos:
            assert texts.n_predictions == b.tokens


def test_short_windows_are_measured_as_they_are_alone():
    m, sae = hooked(), small_sae()
    documents = [Document(str(i), "the cat sat") for i in range(5)] + [Document("long", TEXT[0].text)]
    mixed = tokenize(documents, tokenizer(), 12, held_out=None)
    short = tokenize(documents[:5], tokenizer(), 12, held_out=None)
    assert (mixed.context, short.context) == (12, 4)
    together = behavior(sae, m, HOOK, mixed, batch_windows=5).sums
    alone = behavior(sae, m, HOOK, short, batch_windows=2).sums
    for name in ("kl full", "ce full", "ce ablated"):
        assert together.sums[name][:5].tolist() == pytest.approx(alone.sums[name].tolist(), rel=1e-4)


def test_a_model_that_reads_in_both_directions_is_measured_without_its_padding(tmp_path):
    m = lm.load(str(saved(tmp_path, "bert")))
    sae = small_sae()
    texts = tokenize(TEXT, m, 12, held_out=None)
    assert texts.lengths.min() < texts.context
    with pytest.warns(UserWarning, match="reads in both directions.*no cross-entropy"):
        b = behavior(sae, m, HOOK, texts)
    sae.eval()
    replace, kl = kept_of(sae, ["identity", "linear", "interaction"]), []

    def hook(activation, hook):
        return torch.cat([activation[:, :1], replace(activation[:, 1:])], dim=1)

    for tokens, length in zip(texts.tokens, texts.lengths.tolist(), strict=True):
        with torch.no_grad():
            clean, spliced = (
                m.run_with_hooks(tokens[None, :length], fwd_hooks=hooks, return_type="logits")[0].log_softmax(-1)
                for hooks in ([], [(HOOK, hook)])
            )
        kl.append((clean.exp() * (clean - spliced)).sum(-1)[1:-1])
    assert b.full.kl.estimate == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4)
    assert math.isnan(b.ce_clean.estimate)
    assert math.isnan(b.full.loss_recovered.estimate)


def test_behavior_of_ids_that_the_model_does_not_know():
    texts = windows()
    texts.tokens[1, 2] = 99
    with pytest.raises(ValueError, match="behavior: token id 99 in 'a' is outside the model's vocabulary of 17"):
        behavior(small_sae(), hooked(), HOOK, texts)


def test_behavior_at_a_hook_with_heads():
    hook = "blocks.1.attn.hook_z"
    assert ModelActivations(hooked(), hook, windows()).d_in == 16
    assert behavior(small_sae(), hooked(), hook, windows()).full.kl.estimate > 0


def test_where_nothing_can_be_predicted():
    with pytest.raises(ValueError, match="windows of 2 tokens; use a longer context"):
        behavior(small_sae(), hooked(), HOOK, windows(2))
    for name in ("batch_windows", "draws"):
        with pytest.raises(ValueError, match=f"{name} of at least 1; got 0"):
            behavior(small_sae(), hooked(), HOOK, windows(), **{name: 0})


def test_where_ablation_changes_nothing():
    model = hooked()
    model.unembed.W_U.data.zero_()
    model.unembed.b_U.data.zero_()
    hooked.cache_clear()
    b: Behavior = behavior(perfect_sae(), model, HOOK, windows())
    assert math.isnan(b.full.loss_recovered.estimate)


def test_behavior_at_an_unknown_hook():
    with pytest.raises(ValueError, match=r"no hook .blocks\.9"):
        behavior(small_sae(), hooked(), "blocks.9.hook_resid_post", windows())


# ---- results are read ----


def test_results_print_as_tables():
    sae, rows = fastsae.JointSAE(8, 40, 4), torch.randn(300, 8)
    said = str(reconstruction(sae, [rows]))
    assert said.startswith("Reconstruction of 300 rows\n")
    for column in ("reconstruction", "FVU", "pathway", "share of the variance", "identity", "linear", "interaction"):
        assert column in said
    assert "intervals" not in said
    said = str(geometry(sae, [rows]))
    assert said.startswith("300 rows. Features by firing rate")
    assert "random baseline" in said
    result = fastsae.Trainer(sae, fastsae.TrainerConfig(steps=2, progress=False)).fit([rows, rows])
    assert str(result).startswith("Trained 2 steps\n")
    assert "fvu" in str(result)
    said = str(behavior(fastsae.TopKSAE(16, 40, 4), hooked(), HOOK, windows()))
    assert "loss recovered" in said
    assert "Cross-entropy of the model" in said
    assert max(map(len, said.splitlines())) < 160
