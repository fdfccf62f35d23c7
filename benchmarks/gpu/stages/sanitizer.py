"""compute-sanitizer on one small training step: memcheck (reads and writes outside), racecheck (shared memory)."""

import os
import subprocess
import sys
from typing import Any

from benchmarks.gpu.stage import Stage
from benchmarks.gpu.tools import end_of, find, run_for
from benchmarks.outcomes import Missing

# The tool's exit code when it found something; others are the step's own, or that the tool could not run.
FOUND = 77
TOOLS = ("memcheck", "racecheck")


def run(stage: Stage) -> None:
    step = [sys.executable, "-m", "benchmarks.gpu.small_step", *(["smoke"] if stage.smoke else [])]
    # Without the tool first: what it then ends with is the tool's, and kernels are compiled already.
    if stage.attempt("the step alone", lambda: _alone(step), limit=90) is None:
        return
    for tool in TOOLS:
        stage.attempt(tool, lambda t=tool: _under(t, step, min(stage.left() - 2, 110)), limit=120, needs=8)


def _alone(step: list[str]) -> dict[str, Any]:
    done = subprocess.run(step, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {end_of(done.stdout + done.stderr)}")
    return {"printed": done.stdout.splitlines()}


def _under(tool: str, step: list[str], seconds: float) -> dict[str, Any]:
    program = find("compute-sanitizer")
    if program is None:
        raise Missing("compute-sanitizer is not on this machine")
    # Of memory that PyTorch keeps for later, memcheck cannot tell inside from outside.
    environment = os.environ | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {})
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND), *step]
    done = run_for(seconds, command, environment)
    if done is None:
        raise Missing(f"not done after {seconds:.0f} s under {tool}")
    text = done.stdout + done.stderr
    print(text[-20_000:], flush=True)  # noqa: T201  # goes to the stage's log
    if done.returncode == FOUND:
        found = [line for line in text.splitlines() if line.startswith("=========")]
        raise AssertionError(f"{tool}: {' '.join(found[1:6])}")
    if done.returncode:
        raise Missing(f"{tool} could not run the step (exit code {done.returncode}): {end_of(text)}")
    return {"summary": [line for line in text.splitlines() if "SUMMARY" in line]}
