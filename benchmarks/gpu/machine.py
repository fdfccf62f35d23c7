"""Description of the machine and GPU on which figures are measured."""

import re
from datetime import datetime, timezone
from typing import Any

import torch

import benchmarks.machine


def name() -> str:
    """Give the GPU's name in a form that fits a file name."""
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
        "driver": benchmarks.machine.answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        **found,
    }


def versions() -> dict[str, str]:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return benchmarks.machine.versions() | {"cuda": torch.version.cuda or "not used", "date": now}
