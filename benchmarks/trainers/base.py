"""Timing of a loop that is not ours: one iteration lies between two of the batches it draws."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Shape
from benchmarks.place import CPU
from benchmarks.providers.base import batch
from benchmarks.providers.roofs import BareGemm
from benchmarks.timing import wall


class Batches:
    """Draws for a trainer's loop. Timed is what happens between one batch being given and the next being asked for; the
    bare GEMM is timed, and the next batch made, in between."""

    def __init__(self, shape: Shape, roof: BareGemm) -> None:
        self.shape, self.roof = shape, roof
        self.seconds: list[float] = []
        self.gemm_seconds: list[float] = []
        self._given: float | None = None

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Tensor:
        if self._given is not None:
            self.seconds.append(time.perf_counter() - self._given)
        x = batch(self.shape, CPU, 1 + len(self.seconds))
        self.gemm_seconds.append(wall(self.roof.step, x))
        self._given = time.perf_counter()
        return x


class Loop(ABC):
    """One package's trainer with one SAE in it, made with the seed that all are made with."""

    version: str
    has_joint = True

    @abstractmethod
    def __init__(self, shape: Shape, who: str, steps: int) -> None:
        """Raises Missing where the package cannot be imported."""

    @abstractmethod
    def run(self, batches: Batches) -> None:
        """`steps` iterations of the package's own loop."""

    @abstractmethod
    def watched(self) -> tuple[Any, str, Callable[[Any], Tensor]]:
        """Name the forward to watch: an object, the name of its method, and a function from its result to the loss."""


@contextmanager
def timed_sae(loop: Loop) -> Iterator[tuple[list[float], list[float]]]:
    """Around a run: the losses, and the seconds of forward and backward, of each iteration."""
    owner, name, loss_of = loop.watched()
    forward, backward = getattr(owner, name), torch.Tensor.backward
    losses: list[float] = []
    seconds: list[float] = []

    def timed_forward(*arguments: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        output = forward(*arguments, **options)
        seconds.append(time.perf_counter() - begun)
        losses.append(loss_of(output).item())
        return output

    def timed_backward(*arguments: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        backward(*arguments, **options)
        seconds[-1] += time.perf_counter() - begun

    setattr(owner, name, timed_forward)
    torch.Tensor.backward = timed_backward  # type: ignore[method-assign]  # called by loops that are not ours
    try:
        yield losses, seconds
    finally:
        torch.Tensor.backward = backward  # type: ignore[method-assign]
        setattr(owner, name, forward)
