"""Kernels compiled as they would be launched, without a GPU, and what is wrong with the result.

It must keep everything in registers, fit into shared memory and multiply on tensor cores.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from typing import Any

import triton
from tqdm import tqdm
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError, make_backend
from triton.runtime.jit import create_function_from_signature

from csrc_triton.launch import Launch

SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes one program may use, by chip: A100; RTX 30 and A6000; RTX 40 and L40; H100 and H200; B200; RTX 50. The compiler
never checks it: the launch fails."""

TENSOR_CORES = {
    **dict.fromkeys((80, 86, 89, 120), "mma.sync"),
    90: "wgmma.mma_async",
    100: "tcgen05.mma",
}
"""Instructions of PTX for tensor cores. sm_90 and sm_100 execute the first one too, but slower."""


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
    """Outcome of one compile: its use of the chip, and the rules it breaks."""

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
