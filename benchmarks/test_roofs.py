"""Best rates of this machine: the encoder's matrix product by itself, and a copy of memory."""

import pytest

from benchmarks import correct
from benchmarks.cases import SHAPES
from benchmarks.conftest import suite_of
from benchmarks.measured import gemm, why_too_large
from benchmarks.place import CPU
from benchmarks.providers.base import batch
from benchmarks.providers.roofs import Copy
from benchmarks.timing import timed, wall


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        suite = suite_of(metafunc.config)
        metafunc.parametrize("shape", [SHAPES[n] for n in (*suite.phases, *suite.steps)], ids=lambda s: s.name)


def test_gemm(shape, benchmark, rows, suite):
    if too_large := why_too_large(shape, joint=False):
        pytest.skip(f"{shape.name}: {too_large}")
    roof, x = gemm(shape, CPU), batch(shape, CPU, 0)
    roof.step(x)
    exact = x[:8].double() @ roof.W.double().T + roof.b
    assert correct.relative(roof.out[:8], exact) < correct.TOLERANCE
    benchmark.group = "roof: bare GEMM"
    found = timed(benchmark, lambda: roof.step(x), suite.seconds, wall(roof.step, x))
    rate = 2 * shape.B * shape.D * shape.M / found["median"]
    rows.append({"benchmark": "gemm", "shape": shape.name, "provider": roof.name, "flops_per_second": rate, **found})


def test_copy(benchmark, rows, suite):
    roof = Copy(CPU)
    benchmark.group = "roof: copy"
    found = timed(benchmark, roof.step, suite.seconds, wall(roof.step))
    rows.append({"benchmark": "copy", "bytes_per_second": roof.bytes / found["median"], **found})
