"""Training steps, whole and phase by phase: compared with the specification, then timed beside the bare GEMM.

encode and decode: the forward's two halves, alone and without a graph. backward: from a recorded loss to all gradients.
optimizer: everything after that. step: all of it, as the provider's users run it, a new batch each time.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.cases import PHASES, SHAPES, Shape
from benchmarks.conftest import suite_of
from benchmarks.measured import BesideGemm, Measured, ready
from benchmarks.place import CPU
from benchmarks.providers import CANDIDATES
from benchmarks.providers.base import Candidate, Provider, batch
from benchmarks.suites import Suite
from benchmarks.timing import timed


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    suite = suite_of(metafunc.config)
    if metafunc.function is test_phase:
        chosen = [(SHAPES[name], candidate) for name in suite.phases for candidate in CANDIDATES]
    else:
        eager = [c for c in CANDIDATES if not (c.compiled or c.small_only)]
        chosen = [(SHAPES[name], candidate) for name in suite.steps for candidate in eager]
    ids = [f"{shape.name}-{candidate.name}" for shape, candidate in chosen]
    metafunc.parametrize("measured", chosen, indirect=True, scope="module", ids=ids)


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest) -> Iterator[tuple[Shape, Measured]]:
    shape: Shape
    candidate: Candidate
    shape, candidate = request.param
    made = ready(shape, candidate, CPU)
    yield shape, made
    made.provider = None  # pytest keeps what a fixture gave until the next one is made


# Last, the whole step: by then what the phases left behind is warm for all alike.
@pytest.mark.parametrize("phase", [*PHASES, "step"])
def test_phase(measured: tuple[Shape, Measured], phase: str, benchmark, rows, suite):
    _test(measured, phase, benchmark, rows, suite)


def test_step(measured: tuple[Shape, Measured], benchmark, rows, suite):
    _test(measured, "step", benchmark, rows, suite)


def _test(
    measured: tuple[Shape, Measured], phase: str, benchmark: Any, rows: list[dict[str, Any]], suite: Suite
) -> None:
    shape, made = measured
    benchmark.group = f"{shape.name}, {made.row['architecture']}: {phase}"
    row = {"benchmark": "step", "phase": phase, "shape": shape.name, **made.row}
    provider = made.provider
    if provider is None:
        if phase == "step":
            rows.append(row)
        pytest.skip(f"{row['provider']}: {row['missing']}")
    assert made.gauge is not None
    if made.compiled and phase in ("encode", "decode"):
        pytest.skip("what is compiled is the loss: this would run the eager code")
    roof = BesideGemm(shape, CPU)
    provider.optimizer.zero_grad()
    made.gauge.reset()
    row |= measure(provider, phase, shape, benchmark, suite.seconds, made.once, roof)
    row["gemm_seconds"] = roof.seconds
    if phase == "step" and not made.compiled:  # compiling leaves memory behind
        row["peak_bytes"] = made.gauge.peak()
    rows.append(row)


def measure(
    provider: Provider, phase: str, shape: Shape, benchmark: Any, seconds: float, once: float, roof: BesideGemm
) -> dict[str, Any]:
    """Times of one phase; what goes before it in a step is done outside of what is timed."""
    numbers = itertools.count(1)

    def a_batch() -> tuple[tuple[torch.Tensor], dict[str, Any]]:
        return (batch(shape, CPU, next(numbers)),), {}

    def a_loss() -> tuple[tuple[torch.Tensor], dict[str, Any]]:
        provider.optimizer.zero_grad()
        return (provider.loss(*a_batch()[0]),), {}

    if phase == "step":
        return timed(benchmark, provider.step, seconds, once, roof.before(a_batch))
    if phase == "backward":
        return timed(benchmark, provider.backward, seconds, once, roof.before(a_loss))
    if phase == "optimizer":
        provider.backward(a_loss()[0][0])
        return timed(benchmark, provider.update, seconds / 3, once / 10, roof.before(lambda: None))
    with torch.no_grad():
        if phase == "encode":
            return timed(benchmark, provider.encode, seconds, once / 2, roof.before(a_batch))
        code = provider.encode(batch(shape, CPU, 0))
        return timed(benchmark, provider.decode, seconds / 3, once / 10, roof.before(lambda: ((code,), {})))
