"""The Trainer in odd company: other dtypes, bad first batches, compiled and cast SAEs, threads, extreme options."""

import json
import threading

import pytest
import torch
from test_train import D, K, M, activations, assert_same, config, joint, weights

import fastsae
from fastsae.optim import clip_by_scaling
from fastsae.train import Trainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_clipping_in_every_dtype(dtype: torch.dtype):
    """Fused Adam reads its scale as fp32, whatever the gradients are."""
    p, plain = (torch.nn.Parameter(torch.arange(6.0).to(dtype)) for _ in range(2))
    optimizers = torch.optim.Adam([p], lr=0.1, eps=1.0, fused=True), torch.optim.Adam([plain], lr=0.1, eps=1.0)
    for size in (100.0, 0.01):
        p.grad, plain.grad = (torch.full((6,), size, dtype=dtype) for _ in range(2))
        norm = clip_by_scaling(optimizers[0], 0.5)
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_([plain], 0.5))
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(p, plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_trains(dtype: torch.dtype):
    sae = fastsae.JointSAE(D, M, K, d_embedding=6, dtype=dtype)
    run = config(clip_grad_norm=0.1, auxk=4, dead_after_tokens=32, unit_norm_decoder=True, steps=30, eps=1e-4)
    losses: list[float] = []
    sae.register_forward_hook(lambda module, args, output: losses.append(output.loss.item()))
    Trainer(sae, run).fit(activations())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert all(p.dtype == dtype for p in sae.parameters())


def test_every_forward_sees_a_decoder_of_norm_one():
    sae, norms = fastsae.TopKSAE(D, M, K), []
    sae.register_forward_hook(lambda module, args, output: norms.append(module.W_dec.detach().norm(dim=1)))
    Trainer(sae, config(unit_norm_decoder=True)).fit(activations())
    assert len(norms) == 10
    for norm in norms:
        torch.testing.assert_close(norm, torch.ones(M))


def test_a_decoder_of_norm_one_moves_only_across_itself():
    sae = fastsae.TopKSAE(D, M, K, init="unit")
    trainer = Trainer(sae, config(unit_norm_decoder=True))
    before = sae.W_dec.detach().clone()
    trainer._train_step(torch.randn(64, D))
    assert sae.W_dec.grad is not None
    assert sae.W_dec.grad.abs().max() > 0
    torch.testing.assert_close((sae.W_dec.grad * before).sum(dim=1), torch.zeros(M), rtol=0, atol=1e-7)


def test_nothing_changes_when_the_sae_is_compiled():
    torch.compiler.reset()
    options = {"auxk": 4, "dead_after_tokens": 32, "normalize": "none", "steps": 4}
    plain, compiled = (fastsae.TopKSAE(D, M, K) for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    compiled.compile(backend="aot_eager")
    for sae in (plain, compiled):
        Trainer(sae, config(**options)).fit(activations())
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_sae_may_be_cast_after_the_trainer_was_made():
    results = []
    for early in (True, False):
        sae = joint()
        if early:
            sae.double()
        trainer = Trainer(sae, config())
        sae.double()
        trainer.fit(activations())
        results.append(weights(sae))
    assert_same(*results)


def test_in_a_thread_where_signals_cannot_be_caught():
    done, sae = [], joint()
    thread = threading.Thread(target=lambda: done.append(Trainer(sae, config()).fit(activations()).steps))
    thread.start()
    thread.join()
    assert done == [10]


def test_the_same_bits_on_several_threads():
    x = torch.randn(300, 48)
    runs = []
    torch.set_num_threads(4)
    for _ in range(5):
        torch.manual_seed(1)
        sae = fastsae.JointSAE(48, 5000, 16, d_embedding=8)
        trainer = Trainer(sae, config(auxk=8, dead_after_tokens=1, clip_grad_norm=0.01))
        for _ in range(2):
            trainer._train_step(x)
        runs.append(weights(sae))
    for run in runs[1:]:
        assert_same(run, runs[0])


def test_gradients_stay_in_the_same_memory(monkeypatch: pytest.MonkeyPatch):
    places = []
    step = torch.optim.Adam.step
    sae = joint()
    large = [p for p in sae.parameters() if p.dim() == 2 and len(p) == M]
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self: (places.append([p.grad.data_ptr() for p in large]), step(self))[1]
    )
    Trainer(sae, config(auxk=4, dead_after_tokens=32)).fit(activations())
    assert len(large) == 4
    assert len(places) == 10
    assert all(place == places[0] for place in places)


# ---- bad activations, before and after the normalisation was measured -----------------------------------------------


@pytest.mark.parametrize("normalize", ["zscore", "none"])
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.randn(4, D + 1), ValueError, r"got \(4, 13\)"),
        (torch.randn(2, 3, D), ValueError, r"got \(2, 3, 12\)"),
        (torch.randn(D), ValueError, r"got \(12,\)"),
        (torch.tensor(1.0), ValueError, r"got \(\)"),
        (torch.randn(0, D), ValueError, r"B at least 1; got \(0, 12\)"),
        (torch.ones(4, D, dtype=torch.int64), TypeError, "float tensor that holds numbers; got torch.int64"),
        (torch.ones(4, D, device="meta"), TypeError, "float tensor that holds numbers; got torch.float32 on meta"),
        ([1.0, 2.0], ValueError, "got list"),
    ],
    ids=["width", "3-d", "1-d", "0-d", "empty", "integer", "meta", "list"],
)
def test_a_bad_batch_is_named(bad, error, message, at, normalize):
    batches: list = list(activations(4))
    batches[at] = bad
    with pytest.raises(error, match=rf"batch {at + 1} of the activations: expected .*{message}"):
        Trainer(joint(), config(normalize=normalize, normalize_rows=100)).fit(batches)


@pytest.mark.parametrize("normalize", ["zscore", "none"])
def test_no_batches_at_all(normalize):
    with pytest.raises(ValueError, match="activations gave no batch at all"):
        Trainer(joint(), config(normalize=normalize)).fit([])


def test_skipping_leaves_bad_rows_out_of_the_statistics_too():
    batches = list(activations(6))
    batches[0] = batches[0].clone()
    batches[0][3, 2] = torch.nan
    sae = joint()
    result = Trainer(sae, config(nonfinite="skip", steps=5)).fit(batches)
    assert result.metrics["batches_skipped"] == 1
    finite = torch.cat([batches[0][:3], batches[0][4:], batches[1]])
    torch.testing.assert_close(sae.normalizer.mean, finite.mean(0))
    with pytest.raises(ValueError, match="the sample holds NaN or infinity, first at row 3, dimension 2"):
        Trainer(joint(), config()).fit(batches)


def test_nan_stops_before_anything_moves(tmp_path):
    """Weights, moments, counters: all as a run that simply ended there."""
    batches = list(activations(6))
    batches[3] = torch.full_like(batches[3], torch.inf)
    trainer, plain = Trainer(joint(), config(run_dir=tmp_path)), Trainer(joint(), config(steps=3))
    with pytest.raises(FloatingPointError, match=r"batch 4 .* holds 384 values"):
        trainer.fit(batches)
    plain.fit(batches)
    assert_same(weights(trainer.sae), weights(plain.sae))
    assert (trainer.step, trainer.rows_seen) == (plain.step, plain.rows_seen) == (3, 96)
    assert torch.equal(trainer._rows_since_fired, plain._rows_since_fired)
    for ours, theirs in zip(trainer._optimizer.state.values(), plain._optimizer.state.values(), strict=True):
        assert_same(ours, theirs)
    assert not trainer.sae.training


@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_of_one_row(batch: int, tmp_path):
    Trainer(joint(), config(run_dir=tmp_path)).fit(activations(batch=batch))
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        metrics: dict[str, float] = json.loads(line)
        assert metrics["loss"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalize": "z-score"}, "TrainerConfig.normalize: expected one of none, zscore, scale; got 'z-score'"),
        ({"nonfinite": "ignore"}, "TrainerConfig.nonfinite: expected 'stop' or 'skip'; got 'ignore'"),
        ({"log_to": ("mlflow",), "run_dir": "runs"}, "log_to: expected 'tensorboard' or 'wandb'; got 'mlflow'"),
        ({"dead_after_tokens": 0}, "dead_after_tokens: expected at least 1; got 0"),
        ({"normalize_rows": 1}, "normalize_rows: expected at least 2; got 1"),
        ({"k_anneal_from": 9, "k_anneal_steps": -1}, "k_anneal_steps: expected 0 or more; got -1"),
    ],
)
def test_impossible_options(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)
