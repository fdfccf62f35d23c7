"""Start of every kernel: on the device, or handed as a `Launch` to a caller that asked for it."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl


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

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.fn.__name__

    @property
    def config(self) -> str:
        """The constants the author chose, not those Triton makes of an argument that happens to be 1."""
        parameters = inspect.signature(self.kernel.fn).parameters.values()
        return " ".join(f"{p.name}={self.arguments[p.name]}" for p in parameters if p.annotation is tl.constexpr)

    def start(self) -> None:
        """Start the kernel on the device of its tensors. An empty grid starts nothing."""
        if not all(self.grid):
            return
        device = next(value.device for value in self.arguments.values() if isinstance(value, torch.Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](**self.arguments, num_warps=self.num_warps, num_stages=self.num_stages)


_receive: Callable[[Launch], object] = Launch.start


@contextmanager
def handing_to(receive: Callable[[Launch], object]) -> Iterator[None]:
    """Inside, each launch is handed to `receive` instead of being started."""
    global _receive
    before, _receive = _receive, receive
    try:
        yield
    finally:
        _receive = before


@contextmanager
def noting() -> Iterator[list[Launch]]:
    """Inside, kernels are not started but noted in the list: launchers then take tensors on the meta device."""
    launches: list[Launch] = []
    with handing_to(launches.append):
        yield launches


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
    """Start `kernel` on `grid`, unless launches are handed to somebody else."""
    _receive(Launch(kernel, grid, arguments, num_warps, num_stages, bytes_moved, flops))
