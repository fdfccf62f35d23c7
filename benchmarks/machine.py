"""Description of the machine on which figures are measured, and the file they are written to."""

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastsae.backends.cpu import screen
from fastsae.files import read_json

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "numpy", "fastsae", "sae-lens", "eai-sparsify", "dictionary-learning")


def hardware() -> dict[str, Any]:
    """Describe the machine on which the figures are measured."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists() and (found := re.search(r"model name\s*: (.*)", info.read_text())):
        cpu = found[1]
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "native_bf16": screen.bf16_is_faster(),  # without it fastsae does not screen its encoding
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def results_file() -> Path:
    """Name this machine's results file. It names the instructions too: processors that differ in them share a name."""
    found = hardware()
    told = f"{found['cpu']} {found['cores']} cores {found['instructions']}" + " bf16" * found["native_bf16"]
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', told.lower()).strip('-')}.json"


def newest(kind: str) -> dict[str, Any]:
    """Read the newest results of one kind; each machine's lie in a file of RESULTS / kind."""
    return max(map(read_json, (RESULTS / kind).glob("*.json")), key=lambda found: found["hardware"]["date"])


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    mkl = re.search(r"Math Kernel Library Version ([\d.]+)", torch.__config__.show())
    found["mkl"] = mkl[1] if mkl else "not used"
    found["commit"] = answer("git", "-C", str(Path(__file__).parents[1]), "describe", "--always", "--dirty")
    return found


def answer(*command: str) -> str:
    """The first line a command prints, or that it is not known."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"
