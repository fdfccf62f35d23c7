"""File systems that cannot do all: no locks, folders that cannot be flushed. And a disk that fails while it flushes."""

import errno
import fcntl
import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import victims
from victims import same, weights

import fastsae
from fastsae import files

LACKS = [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM]
BROKEN = [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE]
name = errno.errorcode.__getitem__


def refuse(monkeypatch: pytest.MonkeyPatch, module, function: str, number: int, when: Callable[[int], bool]) -> None:
    real = getattr(module, function)

    def refusing(file, *arguments):
        if when(file if isinstance(file, int) else file.fileno()):
            raise OSError(number, os.strerror(number))  # no name of a file: the call knows none
        return real(file, *arguments)

    monkeypatch.setattr(module, function, refusing)


def of_folders(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


def of_files(descriptor: int) -> bool:
    return not of_folders(descriptor)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    victims.harvest_all(folder / "store")
    victims.train(folder)
    return folder


@pytest.mark.parametrize("number", LACKS, ids=name)
def test_a_mount_without_locks_and_flushed_folders(number: int, whole, tmp_path, monkeypatch):
    """Everything works, to the same bits, and the folders that nobody holds are named, each once."""
    refuse(monkeypatch, fcntl, "flock", number, lambda _: True)
    refuse(monkeypatch, os, "fsync", number, of_folders)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        victims.harvest_all(tmp_path / "store")
        victims.train(tmp_path)
        for _ in range(2):
            victims.joint(1).save_pretrained(tmp_path / "sae")
    assert victims.contents(tmp_path / "store") == victims.contents(whole / "store")
    trained, expected = (weights(fastsae.load(folder / "run")) for folder in (tmp_path, whole))
    assert same(trained, expected)
    told = [str(w.message) for w in said if "locks" in str(w.message)]
    for folder in (tmp_path / "store", tmp_path / "run"):
        about = f"{folder} is on a file system without locks ({os.strerror(number)})"
        assert len([text for text in told if about in text]) == 1


@pytest.mark.parametrize("number", BROKEN, ids=name)
def test_a_lock_that_fails_otherwise_is_named_with_what_to_do(number: int, tmp_path, monkeypatch):
    refuse(monkeypatch, fcntl, "flock", number, lambda _: True)
    message = rf"Trainer: cannot lock {tmp_path}/\.lock: {os.strerror(number)}.* choose a folder on another file system"
    with pytest.raises(OSError, match=message) as caught, files.locked(tmp_path, "Trainer"):
        pass
    assert caught.value.errno == number


def test_a_folder_that_may_be_written_and_not_read(tmp_path, monkeypatch):
    """Such as a drop box: root may open it here, so the answer is made up."""

    def open_(path, *rest, real=os.open):
        if Path(path) == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *rest)

    monkeypatch.setattr(os, "open", open_)
    files.write_json(tmp_path / "a.json", {"b": 1})
    assert files.read_json(tmp_path / "a.json") == {"b": 1}


def test_a_lock_that_another_holds_is_no_missing_lock(tmp_path):
    with (
        files.locked(tmp_path, "first"),
        pytest.raises(RuntimeError, match=f"second: another process is writing into {tmp_path}"),
        files.locked(tmp_path, "second"),
    ):
        pass


@pytest.mark.parametrize(
    ("number", "when"),
    [(number, when) for number in BROKEN for when in (of_files, of_folders)] + [(n, of_files) for n in LACKS],
    ids=lambda v: name(v) if isinstance(v, int) else v.__name__,
)
def test_what_was_not_flushed_is_an_error_that_names_it(number: int, when, tmp_path, monkeypatch):
    """A file's flush above all: it is where a network drive says that what was written is lost."""
    refuse(monkeypatch, os, "fsync", number, when)
    for write in (
        lambda: victims.joint(1).save_pretrained(tmp_path / "sae"),
        lambda: files.write_json(tmp_path / "notes.json", {}),
        lambda: victims.trainer(tmp_path / "run").fit([]),
    ):
        with pytest.raises(OSError, match=str(tmp_path)) as caught:
            write()
        assert caught.value.errno == number
