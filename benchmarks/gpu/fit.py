"""`python -m benchmarks.gpu.fit [FILE]`: what a results file of a GPU says of the constants in csrc_triton.

Rates beside those assumed; each choice between two ways that plan.py makes, beside what was faster; the kernels by how
far they are from their roof; and block shapes that were faster than ours. It changes nothing.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.results import RESULTS
from csrc_triton import plan

Rows = Sequence[dict[str, Any]]

# What the sweeps ran with: enough for one chunk.
_BUDGET = 4 << 30
_PARTS = {
    "forward": "decode",
    "backward": "decode backward",
    "encoder_backward": "encode backward, weights",
}
# Below it a variant is not worth another constant: times differ as much from run to run.
_GAIN = 0.97


@dataclass(frozen=True)
class Choice:
    """Between two ways, at one shape."""

    what: str
    planned: str
    ms: dict[str, float]

    @property
    def fastest(self) -> str:
        return min(self.ms, key=lambda way: self.ms[way])

    @property
    def lost(self) -> float:
        """By the planned way, in ms."""
        return self.ms[self.planned] - self.ms[self.fastest]

    def __str__(self) -> str:
        times = ", ".join(f"{way} {ms:.3f} ms" for way, ms in self.ms.items())
        verdict = "" if self.lost == 0 else f"   loses {self.lost / self.ms[self.fastest]:.0%}"
        return f"{self.what:<44} {times:<44} planned: {self.planned}{verdict}"


def rates(rows: Rows) -> dict[str, tuple[float, float]]:
    """Each rate of plan.py: what it assumes, and what was measured."""
    found = {}
    for case, fact, name, assumed in (
        ("copy", "bytes_per_second", "BANDWIDTH", plan.BANDWIDTH),
        ("GEMM, modern, bfloat16", "flops", "FLOPS[2]", plan.FLOPS[2]),
        ("GEMM, modern, float32", "flops", "FLOPS[4]", plan.FLOPS[4]),
    ):
        for row in _of(rows, "benchmark"):
            if row["case"] == case:
                found[name] = (assumed, row[fact])
    return found


@contextmanager
def assuming(**constants: Any) -> Iterator[None]:
    """Let plan.py decide with these in place of its own."""
    before = {name: getattr(plan, name) for name in constants}
    for name, value in constants.items():
        setattr(plan, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(plan, name, value)


def encode_choices(rows: Rows) -> list[Choice]:
    """cuBLAS and a pass for the maxima, or our product that takes them on the way."""
    found = []
    for row in _of(rows, "benchmark"):
        if row["case"].startswith("encode's GEMM"):
            planned = plan.encode(row["B"], row["D"], row["M"], row["K"], 2, _BUDGET).gemm
            ms = {way: row[way]["ms"]["encode"]["median"] for way in ("cublas", "triton")}
            found.append(Choice(row["case"], planned, ms))
    return found


def decode_choices(rows: Rows) -> list[Choice]:
    """Rows gathered, or products with the code as a dense matrix."""
    found = []
    for row in _of(rows, "benchmark"):
        if row["case"].startswith("gather or dense"):
            B, D, M, K = (row[size] for size in "BDMK")
            planned = plan.decode(B, D, M, K, K, False, 2, 2, _BUDGET, False)
            for name, measured in _PARTS.items():
                ms = {way: row[way][measured]["median"] for way in ("gather", "dense")}
                found.append(Choice(f"{row['case']}, {name}", getattr(planned, name), ms))
    return found


def lost(choices: Sequence[Choice]) -> float:
    """By all planned ways together, as a share of the fastest."""
    return sum(choice.lost for choice in choices) / max(sum(c.ms[c.fastest] for c in choices), 1e-9)


def kernels(rows: Rows) -> list[str]:
    """The launches that take longest, with the share of their roofs."""
    found = [
        (launch["ms"]["median"], row["case"], launch)
        for row in _of(rows, "launches")
        for launch in row.get("launches", [])
        if "ms" in launch
    ]
    found.sort(key=lambda each: -each[0])
    return [
        f"{ms:9.3f} ms  {n['share']:5.0%} of its roof  {case}: {n['kernel']} {n['config']}" for ms, case, n in found
    ]


def better(rows: Rows) -> list[str]:
    """Launches of which another cut was faster than ours by more than noise, by what it saves.

    Each is judged alone: a launcher has one constant for all of its launches.
    """
    found = []
    for row in _of(rows, "tune"):
        for launch in row["launches"]:
            first = launch["variants"][0]
            if first["ms"] < _GAIN * launch["ms"]["median"]:
                saved = launch["ms"]["median"] - first["ms"]
                line = (
                    f"{saved:9.3f} ms of {launch['ms']['median']:.3f}  {row['case']}: {launch['kernel']} "
                    f"{launch['config']} warps={launch['warps']} stages={launch['stages']}\n"
                    f"      -> {first['config']} warps={first['warps']} stages={first['stages']}"
                )
                found.append((-saved, line))
    return [line for _, line in sorted(found)]


def told(rows: Rows) -> Iterator[str]:
    """The whole answer, line by line."""
    found = rates(rows)
    yield "rates: assumed, measured"
    yield from (f"  {name:<10} {assumed:.3g}  {measured:.3g}" for name, (assumed, measured) in found.items())
    measured = {name: value for name, (_, value) in found.items()}
    new = {"BANDWIDTH": measured.get("BANDWIDTH", plan.BANDWIDTH)}
    new |= {"FLOPS": {size: measured.get(f"FLOPS[{size}]", rate) for size, rate in plan.FLOPS.items()}}
    for title, choices in (("who multiplies", encode_choices), ("gather or dense", decode_choices)):
        with assuming(**new):
            then = lost(choices(rows))
        now = choices(rows)
        if not now:
            yield f"\n{title}: not measured"
            continue
        yield f"\n{title}: the plan loses {lost(now):.1%}, with the measured rates {then:.1%}"
        yield from (f"  {choice}" for choice in now)
    for title, lines in (("kernels", kernels(rows)), ("faster cuts", better(rows))):
        yield f"\n{title}"
        yield from (f"  {line}" for line in lines)


def _of(rows: Rows, stage: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["stage"] == stage and row["status"] == "ok"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.fit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path, help="default: the one results file of a GPU there is")
    options = parser.parse_args(arguments)
    files = [options.file] if options.file else sorted(RESULTS.glob("nvidia-*.json"))
    if len(files) != 1:
        parser.error(f"name a file; there are {', '.join(f.name for f in files) or 'none'} in {RESULTS}")
    for line in told(json.loads(files[0].read_text())["rows"]):
        print(line)  # noqa: T201  # the command's answer
    return 0


if __name__ == "__main__":
    sys.exit(main())
