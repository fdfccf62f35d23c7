"""Top features and their contexts, against a search through all activations."""

import pytest
import torch
from tiny_lm import hooked, tokenizer

import fastsae
from fastsae.activations import Document, ModelActivations, tokenize
from fastsae.evaluate import top_features

HOOK = "blocks.1.hook_resid_post"
TEXT = [
    Document("a", "the cat sat on the mat . the dog ran under a tree and then sat"),
    Document("b", "a dog , a cat ."),
    Document("c", "the tree ran quickly and then slowly . a mat sat"),
]


@pytest.fixture
def sae() -> fastsae.TopKSAE:
    sae = fastsae.TopKSAE(16, 24, 3)
    torch.nn.init.normal_(sae.W_enc)
    torch.nn.init.normal_(sae.W_dec)
    return sae


@pytest.fixture
def windows():
    return tokenize(TEXT, tokenizer(), 8, held_out=None)


def test_features_by_definition(sae, windows):
    found = top_features(sae, hooked(), HOOK, windows, n_features=5, n_examples=2, context=3)
    source = ModelActivations(hooked(), HOOK, windows, batch_windows=len(windows))
    rows = source.rows(0)
    with torch.no_grad():
        dense = sae.encode(sae.normalizer(rows.activations)).to_dense()
    contribution = dense.square().sum(0) * sae.W_dec.square().sum(1) / len(dense)
    order = contribution.argsort(descending=True)[:5]
    assert [f.feature for f in found] == order.tolist()
    window = (rows.positions[1:] <= rows.positions[:-1]).long().cumsum(0)
    window = torch.cat([torch.zeros(1, dtype=torch.long), window])
    for feature in found:
        activations = dense[:, feature.feature]
        assert feature.contribution == pytest.approx(contribution[feature.feature].item(), rel=1e-4)
        assert feature.firing_rate == pytest.approx((activations > 0).double().mean().item())
        assert feature.max_activation == pytest.approx(activations.max().item(), rel=1e-5)
        peaks = torch.stack([activations[window == w].max() for w in range(len(windows))])
        strongest = peaks.sort(descending=True).values
        expected = [p for p in strongest[:2].tolist() if p > 0]
        assert [e.activations[e.peak] for e in feature.examples] == pytest.approx(expected, rel=1e-5)
        for example in feature.examples:
            assert max(example.activations) == example.activations[example.peak]
            assert len(example.tokens) == len(example.activations) <= 7
            text = next(document.text for document in TEXT if document.name == example.document)
            assert " ".join(token.strip() for token in example.tokens) in text


def test_features_that_never_fire_are_left_out(sae, windows):
    with torch.no_grad():
        sae.W_enc[4:] = 0
    found = top_features(sae, hooked(), HOOK, windows, n_features=24)
    assert {f.feature for f in found} <= {0, 1, 2, 3}


def test_options_out_of_range(sae, windows):
    with pytest.raises(ValueError, match="n_features of at least 1; got 0"):
        top_features(sae, hooked(), HOOK, windows, n_features=0)
