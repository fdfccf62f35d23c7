"""NVIDIA's programs, where they are installed."""

import os
import shutil


def find(program: str) -> str | None:
    """Its path, None if it is not on this machine."""
    toolkit = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", program)
    return shutil.which(program) or shutil.which(toolkit)


def end_of(text: str) -> str:
    """For a row's reason."""
    return " ".join(text.strip().splitlines()[-2:])[:300]
