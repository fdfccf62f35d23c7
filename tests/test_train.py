"""The Trainer: what it optimises, and that nothing is lost."""

import copy
import dataclasses
import errno
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import fastsae
from fastsae import checkpoint, files
from fastsae.config import TrainerConfig
from fastsae.runs import Batches
from fastsae.train import Trainer

D, M, K = 12, 60, 4


def activations(n: int | None = None, batch: int = 32, seed: int = 7) -> Iterator[Tensor]:
    """Sparse combinations of planted directions."""
    generator = torch.Generator().manual_seed(seed)
    planted = torch.randn(30, D, generator=generator)
    for _ in itertools.count() if n is None else range(n):
        code = torch.rand(batch, 30, generator=generator) * (torch.rand(batch, 30, generator=generator) < 0.1)
        yield code @ planted


class Stream:
    """A stream that can be set back."""

    def __init__(self) -> None:
        self.i = 0

    def __iter__(self):
        return self

    def __next__(self) -> Tensor:
        self.i += 1
        return torch.randn(32, D, generator=torch.Generator().manual_seed(self.i)).abs()

    def state_dict(self) -> dict[str, int]:
        return {"i": self.i}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.i = state["i"]


def config(**changes) -> TrainerConfig:
    return TrainerConfig(
        **({"steps": 10, "lr": 1e-2, "normalize_rows": 64, "log_every": 1, "progress": False} | changes)
    )


def joint() -> fastsae.JointSAE:
    torch.manual_seed(3)
    return fastsae.JointSAE(D, M, K, d_embedding=6)


def weights(sae) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in sae.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


# ---- optimisation ----


def test_planted_features_are_found():
    torch.manual_seed(0)
    d, n = 32, 48
    planted = torch.nn.functional.normalize(torch.randn(n, d), dim=1)

    def stream() -> Iterator[Tensor]:
        while True:
            active = torch.zeros(512, n).scatter_(1, torch.rand(512, n).topk(3).indices, 1.0)
            yield (active * (0.5 + torch.rand(512, n))) @ planted

    sae = fastsae.TopKSAE(d, 96, 3, init="unit")
    result = Trainer(sae, config(steps=800, lr=3e-3, decay_steps=200, normalize="none", log_every=100)).fit(stream())
    assert result.metrics["fvu"] < 0.05
    cosines = planted @ torch.nn.functional.normalize(sae.W_dec.detach(), dim=1).T
    assert (cosines.amax(dim=1) > 0.95).double().mean() > 0.9


@pytest.mark.parametrize("clip", [None, 1e-3], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("make", [lambda: fastsae.TopKSAE(D, M, K), joint], ids=["topk", "joint"])
def test_steps_equal_plain_autograd_with_adam(make, clip):
    batches = list(activations(5))
    ours, plain = make(), make()
    plain.load_state_dict(ours.state_dict())
    ours.eval(), plain.eval()
    trainer = Trainer(ours, config(clip_grad_norm=clip, normalize="none"))
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2, eps=1e-8)
    for x in batches:
        trainer._train_step(x)
        plain(x).loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_the_reference_backend_trains_the_same():
    results = []
    for backend in ("cpu", "reference"):
        sae = fastsae.TopKSAE(D, M, K, backend=backend, dtype=torch.float64)
        torch.manual_seed(1)
        torch.nn.init.normal_(sae.W_dec)
        with torch.no_grad():
            sae.W_enc.copy_(sae.W_dec)
        Trainer(sae, config(steps=20)).fit(activations())
        results.append(sae.W_dec.detach())
    torch.testing.assert_close(results[0], results[1])


def test_schedule_counts_real_steps():
    trainer = Trainer(joint(), config(steps=20, lr=1.0, warmup_steps=4, decay_steps=5, lr_end=0.5))
    rates = [trainer.learning_rate(step) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[5:16] == [1.0] * 11
    assert rates[16:] == pytest.approx([0.9, 0.8, 0.7, 0.6])


def test_the_logged_rate_is_the_one_used(monkeypatch):
    used = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (used.append(self.param_groups[0]["lr"]), step(self)))
    sae, logged = joint(), []
    trainer = Trainer(sae, config(steps=6, warmup_steps=3, decay_steps=2))
    monkeypatch.setattr("fastsae.train.Log.write", lambda self, metrics: logged.append(metrics["lr"]))
    trainer.fit(activations())
    assert used == logged == [trainer.learning_rate(step) for step in range(6)]


def test_auxk_moves_dead_features_and_only_them():
    torch.manual_seed(0)
    sae = fastsae.TopKSAE(D, M, K, pre_bias=False)
    with torch.no_grad():
        sae.b_enc[: M // 2] = -100.0  # these never fire
    trainer = Trainer(sae, config(auxk=8, dead_after_tokens=1, normalize="none", lr=1e-3))
    trainer._rows_since_fired[: M // 2] = 10
    before = weights(sae)
    with torch.no_grad():
        sae.b_enc[: M // 2] = -3.0  # weak: not among the k strongest, but able to explain the residual
    x = next(activations(batch=256)).abs() * 3
    trainer._train_step(x)
    moved = (sae.W_dec != before["W_dec"]).any(dim=1)
    assert moved[: M // 2].any()
    without = fastsae.TopKSAE(D, M, K, pre_bias=False)
    without.load_state_dict(before)
    with torch.no_grad():
        without.b_enc[: M // 2] = -3.0
    Trainer(without, config(normalize="none", lr=1e-3))._train_step(x)
    assert not (without.W_dec != before["W_dec"]).any(dim=1)[: M // 2].any()
    torch.testing.assert_close(sae.W_dec[M // 2 :], without.W_dec[M // 2 :])


def test_auxk_loss_is_the_dead_features_own_reconstruction_of_the_residual():
    sae = fastsae.TopKSAE(D, M, K)
    trainer = Trainer(sae, config(auxk=3, dead_after_tokens=5))
    dead = torch.tensor([1, 5, 9, 33])
    trainer._rows_since_fired[dead] = 5
    x, residual_of = torch.randn(9, D), torch.randn(9, D)
    activation = torch.relu((x - sae.b_dec) @ sae.W_enc[dead].T + sae.b_enc[dead])
    a, i = activation.topk(3)
    expected = ((torch.einsum("bk,bkd->bd", a, sae.W_dec[dead[i]]) - (x - residual_of)) ** 2).mean()
    torch.testing.assert_close(trainer._auxk_loss(x, residual_of), expected)


def test_unit_norm_decoder():
    sae = fastsae.TopKSAE(D, M, K, init="unit")
    Trainer(sae, config(unit_norm_decoder=True)).fit(activations())
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(M))


def test_parallel_gradient_is_removed():
    W = torch.nn.functional.normalize(torch.randn(5000, D), dim=1)
    grad = torch.randn(5000, D)
    expected = grad - (grad * W).sum(1, keepdim=True) * W
    fastsae.train.remove_parallel_(grad, W)
    torch.testing.assert_close(grad, expected)
    assert (grad * W).sum(1).abs().max() < 1e-5


def test_k_comes_down():
    seen = []
    sae = fastsae.TopKSAE(D, M, K)
    sae.register_forward_hook(lambda module, args, output: seen.append(output.code.k))
    Trainer(sae, config(steps=7, k_anneal_from=12, k_anneal_steps=4)).fit(activations())
    assert seen == [12, 10, 8, 6, 4, 4, 4]


def test_seeds():
    runs = []
    for seed in (0, 0, 1):
        sae = joint()
        torch.manual_seed(99)
        state = torch.get_rng_state()
        Trainer(sae, config(seed=seed)).fit(activations())
        assert torch.equal(torch.get_rng_state(), state), "the global generator was moved"
        runs.append(weights(sae))
    assert_same(runs[0], runs[1])
    assert not torch.equal(runs[0]["W1"], runs[2]["W1"])


def test_normalisation_is_measured_on_the_first_rows_which_are_trained_on_too():
    batches = list(activations(10))
    sae, drawn = joint(), []
    Trainer(sae, config()).fit(drawn.append(x) or x for x in batches)
    assert len(drawn) == 10
    first = torch.cat(batches[:2])
    torch.testing.assert_close(sae.normalizer.mean, first.mean(0))
    torch.testing.assert_close(sae.normalizer.scale, first.std(0))


def test_dead_features_are_counted():
    sae = fastsae.TopKSAE(D, M, K, pre_bias=False)
    with torch.no_grad():
        sae.b_enc[:15] = -1e6
    result = Trainer(sae, config(lr=1e-9, normalize="none")).fit(activations())
    fired = torch.zeros(M, dtype=torch.bool)
    for x in activations(10):
        fired[sae.encode(x).indices.unique()] = True
    assert result.metrics["dead_share"] == pytest.approx(1 - fired.double().mean().item())
    assert result.metrics["dead_share"] >= 0.25


# ---- memory that a stream fills again ----


class Refilled(Stream):
    """A stream that gives out one tensor and one state, and fills both anew."""

    def __init__(self) -> None:
        self.state, self.buffer = {"i": 0}, torch.empty(32, D)

    def __next__(self) -> Tensor:
        self.state["i"] += 1
        return self.buffer.normal_(generator=torch.Generator().manual_seed(self.state["i"])).abs_()

    def state_dict(self) -> dict[str, int]:
        return self.state

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.state = state


def refilled(numpy: bool = False) -> Iterator[Tensor]:
    buffer = torch.empty(32, D)
    rows = buffer.numpy()
    for x in activations():
        if numpy:
            rows[:] = x.numpy()
        else:
            buffer.copy_(x)
        yield torch.from_numpy(rows) if numpy else buffer


@pytest.mark.parametrize(
    ("data", "fresh"),
    [(refilled, activations), (lambda: refilled(numpy=True), activations), (Refilled, Stream)],
    ids=["iterable", "numpy", "stream"],
)
def test_a_stream_may_fill_one_tensor_again_and_again(data, fresh, tmp_path):
    whole, ours, resumed = joint(), joint(), joint()
    Trainer(whole, config(normalize_rows=200)).fit(fresh())
    Trainer(ours, config(normalize_rows=200)).fit(data())
    assert_same(weights(ours), weights(whole))
    Trainer(joint(), config(normalize_rows=200, steps=6, run_dir=tmp_path)).fit(data())
    Trainer(resumed, config(normalize_rows=200, run_dir=tmp_path, resume=True)).fit(data())
    assert_same(weights(resumed), weights(whole))


@pytest.mark.parametrize("normalize", ["zscore", "scale", "none"])
def test_batches_are_not_written_to(normalize):
    batches = list(activations(10))
    before = [x.clone() for x in batches]
    Trainer(joint(), config(normalize=normalize)).fit(batches)
    assert all(torch.equal(x, then) for x, then in zip(batches, before, strict=True))


# ---- a loop of one's own ----


def test_steps_of_a_loop_are_those_of_fit():
    torch.manual_seed(3)
    ours = fastsae.TopKSAE(D, M, K)
    theirs = copy.deepcopy(ours)
    options = {"normalize_rows": 32, "clip_grad_norm": 1.0, "warmup_steps": 3, "unit_norm_decoder": True}
    seen = []
    Trainer(theirs, config(**options)).fit(
        activations(), on_step=lambda trainer, losses: seen.append((trainer, losses))
    )
    trainer = Trainer(ours, config(**options))
    losses = [trainer.step(x) for x in activations(10)]
    assert_same(weights(ours), weights(theirs))
    assert [loss["mse"] for loss in losses] == [loss["mse"] for _, loss in seen]
    assert [set(loss) for loss in losses] == [{"mse"}] * 10
    assert (trainer.steps, trainer.rows_seen) == (10, 320)
    assert len({id(trainer) for trainer, _ in seen}) == 1
    with pytest.raises(ValueError, match=r"Trainer.step: all 10 steps of TrainerConfig.steps were made"):
        trainer.step(next(iter(activations())))


def test_terms_of_the_loss_add_up_by_name():
    sae = fastsae.TopKSAE(D, M, K)
    trainer = Trainer(sae, config(auxk=4, auxk_coefficient=0.5, dead_after_tokens=1, normalize="none"))
    first, second = activations(2)
    assert trainer.step(first)["auxk"] == 0  # nothing is dead yet
    trainer._rows_since_fired.fill_(100)
    with torch.no_grad():
        output = sae(second)
        expected = 0.5 * fastsae.auxk_loss(sae, second, output.reconstruction, torch.ones(M, dtype=torch.bool), 4)
    losses = trainer.step(second)
    assert set(losses) == {"mse", "auxk"}
    assert not any(t.requires_grad for t in losses.values())
    assert torch.equal(losses["mse"], output.loss)
    assert torch.equal(losses["auxk"], expected)
    assert expected > 0


def test_a_loop_takes_statistics_that_were_measured_before():
    x = torch.cat(list(activations(10)))
    sae = joint()
    sae.normalizer.measure(x, "scale")
    scale = sae.normalizer.scale.clone()
    Trainer(sae, config(normalize="zscore")).step(x[:32])
    assert torch.equal(sae.normalizer.scale, scale)
    with pytest.raises(ValueError, match="at least 2 rows"):
        Trainer(joint(), config(normalize="zscore")).step(x[:1])


def test_a_loop_is_told_of_what_it_cannot_train_on(tmp_path):
    x = next(iter(activations()))
    bad = x.clone()
    bad[3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"batch 1 of the activations holds \d+ values that are NaN"):
        Trainer(joint(), config(normalize="none")).step(bad)
    skipping = Trainer(joint(), config(normalize="none", nonfinite="skip"))
    assert skipping.step(bad * torch.nan) == {}
    assert (skipping.steps, skipping.batches_skipped) == (0, 1)
    assert set(skipping.step(bad)) == {"mse"}
    with pytest.raises(ValueError, match=r"Trainer\.step writes no files"):
        Trainer(joint(), config(run_dir=tmp_path)).step(x)
    with pytest.raises(ValueError, match=r"batch 1 of the activations: expected a \(B, \d+\) tensor"):
        Trainer(joint(), config()).step(x[0])


def test_auxk_takes_a_mask_or_numbers():
    sae, x = joint(), torch.randn(6, joint().d_in)
    dead = torch.zeros(sae.d_sae, dtype=torch.bool)
    assert fastsae.auxk_loss(sae, x, torch.zeros_like(x), dead, 3) == 0
    dead[[1, 4, 7]] = True
    with pytest.raises(ValueError, match=rf"dead: expected a mask of shape \({sae.d_sae},\), .* got shape \(3,\)"):
        fastsae.auxk_loss(sae, x, x, dead[:3], 3)
    by_mask, by_number = (fastsae.auxk_loss(sae, x, x * 0, d, 5) for d in (dead, torch.tensor([1, 4, 7])))
    pre = torch.relu(x @ sae.W_enc[dead].T + sae.b_enc[dead])
    torch.testing.assert_close(by_mask, (pre @ sae.W_dec[dead] - x).square().mean())
    assert torch.equal(by_mask, by_number)


# ---- the log ----


def test_metrics_lines(tmp_path):
    sae = joint()
    result = Trainer(sae, config(run_dir=tmp_path / "run", log_every=4, clip_grad_norm=1.0)).fit(activations())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 10]
    assert [line["rows"] for line in lines] == [128, 256, 320]
    assert lines[-1] == result.metrics
    wanted = {"loss", "fvu", "l0", "dead_share", "lr", "rows_per_second", "grad_norm"}
    assert wanted <= lines[0].keys()
    assert all(math.isfinite(line[name]) for line in lines for name in wanted)
    assert_same(weights(fastsae.load(tmp_path / "run" / "sae")), weights(sae))


def test_other_loggers(tmp_path, monkeypatch):
    seen, told = [], {}

    class Writer:
        def __init__(self, folder):
            assert folder == str(tmp_path)

        def add_text(self, name, text):
            told[name] = json.loads(text)

        def add_scalar(self, name, value, step):
            seen.append((name, step))

        def flush(self):
            pass

        def close(self):
            seen.append("tensorboard closed")

    class Wandb:
        @staticmethod
        def login(prompt=True, verify=True):
            assert not prompt, "it would wait for an answer"
            return True

        @staticmethod
        def init(**arguments):
            told["wandb"] = arguments
            return Wandb()

        def log(self, metrics, step):
            seen.append(("wandb", step))

        def finish(self):
            seen.append("wandb closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type("m", (), {"SummaryWriter": Writer}))
    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    data = {"model": "embedded", "hook": "blocks.2.hook_resid_post", "text": "stdlib"}
    (tmp_path / "data.json").write_text(json.dumps(data))
    run = config(run_dir=tmp_path, steps=2, log_to=("tensorboard", "wandb"))
    Trainer(joint(), run).fit(activations())
    assert {("loss", 1), ("loss", 2), ("fvu", 2), ("wandb", 1), ("wandb", 2)} <= set(seen)
    assert seen[-2:] == ["tensorboard closed", "wandb closed"]
    asked = told.pop("wandb")
    assert json.loads(json.dumps(asked["config"])) == told, "both are told the same"
    assert (told["model"], told["data"]) == ("embedded", data)
    assert (told["trainer"]["steps"], told["sae"]["architecture"], told["sae"]["d_sae"]) == (2, "joint", joint().d_sae)
    assert (asked["project"], asked["name"], asked["dir"]) == ("fastsae", tmp_path.name, str(tmp_path))
    again = dataclasses.replace(run, resume=True, log_to=("wandb",), wandb_name="b", wandb_project="p")
    Trainer(joint(), again).fit(activations())
    assert (told["wandb"]["project"], told["wandb"]["name"]) == ("p", "b")


@pytest.mark.parametrize("older", [False, True])
def test_wandb_without_a_key_says_what_to_do(older, tmp_path, monkeypatch):
    class Wandb:
        @staticmethod
        def login(prompt=True, verify=True):
            return prompt

        @staticmethod
        def setup():
            return SimpleNamespace(settings=SimpleNamespace(mode="online"))

        @staticmethod
        def init(**arguments):
            pytest.fail("it would ask for a key, and wait")

    if older:
        Wandb.login = staticmethod(lambda timeout=None: timeout is None)
    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = config(run_dir=tmp_path, steps=2, log_to=("wandb",))
    message = r"there is no API key\. Run `wandb login` or set WANDB_API_KEY; WANDB_MODE=offline"
    with pytest.raises(RuntimeError, match=message):
        Trainer(joint(), run).fit(activations())
    Wandb.init = staticmethod(lambda **_: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(RuntimeError, match="W&B did not start: no network"):
        Trainer(joint(), run).fit(activations())


# ---- checkpoints and resuming ----


def test_the_last_two_checkpoints_are_kept(tmp_path):
    Trainer(joint(), config(run_dir=tmp_path, checkpoint_every=3)).fit(activations())
    assert [p.name for p in checkpoint.folders(tmp_path)] == ["step_00000010", "step_00000009"]
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.parametrize("data", [activations, Stream], ids=["iterable", "stream"])
def test_resume_is_bitwise(data, tmp_path, monkeypatch):
    options = {
        "steps": 12,
        "auxk": 4,
        "dead_after_tokens": 64,
        "warmup_steps": 3,
        "decay_steps": 4,
        "clip_grad_norm": 0.1,
    }
    whole = joint()
    uninterrupted = Trainer(whole, config(**options, run_dir=tmp_path / "a")).fit(data())

    cut = Trainer(joint(), config(**options, run_dir=tmp_path / "b", checkpoint_every=5))
    step = cut._train_step
    monkeypatch.setattr(cut, "_train_step", lambda x: pytest.fail("killed") if cut.steps == 8 else step(x))
    with pytest.raises(pytest.fail.Exception):
        cut.fit(data())
    assert checkpoint.folders(tmp_path / "b")[0].name == "step_00000005"
    again = joint()
    with torch.no_grad():
        again.W_dec.zero_()  # everything must come from the checkpoint
    resumed = Trainer(again, config(**options, run_dir=tmp_path / "b", resume=True, checkpoint_every=5)).fit(data())
    assert_same(weights(whole), weights(again))
    assert resumed.metrics | {"rows_per_second": 0} == uninterrupted.metrics | {"rows_per_second": 0}
    steps = [json.loads(line)["step"] for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13))


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 96

    def __getitem__(self, i: int) -> Tensor:
        return torch.randn(D, generator=torch.Generator().manual_seed(i))


def shuffled() -> Iterator[Tensor]:
    """Epochs of three batches, each in an order drawn from torch's generator, from which dropout is drawn too."""
    while True:
        yield from torch.utils.data.DataLoader(Rows(), batch_size=32, shuffle=True)


def test_a_shuffling_loader_is_drawn_again_as_it_was(tmp_path, monkeypatch):
    whole = joint()
    Trainer(whole, config(steps=12)).fit(shuffled())
    cut = Trainer(joint(), config(steps=12, run_dir=tmp_path, checkpoint_every=4))
    step = cut._train_step
    monkeypatch.setattr(cut, "_train_step", lambda x: pytest.fail("killed") if cut.steps == 6 else step(x))
    with pytest.raises(pytest.fail.Exception):
        cut.fit(shuffled())
    again = joint()
    Trainer(again, config(steps=12, run_dir=tmp_path, resume=True)).fit(shuffled())
    assert_same(weights(whole), weights(again))


class Drawn(Stream):
    """A stream that knows where it is, and draws from torch's generator, at its beginning too."""

    def __iter__(self):
        torch.rand(1)
        return self

    def __next__(self) -> Tensor:
        self.i += 1
        return torch.rand(32, D)


@pytest.mark.parametrize("normalize", ["zscore", "none"])
def test_a_stream_that_draws_goes_on_from_where_its_generator_was(normalize, tmp_path, monkeypatch):
    whole, again = joint(), joint()
    Trainer(whole, config(normalize=normalize)).fit(Drawn())
    cut = Trainer(joint(), config(normalize=normalize, run_dir=tmp_path, checkpoint_every=4))
    step = cut._train_step
    monkeypatch.setattr(cut, "_train_step", lambda x: pytest.fail("killed") if cut.steps == 6 else step(x))
    with pytest.raises(pytest.fail.Exception):
        cut.fit(Drawn())
    Trainer(again, config(normalize=normalize, run_dir=tmp_path, resume=True)).fit(Drawn())
    assert_same(weights(whole), weights(again))


def test_rows_that_were_measured_are_trained_on_where_they_are_drawn():
    sae, seen = joint(), []
    trainer = Trainer(sae, config(normalize_rows=64))
    step = trainer._train_step
    trainer._train_step = lambda x: (seen.append(x), step(x))[1]
    trainer.fit(Drawn())
    measured = torch.cat(seen[:2])  # in units of the statistics
    torch.testing.assert_close(measured.mean(dim=0), torch.zeros(D), rtol=0, atol=1e-5)
    torch.testing.assert_close(measured.std(dim=0), torch.ones(D), rtol=1e-5, atol=0)


def test_drawing_a_batch_leaves_the_generator_of_training_alone():
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    seen, batches = [], Batches((torch.rand(2) for _ in range(4)), seed=0)
    for batch in batches:
        seen += [torch.rand(1), batch]
    assert torch.equal(torch.cat(seen[::2]), expected)
    assert len({float(b[0]) for b in seen[1::2]}) == 4


def test_a_damaged_position_is_named(tmp_path):
    position = Batches(Drawn(), 0).position()
    for text in ("no base64", "AAAA", None):
        with pytest.raises(ValueError, match="the position in the activations is damaged: random"):
            Batches(Drawn(), 0, position | {"random": text})


def test_a_finished_run_can_be_trained_on(tmp_path):
    whole, longer = joint(), joint()
    Trainer(whole, config(steps=12)).fit(activations())
    Trainer(joint(), config(steps=5, run_dir=tmp_path)).fit(activations())
    assert Trainer(longer, config(steps=12, run_dir=tmp_path, resume=True)).fit(activations()).steps == 12
    assert_same(weights(whole), weights(longer))
    assert files.read_json(tmp_path / "run.json")["trainer"]["steps"] == 12
    with pytest.raises(ValueError, match="step_00000012 is beyond the 8 steps asked for"):
        Trainer(joint(), config(steps=8, run_dir=tmp_path, resume=True)).fit(activations())


def test_where_the_rate_decays_a_longer_run_is_another_one(tmp_path):
    Trainer(joint(), config(steps=5, decay_steps=2, run_dir=tmp_path)).fit(activations())
    with pytest.raises(
        ValueError, match=r"another configuration: steps was 5, is 12. The rate decays over the last steps"
    ):
        Trainer(joint(), config(steps=12, decay_steps=2, run_dir=tmp_path, resume=True)).fit(activations())


def test_what_was_trained_already_is_said():
    trainer = Trainer(joint(), config())
    trainer.fit(activations())
    with pytest.warns(UserWarning, match="all 10 steps were made before, so nothing is trained"):
        trainer.fit(activations())


RUN = textwrap.dedent("""
    import sys
    from pathlib import Path
    sys.path.insert(0, str(Path({tests!r})))
    from test_train import *
    Trainer(joint(), config(steps={steps}, run_dir={run_dir!r}, checkpoint_every=3, resume=True)).fit(activations())
""")


def start(run_dir: Path, steps: int) -> subprocess.Popen:
    script = RUN.format(tests=str(Path(__file__).parent), steps=steps, run_dir=str(run_dir))
    return subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the subprocess did not get there"
        time.sleep(0.005)


def test_sigkill_at_any_moment(tmp_path):
    steps = 150
    whole = joint()
    Trainer(whole, config(steps=steps)).fit(activations())
    run_dir = tmp_path / "run"
    for kill in range(3):
        process = start(run_dir, steps)
        done = max((int(p.name[5:]) for p in checkpoint.folders(run_dir)), default=0)

        def further(process: subprocess.Popen = process, done: int = done) -> bool:
            newest = next(iter(checkpoint.folders(run_dir)), None)
            return process.poll() is not None or (newest is not None and int(newest.name[5:]) > done + 20)

        wait_for(further)
        time.sleep(0.003 * kill)  # also inside the writing of a checkpoint, which takes a few milliseconds
        process.kill()
        process.wait()
    finished = start(run_dir, steps)
    assert finished.wait(timeout=120) == 0, finished.stderr.read()
    assert_same(weights(fastsae.load(run_dir / "sae")), weights(whole))


def test_a_kill_in_the_middle_of_a_checkpoint_leaves_the_one_before(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def dies(path: Path, value) -> None:
        if path.name == "state.json" and value.get("step") == 6:
            raise Killed
        write_json(path, value)

    write_json = files.write_json
    monkeypatch.setattr(files, "write_json", dies)
    with pytest.raises(Killed):
        Trainer(joint(), config(run_dir=tmp_path, checkpoint_every=3)).fit(activations())
    assert [p.name for p in checkpoint.folders(tmp_path)] == ["step_00000003"]
    monkeypatch.undo()
    whole, again = joint(), joint()
    Trainer(whole, config()).fit(activations())
    Trainer(again, config(run_dir=tmp_path, resume=True)).fit(activations())
    assert_same(weights(whole), weights(again))


def test_sigint_saves_and_exits(tmp_path):
    run_dir = tmp_path / "run"
    process = start(run_dir, 100_000)
    wait_for(lambda: checkpoint.folders(run_dir))
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "continue with resume" in stderr
    found = re.search(r"training stopped at step (\d+)", stderr)
    assert found, stderr
    assert checkpoint.folders(run_dir)[0].name == f"step_{int(found[1]):08d}"


def test_full_disk(tmp_path, monkeypatch):
    def full(path, tensors):
        if "step_00000006" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, tensors)

    write = files.write_tensors
    monkeypatch.setattr(files, "write_tensors", full)
    with pytest.raises(OSError, match=r"No space left on device; the last good checkpoint is .*step_00000003"):
        Trainer(joint(), config(run_dir=tmp_path, checkpoint_every=3)).fit(activations())
    assert checkpoint.load(tmp_path).state["step"] == 3


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "config.json", "state.json"])
@pytest.mark.parametrize("how", ["truncated", "one byte flipped", "missing"])
def test_damaged_checkpoints_are_named_and_the_previous_one_offered(name, how, tmp_path):
    Trainer(joint(), config(run_dir=tmp_path, checkpoint_every=5)).fit(activations())
    damaged = checkpoint.folders(tmp_path)[0] / name
    content = bytearray(damaged.read_bytes())
    if how == "missing":
        damaged.unlink()
    elif how == "truncated":
        damaged.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) * 2 // 3] ^= 0x55
        damaged.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"(?s)step_00000010.*{name}.*delete .*step_00000010 to go on from step_00000005"
    ):
        Trainer(joint(), config(run_dir=tmp_path, resume=True)).fit(activations())


def test_resume_with_another_configuration_names_what_differs(tmp_path):
    Trainer(joint(), config(run_dir=tmp_path)).fit(activations())
    with pytest.raises(ValueError, match=r"another configuration: lr was 0.01, is 0.5$"):
        Trainer(joint(), config(run_dir=tmp_path, resume=True, lr=0.5)).fit(activations())
    with pytest.raises(ValueError, match="architecture was 'joint', is 'topk'"):
        Trainer(fastsae.TopKSAE(D, M, K), config(run_dir=tmp_path, resume=True)).fit(activations())
    with pytest.raises(ValueError, match="another kind of activations"):
        Trainer(joint(), config(run_dir=tmp_path, resume=True)).fit(Stream())


def test_a_finished_run_resumes_to_its_end(tmp_path):
    first = Trainer(joint(), config(run_dir=tmp_path)).fit(activations())
    again = Trainer(joint(), config(run_dir=tmp_path, resume=True)).fit(activations())
    assert again.steps == first.steps == 10
    assert again.metrics == first.metrics


def test_a_folder_that_holds_a_run(tmp_path):
    Trainer(joint(), config(run_dir=tmp_path)).fit(activations())
    with pytest.raises(FileExistsError, match=r"already holds a run. Continue it with resume"):
        Trainer(joint(), config(run_dir=tmp_path)).fit(activations())


def test_two_processes_in_one_folder(tmp_path):
    process = start(tmp_path, 100_000)
    try:
        wait_for(lambda: checkpoint.folders(tmp_path))
        with pytest.raises(RuntimeError, match="another process is writing into"):
            Trainer(joint(), config(run_dir=tmp_path, resume=True)).fit(activations())
    finally:
        process.kill()
        process.wait()


def test_unwritable_run_dir(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write into .*file"):
        Trainer(joint(), config(run_dir=tmp_path / "file" / "run")).fit(activations())


# ---- bad activations ----


def spoiled(n: int, at: int) -> Iterator[Tensor]:
    for i, x in enumerate(activations(n)):
        if i == at:
            x[3, 5] = torch.nan
            x[4, 1] = torch.inf
        yield x


def test_nan_stops_with_its_position_and_nothing_trained_on_it(tmp_path):
    sae, clean = joint(), joint()
    message = r"batch 6 of the activations holds 2 values that are NaN or infinite, the first at row 3, dimension 5"
    with pytest.raises(FloatingPointError, match=message):
        Trainer(sae, config(run_dir=tmp_path)).fit(spoiled(20, 5))
    Trainer(clean, config(steps=5)).fit(activations())
    assert_same(weights(sae), weights(clean))
    again = joint()
    Trainer(again, config(run_dir=tmp_path, resume=True, nonfinite="skip")).fit(spoiled(20, 5))
    skipped = joint()
    Trainer(skipped, config()).fit(x[x.isfinite().all(dim=1)] for x in spoiled(20, 5))
    assert_same(weights(again), weights(skipped))


def test_nan_batches_can_be_skipped_and_are_counted():
    ours, plain = joint(), joint()
    batches = list(activations(11))
    result = Trainer(ours, config(nonfinite="skip")).fit([*batches[:4], batches[0] * torch.nan, *batches[4:]])
    assert (result.steps, result.metrics["batches_skipped"], result.metrics["rows_skipped"]) == (10, 1, 32)
    Trainer(plain, config()).fit(batches)
    assert_same(weights(ours), weights(plain))


def test_rows_with_nan_can_be_skipped_and_are_counted(tmp_path):
    run = config(nonfinite="skip", run_dir=tmp_path)
    result = Trainer(joint(), run).fit(spoiled(20, 5))
    assert result.steps == 10
    assert (result.metrics["rows_skipped"], result.metrics["rows"]) == (2, 10 * 32 - 2)
    assert "batches_skipped" not in result.metrics
    longer = config(nonfinite="skip", run_dir=tmp_path, resume=True, steps=12)
    assert Trainer(joint(), longer).fit(spoiled(20, 5)).metrics["rows_skipped"] == 2


def test_activations_that_end_early(tmp_path):
    with pytest.warns(UserWarning, match=r"activations ended after 4 of 10 steps"):
        result = Trainer(joint(), config(run_dir=tmp_path, log_every=3)).fit(activations(4))
    assert result.steps == result.metrics["step"] == 4
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [3, 4]
    with pytest.warns(UserWarning, match="ended after 4"):
        Trainer(joint(), config(run_dir=tmp_path / "even", log_every=2)).fit(activations(4))
    steps = [json.loads(line)["step"] for line in (tmp_path / "even" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4]
    assert checkpoint.load(tmp_path).state["step"] == 4


def test_divergence_stops_and_names_the_last_good_checkpoint(tmp_path):
    run = config(lr=1e18, run_dir=tmp_path, steps=50, checkpoint_every=1, normalize="none")
    with pytest.raises(
        FloatingPointError, match=r"training diverged. The last good checkpoint is .*step_0.*Try a lower lr"
    ):
        Trainer(joint(), run).fit(x * 1e10 for x in activations())


def test_k_anneal_from_must_be_above_k():
    with pytest.raises(ValueError, match="k_anneal_from"):
        Trainer(joint(), config(k_anneal_from=2))
