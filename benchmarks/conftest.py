"""Options of `pytest benchmarks`, and the results file."""

from typing import Any

import pytest

from benchmarks.cases import SHAPES
from benchmarks.machine import RESULTS, hardware, results_file, versions
from fastsae import files

_rows: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shape", choices=SHAPES, default="smoke", help="which of benchmarks/cases.py to measure")
    parser.addoption("--results", action="store_true", help="write benchmarks/results/<machine>.json")


@pytest.fixture(scope="session")
def shape(request: pytest.FixtureRequest):
    return SHAPES[request.config.getoption("--shape")]


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    """Rows of the results file, appended to by the benchmarks."""
    return _rows


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if session.config.getoption("--results") and exitstatus == 0:
        RESULTS.mkdir(exist_ok=True)
        files.write_json(results_file(), {"hardware": hardware(), "versions": versions(), "rows": _rows})
