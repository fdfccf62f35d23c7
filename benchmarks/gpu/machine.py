"""What GPU figures are measured on."""

import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import benchmarks.machine

PACKAGES = ("torch", "triton", "numpy", "pytest", "sae-lens", "eai-sparsify")


def name() -> str:
    """The GPU's, as a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def hardware(smoke: bool) -> dict[str, Any]:
    found = benchmarks.machine.hardware()
    if smoke:
        return found
    gpu = torch.cuda.get_device_properties(0)
    return {
        "gpu": gpu.name,
        "gpu_memory_gib": round(gpu.total_memory / 2**30, 1),
        "compute_capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "driver": _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        **found,
    }


def versions() -> dict[str, Any]:
    found = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["commit"] = _answer("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    found["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return found


def _answer(*command: str) -> str:
    """The first line a command prints, or that it is not known."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"
