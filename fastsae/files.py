"""Files that are either whole or absent: atomic writes, reads that name the damaged file, folders with one writer."""

import errno
import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsae import packages

LOCK = ".lock"
# How file systems, those over a network above all, say that they cannot do something at all.
_NOT_SUPPORTED = {
    *(errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY),
    *(errno.EBADF, errno.ENOLCK, errno.EPERM),
}


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then put it in place: after a crash `path` is the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with named(path):
            write(temporary)
            sync(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Let errors name the file: a full disk does not say where it was met."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk. Some file systems flush files only, and some folders may
    be written and not read."""
    try:
        with named(path):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED | {errno.EACCES} or not path.is_dir():
            raise


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=2) + "\n"))


def read_json(path: Path) -> Any:
    """Raises FileNotFoundError, or ValueError naming the file when it is not JSON."""
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: not valid JSON ({error}). Restore it or use another copy.") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object, values by name. Raises as read_json does, and ValueError for JSON of another kind."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: expected values by name; got {type(value).__name__}")
    return value


@contextmanager
def expected_in(path: Path, advice: str) -> Iterator[None]:
    """Name the file whose contents are not of the form that is made use of here."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error} is missing or wrong; {advice}") from error


def read_numbers(line: str, counts: Iterable[str], measures: Iterable[str]) -> dict[str, Any]:
    """One line of a log: numbers by name, null where a measure was not finite. Raises ValueError saying what is wrong.

    counts, measures: what has to be there.
    """
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON ({error})") from error
    if not isinstance(found, dict) or not found.keys() >= {*counts, *measures}:
        raise ValueError(f"does not hold {', '.join((*counts, *measures))} by name")
    for name, value in found.items():
        number = type(value) is float or (type(value) is int and abs(value) < 2**63)
        if not number and (value is not None or name in counts):
            raise ValueError(f"holds no number for {name}")
    return found


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file. Raises OSError, on a full disk too."""
    packages.need("safetensors", f"writing {path}")
    from safetensors import SafetensorError  # here: training without saving needs torch and numpy only
    from safetensors.torch import save_file

    contiguous = {name: t.detach().contiguous() for name, t in tensors.items()}
    scratch = path.with_name(f".{path.name}.parts")

    def write(temporary: Path) -> None:
        # safetensors writes into a file of its own first, under a random name that nobody would find after a kill, and
        # that its owner alone may read.
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        temporary.touch()
        save_file(contiguous, scratch / path.name)
        with suppress(PermissionError):  # some mounts have no modes
            shutil.copymode(temporary, scratch / path.name)
        os.replace(scratch / path.name, temporary)

    try:
        write_atomically(path, write)
    except SafetensorError as error:  # safetensors tells the system's error number in its text only
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises FileNotFoundError, or ValueError naming the file when it is damaged.

    The tensors lie in the file's mapping: who keeps them copies them, since the file may be written anew under them.
    """
    packages.need("safetensors", f"reading {path}")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated ({error}). Restore it or use another copy.") from error


def crc32(path: Path) -> int:
    """The checksum of a file's bytes."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            value = zlib.crc32(block, value)
    return value


@contextmanager
def locked(folder: Path, who: str) -> Iterator[None]:
    """Make a folder if need be, and hold it for this process. The lock ends with the process, however it ends.

    Where the file system has no locks, warns that nothing holds it. Raises OSError when the folder cannot be written or
    locked, RuntimeError when another process holds it; `who` begins all of them.
    """
    import fcntl  # not on Windows, where everything but training into a folder works

    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a")  # whoever holds it keeps what it wrote there
    except OSError as error:
        raise OSError(error.errno, f"{who}: cannot write into {folder}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(
                f"{who}: another process is writing into {folder}; wait for it, or choose another folder"
            ) from error
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise OSError(
                    error.errno,
                    f"{who}: cannot lock {folder / LOCK}: {error.strerror}. If no other process writes into {folder}, "
                    "try again, or choose a folder on another file system",
                ) from error
            warnings.warn(
                f"{who}: {folder} is on a file system without locks ({error.strerror}), so nothing keeps a second "
                "process out of it: see to it that this is the only one",
                stacklevel=3,
            )
        yield
