"""Options of `pytest benchmarks`, what is measured in which order, and the results file."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cases import SHAPES
from benchmarks.machine import hardware, results_file, versions
from benchmarks.report.results import MEASURED
from benchmarks.report.terminal import steps_as_text
from benchmarks.suites import SUITES, Suite
from fastsae import files

_rows: list[dict[str, Any]] = []
_begun = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastsae")
    group.addoption("--suite", choices=SUITES, default="smoke", help="how much to measure; see benchmarks/suites.py")
    group.addoption("--shape", choices=SHAPES, help="measure steps at this one of benchmarks/cases.py instead")
    group.addoption("--results", action="store_true", help="write benchmarks/results/<machine>.json")


def suite_of(config: pytest.Config) -> Suite:
    suite, shape = SUITES[config.getoption("--suite")], config.getoption("--shape")
    return dataclasses.replace(suite, phases=(shape,), steps=()) if shape else suite


@pytest.fixture(scope="session")
def suite(request: pytest.FixtureRequest) -> Suite:
    return suite_of(request.config)


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    """Rows of the results file, appended to by the benchmarks."""
    return _rows


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if any(row["benchmark"] == "step" for row in _rows):
        terminalreporter.section("steps beside the bare GEMM")
        terminalreporter.write_line(steps_as_text(_rows))


def pytest_configure(config: pytest.Config) -> None:
    partly = config.getoption("--shape") or config.getoption("--suite") != "cpu" or config.option.keyword
    if config.getoption("--results") and partly:
        raise pytest.UsageError("--results is for the whole of --suite cpu: what is committed is never a part")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if not session.config.getoption("--results"):
        return
    found = {
        "hardware": hardware(),
        "versions": versions(),
        "suite": session.config.getoption("--suite"),
        "seconds": round(time.monotonic() - _begun),
        "rows": _rows,
    }
    complete = exitstatus == 0 and {row["benchmark"] for row in _rows} == set(MEASURED)
    file = results_file() if complete else Path("runs") / results_file().name
    file.parent.mkdir(exist_ok=True)
    files.write_json(file, found)
    if not complete:
        print(f"\nnot everything ran and passed: what was measured is in {file}, not among the results")  # noqa: T201
