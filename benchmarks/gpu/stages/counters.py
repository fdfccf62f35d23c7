"""Nsight Compute's counters for every kernel of a step: the bytes that really moved, and what warps waited for."""

import csv
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.measures.launches import identity
from benchmarks.gpu.stage import Stage
from benchmarks.gpu.tools import end_of, find, run_for
from benchmarks.outcomes import Missing
from csrc_triton.cases import Part, parts
from csrc_triton.launch import Launch

METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__bytes_read.sum": "bytes_read",
    "dram__bytes_write.sum": "bytes_written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory_pct",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "l2_pct",
    "lts__t_sector_hit_rate.pct": "l2_hit_pct",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_pct",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_active_pct",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "waiting_for_memory",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": "waiting_at_barriers",
}
SHOWN = ("modern", "paper")


def run(stage: Stage) -> None:
    for part in parts(*SHOWN) if not stage.smoke else parts("modern")[:1]:
        stage.attempt(
            part.title, lambda p=part: {"launches": counted(p, min(stage.left() - 2, 140))}, limit=150, needs=15
        )


def counted(part: Part, seconds: float) -> list[dict[str, Any]]:
    """Give for each launch of `part` the counts made beforehand and those of the device."""
    program = find("ncu")
    if program is None:
        raise Missing("Nsight Compute (ncu) is not on this machine")
    started = [launch for launch in part.launches() if all(launch.grid)]
    names = sorted({launch.name for launch in started})
    command = [
        program,
        *("--csv", "--page", "raw", "--print-units", "base"),
        *("--clock-control", "none"),  # the clocks of a machine that is lent are left alone
        *("--replay-mode", "kernel"),  # the program starts once: its start takes longer than all of its kernels
        *("--kernel-name", f"regex:^({'|'.join(names)})$"),
        *("--metrics", ",".join(METRICS)),
        *(sys.executable, "-m", "benchmarks.gpu.one_part", part.title),
    ]
    done = run_for(seconds, command)
    if done is None:
        raise Missing(f"not done after {seconds:.0f} s under ncu")
    text = done.stdout + done.stderr
    print(text[-20_000:], flush=True)  # noqa: T201  # goes to the stage's log
    errors = [line for line in text.splitlines() if line.startswith("==ERROR==")]
    if done.returncode or errors:
        told = " ".join(errors)[:300] or end_of(text)
        raise Missing(f"ncu could not run it (exit code {done.returncode}): {told}")
    return beside(started, done.stdout)


def beside(started: Sequence[Launch], printed: str) -> list[dict[str, Any]]:
    """The rows of ncu's CSV beside the launches they are of."""
    rows = list(csv.DictReader(line for line in printed.splitlines() if line.startswith('"')))[1:]  # first: the units
    told, expected = [row["Kernel Name"] for row in rows], [launch.name for launch in started]
    if told != expected:
        raise AssertionError(f"ncu saw {len(told)} launches {told[:8]}..., expected {len(expected)} {expected[:8]}...")
    return [
        identity(launch)
        | {"bytes": launch.bytes_moved, "flops": launch.flops}
        | {name: value for metric, name in METRICS.items() if (value := _number(row.get(metric))) is not None}
        for launch, row in zip(started, rows, strict=True)
    ]


def _number(printed: str | None) -> float | None:
    """None for what this device does not count."""
    try:
        return float((printed or "").replace(",", ""))
    except ValueError:
        return None
