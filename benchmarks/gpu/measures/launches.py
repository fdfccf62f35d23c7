"""The launches of csrc_triton/cases.py one by one, on tensors that hold numbers, beside what the roofs would take."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.timing import measure_start
from benchmarks.outcomes import Missing
from benchmarks.place import Place
from csrc_triton.adam import AdamStep
from csrc_triton.cases import Part, Shape, Step
from csrc_triton.launch import Launch, handing_to


class _RealStep(Step):
    """Normal numbers, random features, second moments that are not negative."""

    def __init__(self, place: Place, shape: Shape, dtype: torch.dtype) -> None:
        self._generator, self._device = place.generator(0), place.device
        super().__init__(shape, dtype)

    def tensor(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        if dtype == torch.int64:
            return torch.randint(self.shape.M, size, generator=self._generator, device=self._device)
        empty = torch.empty(size, dtype=dtype, device=self._device)
        return empty.normal_(std=0.05, generator=self._generator)

    def adam(self, weight: Tensor, unit_norm: bool = False) -> AdamStep:
        step = super().adam(weight, unit_norm)
        step.exp_avg_sq.abs_()
        step.corrections.copy_(torch.tensor([1e-3 / (1 - 0.9**100), (1 - 0.999**100) ** -0.5]))  # the hundredth step
        return step


def rehearsed() -> list[Part]:
    """List the parts that a smoke run measures: those of `modern`, tiny."""
    shape = Shape(B=4, D=16, M=64, K=4, N=2, E=8)
    return [Part("smoke", shape, torch.bfloat16, case) for case in shape.cases]


def of(part: Part, place: Place, about: Callable[[Launch], dict[str, Any]]) -> list[dict[str, Any]]:
    """Run the launches of `part`, each followed by what `about` finds out of it; `about` may start it again.

    Each is let go before the next: a step of Adam at a million features leaves no memory for another one.
    """
    if not place.on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise Missing("kernels need an NVIDIA GPU, or TRITON_INTERPRET=1")
    found = []

    def receive(launch: Launch) -> None:
        launch.start()
        found.append(about(launch))

    with handing_to(receive):
        part.run(partial(_RealStep, place))
    return found


@dataclass(frozen=True)
class Roofs:
    """Best rates of this device."""

    bytes_per_second: float
    flops: dict[int, float]
    """Operations per second by the bytes of a number."""

    def ms(self, launch: Launch, itemsize: int) -> float:
        """Compute the launch's time at these rates in ms, memory and arithmetic overlapping."""
        return 1e3 * max(launch.bytes_moved / self.bytes_per_second, launch.flops / self.flops[itemsize])


def timed(part: Part, place: Place, roofs: Roofs) -> list[dict[str, Any]]:
    """Time each launch; give its identity, its counted bytes and FLOP, its time, and the share of its roof it reaches.

    The share is over 1 if rows that are gathered more than once come from the cache: they are counted each time.
    """

    def about(launch: Launch) -> dict[str, Any]:
        facts = identity(launch) | {"bytes": launch.bytes_moved, "flops": launch.flops}
        if not all(launch.grid):  # nothing to start
            return facts
        ms, roof = measure_start(launch.start, place), roofs.ms(launch, part.dtype.itemsize)
        return facts | {"ms": ms, "roof_ms": round(roof, 7), "share": round(roof / ms["median"], 3)}

    return of(part, place, about)


def identity(launch: Launch) -> dict[str, Any]:
    """Name the facts that tell a part's launches apart, for the reader of the rows."""
    return {
        "kernel": launch.name,
        "config": launch.config,
        "warps": launch.num_warps,
        "stages": launch.num_stages,
    }
