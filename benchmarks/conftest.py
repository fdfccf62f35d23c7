"""Options of `pytest benchmarks`, and the results file."""

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cases import SHAPES
from fastsae import files

RESULTS = Path(__file__).parent / "results"
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
        hardware = machine()
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{slug(hardware)}.json"
        files.write_json(path, {"hardware": hardware, "versions": versions(), "rows": _rows})


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists() and (found := re.search(r"model name\s*: (.*)", info.read_text())):
        cpu = found[1]
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def slug(hardware: dict[str, Any]) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{hardware['cpu']} {hardware['cores']} cores".lower()).strip("-")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "numpy", "fastsae", "sae-lens", "eai-sparsify"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    found["commit"] = commit.stdout.strip()
    return found
