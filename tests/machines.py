"""The tests as other processors compute them: sums in other orders, on one thread and on two. A line each.

    make test-machines                                  (six times as long as `make test`)
    python tests/machines.py tests/test_train.py -x     (what is given goes to pytest)

An x86 processor plays those with fewer instructions: torch, NumPy, MKL and oneDNN are told which ones to use.
"""

# ruff: noqa: T201  # the command's answer

import os
import subprocess
import sys
import time
from pathlib import Path

from numpy._core._multiarray_umath import __cpu_dispatch__  # what NumPy chooses among; other names it refuses

NO_AVX512 = " ".join(name for name in __cpu_dispatch__ if name.startswith(("AVX512", "X86_V4")))
PROCESSORS = {
    "this processor": {},
    "AVX2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "NPY_DISABLE_CPU_FEATURES": NO_AVX512,
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "SSE": {
        "ATEN_CPU_CAPABILITY": "default",
        "NPY_DISABLE_CPU_FEATURES": NO_AVX512,
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
}


def green(processor: str, threads: int, arguments: list[str]) -> bool:
    """Run pytest in this setting, and print one line, below what failed."""
    began = time.monotonic()
    # Two processes as in `make test`, or the one that two threads leave room for.
    command = [sys.executable, "-m", "pytest", "-n", str(2 // threads), "--dist", "loadfile", *arguments]
    env = os.environ | PROCESSORS[processor] | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(done.stdout)
    said, minutes = "red" if done.returncode else "green", (time.monotonic() - began) / 60
    print(f"{processor}, {threads} thread{'s' * (threads > 1)}: {said} after {minutes:.1f} minutes", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    every = [green(processor, threads, sys.argv[1:]) for processor in PROCESSORS for threads in (1, 2)]
    sys.exit(not all(every))
