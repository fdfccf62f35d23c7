"""Best rates of this device: bytes copied and products made per second."""

from dataclasses import replace
from typing import Any

import torch

from benchmarks.cases import Shape
from benchmarks.gpu.timing import measure
from benchmarks.place import Place
from benchmarks.providers.base import batch
from benchmarks.providers.roofs import BareGemm, Copy


def copy(place: Place) -> dict[str, Any]:
    """The bandwidth of a large copy, read and write counted."""
    roof = Copy(place)
    times = measure({"copy": roof.step}, place)
    return {"ms": times, "bytes_per_second": roof.bytes / (times["copy"]["median"] / 1e3)}


def gemm(shape: Shape, dtype: torch.dtype, place: Place) -> dict[str, Any]:
    """The encoder's matrix product by cuBLAS, into memory that is kept."""
    roof = BareGemm(shape, replace(place, products=dtype))
    x = batch(shape, place, 0).to(dtype)
    times = measure({"gemm": lambda: roof.step(x)}, place)
    return {"ms": times, "flops": 2 * shape.B * shape.M * shape.D / (times["gemm"]["median"] / 1e3)}
