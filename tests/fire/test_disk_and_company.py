"""A full disk, a folder that may not be written, another process in it, a clock that goes back, rows that are none."""

import io
import itertools
import os
import random
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import victims
from torch import Tensor
from victims import BLOCK, contents, same, weights

import fastsae
from fastsae import checkpoint
from fastsae.activations import ActivationStore, ActivationStream


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing disturbed, and its store."""
    folder = tmp_path_factory.mktemp("whole")
    victims.harvest_all(folder / "store")
    victims.train(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    (tmp_path / "store").symlink_to(whole / "store")
    return tmp_path


def trained(folder: Path) -> dict[str, Tensor]:
    return weights(fastsae.load(folder / "run" / "sae"))


# ---- a disk that is full, or may not be written ---------------------------------------------------------------------


def refused_from(byte: int, work: victims.Work, folder: Path) -> str | None:
    """Do the work while no file may grow beyond that byte, and give the error; None if there was none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (byte, hard))
    try:
        work(folder)
    except OSError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return None


def test_a_disk_that_is_full_at_any_byte(whole, tmp_path, monkeypatch, times):
    """The kernel refuses to write on, in whichever file that happens; what is there stays, and goes on."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # progress goes into a file here
    draw, refused = random.Random(5), 0
    for round in range(12 * times):
        folder = tmp_path / str(round)
        sae, store = folder / "sae", folder / "store"
        victims.joint(1).save_pretrained(sae)
        for work, into, size in (
            (victims.harvest_all, store, 2_600),
            (victims.train, folder, 30_000),
            (victims.save_again_and_again, sae, 12_000),
        ):
            told = refused_from(draw.randrange(size), work, into)
            if told is not None:
                refused += 1
                assert "File too large" in told
                assert str(into) in told
            if into == sae:
                assert any(same(weights(fastsae.load(sae)), weights(victims.joint(seed))) for seed in (1, 2))
            work(into)
        assert contents(store) == contents(whole / "store")
        assert same(trained(folder), trained(whole))
        assert not [p for p in folder.rglob(".*") if p.name != ".lock"], "something was left"
    assert refused > 20 * times


def test_a_folder_that_may_not_be_written(whole, tmp_path):
    victims.harvest_all(tmp_path / "store")
    victims.joint().save_pretrained(tmp_path / "sae")
    (tmp_path / "run").mkdir()
    for path in (tmp_path / "run", tmp_path):
        path.chmod(0o555)
    try:
        victims.finish(victims.may_not_write, tmp_path)
    finally:
        tmp_path.chmod(0o755)


def test_others_may_read_what_was_written(tmp_path):
    previous = os.umask(0o022)
    try:
        victims.joint().save_pretrained(tmp_path)
    finally:
        os.umask(previous)
    assert {oct(p.stat().st_mode)[-3:] for p in tmp_path.iterdir()} == {"644"}


# ---- two processes --------------------------------------------------------------------------------------------------


def test_several_processes_in_one_folder(whole, folder, times):
    """They begin at the same moment, and again when one was killed: one works, the others are told."""
    for work in (victims.train_or_be_refused, victims.harvest_or_be_refused):
        into = folder if work is victims.train_or_be_refused else folder / "own"
        for round in range(3 * times):
            processes = [victims.start(work, into) for _ in range(3)]
            if round % 3 == 0:
                time.sleep(0.05)
                processes[0].kill()
            for process in processes:
                process.join()
            assert all(process.exitcode == 0 for process in processes[1:])
        work(into)
    assert same(trained(folder), trained(whole))
    assert contents(folder / "own") == contents(whole / "store")


# ---- the clock ------------------------------------------------------------------------------------------------------


def test_a_clock_that_goes_back(whole, folder, monkeypatch):
    """And files from the future: what is newest is said by its name."""
    ticks = itertools.count(2_000_000_000, -3600)
    for clock in ("time", "monotonic"):
        monkeypatch.setattr(time, clock, lambda: float(next(ticks)))
    monkeypatch.setattr(time, "perf_counter", lambda: 1.0)  # too coarse to see a step
    stream = ActivationStream(ActivationStore(folder / "store"), 32, 2 * BLOCK)
    with pytest.warns(UserWarning, match="activations ended after 5 of 10 steps"):
        victims.trainer(folder / "run").fit(Ends(stream, 5 + LOOKED_AT))
    for i, path in enumerate(checkpoint.folders(folder / "run")):  # newest first
        os.utime(path, (4e9 + i, 4e9 + i))
    assert checkpoint.load(folder / "run").state["step"] == 5
    victims.train(folder)
    assert same(trained(folder), trained(whole))
    assert [*victims.steps(folder / "run")] == list(range(1, 11))


# Batches that are looked at for the statistics, and come again.
LOOKED_AT = 2


class Ends:
    """A stream of which only so many batches come; the last of them may be spoiled."""

    def __init__(self, stream: ActivationStream, batches: int, spoil=None) -> None:
        self.stream, self.left, self.spoil = stream, batches, spoil
        self.state_dict, self.load_state_dict = stream.state_dict, stream.load_state_dict

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        if self.left == 0:
            raise StopIteration
        self.left -= 1
        batch = next(self.stream)
        return self.spoil(batch) if self.spoil is not None and self.left == 0 else batch


# ---- rows that are none ---------------------------------------------------------------------------------------------


def test_rows_that_are_not_finite(whole, tmp_path, times):
    """Training up to them is kept; with good rows in their place the run ends at the bits it would have."""
    draw = random.Random(6)
    for round in range(8 * times):
        folder = tmp_path / str(round)
        folder.mkdir()
        (folder / "store").symlink_to(whole / "store")
        at, row, column = draw.randint(1, 8), draw.randrange(32), draw.randrange(victims.D)
        value = draw.choice((float("nan"), float("inf"), float("-inf")))

        def spoil(batch: Tensor, row: int = row, column: int = column, value: float = value) -> Tensor:
            return batch.index_put((torch.tensor([row]), torch.tensor([column])), torch.tensor([value]))

        stream = ActivationStream(ActivationStore(folder / "store"), 32, 2 * BLOCK)
        where = rf"holds 1 values that are NaN or infinite, the first at row {row}, dimension {column}"
        with pytest.raises(FloatingPointError, match=where):
            victims.trainer(folder / "run").fit(Ends(stream, at + LOOKED_AT, spoil))
        victims.train(folder)
        assert same(trained(folder), trained(whole))


# ---- files left open ------------------------------------------------------------------------------------------------


def test_no_file_stays_open(whole, tmp_path):
    def opened() -> list[str]:
        return sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if is_open(fd))

    def is_open(fd: str) -> bool:
        return os.path.lexists(f"/proc/self/fd/{fd}")

    before = None
    for round in range(4):
        folder = tmp_path / str(round)
        folder.mkdir()
        (folder / "store").symlink_to(whole / "store")
        victims.train(folder)
        with pytest.raises(FileExistsError):
            victims.trainer(folder / "run", resume=False).fit([])
        with pytest.raises(ValueError, match="another configuration"):
            victims.trainer(folder / "run", lr=0.5).fit([])
        with pytest.warns(UserWarning, match="activations ended"):
            victims.trainer(folder / "cut").fit(Ends(ActivationStream(ActivationStore(whole / "store"), 32), 3))
        before = before or opened()
    assert opened() == before
