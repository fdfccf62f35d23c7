"""Whatever ends a run, and at whichever operation on the disk: it can be resumed, and to the same bits."""

import contextlib
import itertools
import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_train import D, K, M, activations, assert_same, config, joint, weights
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import fastsae
from fastsae import checkpoint, gradients, runs
from fastsae.train import Trainer


class Killed(BaseException):
    """The end of the process, as it were."""


class Disk:
    """Counts operations on files; the n-th is the last, half done, and after it no other happens: nothing is tidied."""

    def __init__(self, patch: pytest.MonkeyPatch, last: int | None = None) -> None:
        self.count, self.last = 0, last
        for where, name in (
            (os, "replace"),
            (os, "rename"),
            (os, "fsync"),
            (shutil, "rmtree"),
            (Path, "unlink"),
            (Path, "write_text"),
            (safetensors.torch, "save_file"),
        ):
            patch.setattr(where, name, self._counted(name, getattr(where, name)))

    def _counted(self, name: str, operation):
        def counted(*args, **kwargs):
            self.count += 1
            if self.last is not None and self.count >= self.last:
                if self.count == self.last:
                    self._half(name, args)
                raise Killed
            # Flushing is counted but not done: what it is for cannot be seen here, and it takes most of the time.
            return None if name == "fsync" else operation(*args, **kwargs)

        return counted

    def _half(self, name: str, args: tuple) -> None:
        if name == "rmtree" and Path(args[0]).is_dir():
            for first in sorted(Path(args[0]).iterdir())[:1]:
                os.remove(first)
        elif name == "write_text":
            with open(args[0], "w") as file:
                file.write(args[1][: len(args[1]) // 2])
        elif name == "save_file":
            with open(args[1], "wb") as file:
                file.write(b"\x08\x00\x00")


RUN = {"steps": 3, "checkpoint_every": 1}


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Tensor]:
    sae = joint()
    Trainer(sae, config(**RUN)).fit(activations())
    return weights(sae)


def train(run_dir: Path, last: int | None = None, resume: bool = False) -> dict[str, Tensor]:
    """A run of three steps on a disk that ends after `last` operations."""
    sae = joint()
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, last)
        Trainer(sae, config(**RUN, run_dir=run_dir, resume=resume)).fit(activations())
    return weights(sae)


def test_a_kill_at_every_operation_on_the_disk(uninterrupted, tmp_path):
    for last in itertools.count(1):
        run_dir = tmp_path / str(last)
        try:
            train(run_dir, last)
            break
        except Killed:
            assert_same(train(run_dir, resume=True), uninterrupted)
        assert_same(weights(fastsae.load(run_dir / "sae")), uninterrupted)
        steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3]
        assert [p.name for p in checkpoint.folders(run_dir)] == ["step_00000003", "step_00000002"]
        shutil.rmtree(run_dir)
    assert last > 80


def test_what_a_killed_checkpoint_left_is_tidied_by_the_next(tmp_path):
    Trainer(joint(), config(**RUN, run_dir=tmp_path)).fit(activations())
    left = tmp_path / "checkpoints" / ".step_00000003.tmp"
    left.mkdir()
    checkpoint.save(tmp_path, 6, joint(), {}, {})
    assert not left.exists()


def test_replacing_a_checkpoint_of_the_same_step_never_leaves_half_of_it(tmp_path):
    for last in itertools.count(1):
        run_dir = tmp_path / str(last)
        checkpoint.save(run_dir, 1, joint(), {}, {})
        checkpoint.save(run_dir, 2, joint(), {}, {})
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, last)
            with contextlib.suppress(Killed):
                checkpoint.save(run_dir, 2, joint(), {}, {})
        found = checkpoint.load(run_dir)
        assert found is not None
        assert found.state["step"] in (1, 2)
        if disk.count < last:
            break
    assert last > 10


def test_a_disk_that_refuses_more_bytes(uninterrupted, tmp_path):
    """The real thing, by a limit on the size of files: safetensors has an error of its own for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited() -> Iterator[Tensor]:
        for i, x in enumerate(activations()):
            if i == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
            yield x

    run = config(**RUN, run_dir=tmp_path)
    try:
        with pytest.raises(OSError, match=r"could not write checkpoint .*step_00000003: File too large; the last good"):
            Trainer(joint(), run).fit(limited())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step_00000001", "step_00000002"]
    sae = joint()
    Trainer(sae, config(**RUN, run_dir=tmp_path, resume=True)).fit(activations())
    assert_same(weights(sae), uninterrupted)


def test_every_damaged_byte_is_noticed(tmp_path):
    torch.manual_seed(0)
    Trainer(fastsae.TopKSAE(3, 5, 2), config(run_dir=tmp_path, steps=2)).fit(x[:, :3] for x in activations())
    folder = checkpoint.folders(tmp_path)[0]
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for place in range(0, len(content), max(1, len(content) // 60)):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(ValueError, match=rf"checkpoint {folder} cannot be used.*there is no earlier"):
                checkpoint.load(tmp_path)
        path.write_bytes(content)
    assert checkpoint.load(tmp_path) is not None


# ---- Ctrl-C ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def ctrl_c_is_not_ignored() -> Iterator[None]:
    """As it is in a shell's background jobs."""
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, found)


def interrupting(times: int) -> Iterator[Tensor]:
    for i, x in enumerate(activations()):
        for _ in range(times if i == 3 else 0):
            signal.raise_signal(signal.SIGINT)
        yield x


def test_ctrl_c_finishes_the_step_saves_and_can_be_resumed(tmp_path):
    sae, handler = joint(), signal.getsignal(signal.SIGINT)
    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt, match="stopped at step 4; saved, continue with resume"):
        Trainer(sae, config(steps=5, run_dir=tmp_path, normalize_rows=32)).fit(interrupting(1))
    assert checkpoint.folders(tmp_path)[0].name == "step_00000004"
    assert not sae.training, "dropout must not stay on"
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.equal(torch.get_rng_state(), state)
    assert gradients.active() is None
    again = joint()
    Trainer(again, config(steps=5, run_dir=tmp_path, resume=True, normalize_rows=32)).fit(activations())
    whole = joint()
    Trainer(whole, config(steps=5, normalize_rows=32)).fit(activations())
    assert_same(weights(again), weights(whole))


def test_a_second_ctrl_c_does_not_wait(tmp_path, ctrl_c_is_not_ignored):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught:
        Trainer(joint(), config(run_dir=tmp_path)).fit(interrupting(2))
    assert "saved" not in str(caught.value)
    assert checkpoint.folders(tmp_path) == []
    assert signal.getsignal(signal.SIGINT) is handler


# ---- resuming what is not quite the same ----------------------------------------------------------------------------


def killed_after(stream, n: int) -> Iterator[Tensor]:
    yield from itertools.islice(stream, n)
    raise Killed


class Shuffled:
    """Activations in the order of torch's own shuffling, which draws on the global generator."""

    data = TensorDataset(torch.cat(list(activations(12))))

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            for (batch,) in DataLoader(self.data, batch_size=32, shuffle=True):
                yield batch


@pytest.mark.parametrize("normalize", ["none", "zscore"])
def test_a_shuffling_loader_is_resumed_in_its_order(normalize: str, tmp_path):
    options = {"steps": 9, "checkpoint_every": 2, "normalize": normalize}
    whole, cut, resumed = joint(), joint(), joint()
    Trainer(whole, config(**options)).fit(Shuffled())
    with pytest.raises(Killed):
        Trainer(cut, config(**options, run_dir=tmp_path)).fit(killed_after(Shuffled(), 5))
    Trainer(resumed, config(**options, run_dir=tmp_path, resume=True)).fit(Shuffled())
    assert_same(weights(resumed), weights(whole))


class Numbered:
    """A stream that can be set back: batches of `size` rows of `data`, one after the other."""

    def __init__(self, data: Tensor, size: int) -> None:
        self.data, self.size, self.i = data, size, 0

    def __iter__(self) -> Iterator[Tensor]:
        while self.i < len(self.data):
            self.i += self.size
            yield self.data[self.i - self.size : self.i]

    def state_dict(self) -> dict[str, int]:
        return {"i": self.i}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.i = state["i"]


ROWS = torch.cat(list(activations(40)))
SPARSE = [
    x.relu() * (torch.rand(x.shape, generator=torch.Generator().manual_seed(i)) < 0.1)
    for i, x in enumerate([ROWS, ROWS.flip(0)])
]


@pytest.mark.parametrize("kind", ["iterable", "stream"])
@pytest.mark.parametrize(
    ("rows", "size", "again", "other_size", "message"),
    [
        (ROWS, 32, ROWS, 16, r"(10 batches were 320 rows, drawn again they are 160|was \(32, 12\).* is \(16, 12\))"),
        (ROWS, 32, torch.randn(1280, D), 32, "holds other numbers"),
        (ROWS, 32, ROWS.flip(0), 32, "holds other numbers"),
        (ROWS, 32, 2 * ROWS, 32, "holds other numbers"),
        (ROWS / 100 + 100, 32, ROWS.flip(0) / 100 + 100, 32, "holds other numbers"),
        (SPARSE[0], 32, SPARSE[1], 32, "holds other numbers"),
        (ROWS, 1, ROWS.roll(3, 0), 1, "holds other numbers"),
        (ROWS, 32, ROWS[:300], 32, r"(320 rows, drawn again they are 300|was \(32, 12\).* is \(12, 12\))"),
    ],
    ids=["batch size", "data", "order", "scale", "far from zero", "sparse", "single rows", "last batch"],
)
def test_other_activations_are_not_resumed_on(kind, rows, size, again, other_size, message, tmp_path):
    def data(rows: Tensor, size: int):
        return rows.split(size) if kind == "iterable" else Numbered(rows, size)

    Trainer(joint(), config(run_dir=tmp_path)).fit(data(rows, size))
    with pytest.raises(ValueError, match=f"cannot resume with other activations: .*{message}.* start a new run on"):
        Trainer(joint(), config(run_dir=tmp_path, resume=True, steps=12)).fit(data(again, other_size))
    Trainer(joint(), config(run_dir=tmp_path, resume=True, steps=12)).fit(data(rows, size))


def test_activations_that_are_rounded_otherwise_are_gone_on_with(tmp_path):
    """As a model gives them on other hardware."""
    Trainer(joint(), config(run_dir=tmp_path)).fit(ROWS.split(32))
    with pytest.warns(UserWarning, match="batch 10 drawn again differs by rounding"):
        Trainer(joint(), config(run_dir=tmp_path, resume=True, steps=12)).fit(ROWS.bfloat16().float().split(32))


@pytest.mark.parametrize("kind", ["iterable", "stream"])
def test_checkpoints_that_know_no_last_batch_are_resumed(kind, tmp_path, monkeypatch):
    def data():
        return ROWS.split(32) if kind == "iterable" else Numbered(ROWS, 32)

    with monkeypatch.context() as patch:
        new = runs._Place.to_json
        old = ("drawn", "stream", "random")
        patch.setattr(runs._Place, "to_json", lambda self: {name: new(self)[name] for name in old})
        Trainer(joint(), config(run_dir=tmp_path, steps=6)).fit(data())
    whole, again = joint(), joint()
    Trainer(whole, config()).fit(data())
    Trainer(again, config(run_dir=tmp_path, resume=True)).fit(data())
    assert_same(weights(again), weights(whole))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: fastsae.TopKSAE(D, M, K + 1), "k was 4, is 5$"),
        (lambda: fastsae.TopKSAE(D, M, K, dtype=torch.bfloat16), "dtype was 'float32', is 'bfloat16'$"),
        (lambda: fastsae.TopKSAE(D, M + 1, K), "d_sae was 60, is 61$"),
        (lambda: fastsae.JointSAE(D, M, K, pre_bias=True, linear=False, interaction=False), "architecture was 'topk'"),
    ],
    ids=["k", "dtype", "d_sae", "architecture"],
)
def test_another_sae_is_not_resumed_into(other, message, tmp_path):
    Trainer(fastsae.TopKSAE(D, M, K), config(run_dir=tmp_path)).fit(activations())
    sae = other()
    before = weights(sae)
    with pytest.raises(ValueError, match=message):
        Trainer(sae, config(run_dir=tmp_path, resume=True)).fit(activations())
    assert_same(weights(sae), before)


def test_a_run_stopped_before_its_first_step_can_be_resumed(tmp_path):
    def spoiled() -> Iterator[Tensor]:
        for i, x in enumerate(activations()):
            yield x * torch.nan if i == 0 else x

    with pytest.raises(FloatingPointError, match="batch 1 of the activations"):
        Trainer(joint(), config(run_dir=tmp_path, normalize="none")).fit(spoiled())
    resumed, fresh = joint(), joint()
    run = config(run_dir=tmp_path, normalize="none", resume=True, nonfinite="skip")
    assert Trainer(resumed, run).fit(spoiled()).metrics["batches_skipped"] == 1
    Trainer(fresh, config(normalize="none", nonfinite="skip")).fit(spoiled())
    assert_same(weights(resumed), weights(fresh))


def test_activations_that_ended_can_be_gone_on_with(uninterrupted, tmp_path):
    with pytest.warns(UserWarning, match="activations ended after 2 of 3 steps"):
        Trainer(joint(), config(steps=3, run_dir=tmp_path)).fit(activations(2))
    sae = joint()
    Trainer(sae, config(steps=3, run_dir=tmp_path, resume=True)).fit(activations())
    assert_same(weights(sae), uninterrupted)


def test_the_log_forgets_what_was_not_saved(tmp_path):
    Trainer(joint(), config(run_dir=tmp_path, checkpoint_every=4)).fit(activations())
    shutil.rmtree(checkpoint.folders(tmp_path)[0])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    Trainer(joint(), config(run_dir=tmp_path, resume=True)).fit(activations())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))


def test_resumed_moments_are_not_the_file(tmp_path):
    """The checkpoint may be replaced while the run that was resumed from it goes on."""
    Trainer(joint(), config(steps=3, run_dir=tmp_path)).fit(activations())
    trainer = Trainer(joint(), config(steps=3, run_dir=tmp_path, resume=True))
    trainer.fit(activations())
    moments = [t for state in trainer._optimizer.state.values() for t in state.values()]
    before = [t.clone() for t in moments]
    file = checkpoint.folders(tmp_path)[0] / "optimizer.safetensors"
    with file.open("r+b") as content:
        content.write(b"\xff" * file.stat().st_size)
    assert len(moments) > 20
    assert all(torch.equal(t, then) for t, then in zip(moments, before, strict=True))
