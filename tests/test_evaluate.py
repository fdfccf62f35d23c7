"""Evaluation against definitions written out by hand."""

import math

import pytest
import torch
from tiny_lm import bridge, hooked, tokenizer

import fastsae
from fastsae.activations import Document, ModelActivations, tokenize
from fastsae.evaluate import behavior, reconstruction

HOOK = "blocks.1.hook_resid_post"
TEXT = [
    Document("a", "the cat sat on the mat . the dog ran under a tree and then sat"),
    Document("b", "a dog , a cat ."),
]


def small_sae(make=fastsae.JointSAE) -> fastsae.JointSAE:
    torch.manual_seed(2)
    sae = make(16, 64, 4)
    for parameter in sae.parameters():  # larger than at the start, where dropout would hardly show
        torch.nn.init.normal_(parameter, std=0.3)
    sae.normalizer.measure(torch.randn(50, 16) * 2 + 1, "zscore")
    return sae


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
    assert r.rows == 100
    assert r.mse == pytest.approx((x - y).square().mean().item(), rel=1e-5)
    assert r.fvu == pytest.approx(((x - y).square().sum() / (x - x.mean(0)).square().sum()).item(), rel=1e-5)
    assert r.fvu_raw == pytest.approx(
        ((raw - restored).square().sum() / (raw - raw.mean(0)).square().sum()).item(), rel=1e-4
    )
    assert r.cosine == pytest.approx(torch.cosine_similarity(raw, restored, dim=1).mean().item(), rel=1e-5)
    assert r.l0 == pytest.approx(active.sum(1).double().mean().item())
    assert r.dead_share == pytest.approx((~active.any(0)).double().mean().item())


def test_reconstruction_needs_rows():
    with pytest.raises(ValueError, match="at least 2 rows"):
        reconstruction(small_sae(), [])


@pytest.mark.parametrize("model", [hooked, bridge], ids=["HookedTransformer", "TransformerBridge"])
def test_behavior_by_definition(model):
    m, sae = model(), small_sae()
    windows = tokenize(TEXT, tokenizer(), 12, held_out=None)
    b = behavior(sae, m, HOOK, windows, batch_windows=2)
    assert sae.training, "the mode was not restored"
    sae.eval()
    totals, n = torch.zeros(4, dtype=torch.float64), 0
    for i in range(len(windows)):
        tokens = windows.tokens[i : i + 1, : windows.lengths[i]]

        def logprobs(change, tokens=tokens):
            def hook(activation, hook):
                activation = activation.clone()
                activation[:, 1:] = change(activation[:, 1:])
                return activation

            with torch.no_grad():
                return (
                    m.run_with_hooks(tokens, fwd_hooks=[(HOOK, hook)], return_type="logits")[0, :-1]
                    .double()
                    .log_softmax(-1)[1:]
                )

        p, q, zero = (logprobs(f) for f in (lambda a: a, sae.reconstruct, torch.zeros_like))
        target = tokens[0, 2:, None]  # what BOS predicts does not count: no splicing can change it
        totals[0] += (p.exp() * (p - q)).sum()
        for j, distribution in enumerate((p, q, zero)):
            totals[j + 1] -= distribution.gather(1, target).sum()
        n += len(target)
    kl, clean, spliced, ablated = (totals / n).tolist()
    assert b.tokens == n == windows.n_tokens - len(windows)
    assert b.kl == pytest.approx(kl, rel=1e-4)
    assert (b.ce_clean, b.ce_spliced, b.ce_ablated) == pytest.approx((clean, spliced, ablated), rel=1e-5)
    assert b.loss_recovered == pytest.approx((ablated - spliced) / (ablated - clean), rel=1e-3)
    assert b.kl > 1e-3


def test_a_perfect_reconstruction_changes_nothing():
    sae = small_sae()
    sae.reconstruct = lambda raw: raw
    b = behavior(sae, hooked(), HOOK, tokenize(TEXT, tokenizer(), 12, held_out=None))
    assert b.kl == pytest.approx(0, abs=1e-6)
    assert b.ce_spliced == pytest.approx(b.ce_clean)
    assert b.loss_recovered == pytest.approx(1)


def test_behavior_at_a_hook_with_heads():
    windows = tokenize(TEXT, tokenizer(), 12, held_out=None)
    hook = "blocks.1.attn.hook_z"
    assert ModelActivations(hooked(), hook, windows).d_in == 16
    assert behavior(small_sae(), hooked(), hook, windows).kl > 0


def test_an_error_restores_the_mode_too():
    sae = small_sae()
    with pytest.raises(ValueError, match="must end in d_in"):
        reconstruction(sae, [torch.randn(4, 5)])
    assert sae.training


def test_where_nothing_can_be_predicted():
    windows = tokenize(TEXT, tokenizer(), 2, held_out=None)
    with pytest.raises(ValueError, match="windows of 2 tokens; use a longer context"):
        behavior(small_sae(), hooked(), HOOK, windows)
    with pytest.raises(ValueError, match="batch_windows of at least 1; got 0"):
        behavior(small_sae(), hooked(), HOOK, windows, batch_windows=0)


def test_where_ablation_changes_nothing():
    sae = small_sae()
    sae.reconstruct = lambda raw: raw
    windows = tokenize(TEXT, tokenizer(), 12, held_out=None)
    model = hooked()
    model.unembed.W_U.data.zero_()
    model.unembed.b_U.data.zero_()
    assert math.isnan(behavior(sae, model, HOOK, windows).loss_recovered)


def test_behavior_at_an_unknown_hook():
    with pytest.raises(ValueError, match=r"no hook .blocks\.9"):
        behavior(small_sae(), hooked(), "blocks.9.hook_resid_post", tokenize(TEXT, tokenizer(), 12, held_out=None))
