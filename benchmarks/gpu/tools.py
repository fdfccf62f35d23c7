"""NVIDIA's programs, where they are installed."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence


def find(program: str) -> str | None:
    """Its path, None if it is not on this machine."""
    toolkit = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", program)
    return shutil.which(program) or shutil.which(toolkit)


def run_for(
    seconds: float, command: Sequence[str], environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str] | None:
    """The command done, None if it was not after so long: then it is killed with what it started, as profilers do.

    That would go on, and hold the GPU's memory.
    """
    killed_at = f"{max(1.0, seconds):.0f}"
    command = ["timeout", "--signal=KILL", killed_at, *command]  # which signals its whole group
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return None if done.returncode in (137, -9) else done


def end_of(text: str) -> str:
    """For a row's reason."""
    return " ".join(text.strip().splitlines()[-2:])[:300]
