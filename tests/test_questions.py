"""The everyday questions, against the model's own activations and dense algebra."""

import pytest
import torch
from torch.nn.functional import normalize

import fastsae
from fastsae import lm
from fastsae.activations import Document, tokenize
from fastsae.evaluate import questions

HOOK = "blocks.2.hook_resid_post"
TEXT = "def mean(values):\n    return sum(values) / len(values)\n"


@pytest.fixture(scope="module")
def model():
    return lm.load()


@pytest.fixture
def sae():
    made = fastsae.TopKSAE(256, 300, 8, init="unit")
    torch.nn.init.normal_(made.W_dec)
    torch.nn.init.normal_(made.W_enc)
    made.normalizer.measure(3 * torch.randn(100, 256) + 1, "zscore")
    return made


def raw(model, text):
    _, cache = model.run_with_cache(text, names_filter=[HOOK])
    return cache[HOOK][0, 1:]  # without BOS


def test_features_of_a_prompt(model, sae):
    found = questions.features(sae, model, HOOK, TEXT, n=3)
    assert "".join(found.tokens) == TEXT
    x = (raw(model, TEXT) - sae.normalizer.mean) / sae.normalizer.scale
    dense = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu()
    values, indices = dense.topk(3)
    assert torch.equal(found.indices, indices)
    torch.testing.assert_close(found.values, values)
    lines = str(found).splitlines()
    assert len(lines) == 2 + len(found.tokens)
    assert f"{indices[0, 0]} ({values[0, 0]:.2f})" in lines[2]
    with pytest.raises(ValueError, match=r"features: the prompt has \d+ tokens, the model reads 256 at once"):
        questions.features(sae, model, HOOK, 50 * TEXT)


def test_texts_of_a_feature(model, sae):
    windows = tokenize([Document("a", 8 * TEXT), Document("b", "x = 1\n")], model.tokenizer, 32, held_out=None)
    strengths = torch.zeros(sae.d_sae)
    for text in ("a", "b"):
        rows = raw(model, {"a": 8 * TEXT, "b": "x = 1\n"}[text])[:31]
        strengths = torch.maximum(strengths, sae.encode_raw(rows).to_dense().amax(dim=0))
    feature = int(strengths.argmax())
    (best, *_) = questions.texts(sae, model, HOOK, windows, feature)
    assert best.activations[best.peak] == max(best.activations)
    assert best.activations[best.peak] >= strengths[feature] - 1e-3
    with pytest.raises(ValueError, match="texts: expected a feature from 0 to 299; got 300"):
        questions.texts(sae, model, HOOK, windows, 300)


def test_logits_of_a_feature(model, sae):
    found = questions.logits(sae, model, 7, n=4)
    row = (sae.W_dec[7] * sae.normalizer.scale).detach().double()
    by_token = ((row - row.mean()) * model.ln_final.w.double()) @ model.W_U.double()
    for told, largest in ((found.raised, True), (found.lowered, False)):
        values, indices = by_token.topk(4, largest=largest)
        assert [token for token, _ in told] == [model.tokenizer.decode([i]) for i in indices.tolist()]
        torch.testing.assert_close(torch.tensor([v for _, v in told]).double(), values, rtol=1e-4, atol=1e-4)
    assert repr(found.raised[0][0]) in str(found)
    with pytest.raises(ValueError, match="logits: the SAE reads activations of width 64, the residual stream has 256"):
        questions.logits(fastsae.TopKSAE(64, 300, 8), model, 7)


def test_steering_adds_what_the_feature_writes(model, sae):
    tokens = model.to_tokens(TEXT)
    added = 5 * (sae.W_dec[3] * sae.normalizer.scale).detach()
    expected = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, lambda activation, hook: activation + added)])
    clean = model(tokens)
    with questions.steered(sae, model, HOOK, 3, 5.0) as steered:
        assert torch.equal(steered(tokens), expected)
    assert torch.equal(model(tokens), clean)  # the hook is gone
    assert not torch.allclose(expected, clean)


def test_compared_with_its_own_copy_in_another_order():
    a, b = fastsae.TopKSAE(16, 3000, 4), fastsae.TopKSAE(16, 40, 4)
    a.normalizer.scale.mul_(2)
    b.normalizer.scale.copy_(torch.rand(16) + 0.5)
    with torch.no_grad():
        a.W_dec.normal_()
        a.W_dec[torch.arange(40) * 7] = b.W_dec * b.normalizer.scale / 2  # in raw activations the same directions
    found = questions.compare(b, a)
    assert torch.equal(found.nearest, torch.arange(40) * 7)
    torch.testing.assert_close(found.cosine, torch.ones(40))
    assert found.shared == 1
    back = questions.compare(a, b)
    exact = normalize(a.W_dec.detach(), dim=1) @ normalize(b.W_dec.detach() * b.normalizer.scale, dim=1).T
    torch.testing.assert_close(back.cosine, exact.amax(dim=1))
    assert back.shared == float((exact.amax(dim=1) >= 0.7).double().mean())
    assert str(back).startswith(f"{back.shared:.1%} of 3,000 features are in both")
    with pytest.raises(ValueError, match="of one width; got d_in = 16 and 8"):
        questions.compare(a, fastsae.TopKSAE(8, 40, 4))
