"""`python -m csrc_triton.offline` compiles the kernels of training steps without a GPU, checks and lists them.

The real launchers run on meta tensors, at real sizes, and only note their launches. Each becomes a cubin for every chip
that is asked for.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from csrc_triton import plan
from csrc_triton.cases import SHAPES, Part, parts
from csrc_triton.compilation import SHARED_MEMORY, Job, Result, compile_all, specialise
from csrc_triton.launch import Launch

# Those in the tables of docs/kernels.md.
_SHOWN = [80, 90]


@dataclass(frozen=True)
class Row:
    """A launch of a part, and what its kernel came to for each architecture."""

    part: Part
    launch: Launch
    jobs: tuple[Job, ...]
    results: tuple[Result, ...]
    measured: float | None
    """Seconds that the launch took on a GPU."""

    @property
    def seconds(self) -> float:
        """Predicted: memory and arithmetic overlap, each at the rate that plan.py assumes."""
        return max(self.launch.bytes_moved / plan.BANDWIDTH, self.launch.flops / plan.FLOPS[self.part.dtype.itemsize])


@dataclass(frozen=True)
class Measured:
    """Times of a GPU for the launches of each part, by the part's title: rows of stage `launches` of `make gpu`."""

    gpu: str
    launches: dict[str, list[dict[str, Any]]]

    @classmethod
    def read(cls, file: Path | None) -> "Measured":
        """Read a results file; None gives no times."""
        if file is None:
            return cls("", {})
        found = json.loads(file.read_text())
        rows = [row for row in found["rows"] if row["stage"] == "launches"]
        return cls(found["hardware"]["gpu"], {row["case"]: row.get("launches", []) for row in rows})

    def seconds(self, title: str, launches: Sequence[Launch]) -> list[float | None]:
        """Give the time of each launch; None if it was not timed, or was timed in another configuration."""
        rows = self.launches.get(title, [])
        timed = [(row["kernel"], row["config"], row["warps"], row["stages"]) for row in rows]
        if timed != [(n.name, n.config, n.num_warps, n.num_stages) for n in launches]:
            return [None] * len(launches)
        return [row["ms"]["median"] / 1e3 if "ms" in row else None for row in rows]


def compiled_parts(shapes: Iterable[str], chips: Sequence[int], measured: Measured) -> list[Row]:
    """Every launch at these shapes, compiled for these chips (80 for sm_80)."""
    launches = [
        (part, launch, seconds)
        for part in parts(*shapes)
        for launches in [part.launches()]
        for launch, seconds in zip(launches, measured.seconds(part.title, launches), strict=True)
    ]
    jobs = [tuple(specialise(launch, chip) for chip in chips) for _, launch, _ in launches]
    results = iter(compile_all([job for each in jobs for job in each]))
    return [
        Row(part, launch, each, tuple(next(results) for _ in each), seconds)
        for (part, launch, seconds), each in zip(launches, jobs, strict=True)
    ]


def lines(rows: Iterable[Row]) -> Iterator[str]:
    """Yield the command's output: a line per compile, under the first shape that needs it."""
    seen = set()
    for row in rows:
        for job, result in zip(row.jobs, row.results, strict=True):
            if job.key in seen:
                continue
            seen.add(job.key)
            yield (
                f"{'FAIL' if result.violations else 'ok  '} sm_{job.arch} {row.part.heading:14} {job.kernel:24} "
                f"{row.launch.config} warps={job.num_warps} stages={job.num_stages}: {result.registers} registers, "
                f"{human(result.shared, 'B')} shared"
            )
            yield from (f"     {line}" for violation in result.violations for line in violation.splitlines())


def human(value: float, unit: str) -> str:
    """Three digits and a prefix: 1.07 GB."""
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k"), (0, ""), (-3, "m"), (-6, "µ")):
        if value >= 0.9995 * 10**power:  # 999.6 M rounds to 1 G
            return f"{value / 10**power:.3g} {prefix}{unit}"
    return f"< 1 µ{unit}" if value else "0"


INTRODUCTION = f"""\
# The kernels, compiled without a GPU

Written by `make kernels`; edit `csrc_triton/offline.py`, not this page. The command lets the real launchers run on
tensors without memory, notes what they would start, and compiles it with Triton {triton.__version__} for sm_80 (A100)
and sm_90 (H100, H200), which the tables show, and for sm_86, 89, 100 and 120. It fails if a kernel spills registers to
memory, if it needs more shared memory than the chip has ({human(SHARED_MEMORY[80], "B")} on an A100,
{human(SHARED_MEMORY[90], "B")} on an H200, {human(SHARED_MEMORY[89], "B")} on RTX cards), or if it multiplies 16-bit
matrices without tensor cores.

A table holds what training steps at one shape start: with and without the linear and the interaction pathway, the
latter by our products and around those of cuBLAS (which are not listed), gradients written and used up at once by Adam.
A row is one compiled kernel; *launches* counts the starts that share it, bytes and FLOP are their sum. Bytes are what
is read and written in device memory, each gathered row every time; FLOP are multiply-adds, two each, and 0 where memory
alone matters. Gathers are here even where `csrc_triton/plan.py` prefers dense products. Rows with one configuration
differ in what their arguments are: some aligned, some of another dtype, some absent.

**Predicted times are not measurements.** They are what an H200 would need at {plan.BANDWIDTH / 1e12:g} TB/s and
{plan.FLOPS[2] / 1e12:g} TFLOP/s ({plan.FLOPS[4] / 1e12:g} in fp32), whichever takes longer, without what a launch
costs. The rates are estimates, held in `csrc_triton/plan.py` until a GPU has been measured.
"""


def document(rows: Sequence[Row], gpu: str) -> str:
    """Write the text of docs/kernels.md; gpu: the GPU that was measured, "" if none was."""
    texts = [INTRODUCTION]
    if gpu:
        texts.append(MEASURED.format(gpu=gpu))
    for heading in dict.fromkeys(row.part.heading for row in rows):
        same = [row for row in rows if row.part.heading == heading]
        shape = same[0].part.shape
        sizes = ", ".join(f"{name} = {getattr(shape, name)}" for name in "BDMKNE")
        texts.append(f"## {heading.replace(' ', ', ')}\n\n{sizes}\n\n{table(same, gpu)}")
    return "\n".join(texts)


MEASURED = """\
The last column is measured, on one {gpu}: each launch replayed from a CUDA graph, on random numbers and features. It is
empty where a launch was not timed, or has had another configuration since.
"""


def table(rows: Iterable[Row], gpu: str) -> str:
    """Markdown, a line per compiled kernel in the order of their first launches."""
    equal: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        equal.setdefault(tuple(job.key for job in row.jobs), []).append(row)
    text = (
        "| kernel | configuration | warps, stages | registers sm_80 / sm_90 | shared memory sm_80 / sm_90 "
        "| launches | bytes | FLOP | predicted on an H200 |"
    )
    text += f" {gpu} |\n" if gpu else "\n"
    text += "|---|---|---|---:|---:|---:|---:|---:|---:|" + ("---:|\n" if gpu else "\n")
    for same in equal.values():
        first = same[0]
        moved = sum(row.launch.bytes_moved for row in same)
        flops = sum(row.launch.flops for row in same)
        seconds = sum(row.seconds for row in same)
        registers = " / ".join("**fails**" if r.violations else str(r.registers) for r in first.results)
        shared = " / ".join(human(r.shared, "B") for r in first.results)
        text += (
            f"| {first.jobs[0].kernel} | {first.launch.config} | {first.launch.num_warps}, {first.launch.num_stages} "
            f"| {registers} | {shared} | {len(same)} | {human(moved, 'B')} | {human(flops, 'FLOP')} "
            f"| {human(seconds, 's')} |"
        )
        times = [row.measured for row in same]
        known = human(sum(filter(None, times)), "s") if None not in times else ""
        text += f" {known} |\n" if gpu else "\n"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile everything, say what it came to; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m csrc_triton.offline", description="Compile and check every kernel."
    )
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)}; all if none is named")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the tables there: docs/kernels.md")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="results of `make gpu`, shown in the tables")
    parser.add_argument(
        "--chips",
        nargs="+",
        type=int,
        choices=SHARED_MEMORY,
        default=_SHOWN,
        help="compute capabilities, 80 for sm_80; 80 and 90 if none is named",
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.shapes) - set(SHAPES):
        parser.error(f"no shape is called {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}")
    if options.write and not options.write.absolute().parent.is_dir():
        parser.error(f"--write: there is no folder {options.write.parent}")
    if options.write and options.chips != _SHOWN:
        parser.error("--write: the tables show sm_80 and sm_90; leave --chips out")
    measured = Measured.read(options.measured)
    rows = compiled_parts(options.shapes or SHAPES, options.chips, measured)
    for line in lines(rows):
        print(line)  # noqa: T201  # the command's answer
    if options.write:
        options.write.write_text(document(rows, measured.gpu))
    return int(any(result.violations for row in rows for result in row.results))


if __name__ == "__main__":
    sys.exit(main())
