"""Kernels compiled by many processes at once, into Triton's cache, before one process needs them one after another."""

import os
import subprocess
import sys
import time

import torch

from benchmarks.gpu.stage import Stage
from csrc_triton.compilation import Job, Result, compile_all, specialise
from csrc_triton.launch import Launch

# Processes: half of the cores, since each also has a context on the GPU.
MOST = 8


def compile_ahead(module: str, stage: Stage, share: float = 0.45) -> None:
    """Run `python -m module NUMBER COUNT` for each NUMBER below COUNT, for at most this share of the stage's time.

    What they find is ignored: a process that fails or hangs is nothing but a cache that is not filled.
    """
    if stage.smoke or stage.journal.ended():  # an earlier process of this stage has done it
        return
    count = max(1, min(MOST, (os.cpu_count() or 1) // 2))
    until = time.monotonic() + share * stage.left()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(number), str(count)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for number in range(count)
    ]
    while time.monotonic() < until and any(process.poll() is None for process in processes):
        time.sleep(0.1)
    for process in processes:
        process.kill()
        process.wait()
    print(f"{count} processes compiled ahead; {stage.left():.0f} s left", flush=True)  # noqa: T201  # the stage's log


def compiled(started: list[Launch]) -> dict[str, Result]:
    """Compile these launches for the GPU of this machine, with all of its cores: results by the keys of their jobs."""
    jobs = [job(launch) for launch in started]
    return dict(zip((each.key for each in jobs), compile_all(jobs), strict=True))


def job(launch: Launch) -> Job:
    """Its compile for the GPU of this machine."""
    major, minor = torch.cuda.get_device_capability()
    return specialise(launch, 10 * major + minor)
