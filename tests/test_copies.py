"""Copies and pickles of what training is made of: the copy's next step is that of the original."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsae
from fastsae.gradients import GradientBuffers
from fastsae.narrow import NarrowAdam
from fastsae.normalize import Normalizer
from fastsae.optim import AdamInBackward


def _saved(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


Copy = Callable[[Any], Any]
ways: Any = [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing)), _saved]
every_way = pytest.mark.parametrize("copied", ways, ids=["deepcopy", "pickle", "torch.save"])
OPTIMIZERS = {
    "AdamInBackward": AdamInBackward,
    "NarrowAdam": NarrowAdam,
    "NarrowAdam, 8 bits": lambda *a, **options: NarrowAdam(*a, optimizer_state="8bit", **options),
}


def weights(sae: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in sae.named_parameters()}


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@every_way
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_with_its_sae(copied: Copy, name: str):
    if "8" in name:
        pytest.importorskip("torchao")
    sae, x = fastsae.TopKSAE(64, 50, 4), torch.randn(16, 64)
    optimizer = OPTIMIZERS[name](sae.parameters(), lr=0.1, unit_norm=[sae.W_dec])

    def step(sae: fastsae.TopKSAE, optimizer: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        optimizer.zero_grad()
        sae(x).loss.backward()
        optimizer.step()
        return weights(sae)

    before = step(sae, optimizer)
    others, another = copied((sae, optimizer))
    assert_equal(weights(others), before)
    expected = step(sae, optimizer)
    assert_equal(step(others, another), expected)
    assert not torch.equal(expected["W_dec"], before["W_dec"])
    torch.testing.assert_close(others.W_dec.norm(dim=1), torch.ones(50))
    step(others, another)
    assert_equal(weights(sae), expected)


@every_way
def test_a_copied_adam_in_the_backward_refuses_a_grad_scaler_as_before(copied: Copy):
    scaler = torch.amp.GradScaler("cpu")
    for optimizer in (made := AdamInBackward([torch.ones(2, requires_grad=True)]), copied(made)):
        scaler.scale(optimizer.param_groups[0]["params"][0].sum()).backward()
        with pytest.raises(RuntimeError, match="GradScaler needs gradients"):
            scaler.step(optimizer)
        scaler.update()


@every_way
def test_buffers_with_their_sae(copied: Copy):
    sae, x = fastsae.TopKSAE(8, 50, 4), torch.randn(16, 8)
    buffers = GradientBuffers(sae.parameters())
    with buffers:
        sae(x).loss.backward()
        others, theirs = copied((sae, buffers))  # in a step: the copy is in none
    gradients = {name: p.grad.clone() for name, p in sae.named_parameters()}
    with theirs:
        others(x).loss.backward()
        assert others.W_dec.grad is theirs._buffers[others.W_dec]
    assert_equal({name: p.grad for name, p in others.named_parameters()}, gradients)
    others.W_dec.grad.zero_()
    assert_equal({name: p.grad for name, p in sae.named_parameters()}, gradients)


@every_way
@pytest.mark.parametrize("options", [{}, {"adam_in_backward": True}, {"auxk": 4}, {"optimizer_state": "8bit"}], ids=str)
def test_a_trainer(copied: Copy, options: dict[str, Any]):
    if "optimizer_state" in options:
        pytest.importorskip("torchao")
    batches = torch.randn(6, 16, 64).unbind()
    sae = fastsae.JointSAE(64, 50, 4, d_embedding=3)
    config = {"steps": 6, "lr": 0.01, "unit_norm_decoder": True, "dead_after_tokens": 32, "progress": False}
    trainer = fastsae.Trainer(sae, fastsae.TrainerConfig(**config, **options))
    with pytest.warns(UserWarning, match="activations ended after 3 of 6"):
        trainer.fit(batches[:3])
    before = weights(sae)
    another = copied(trainer)
    trainer.fit(batches[3:])
    expected = weights(sae)
    assert not torch.equal(expected["W_dec"], before["W_dec"])
    assert_equal(weights(another.sae), before)
    another.fit(batches[3:])
    assert_equal(weights(another.sae), expected)
    assert_equal(dict(another.sae.named_buffers()), dict(sae.named_buffers()))
    assert_equal(weights(sae), expected)


@every_way
def test_what_an_sae_returns_and_what_it_is_made_of(copied: Copy):
    normalizer = Normalizer(4, dtype=torch.bfloat16)
    normalizer.measure(torch.randn(9, 4), "zscore")
    sae, x = fastsae.JointSAE(4, 20, 3, d_embedding=2).eval(), torch.randn(5, 4)
    with torch.no_grad():
        output = sae(x)
        same = copied(output)
        torch.testing.assert_close(copied(normalizer)(x), normalizer(x), rtol=0, atol=0)
        torch.testing.assert_close(copied(sae)(x).loss, output.loss, rtol=0, atol=0)
    for part in ("reconstruction", "loss"):
        torch.testing.assert_close(getattr(same, part), getattr(output, part), rtol=0, atol=0)
    torch.testing.assert_close(same.code.to_dense(), output.code.to_dense(), rtol=0, atol=0)
