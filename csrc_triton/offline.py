"""`python -m csrc_triton.offline` compiles every kernel as it would be launched, without a GPU, and checks the result.

The real launchers run on meta tensors, at real sizes, and only note their launches. Each becomes a cubin for sm_80 and
one for sm_90; it must keep everything in registers, fit into shared memory and multiply on tensor cores.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import triton
from tqdm import tqdm
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError, make_backend
from triton.runtime.jit import create_function_from_signature

from csrc_triton import plan
from csrc_triton.cases import SHAPES, Part, parts
from csrc_triton.launch import Launch

SHARED_MEMORY = {80: 166_912, 90: 232_448}
"""Bytes one program may use. The compiler never checks it: the launch fails."""

TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async"}
"""Instructions of PTX that become HMMA and HGMMA. sm_90 executes the former too, but slower."""


@dataclass(frozen=True)
class Job:
    """All that decides what the compiler makes of a launch. Plain data: it is sent to another process."""

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    num_warps: int
    num_stages: int
    arch: int
    computes: bool
    """Work was counted, so its 16-bit products belong on tensor cores."""

    @property
    def key(self) -> str:
        """Equal for equal jobs only; as a tuple, True would equal 1."""
        return repr(self)


@dataclass(frozen=True)
class Result:
    """What a job came to."""

    registers: int = 0
    shared: int = 0
    violations: tuple[str, ...] = ()


def specialise(launch: Launch, arch: int) -> Job:
    """Types, constants and alignments of the arguments, by the code that Triton itself runs at every launch.

    A meta tensor has its storage offset for an address, so it is as aligned as a tensor of torch's allocator would be.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("offline: TRITON_INTERPRET is set, so kernels are not compiled; unset it and start again")
    kernel = launch.kernel
    backend = make_backend(GPUTarget("cuda", arch, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, options = bind(**launch.arguments)
    _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialisation, options)
    return Job(
        module=kernel.fn.__module__,
        kernel=kernel.fn.__name__,
        signature=signature,
        constants=constants,
        attributes=attributes,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        arch=arch,
        computes=launch.flops > 0,
    )


def compiled(job: Job) -> Any:
    """The kernel of Triton, in every stage of its compilation."""
    kernel = getattr(import_module(job.module), job.kernel)
    source = ASTSource(kernel, job.signature, job.constants, job.attributes)
    options = {"num_warps": job.num_warps, "num_stages": job.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=options)


def compile_here(job: Job) -> Result:
    """Compile and check. Changes where this process writes to, so it needs a process of its own."""
    with tempfile.TemporaryFile("w+") as log:
        # Triton and LLVM print a failing kernel in full, from C++ too.
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            kernel = compiled(job)
        except Exception as error:
            log.seek(0)
            return Result(violations=(reason(error, log.read()),))
    registers, violations = resources(kernel.asm["cubin"])
    shared = kernel.metadata.shared
    if shared > SHARED_MEMORY.get(job.arch, shared):  # of other chips the launch will tell
        violations.append(f"{shared} bytes of shared memory, sm_{job.arch} has {SHARED_MEMORY[job.arch]}")
    multiplies = job.computes and re.search(r"tt\.dot .*x[bf]*f16>", kernel.asm["ttir"])
    if multiplies and TENSOR_CORES.get(job.arch, "") not in kernel.asm["ptx"]:
        violations.append(f"tl.dot of 16-bit operands without {TENSOR_CORES[job.arch]}")
    return Result(registers, shared, tuple(violations))


def resources(cubin: bytes) -> tuple[int, list[str]]:
    """Registers, and a violation if they did not suffice.

    What spills goes to the stack, so LDL and STL need not be looked for: nvdisasm takes half a second per kernel.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # One line per function of the cubin: a kernel, and what it calls.
    functions = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told)
    registers, stack, local = (max(int(value) for value in column) for column in zip(*functions, strict=True))
    return registers, [f"spills: {stack} bytes of stack, {local} of local memory"] if stack or local else []


def reason(error: BaseException, log: str) -> str:
    """The first lines that say what went wrong, where a compiler would print the kernel in full."""
    while error.__cause__ is not None:  # an error in a function that the kernel calls
        error = error.__cause__
    told = str(error).splitlines()
    if isinstance(error, CompilationError) and len(told) > 5:
        told = [told[0], *told[-4:]]  # the place, then the source that leads to it, of which the last line is enough
    told += [line for line in log.splitlines() if "error:" in line]
    return "\n".join(["does not compile:", *told[:5]])


def compile_alone(job: Job, context: BaseContext) -> Result:
    """Compile where a crash hits nothing else."""
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(compile_here, job).result()
        except BrokenProcessPool:
            return Result(violations=("does not compile: the compiler crashed",))


def compile_all(jobs: Sequence[Job]) -> list[Result]:
    """A result per job. Equal jobs are compiled once, and as many at a time as there are CPUs."""
    # Forks of a process that has imported what takes long, but started no threads.
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "triton.compiler"])

    distinct = {job.key: job for job in jobs}
    results: dict[str, Result] = {}
    try:
        with ProcessPoolExecutor(os.cpu_count(), context) as pool:
            done = pool.map(compile_here, distinct.values())
            # disable=None: no bar unless a terminal shows it
            for key, result in zip(distinct, tqdm(done, total=len(distinct), unit="kernel", disable=None), strict=True):
                results[key] = result
    except BrokenProcessPool:
        # The compiler crashed, and took all others with it: which kernel was it?
        for key, job in distinct.items():
            if key not in results:
                results[key] = compile_alone(job, context)
    return [results[job.key] for job in jobs]


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
    """What a GPU took for the launches of a part, by the part's title: rows of stage `launches` of `make gpu`."""

    gpu: str
    launches: dict[str, list[dict[str, Any]]]

    @classmethod
    def read(cls, file: Path | None) -> "Measured":
        """From a results file; nothing from None."""
        if file is None:
            return cls("", {})
        found = json.loads(file.read_text())
        rows = [row for row in found["rows"] if row["stage"] == "launches"]
        return cls(found["hardware"]["gpu"], {row["case"]: row.get("launches", []) for row in rows})

    def seconds(self, title: str, launches: Sequence[Launch]) -> list[float | None]:
        """Of each launch; None where it was not timed, or where another configuration was."""
        rows = self.launches.get(title, [])
        timed = [(row["kernel"], row["config"], row["warps"], row["stages"]) for row in rows]
        if timed != [(n.name, n.config, n.num_warps, n.num_stages) for n in launches]:
            return [None] * len(launches)
        return [row["ms"]["median"] / 1e3 if "ms" in row else None for row in rows]


def compiled_parts(shapes: Iterable[str], measured: Measured) -> list[Row]:
    """Every launch at these shapes, compiled for every architecture."""
    launches = [
        (part, launch, seconds)
        for part in parts(*shapes)
        for launches in [part.launches()]
        for launch, seconds in zip(launches, measured.seconds(part.title, launches), strict=True)
    ]
    jobs = [tuple(specialise(launch, arch) for arch in SHARED_MEMORY) for _, launch, _ in launches]
    results = iter(compile_all([job for each in jobs for job in each]))
    return [
        Row(part, launch, each, tuple(next(results) for _ in each), seconds)
        for (part, launch, seconds), each in zip(launches, jobs, strict=True)
    ]


def lines(rows: Iterable[Row]) -> Iterator[str]:
    """What the command prints: a line per compile, under the first shape that needs it."""
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
and sm_90 (H100, H200). It fails if a kernel spills registers to memory, if it needs more shared memory than the chip
has ({human(SHARED_MEMORY[80], "B")} and {human(SHARED_MEMORY[90], "B")}), or if it multiplies 16-bit matrices without
tensor cores.

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
    """docs/kernels.md; gpu: what was measured on, if anything."""
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
    options = parser.parse_args(arguments)
    if unknown := set(options.shapes) - set(SHAPES):
        parser.error(f"no shape is called {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}")
    if options.write and not options.write.absolute().parent.is_dir():
        parser.error(f"--write: there is no folder {options.write.parent}")
    measured = Measured.read(options.measured)
    rows = compiled_parts(options.shapes or SHAPES, measured)
    for line in lines(rows):
        print(line)  # noqa: T201  # the command's answer
    if options.write:
        options.write.write_text(document(rows, measured.gpu))
    return int(any(result.violations for row in rows for result in row.results))


if __name__ == "__main__":
    sys.exit(main())
