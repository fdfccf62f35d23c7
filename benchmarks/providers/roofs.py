"""Roofs that no provider can beat by cleverness: the encoder's matrix product, and a copy of memory."""

import torch
from torch import Tensor

from benchmarks.cases import Shape
from benchmarks.place import Place
from benchmarks.providers.base import weights


class BareGemm:
    """x @ W_enc.T + b_enc alone, into memory that is kept: the roof of every ratio."""

    name = "bare GEMM"

    def __init__(self, shape: Shape, place: Place) -> None:
        w = weights(shape, place, joint=False)
        dtype = place.products or torch.float32
        self.W, self.b = w["W_enc"].to(dtype), w["b_enc"].to(dtype)
        self.out = torch.zeros(shape.B, shape.M, dtype=dtype, device=place.device)  # paged in before it is timed

    def step(self, x: Tensor) -> None:
        torch.addmm(self.b, x.to(self.W.dtype), self.W.T, out=self.out)


class Copy:
    """A copy of 256 MiB (2 GiB on a GPU); `bytes` are those read and written."""

    name = "copy"

    def __init__(self, place: Place) -> None:
        self.source = torch.empty((2048 if place.on_gpu else 256) * 2**20, dtype=torch.uint8, device=place.device)
        self.source.random_()  # memory may be faster where it holds zeros
        self.target = torch.zeros_like(self.source)
        self.bytes = 2 * self.source.numel()

    def step(self) -> None:
        self.target.copy_(self.source)
