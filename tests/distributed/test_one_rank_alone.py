"""Failures of one rank alone: they end all ranks with an error, at once, and leave none waiting."""

import json
import resource
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crew import Crew
from ranked import B, D, Recording, activations, config, new, trained, whole
from test_failure import TORCHRUN, environment
from torch import Tensor

import fastsae
from fastsae import checkpoint, distributed, runs


def said_by(crew: Crew, run: Callable[..., None], *arguments: Any) -> list[str]:
    """Collect the errors of all ranks, which come within seconds; the ranks still answer one another afterwards."""
    began = time.monotonic()
    said = crew(_saying, run, arguments)
    assert time.monotonic() - began < 30, "ranks waited for one another until they gave up"
    assert crew(together) == [len(said)] * len(said)
    return said


def _saying(run: Callable[..., None], arguments: tuple[Any, ...]) -> str:
    try:
        run(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def together() -> int:
    one = torch.ones(())
    torch.distributed.all_reduce(one)
    return int(one)


def rank() -> int:
    return torch.distributed.get_rank()


def on_rank_1(what: Callable[[], Iterator[Tensor]]) -> Iterator[Tensor]:
    return what() if rank() == 1 else activations()


# ---- activations ----------------------------------------------------------------------------------------------------


def test_the_first_batch_cannot_be_read(two):
    first, second = said_by(two, unreadable)
    assert first == "OSError: [Errno 5] rank 1: the disk is gone"
    assert second == "OSError: [Errno 5] the disk is gone"


def unreadable() -> None:
    def stream() -> Iterator[Tensor]:
        raise OSError(5, "the disk is gone")
        yield

    trained("topk", 2, {}, stream=on_rank_1(stream))


def test_a_position_cannot_be_stored(two, tmp_path):
    first, second = said_by(two, without_json, tmp_path)
    assert first.startswith("RuntimeError: rank 1: Trainer: state_dict() of the activations must hold what JSON can")
    assert second.startswith("TypeError: Trainer: state_dict() of the activations must hold what JSON can")


class _Stream:
    def state_dict(self) -> dict[str, Any]:
        return {"at": torch.zeros(1) if rank() == 1 else 0}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def __iter__(self) -> Iterator[Tensor]:
        return activations()


def without_json(run_dir: Path) -> None:
    trained("topk", 2, {"run_dir": run_dir}, stream=_Stream())  # type: ignore[arg-type]


def test_a_stream_that_ends_earlier_loses_no_batch(two, tmp_path):
    two(ending, tmp_path)
    (found,) = checkpoint.folders(tmp_path)
    state = json.loads((found / "state.json").read_text())
    assert (state["step"], state["data"]["drawn"]) == (3, 3)


def ending(run_dir: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained("topk", 2, {"run_dir": run_dir}, stream=on_rank_1(lambda: activations(3)))


@pytest.mark.parametrize("features", [1, 2])
def test_nan_on_one_rank(two, tmp_path, features):
    first, second = said_by(two, one_nan, tmp_path, features)
    where = "FloatingPointError: Trainer: batch 3 of the activations holds"
    others = "NaN or infinite values on another rank, and none on this one. Give all ranks the same activations"
    assert first == f"{where} {others}"
    assert second.startswith(f"{where} 1 values that are NaN or infinite, the first at row 23, dimension 3.")
    assert [p.name for p in checkpoint.folders(tmp_path)] == ["step_00000002"]


def one_nan(run_dir: Path, features: int) -> None:
    def stream() -> Iterator[Tensor]:
        for i, x in enumerate(activations()):
            if i == 2:
                x[-1, 3] = torch.nan
            yield x

    trained("topk", features, {"run_dir": run_dir, "normalize": "none"}, stream=on_rank_1(stream))


def test_a_row_that_is_bad_on_one_rank_is_left_out_on_all(two):
    results = two(one_nan_skipped)
    whole(results, 1)
    assert [result["lines"][-1]["rows_skipped"] for result in results] == [1, 1]


def one_nan_skipped() -> dict[str, Any]:
    def stream() -> Iterator[Tensor]:
        for i, x in enumerate(activations()):
            if i == 2:
                x[-1, 3] = torch.nan
            yield x

    options = {"normalize": "none", "nonfinite": "skip"}
    return trained("topk", 1, options, stream=on_rank_1(stream))


@pytest.mark.parametrize("features", [1, 2])
def test_what_is_too_large_for_the_sae_is_named_by_its_place(two, features):
    for said in said_by(two, too_large, features):
        assert "batch 1 of the activations holds 1 values that are NaN or infinite, the first at row 2" in said


def too_large(features: int) -> None:
    x = torch.zeros(B, D, dtype=torch.float64)
    x[2, 1] = 1e300  # finite, but not in fp32
    sae = distributed.shard(new("topk", dtype=torch.float32), distributed.start(features))
    fastsae.Trainer(sae, config(normalize="none")).fit([x])


@pytest.mark.parametrize("features", [1, 2, 4])
def test_each_rank_is_given_rows_of_its_own(four, features):
    for said in said_by(four, rows_of_its_own, features):
        assert said == (
            "ValueError: distributed: the ranks were given different activations; give every rank the same whole "
            "batches, of which it takes its rows"
        )


def rows_of_its_own(features: int) -> None:
    trained("topk", features, {"normalize": "none"}, stream=activations(seed=rank() // 3))


def test_statistics_are_those_of_the_first_rank(two):
    results = two(measured_on_other_rows)
    whole(results, 1)  # asserts that ranks hold the same bits
    assert results[0]["weights"]["normalizer.mean"].any()


def measured_on_other_rows() -> dict[str, Any]:
    return trained("topk", 1, {"steps": 1}, stream=(x + i * rank() for i, x in enumerate(activations())))


def test_the_loss_of_one_data_rank_diverges(two, tmp_path):
    for said in said_by(two, diverging, tmp_path, 100):
        assert said.startswith("FloatingPointError: Trainer: the loss is inf at step 2: training diverged. There is no")
    first, second = said_by(two, diverging, tmp_path, 1)
    assert first.startswith("RuntimeError: Trainer: batch 2 of the activations: another rank could not draw it")
    assert second == "OSError: the disk is gone"
    assert checkpoint.folders(tmp_path) == []


def diverging(run_dir: Path, batches: int) -> None:
    """Rank 1 makes nothing of its rows, and after so many batches it cannot draw any more."""
    trainer = Recording(
        distributed.shard(new("topk"), distributed.start(1)),
        config(run_dir=run_dir, resume=True, log_every=100, checkpoint_every=2, normalize="none"),
    )
    step = trainer._train_step

    def spoiled(x: Tensor) -> Any:
        made = step(x)
        return made._replace(output=made.output._replace(loss=made.output.loss * (float("inf") if rank() else 1.0)))

    def stream() -> Iterator[Tensor]:
        yield from activations(batches)
        raise OSError("the disk is gone")

    trainer._train_step = spoiled
    trainer.fit(on_rank_1(stream))


def test_too_few_rows_cost_nothing(two, tmp_path):
    for said in said_by(two, too_few, tmp_path):
        assert said == (
            "ValueError: distributed: a batch of 1 rows cannot be split over 2 data ranks; leave such batches out, or "
            "let more ranks be feature ranks"
        )
    (found,) = checkpoint.folders(tmp_path)
    assert found.name == "step_00000003"
    assert json.loads((found / "state.json").read_text())["data"]["drawn"] == 3


def too_few(run_dir: Path) -> None:
    def stream() -> Iterator[Tensor]:
        yield from activations(3)
        yield torch.ones(1, D, dtype=torch.float64)

    trained("topk", 1, {"run_dir": run_dir}, stream=stream())


# ---- files of the first rank ----------------------------------------------------------------------------------------


def test_a_folder_that_not_all_see(two, tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / ".lock").touch()  # of an earlier run
    first, second = said_by(two, folder_of_its_own, tmp_path)
    told = "must be one folder that all ranks see, on a file system that they share"
    assert first == f"ValueError: rank 1: Trainer: {tmp_path / '1'} {told}"
    assert second == f"ValueError: Trainer: {tmp_path / '1'} {told}"
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [".lock", ".lock"]


def folder_of_its_own(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastsae.distributed.ranks._SHOWN_WITHIN", 0.3)
        trained("topk", 2, {"run_dir": folder / str(rank())})


def test_the_log_cannot_be_written(two, tmp_path):
    first, second = said_by(two, without_room_for_the_log, tmp_path)
    assert "could not write" in first
    assert "metrics.jsonl at step 3" in first
    assert second.startswith("OSError: [Errno 27] rank 0: ")
    assert "metrics.jsonl at step 3" in second


def without_room_for_the_log(run_dir: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def stream() -> Iterator[Tensor]:
        for i, x in enumerate(activations()):
            if i == 2 and rank() == 0:
                resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
            yield x

    try:
        trained("topk", 2, {"run_dir": run_dir}, stream=stream())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_logger_is_not_installed(two, tmp_path):
    first, second = said_by(two, without_wandb, tmp_path)
    assert first == "ImportError: log_to='wandb' needs that package"
    assert second == "RuntimeError: rank 0: log_to='wandb' needs that package"


def without_wandb(run_dir: Path) -> None:
    def missing(*_: Any) -> Any:
        raise ImportError("log_to='wandb' needs that package")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(runs._SINKS, "wandb", missing)
        trained("topk", 2, {"run_dir": run_dir, "log_to": ("wandb",)})


def test_the_finished_sae_does_not_fit_the_disk(two, tmp_path):
    first, second = said_by(two, without_room_for_the_sae, tmp_path)
    file = tmp_path / ".weights.safetensors.new"
    assert first == f"OSError: [Errno 27] rank 1: File too large: '{file}'"
    assert second == f"OSError: [Errno 27] File too large: '{file}'"
    assert [p.name for p in tmp_path.iterdir()] == []


def without_room_for_the_sae(folder: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    sae = distributed.shard(new("topk"), distributed.start(2))
    if rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        sae.save_pretrained(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_that_one_rank_alone_may_not_make(two, tmp_path):
    (tmp_path / "taken").write_text("a file")
    for said in said_by(two, saved_into_a_file, tmp_path):
        assert said.startswith("FileExistsError: [Errno 17]")


def saved_into_a_file(folder: Path) -> None:
    sae = distributed.shard(new("topk"), distributed.start(2))
    sae.save_pretrained(folder / ("taken" if rank() else "free"))


def test_whatever_kind_of_error_it_is(two):
    assert said_by(two, unlucky) == ["KeyError: 'batch'", "RuntimeError: rank 0: 'batch'"]


def unlucky() -> None:
    distributed.start(2).first_does(lambda: {}["batch"])


# ---- who is lost, and who is not ------------------------------------------------------------------------------------


def test_errors_that_only_sound_as_if_a_rank_were_lost(two):
    for said in said_by(two, sounding):
        assert said == "RuntimeError: Trainer: another process is writing into runs/gloo-or-NCCL: Broken pipe"


def sounding() -> None:
    with distributed.start(2).watched(None):
        raise RuntimeError("Trainer: another process is writing into runs/gloo-or-NCCL: Broken pipe")


def test_a_rank_that_hangs_is_given_up_after_as_long_as_was_said(four):
    assert four(patience, 2, 7.0) == [[7.0, 7.0]] * 4


def patience(features: int, timeout: float) -> list[float]:
    ranks = distributed.start(features, timeout=timeout)
    groups = [g for g in (ranks.data_group, ranks.feature_group) if g.size() > 1]
    return [g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in groups]


BUSY = """
import sys, time
from fastsae import distributed

ranks = distributed.start(2, timeout=3)
ranks.first_does(lambda: time.sleep(8), for_hours=True)
print("done", flush=True)
"""


def test_a_rank_that_is_known_to_be_busy_is_waited_for(tmp_path):
    """As for a harvest, which takes longer than a rank that hangs is waited for."""
    (tmp_path / "busy.py").write_text(BUSY)
    command = [*TORCHRUN, str(tmp_path / "busy.py")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 2


# ---- half precision -------------------------------------------------------------------------------------------------


def test_the_norm_of_fp16_gradients_does_not_overflow(two):
    for norm in two(large_norm):
        assert norm == pytest.approx(600, rel=1e-3)


def large_norm() -> float:
    grad = torch.zeros(4, D, dtype=torch.float16)
    grad[0, 0] = 600 / 2**0.5
    return distributed.start(2).norm({"W_enc": grad}).item()


@pytest.mark.parametrize("at_once", [1 << 22, 5, 1])
def test_a_fingerprint_tells_entries_that_changed_places(at_once, monkeypatch):
    from fastsae.distributed.ranks import _fingerprint

    monkeypatch.setattr("fastsae.distributed.ranks._AT_ONCE", at_once)
    t = torch.randn(3, 5)
    swapped = t.clone()
    swapped[0, 1], swapped[2, 3] = t[2, 3], t[0, 1]
    assert int(_fingerprint(t)) == int(_fingerprint(t.clone()))
    assert int(_fingerprint(t)) != int(_fingerprint(swapped))
    assert int(_fingerprint(t)) != int(_fingerprint(t.double().float() + 1e-6))
