"""What this device does at best: bytes copied and products made per second."""

from typing import Any

import torch

from benchmarks.cases import Shape
from benchmarks.gpu.place import Place
from benchmarks.gpu.timing import measure


def copy(megabytes: int, place: Place) -> dict[str, Any]:
    """The bandwidth of a large copy, read and write counted."""
    source = torch.zeros(megabytes * 2**20, dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    times = measure({"copy": lambda: target.copy_(source)}, place)
    return {"ms": times, "bytes_per_second": 2 * source.numel() / (times["copy"]["median"] / 1e3)}


def gemm(shape: Shape, dtype: torch.dtype, place: Place) -> dict[str, Any]:
    """The encoder's matrix product by cuBLAS, into memory that is kept."""
    x = torch.randn(shape.B, shape.D, dtype=dtype, device=place.device, generator=place.generator(0))
    W = torch.randn(shape.M, shape.D, dtype=dtype, device=place.device, generator=place.generator(1))
    y = torch.empty(shape.B, shape.M, dtype=dtype, device=place.device)
    times = measure({"gemm": lambda: torch.mm(x, W.T, out=y)}, place)
    return {"ms": times, "flops": 2 * shape.B * shape.M * shape.D / (times["gemm"]["median"] / 1e3)}
