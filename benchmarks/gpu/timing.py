"""Time of some work on the device, and the memory it needs beside what stays."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.place import Place
from benchmarks.providers.base import Provider
from benchmarks.timing import wall

ROUNDS = 3


def measure(
    functions: Mapping[str, Callable[[], object]], place: Place, seconds: float = 1.5
) -> dict[str, dict[str, Any]]:
    """Milliseconds of each function (median, p20, p80), all in turn so that the clock's drift hits them alike.

    seconds: about how long each is measured. Warmed up first: kernels are compiled and memory is reserved then.
    """
    once = {}
    for name, function in functions.items():
        for _ in range(2 if place.on_gpu else 1):
            function()
        once[name] = max(_times(function, 1, place)[0], 1e-3)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            calls = int(min(max(1e3 * seconds / ROUNDS / once[name], 3), 50)) if place.on_gpu else 1
            samples[name] += _times(function, calls, place)
    return {name: _spread(found) for name, found in samples.items()}


def measure_start(start: Callable[[], object], place: Place, seconds: float = 0.3) -> dict[str, Any]:
    """Milliseconds of one `start` of a kernel, from replays of a CUDA graph of many: the host's part is left out.

    What is small stays in the cache from one start to the next.
    """
    if not place.on_gpu:
        return measure({"start": start}, place)["start"]
    for _ in range(2):
        start()
    once = max(_times(start, 1, place)[0], 1e-3)
    copies = int(min(max(1 / once, 1), 50))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(copies):
            start()
    calls = int(min(max(1e3 * seconds / (copies * once), 5), 100))
    return _spread([ms / copies for ms in _times(graph.replay, calls, place)])


def _times(function: Callable[[], object], calls: int, place: Place) -> list[float]:
    if not place.on_gpu:
        return [1e3 * wall(function) for _ in range(calls)]
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
    torch.cuda.synchronize()
    for start, end in marks:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in marks]


def _spread(found: list[float]) -> dict[str, Any]:
    p20, *_, p80 = statistics.quantiles(found, n=5)
    spread = {"median": statistics.median(found), "p20": p20, "p80": p80}
    return {name: round(ms, 5) for name, ms in spread.items()} | {"calls": len(found)}


def activation_bytes(provider: Provider, x: Tensor, gradients: int, place: Place) -> int | None:
    """Measure a step's peak memory in bytes, less what stays allocated and `gradients` bytes; None off the GPU.

    Call it after some steps, so that optimizer state and workspaces that stay are there before.
    """
    if not place.on_gpu:
        return None
    provider.optimizer.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    provider.step(x)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - gradients
