"""Growth of cost with work: steps over one size at a time."""

import dataclasses
import itertools

import pytest

from benchmarks.cases import Shape
from benchmarks.conftest import suite_of
from benchmarks.measured import gemm, ready
from benchmarks.place import CPU
from benchmarks.providers import CANDIDATES
from benchmarks.providers.base import Candidate, batch
from benchmarks.timing import timed, wall

SHOWN = (
    "fastsae TopKSAE, Trainer",
    "PyTorch TopK, topk + embedding_bag",
    "sparsify",
    "fastsae JointSAE, Trainer",
    "PyTorch joint, dense",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    suite = suite_of(metafunc.config)
    points = [(axis, suite.scaled.scaled(axis, size)) for axis, sizes in suite.series.items() for size in sizes]
    chosen = [c for c in CANDIDATES if c.name in SHOWN]
    metafunc.parametrize(
        ("axis", "shape", "candidate"),
        [(axis, shape, candidate) for axis, shape in points for candidate in (None, *chosen)],
        ids=[f"{shape.name}-{c.name if c else 'bare GEMM'}" for _, shape in points for c in (None, *chosen)],
    )


def test_scaling(axis: str, shape: Shape, candidate: Candidate | None, benchmark, rows, suite):
    benchmark.group = f"over {axis}"
    row = {"benchmark": "scaling", "axis": axis, "size": getattr(shape, axis), "shape": dataclasses.asdict(shape)}
    seconds = suite.seconds / 5
    if candidate is None:
        roof, x = gemm(shape, CPU), batch(shape, CPU, 0)
        found = timed(benchmark, lambda: roof.step(x), seconds, wall(roof.step, x))
        rows.append(row | {"provider": roof.name, "architecture": None, **found})
        return
    made = ready(shape, candidate, CPU)
    if made.provider is None:
        rows.append(row | made.row)
        pytest.skip(f"{candidate.name}: {made.row['missing']}")
    assert made.gauge is not None
    made.gauge.reset()
    numbers = itertools.count(1)
    found = timed(benchmark, made.provider.step, seconds, made.once, lambda: ((batch(shape, CPU, next(numbers)),), {}))
    rows.append(row | made.row | found | {"peak_bytes": made.gauge.peak()})
