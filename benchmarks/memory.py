"""The peak of a step's memory, in this process: by the kernel's high-water mark, or by torch's on a GPU."""

import contextlib
import ctypes
import gc
import os
import re
from pathlib import Path

import torch

from benchmarks.place import Place
from fastsae.backends.cpu import memory

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Gauge:
    """Made before a provider is; `reset()` before its step, `peak()` after.

    peak() counts bytes beyond what was held when the gauge was made: the provider's parameters too. None where the
    system does not tell (macOS).
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        gc.collect()
        memory.release()  # else the first provider of fastsae would pay for all
        _trim()
        self._before = self._held()

    def reset(self) -> None:
        gc.collect()
        _trim()
        if self._place.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        elif self._before is not None:
            _CLEAR.write_text("5")  # VmHWM falls to VmRSS

    def peak(self) -> int | None:
        if self._place.on_gpu:
            return torch.cuda.max_memory_allocated() - (self._before or 0)
        return None if self._before is None else _status("VmHWM") - self._before

    def _held(self) -> int | None:
        if self._place.on_gpu:
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated()
        try:
            _CLEAR.write_text("5")
            return _status("VmRSS")
        except OSError:
            return None


def _status(key: str) -> int:
    return _told(_STATUS, key)


def _told(file: Path, key: str) -> int:
    """Bytes. Raises OSError where the system does not tell."""
    found = re.search(rf"{key}:\s+(\d+) kB", file.read_text())
    if found is None:
        raise OSError(f"{file} has no {key}")
    return int(found[1]) * 1024


def _trim() -> None:
    """Give freed memory back to the system, so that it is not taken for held."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def available_bytes() -> int:
    """Read the bytes of memory left before the system would have to swap or kill."""
    with contextlib.suppress(OSError):
        return _told(Path("/proc/meminfo"), "MemAvailable")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
