"""How every kernel is started: on the device, or noted down for the offline compile."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """One start of a kernel, with what it costs."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """All parameters of the kernel by name, constants of its compilation included."""
    num_warps: int
    num_stages: int
    bytes_moved: int
    """Counted: what is read and written in device memory, each gathered row every time."""
    flops: int
    """Counted multiply-adds, two each; 0 where memory alone matters."""


_noted: list[Launch] | None = None


@contextmanager
def noting() -> Iterator[list[Launch]]:
    """Inside, kernels are not started but noted in the list: launchers then take tensors on the meta device."""
    global _noted
    before, _noted = _noted, []
    try:
        yield _noted
    finally:
        _noted = before


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    *,
    num_warps: int,
    num_stages: int = 1,
    bytes_moved: int,
    flops: int = 0,
) -> None:
    """Start `kernel` on `grid`, on the device of its tensors. An empty grid starts nothing."""
    if _noted is not None:
        _noted.append(Launch(kernel, grid, arguments, num_warps, num_stages, bytes_moved, flops))
    elif all(grid):
        device = next(value.device for value in arguments.values() if isinstance(value, torch.Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)
