"""The Trainer in odd company: other dtypes, bad first batches, compiled and cast SAEs, threads, extreme options."""

import contextlib
import itertools
import json
import math
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_train import D, K, M, activations, assert_same, config, joint, weights
from torch import Tensor

import fastsae
from fastsae import checkpoint, evaluate, files, runs, train
from fastsae.integrations import convert
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


@pytest.mark.parametrize("first", ["compiled", "plain"])
def test_a_run_of_a_compiled_sae_is_that_of_the_plain_one(first: str, tmp_path):
    torch.compiler.reset()
    options = {
        "auxk": 4,
        "dead_after_tokens": 32,
        "unit_norm_decoder": True,
        "checkpoint_every": 3,
        "run_dir": tmp_path,
    }
    whole = joint()
    Trainer(whole, config(**options | {"run_dir": None})).fit(activations())
    for steps, kind in ((5, first), (10, "plain" if first == "compiled" else "compiled")):
        sae, called = joint(), []
        given = torch.compile(sae, backend="eager") if kind == "compiled" else sae
        given.register_forward_hook(lambda *_, called=called: called.append(1))
        trainer = Trainer(given, config(steps=steps, resume=True, **options))
        trainer.fit(activations())
        assert len(called) == 5, "the module that was given is what is called"
        assert_same(weights(sae), weights(fastsae.load(tmp_path / "sae")))
    assert_same(weights(sae), weights(whole))


def test_a_run_with_the_names_that_compiling_gave_goes_on(tmp_path):
    """As it was written once."""
    whole = joint()
    Trainer(whole, config()).fit(activations())
    Trainer(joint(), config(steps=5, run_dir=tmp_path)).fit(activations())
    [step] = checkpoint.folders(tmp_path)
    tensors = files.read_tensors(step / "optimizer.safetensors")
    files.write_tensors(step / "optimizer.safetensors", {k.replace("/", "/_orig_mod."): t for k, t in tensors.items()})
    state = files.read_json(step / "state.json")
    state["sae"]["trained"] = [f"_orig_mod.{name}" for name in state["sae"]["trained"]]
    files.write_json(step / "state.json", state)
    sums = {name: files.crc32(step / name) for name in files.read_json(step / "checksums.json")}
    files.write_json(step / "checksums.json", sums)
    sae = joint()
    Trainer(sae, config(run_dir=tmp_path, resume=True)).fit(activations())
    assert_same(weights(sae), weights(whole))


def test_training_on_holds_no_file_of_the_checkpoint(tmp_path):
    """On a network drive a folder with a file that is still mapped cannot be deleted."""
    Trainer(joint(), config(steps=3, run_dir=tmp_path)).fit(activations())
    sae, mapped = joint(), []
    sae.register_forward_hook(lambda *_: mapped.append(str(tmp_path) in Path("/proc/self/maps").read_text()))
    Trainer(sae, config(steps=5, run_dir=tmp_path, resume=True)).fit(activations())
    assert mapped == [False, False]


def test_a_compiled_sae_is_measured_and_converted_as_the_plain_one():
    sae = joint().eval()
    compiled, rows = torch.compile(sae, backend="eager"), [torch.randn(30, D)]
    assert repr(evaluate.geometry(compiled, rows)) == repr(evaluate.geometry(sae, rows))
    assert repr(evaluate.reconstruction(compiled, rows)) == repr(evaluate.reconstruction(sae, rows))
    assert_same(weights(convert.in_raw_space(compiled)), weights(convert.in_raw_space(sae)))


def test_a_compiled_sae_is_a_base_too():
    compiled = torch.compile(joint(), backend="eager")
    assert fastsae.SecondarySAE.on(compiled).d_in == 6
    plain = torch.compile(fastsae.TopKSAE(D, M, K), backend="eager")
    assert torch.equal(fastsae.SequentialSAE.on(plain).W_dec, plain.W_dec)


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
        ([1.0, 2.0], ValueError, "got list$"),
        (None, ValueError, "got NoneType$"),
        (torch.randn(D), ValueError, r"For one tensor of activations use fastsae.batches\(x, 2048\)"),
        (
            [torch.randn(4, D)],
            ValueError,
            r"For a DataLoader over a TensorDataset use \(rows for \(rows,\) in loader\)",
        ),
        (
            torch.randn(4, D).numpy(),
            ValueError,
            r"got ndarray. For NumPy arrays use fastsae.batches\(x, 2048\), or torch.from_numpy\(x\)",
        ),
    ],
    ids=["width", "3-d", "1-d", "0-d", "empty", "integer", "meta", "list", "None", "rows", "loader", "numpy"],
)
def test_a_bad_batch_is_named(bad, error, message, at, normalize):
    batches: list = list(activations(4))
    batches[at] = bad
    with pytest.raises(error, match=rf"batch {at + 1} of the activations: expected .*{message}"):
        Trainer(joint(), config(normalize=normalize, normalize_rows=100)).fit(batches)


def test_activations_that_are_a_function_are_to_be_called():
    with pytest.raises(TypeError, match=r"an iterable of \(B, d_in\) tensors; got a function; call it"):
        Trainer(joint(), config()).fit(activations)


@pytest.mark.parametrize("normalize", ["zscore", "none"])
def test_no_batches_at_all(normalize):
    with pytest.raises(ValueError, match="activations gave no batch at all"):
        Trainer(joint(), config(normalize=normalize)).fit([])


def test_skipping_leaves_bad_rows_out_of_the_statistics_too():
    batches = list(activations(6))
    batches[0] = batches[0].clone()
    batches[0][3, 2] = torch.nan
    sae = joint()
    result = Trainer(sae, config(nonfinite="skip", steps=6)).fit(batches)
    assert result.metrics["rows_skipped"] == 1
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
    assert (trainer.steps, trainer.rows_seen) == (plain.steps, plain.rows_seen) == (3, 96)
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
        ({"steps": 0}, "TrainerConfig.steps: expected at least 1; got 0"),
        ({"lr": 0.0}, "TrainerConfig.lr"),
        ({"lr": math.inf}, "TrainerConfig.lr: expected above 0 and finite; got inf"),
        ({"lr_end": -1.0}, "TrainerConfig.lr_end: expected 0 or more, and finite; got -1.0"),
        ({"auxk_coefficient": math.nan}, "TrainerConfig.auxk_coefficient: expected 0 or more, and finite; got nan"),
        ({"warmup_steps": 6, "decay_steps": 5}, "6 and 5 of 10 steps"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm: expected None or above 0"),
        ({"resume": True}, "resume and log_to need a run_dir"),
        ({"log_every": 0}, "log_every"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"auxk": -1}, "auxk"),
        ({"steps": 2.5}, "TrainerConfig.steps: expected int; got 2.5"),
        ({"steps": True}, "TrainerConfig.steps: expected int; got True"),
        ({"lr": "fast"}, "TrainerConfig.lr: expected float; got 'fast'"),
        ({"betas": (0.9,)}, r"TrainerConfig.betas: expected a tuple of float; got \(0.9,\)"),
        ({"k_anneal_from": 9}, "k_anneal_steps: expected at least 1 with k_anneal_from; got 0"),
        ({"normalize": "z-score"}, "TrainerConfig.normalize: expected 'none' or 'zscore' or 'scale'; got 'z-score'"),
        ({"nonfinite": "ignore"}, "TrainerConfig.nonfinite: expected 'stop' or 'skip'; got 'ignore'"),
        ({"log_to": ("mlflow",), "run_dir": "runs"}, "log_to: expected a tuple of 'tensorboard' or 'wandb'; got"),
        ({"dead_after_tokens": 0}, "dead_after_tokens: expected at least 1; got 0"),
        ({"normalize_rows": 1}, "normalize_rows: expected at least 2; got 1"),
        ({"k_anneal_from": 9, "k_anneal_steps": -1}, "k_anneal_steps: expected 0 or more; got -1"),
    ],
)
def test_impossible_options(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


# ---- activations that fail ------------------------------------------------------------------------------------------


def failing(n: int, how: Callable[[], Tensor]) -> Iterator[Tensor]:
    yield from activations(n)
    yield how()


def no_network() -> Tensor:
    raise ConnectionError("no route to host")


@pytest.mark.parametrize(
    ("how", "error"), [(no_network, ConnectionError), (lambda: torch.empty(0, D), ValueError)], ids=["raises", "empty"]
)
def test_what_was_trained_is_kept_when_the_activations_fail(how, error, tmp_path):
    with pytest.raises(error):
        Trainer(joint(), config(run_dir=tmp_path, normalize_rows=32)).fit(failing(6, how))
    again, whole = joint(), joint()
    Trainer(again, config(run_dir=tmp_path, resume=True, normalize_rows=32)).fit(activations())
    Trainer(whole, config(normalize_rows=32)).fit(activations())
    assert checkpoint.folders(tmp_path)[-1].name == "step_00000006"
    assert_same(weights(again), weights(whole))


def test_only_nan_does_not_run_for_ever(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train, "_SKIPPED_IN_A_ROW", 5)
    endless = itertools.chain(activations(2), itertools.repeat(torch.full((4, D), torch.nan)))
    with pytest.raises(FloatingPointError, match=r"batch 8 of the activations holds 48 values.*So did the 5 before it"):
        Trainer(joint(), config(nonfinite="skip", normalize_rows=32)).fit(endless)


def test_a_batch_with_one_good_row_ends_a_row_of_bad_ones(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train, "_SKIPPED_IN_A_ROW", 5)
    bad = torch.full((4, D), torch.nan)
    mixed = torch.cat([bad, torch.ones(1, D)])
    batches = [*activations(2), *[bad] * 5, mixed, *[bad] * 5, *activations(1)]
    result = Trainer(joint(), config(nonfinite="skip", normalize_rows=32, steps=4)).fit(batches)
    assert (result.metrics["batches_skipped"], result.metrics["rows_skipped"]) == (10, 44)


# ---- rows far larger than others ------------------------------------------------------------------------------------


def with_sinks(n: int | None = None) -> Iterator[Tensor]:
    """In each batch of 32 rows one is 1000 times as large, in three dimensions."""
    for i, x in enumerate(activations(n)):
        x[i % 32, :3] += torch.tensor([900.0, -700.0, 400.0])
        yield x


def without_sinks(n: int | None = None) -> Iterator[Tensor]:
    for i, x in enumerate(activations(n)):
        yield torch.cat([x[: i % 32], x[i % 32 + 1 :]])


@pytest.mark.parametrize("normalize", ["zscore", "scale", "none"])
def test_outliers_can_be_left_out(normalize, tmp_path):
    ours, plain, resumed = joint(), joint(), joint()
    options = {"normalize": normalize, "outliers": "skip"}
    caught = contextlib.nullcontext() if normalize == "none" else pytest.warns(UserWarning, match="2 of 64 rows")
    with caught:
        result = Trainer(ours, config(**options, run_dir=tmp_path, steps=6)).fit(with_sinks())
    assert result.metrics["outliers_skipped"] == 6
    assert result.metrics["rows"] == 6 * 31
    assert "fvu_ordinary" not in result.metrics
    again = config(**options, run_dir=tmp_path, resume=True)
    assert Trainer(resumed, again).fit(with_sinks()).metrics["outliers_skipped"] == 10
    Trainer(plain, config(normalize=normalize, normalize_rows=62)).fit(without_sinks())
    assert_same(weights(resumed), weights(plain))


def test_outliers_are_told_of_once_and_their_share_of_the_fvu_is_shown():
    sae = fastsae.TopKSAE(D, M, K)
    x = next(with_sinks())  # its first row is one
    trainer, other = Trainer(sae, config(normalize="none")), Trainer(sae, config(normalize="none"))
    trainer.steps = other.steps = 1
    with torch.no_grad():
        output = sae(x)
    with pytest.warns(UserWarning, match=r"1 of 32 rows \(3.12%\) are up to [\d,]+ times .*outliers='skip'"):
        metrics = trainer._metrics(x, output, None, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trainer._metrics(x, output, None, 1.0) == metrics
        ordinary, restored = x[1:].double().numpy(), output.reconstruction[1:].double().numpy()
        expected = ((ordinary - restored) ** 2).sum() / ((ordinary - ordinary.mean(0)) ** 2).sum()
        assert metrics["fvu_ordinary"] == pytest.approx(expected, rel=1e-4)
        with torch.no_grad():
            plain = next(activations())
            assert "fvu_ordinary" not in other._metrics(plain, sae(plain), None, 1.0)


def test_ctrl_c_while_batches_are_skipped(tmp_path):
    def stream() -> Iterator[Tensor]:
        yield from activations(3)
        signal.raise_signal(signal.SIGINT)
        for _ in range(3):
            yield torch.full((4, D), torch.nan)

    with pytest.raises(KeyboardInterrupt, match="stopped at step 3; saved"):
        Trainer(joint(), config(nonfinite="skip", run_dir=tmp_path, normalize_rows=32)).fit(stream())


def test_a_position_that_cannot_be_stored_is_refused_at_once(tmp_path):
    class Stream:
        def __iter__(self) -> Iterator[Tensor]:
            return activations()

        def state_dict(self) -> dict:
            return {"rng": torch.get_rng_state()}

        def load_state_dict(self, state: dict) -> None: ...

    with pytest.raises(TypeError, match=r"state_dict\(\) of the activations must hold what JSON can"):
        Trainer(joint(), config(run_dir=tmp_path)).fit(Stream())


def test_rows_looked_at_in_advance_do_not_stay_in_memory():
    seen: list[weakref.ref] = []

    def stream() -> Iterator[Tensor]:
        for x in activations(8):
            seen.append(weakref.ref(x))
            yield x

    sae, alive = joint(), []
    sae.register_forward_hook(lambda *_: alive.append(sum(ref() is not None for ref in seen)))
    Trainer(sae, config(steps=8, normalize_rows=128)).fit(stream())
    assert alive[-1] <= 2


def test_a_trainer_inside_no_grad_and_inference_mode():
    results = []
    for mode in (contextlib.nullcontext, torch.no_grad, torch.inference_mode):
        sae = joint()
        with mode():
            Trainer(sae, config()).fit(activations())
        assert all(p.grad is None for p in sae.parameters())
        results.append(weights(sae))
    for result in results[1:]:
        assert_same(result, results[0])


# ---- SAEs that cannot be trained so ---------------------------------------------------------------------------------


def test_weights_that_cannot_be_trained_so():
    frozen = joint().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of this SAE has requires_grad"):
        Trainer(frozen, config())
    tied = fastsae.TopKSAE(D, M, K)
    tied.W_dec = tied.W_enc
    with pytest.raises(ValueError, match="two weights of this SAE share their memory"):
        Trainer(tied, config())
    with pytest.raises(ValueError, match=r"eps: 1e-08 is 0 in the torch.float16 of this SAE"):
        Trainer(fastsae.TopKSAE(D, M, K, dtype=torch.float16), config())
    no_decoder = fastsae.TopKSAE(D, M, K)
    no_decoder.W_dec.requires_grad_(False)
    with pytest.raises(ValueError, match="unit_norm_decoder: W_dec is frozen"):
        Trainer(no_decoder, config(unit_norm_decoder=True))
    measured = joint()
    Trainer(measured, config(steps=1)).fit(activations())
    with pytest.raises(ValueError, match="normalize: 'none', but this SAE has stored statistics"):
        Trainer(measured, config(normalize="none")).fit(activations())


class Shell(torch.nn.Module):
    """As FSDP and DistributedDataParallel are."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (torch.nn.DataParallel, r"got DataParallel, a wrapper .*\.module; several processes .*docs/distributed\.md"),
        (torch.optim.swa_utils.AveragedModel, r"got AveragedModel, a wrapper .*\.module"),
        (Shell, r"got Shell, a wrapper .*\.module"),
        (lambda sae: Shell(torch.compile(sae, backend="eager")), r"got Shell, a wrapper .*\.module"),
        (lambda sae: torch.compile(Shell(sae), backend="eager"), r"got Shell, a wrapper .*\.module"),
        (lambda sae: torch.nn.Linear(2, 2), "got Linear$"),
        (lambda sae: type(sae), r"got JointSAE\. Make one: JointSAE\(d_in, d_sae, k\)"),
        (lambda sae: "runs/first", r"got str\. Load it: fastsae\.load\('runs/first'\)"),
        (lambda sae: sae.state_dict(), "got OrderedDict$"),
        (lambda sae: None, "got NoneType$"),
    ],
    ids=["DP", "average", "shell", "shell of compiled", "compiled shell", "Linear", "class", "path", "dict", "None"],
)
def test_what_is_no_sae_is_refused_with_what_to_pass(wrap: Callable, message: str):
    with pytest.raises(TypeError, match=f"Trainer: expected an SAE of fastsae; {message}"):
        Trainer(wrap(joint()), config())


def test_what_is_frozen_belongs_to_a_run(tmp_path):
    Trainer(joint(), config(steps=3, run_dir=tmp_path)).fit(activations())
    sae = joint()
    sae.W_enc.requires_grad_(False)
    before = weights(sae)
    with pytest.raises(ValueError, match="another configuration: trained was"):
        Trainer(sae, config(steps=3, run_dir=tmp_path, resume=True)).fit(activations())
    assert_same(weights(sae), before)


# ---- metrics --------------------------------------------------------------------------------------------------------


def test_metrics_by_definition():
    """FVU about the mean of the batch, L0 of what is active, dead by the last tokens only."""
    sae = fastsae.TopKSAE(D, M, K)
    sae.b_enc.data[3:] = -1e6  # so that fewer than K can be active
    x = torch.randn(64, D) + 5
    trainer = Trainer(sae, config(normalize="none", dead_after_tokens=100))
    with torch.no_grad():
        output = sae(x)
    trainer._rows_since_fired[:] = 0
    trainer._rows_since_fired[:7] = 100
    trainer._rows_since_fired[7:20] = 99
    trainer.steps, trainer.rows_seen = 1, 5000
    metrics = trainer._metrics(x, output, None, 1.0)
    residual = (x - output.reconstruction).square().sum()
    assert metrics["fvu"] == pytest.approx((residual / (x - x.mean(0)).square().sum()).item(), rel=1e-4)
    assert metrics["l0"] == pytest.approx((output.code.values > 0).sum().item() / 64)
    assert metrics["l0"] < K
    assert metrics["dead_share"] == pytest.approx(7 / M)


def test_a_full_disk_under_the_log_says_where(tmp_path, monkeypatch: pytest.MonkeyPatch):
    trainer = Trainer(joint(), config(run_dir=tmp_path))
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr(runs.Log, "_drop_lines_after", lambda *_: None)
    monkeypatch.setattr(trainer, "_open_run", lambda _: None)
    with pytest.raises(OSError, match=r"could not write .*metrics.jsonl at step 1: No space left"):
        trainer.fit(activations())


def test_what_json_cannot_hold_is_null(tmp_path):
    Trainer(fastsae.TopKSAE(D, M, K), config(steps=2, run_dir=tmp_path)).fit(activations(batch=1))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["fvu"] for line in lines] == [None, None]


def test_what_overflows_in_the_dtype_of_the_sae_is_caught():
    batches = [x.double() for x in activations(4)]
    batches[2][1, 1] = 1e39
    with pytest.raises(FloatingPointError, match=r"batch 3 .* at row 1, dimension 1"):
        Trainer(joint(), config(normalize="none")).fit(batches)


def test_no_gradient_goes_into_where_the_activations_come_from():
    layer = torch.nn.Linear(D, D)
    Trainer(joint(), config(normalize="none", steps=3)).fit(layer(x) for x in activations(5))
    assert layer.weight.grad is None


@pytest.mark.parametrize("kind", ["zscore", "scale"])
def test_of_two_rows_none_is_left_out_of_the_statistics(kind: str):
    sae = fastsae.TopKSAE(2, 3, 1)
    assert sae.normalizer.measure(torch.tensor([[0.0, 0.0], [100.0, -1.0]]), kind) == 0
    expected = [50 * 2**0.5, 0.5 * 2**0.5] if kind == "zscore" else [(10001 / 4) ** 0.5] * 2
    torch.testing.assert_close(sae.normalizer.scale, torch.tensor(expected))


def test_a_tenth_of_far_rows_does_not_decide_the_statistics():
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    x[::8, 3] += 1000
    sae = fastsae.TopKSAE(8, 16, 2)
    with pytest.warns(UserWarning, match=r"125 of 1000 rows \(12\.50%\)"):
        assert sae.normalizer.measure(x, "zscore") == 125
    assert 0.8 < float(sae.normalizer.scale[3]) < 1.2
