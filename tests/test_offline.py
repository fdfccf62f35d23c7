"""The offline compile finds what would go wrong on a GPU, and sees the arguments as a launch would."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from csrc_triton import cases, compilation, offline
from csrc_triton.launch import Launch, launch, noting

ARCHS = (80, 90)


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)


@triton.jit(do_not_specialize=["n"])
def count_kernel(x_ptr, n, stride, bias_ptr, scale):
    tl.store(x_ptr + n * stride, scale)


@triton.jit
def minus_sum_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """All of x must be held until its sum is known: BLOCK / (32 num_warps) registers of a thread, which has 255."""
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(y_ptr + tl.arange(0, BLOCK), x - tl.sum(x))


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, K, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    rows, offs_k = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    acc = tl.zeros([ROWS, ROWS], tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + rows[:, None] * K + (k + offs_k)[None, :])
        b = tl.load(b_ptr + rows[None, :] * K + (k + offs_k)[:, None])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + rows[:, None] * ROWS + rows[None, :], acc)


@triton.jit
def nameless(x):
    return x + undefined  # noqa: F821  # pyright: ignore[reportUndefinedVariable]  # what is tested


@triton.jit
def nameless_kernel(x_ptr):
    tl.store(x_ptr, nameless(tl.load(x_ptr)))


@triton.jit
def assembly_kernel(x_ptr):
    x = tl.load(x_ptr)
    x = tl.inline_asm_elementwise("nonsense.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(x_ptr, x)


class Crash:
    """Ends the process that receives it, as a failed assertion of LLVM does."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (3,)


def meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def noted(kernel: Any, arguments: dict[str, Any], num_warps: int = 4, num_stages: int = 1, flops: int = 0) -> Launch:
    with noting() as launches:
        launch(kernel, (1,), arguments, num_warps=num_warps, num_stages=num_stages, bytes_moved=800, flops=flops)
    return launches[0]


def copy(block: Any = 128) -> Launch:
    return noted(copy_kernel, {"x_ptr": meta(100), "y_ptr": meta(100), "n": 100, "BLOCK": block})


def minus_sum(block: int) -> Launch:
    return noted(minus_sum_kernel, {"x_ptr": meta(block), "y_ptr": meta(block), "BLOCK": block})


def product(rows: int, block_k: int = 32, num_stages: int = 3, dtype: torch.dtype = torch.bfloat16) -> Launch:
    a, b, c = meta(rows, 256, dtype=dtype), meta(rows, 256, dtype=dtype), meta(rows, rows)
    arguments = {"a_ptr": a, "b_ptr": b, "c_ptr": c, "K": 256, "ROWS": rows, "BLOCK_K": block_k}
    return noted(product_kernel, arguments, num_stages=num_stages, flops=1)


LAUNCHES = {
    "clean": copy(),
    "spills": minus_sum(32768),
    "tensor cores": product(64),
    "no tensor cores, nothing counted": noted(product_kernel, product(16).arguments, flops=0),
    "rows too few for the tensor cores of sm_90": product(16),
    "fp32": product(16, dtype=torch.float32),
    "too much shared memory": product(64, block_k=128, num_stages=12),
    "unknown name": noted(nameless_kernel, {"x_ptr": meta(1)}),
    "unknown instruction": noted(assembly_kernel, {"x_ptr": meta(1)}),
}


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, int], compilation.Result]:
    """Outcome of each launch's compile, all compiled beside one another."""
    keys = [(name, arch) for name in LAUNCHES for arch in ARCHS]
    results = compilation.compile_all([compilation.specialise(LAUNCHES[name], arch) for name, arch in keys])
    return dict(zip(keys, results, strict=True))


def violations(found: dict[tuple[str, int], compilation.Result], name: str) -> list[str]:
    return ["; ".join(found[name, arch].violations) for arch in ARCHS]


@pytest.mark.parametrize("name", ["clean", "tensor cores", "no tensor cores, nothing counted", "fp32"])
def test_nothing_is_wrong(found: dict[tuple[str, int], compilation.Result], name: str):
    assert violations(found, name) == ["", ""]
    assert all(0 < found[name, arch].registers <= 255 for arch in ARCHS)


def test_shared_memory_is_told(found: dict[tuple[str, int], compilation.Result]):
    assert found["clean", 90].shared == 0
    # Two operands of 64 x 32 bf16, in the three stages that sm_90 keeps and the two that sm_80 does.
    assert [found["tensor cores", arch].shared for arch in ARCHS] == [2 * 2 * 64 * 32 * 2, 3 * 2 * 64 * 32 * 2]


def test_a_spill_is_found(found: dict[tuple[str, int], compilation.Result]):
    for told in violations(found, "spills"):
        assert re.fullmatch(r"spills: [1-9]\d* bytes of stack, 0 of local memory", told)


def test_too_much_shared_memory_is_found(found: dict[tuple[str, int], compilation.Result]):
    assert [re.sub(r"^\d+", "n", told) for told in violations(found, "too much shared memory")] == [
        "n bytes of shared memory, sm_80 has 166912",
        "n bytes of shared memory, sm_90 has 232448",
    ]


def test_missing_tensor_cores_are_found(found: dict[tuple[str, int], compilation.Result]):
    assert violations(found, "rows too few for the tensor cores of sm_90") == [
        "",
        "tl.dot of 16-bit operands without wgmma.mma_async",
    ]


@pytest.mark.parametrize(
    ("name", "says"), [("unknown name", "undefined is not defined"), ("unknown instruction", "'nonsense'")]
)
def test_a_compile_error_is_told_in_few_lines(found: dict[tuple[str, int], compilation.Result], name: str, says: str):
    for told in violations(found, name):
        assert told.startswith("does not compile:")
        assert says in told
        assert len(told.splitlines()) <= 6


def test_a_failing_kernel_is_not_printed():
    script = (
        "import test_offline; from csrc_triton import compilation; "
        "compilation.compile_here(compilation.specialise(test_offline.LAUNCHES['unknown instruction'], 90))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_crash_of_the_compiler_stops_no_other_kernel():
    jobs = [compilation.specialise(case, 90) for case in (copy(block=Crash()), copy(), copy())]
    crashed, clean, same = compilation.compile_all(jobs)
    assert crashed.violations == ("does not compile: the compiler crashed",)
    assert clean.violations == ()
    assert same is clean  # compiled once


@pytest.mark.parametrize(("arch", "instruction"), [(80, "HMMA"), (90, "HGMMA")])
def test_machine_code_agrees(arch: int, instruction: str):
    """The stack tells of every local access, and PTX of the instructions of tensor cores."""
    clean, spilled = (disassembled(LAUNCHES[name], arch) for name in ("tensor cores", "spills"))
    assert "LDL" in spilled
    assert "STL" in spilled
    assert not {"LDL", "STL"} & clean
    assert instruction in clean
    assert instruction not in spilled


def disassembled(case: Launch, arch: int) -> set[str]:
    """The words of a kernel's machine code."""
    job = compilation.specialise(case, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compilation.compiled(job).asm["cubin"])
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return set(re.findall(r"\w+", subprocess.run(command, check=True, capture_output=True, text=True).stdout))


# ---- what a launch makes of its arguments ---------------------------------------------------------------------------


def argument(value: Any, name: str = "stride") -> tuple[str, bool]:
    """Type of an argument, and whether it is known to be divisible by 16."""
    arguments = {"x_ptr": meta(4), "n": 5, "stride": 5, "bias_ptr": None, "scale": 0.5} | {name: value}
    job = compilation.specialise(noted(count_kernel, arguments), 90)
    place = (list(job.signature).index(name),)
    assert job.constants.get(place) == (value if job.signature[name] == "constexpr" else None)
    return job.signature[name], job.attributes.get(place) == [["tt.divisibility", 16]]


@pytest.mark.parametrize(
    ("value", "type", "divisible"),
    [
        (1, "constexpr", False),
        (5, "i32", False),
        (48, "i32", True),
        (2**31 - 1, "i32", False),
        (2**31, "i64", True),
        (2**31 + 1, "i64", False),
        (-(2**31) - 1, "i64", False),
        (0.5, "fp32", False),
        (None, "constexpr", False),
    ],
)
def test_numbers(value: float | None, type: str, divisible: bool):
    assert argument(value) == (type, divisible)


@pytest.mark.parametrize("value", [1, 48])
def test_numbers_that_are_not_specialised(value: int):
    assert argument(value, "n") == ("i32", False)


@pytest.mark.parametrize(
    ("dtype", "type"),
    [
        (torch.bfloat16, "*bf16"),
        (torch.float16, "*fp16"),
        (torch.float32, "*fp32"),
        (torch.int64, "*i64"),
        (torch.int32, "*i32"),
        (torch.int16, "*i16"),
        (torch.int8, "*i8"),
        (torch.uint8, "*u8"),
        (torch.bool, "*u1"),
    ],
)
def test_tensors(dtype: torch.dtype, type: str):
    assert argument(meta(32, dtype=dtype), "x_ptr") == (type, True)


@pytest.mark.parametrize(("offset", "aligned"), [(8, True), (3, False)])
def test_a_tensor_that_begins_within_another(offset: int, aligned: bool):
    assert argument(meta(32, dtype=torch.bfloat16)[offset:], "x_ptr") == ("*bf16", aligned)


def test_equal_launches_are_one_job():
    jobs = [compilation.specialise(case, 90) for case in (copy(), copy(), copy(256), LAUNCHES["clean"])]
    assert [job.key == jobs[0].key for job in jobs] == [True, True, False, True]
    assert compilation.specialise(copy(True), 90).key != compilation.specialise(copy(1), 90).key


class Driver:
    """Driver of a GPU that is not here, as far as a compile asks."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def test_a_launch_finds_what_was_compiled_ahead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = product(64)
    compilation.compiled(compilation.specialise(case, 90))
    compiled = set(tmp_path.iterdir())
    monkeypatch.setattr(driver, "_active", Driver())
    for warps in (4, 8):
        case.kernel.run(**case.arguments, num_warps=warps, num_stages=3, grid=case.grid, warmup=True)
        assert (set(tmp_path.iterdir()) == compiled) == (warps == 4)


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compilation.specialise(copy(), 90)


# ---- the command ----------------------------------------------------------------------------------------------------


def of_shape(launches: Iterable[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the command see one shape at which only these are launched."""

    def start(step: cases.Step) -> None:
        for case in launches:
            counted: dict[str, Any] = {"bytes_moved": step.shape.B * 10**6, "flops": step.shape.D * 10**9}
            launch(**(vars(case) | counted))

    tiny = cases.Shape(B=43, D=79, M=3, K=4, N=5, E=6, cases=("start",))
    for module in (cases, offline):
        monkeypatch.setattr(module, "SHAPES", {"tiny": tiny})
    monkeypatch.setattr(cases, "CASES", {"start": start})


def test_the_command_writes_a_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    of_shape([copy(), copy(), copy(256)], monkeypatch)
    assert offline.main(["--write", str(tmp_path / "kernels.md")]) == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    assert [line.split(":")[0] for line in printed.out.splitlines()] == [
        f"ok   sm_{arch} tiny bfloat16  copy_kernel              BLOCK={block} warps=4 stages=1"
        for block in (128, 256)
        for arch in ARCHS
    ]
    written = (tmp_path / "kernels.md").read_text()
    assert "## tiny, bfloat16\n\nB = 43, D = 79, M = 3, K = 4, N = 5, E = 6\n" in written
    rows = [[cell.strip() for cell in line.split("|")] for line in written.splitlines() if line.startswith("| copy")]
    registers = [r"\d+ / \d+", "0 / 0"]
    # 43 MB at 4.3 TB/s take 10 us, 79 GFLOP at 790 TFLOP/s take 100.
    for row, config, counted in zip(
        rows, ["BLOCK=128", "BLOCK=256"], ["2|86 MB|158 GFLOP|200 µs", "1|43 MB|79 GFLOP|100 µs"], strict=True
    ):
        assert row[1:4] == ["copy_kernel", config, "4, 1"]
        assert re.fullmatch(registers[0], row[4])
        assert row[5] == registers[1]
        assert "|".join(row[6:10]) == counted
    assert offline.main(["--write", str(tmp_path / "again.md")]) == 0
    assert (tmp_path / "again.md").read_text() == written


def test_measured_times_stand_beside_those_predicted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    of_shape([copy(), copy(), copy(256)], monkeypatch)

    def written(*blocks: int, warps: int = 4) -> list[str]:
        same = {"kernel": "copy_kernel", "warps": warps, "stages": 1, "ms": {"median": 0.5}}
        timed = [same | {"config": f"BLOCK={n}"} for n in blocks]
        rows = [{"stage": "launches", "case": "tiny bfloat16 start", "launches": timed}, {"stage": "other"}]
        (tmp_path / "gpu.json").write_text(json.dumps({"hardware": {"gpu": "Some GPU"}, "rows": rows}))
        page = tmp_path / "kernels.md"
        assert offline.main(["--write", str(page), "--measured", str(tmp_path / "gpu.json")]) == 0
        capfd.readouterr()
        assert "measured, on one Some GPU" in page.read_text()
        return [line.split("|")[-2].strip() for line in page.read_text().splitlines() if line.startswith("| ")]

    assert written(128, 128, 256) == ["Some GPU", "1 ms", "500 µs"]
    assert written(128, 128, 64) == ["Some GPU", "", ""], "another configuration was timed"
    assert written(128, 128, 256, warps=8) == ["Some GPU", "", ""]


def test_the_command_fails_after_all_is_done(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    of_shape([LAUNCHES["unknown name"], copy()], monkeypatch)
    assert offline.main(["--write", str(tmp_path / "kernels.md")]) == 1
    printed = capfd.readouterr().out
    assert re.findall(r"^(FAIL|ok  ) sm_(\d+)", printed, re.M) == [
        ("FAIL", "80"),
        ("FAIL", "90"),
        ("ok  ", "80"),
        ("ok  ", "90"),
    ]
    assert "     NameError('undefined is not defined')" in printed
    assert "| nameless_kernel |  | 4, 1 | **fails** / **fails** |" in (tmp_path / "kernels.md").read_text()


def test_every_shape_and_dtype_has_its_launches():
    assert {part.heading for part in cases.parts(*cases.SHAPES) if part.launches()} == {
        *("modern bfloat16", "paper bfloat16", "million bfloat16", "widest bfloat16", "wider bfloat16"),
        *("precise float32", "few bfloat16", "few float32"),
        *("small float32", "narrow bfloat16", "narrow float16", "odd bfloat16", "odd float32"),
        *("one bfloat16", "one float32"),
    }
    assert {part.name for part in cases.parts("small")} == {"small"}


def test_another_k_or_batch_compiles_nothing_anew():
    """k is annealed, AuxK's follows the number of dead features, and the last batch is smaller."""

    def keys(k: int, rows: int) -> set[str]:
        shape = cases.Shape(B=rows, D=256, M=30000, K=k, N=k // 2 + 1, E=64)
        step = cases.Step(shape, torch.float32)
        adam = step.adam(step.W_dec)
        with noting() as launches:
            items = cases.work_items(step.indices, shape.M)
            cases._topk_encode(step)
            cases._joint_decode(step)
            decoder = cases.Decoder(step.W_dec, adam)
            cases.decode_backward(items, step.values, k, step.x, None, None, decoder, None, None, step.values, False)
            cases.weight_gradient(items, step.values, step.x, adam)
        return {compilation.specialise(launch, 90).key for launch in launches}

    assert keys(35, 512) == keys(53, 511)
