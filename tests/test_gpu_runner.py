"""`make gpu`'s runner, without a GPU: stages that fail, hang or die cost themselves only, and their rows are kept."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import benchmarks.machine
from benchmarks import correct
from benchmarks.cases import Shape
from benchmarks.gpu import bars
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.ahead import compile_ahead
from benchmarks.gpu.measures import steps
from benchmarks.gpu.results import Results
from benchmarks.gpu.runner import StageSpec
from benchmarks.gpu.stage import Settings, Stage
from benchmarks.gpu.stages import benchmark, counters, sanitizer
from benchmarks.gpu.tools import run_for
from benchmarks.outcomes import Missing, WrongAnswer
from benchmarks.place import Place, place
from benchmarks.providers.base import Candidate, weights
from benchmarks.providers.ours import Autograd
from csrc_triton.cases import parts

# Stages as the runner starts them: modules with run(stage). None imports torch, so their processes start at once.
MODULES = {
    "well": """
        def run(stage):
            stage.attempt("first", lambda: {"answer": 42})
            stage.attempt("second", lambda: {"left": stage.left()})
    """,
    "loads": """
        import time
        time.sleep(2)
        def run(stage):
            stage.attempt("first", lambda: {"left": stage.left()})
    """,
    "raises": """
        def run(stage):
            stage.attempt("before", lambda: {})
            raise OSError("no such luck")
    """,
    "wrong": """
        def run(stage):
            stage.attempt("wrong", lambda: 1 / 0)
            stage.attempt("after", lambda: {})
    """,
    "hangs": """
        import subprocess, time
        def run(stage):
            stage.attempt("before", lambda: {})
            child = subprocess.Popen(["sleep", "600"])
            stage.row("child", "ok", pid=child.pid)
            stage.attempt("endless", lambda: time.sleep(600))
    """,
    "endures": """
        import os, signal, time
        def run(stage):
            stage.attempt("endless", lambda: time.sleep(600), limit=0.3)
            stage.attempt("deadly", lambda: os.kill(os.getpid(), signal.SIGSEGV))
            stage.attempt("after", lambda: {})
    """,
    "partly": """
        from benchmarks.outcomes import Missing, WrongAnswer
        class OutOfMemoryError(RuntimeError): pass
        def missing():
            raise Missing("not here")
        def too_large():
            raise OutOfMemoryError("too large")
        def wrong():
            raise WrongAnswer("another function")
        def run(stage):
            stage.attempt("missing", missing)
            stage.attempt("ours too large", too_large)
            stage.attempt("theirs too large", too_large, theirs=True)
            stage.attempt("no time", lambda: {}, needs=1e6)
            stage.attempt("theirs", lambda: 1 / 0, theirs=True)
            stage.attempt("theirs wrong", wrong, theirs=True)
            for n in range(5):
                stage.attempt(f"number {n}", lambda n=n: {"inverse": 1 / n}, group="numbers")
    """,
}


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that makes stages of MODULES, each with a share of the time."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.delenv("OUT", raising=False)

    def make(**shares: float) -> list[StageSpec]:
        for name in shares:
            lines = [line[8:] for line in MODULES[name].splitlines()]
            (tmp_path / f"stage_that_{name}.py").write_text("\n".join(lines))
        return [StageSpec(name, "", f"stage_that_{name}", share) for name, share in shares.items()]

    return make


def read(tmp_path: Path) -> dict[str, dict[str, dict]]:
    """The rows by stage and case."""
    found: dict[str, dict[str, dict]] = {}
    for row in json.loads((tmp_path / "runs" / "smoke.json").read_text())["rows"]:
        found.setdefault(row["stage"], {})[row["case"]] = row
    return found


def run(tmp_path: Path, specs: list[StageSpec], *more: str) -> int:
    return main(["--smoke", "--runs", str(tmp_path / "runs"), *more], specs)


def test_without_a_gpu_it_says_so_in_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([]) == 0
    assert (
        capsys.readouterr().out == "no NVIDIA GPU here: nothing to run (--smoke tries the runner itself on the CPU)\n"
    )


def test_a_hanging_stage_is_killed_at_its_limit_and_the_rest_goes_on(stages, tmp_path: Path, capsys):
    assert run(tmp_path, stages(hangs=1, well=9), "--seconds", "20") == 1
    rows = read(tmp_path)
    assert rows["hangs"]["before"]["status"] == "ok"
    assert rows["hangs"]["endless"] | {"reason": ""} == {
        "stage": "hangs",
        "case": "endless",
        "status": "unfinished",
        "reason": "",
    }
    assert not alive(rows["hangs"]["child"]["pid"])
    assert rows["well"]["first"]["answer"] == 42
    assert 10 < rows["well"]["second"]["left"] < 14  # of 20 s, less what is kept back and the 1.5 s of the other
    printed = capsys.readouterr().out
    assert "hangs      timeout" in printed
    assert "well       ok" in printed


def test_a_stage_s_clock_runs_while_its_module_is_imported(stages, tmp_path: Path):
    left = {}
    for name in ("well", "loads"):
        assert run(tmp_path, stages(**{name: 1}), "--seconds", "20") == 0
        left[name] = next(row["left"] for row in read(tmp_path)[name].values() if "left" in row)
    assert left["loads"] < left["well"] - 1.5


def test_a_soak_without_time_for_one_shape_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    settings = Settings("soak", "", 2, True, str(tmp_path / "runs" / "smoke.json"), [], str(tmp_path / "journal"))
    importlib.import_module("benchmarks.gpu.stages.soak").run(Stage(settings))
    assert read(tmp_path)["soak"]["4 shapes"]["status"] == "failed"


def alive(pid: int) -> bool:
    """A child of a killed process may stay as a zombie until its new parent looks."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_a_stage_that_raises_keeps_its_rows_and_is_a_failure(stages, tmp_path: Path, capsys):
    assert run(tmp_path, stages(raises=1, wrong=1, well=1)) == 1
    rows = read(tmp_path)
    assert rows["raises"]["before"]["status"] == "ok"
    assert "OSError: no such luck" in rows["raises"]["(between cases)"]["reason"]
    assert rows["wrong"]["wrong"]["status"] == "failed"
    assert rows["wrong"]["wrong"]["reason"] == "ZeroDivisionError: division by zero"
    assert rows["wrong"]["after"]["status"] == "ok"
    assert set(rows["well"]) == {"first", "second"}
    assert "no such luck" in capsys.readouterr().out  # the end of its log


def test_a_case_that_hangs_or_kills_its_process_costs_only_itself(stages, tmp_path: Path):
    assert run(tmp_path, stages(endures=1)) == 1
    rows = read(tmp_path)["endures"]
    assert rows["endless"]["reason"] == "no end within 0.3 s; killed"
    assert rows["deadly"]["reason"] == "killed by signal 11 (SIGSEGV)"
    assert rows["after"]["status"] == "ok"


def test_what_cannot_be_done_here_is_no_failure_but_a_wrong_answer_is(stages, tmp_path: Path):
    assert run(tmp_path, stages(partly=1)) == 1
    rows = read(tmp_path)["partly"]
    assert {case: rows[case]["status"] for case in rows if not case.startswith("number")} == {
        "missing": "missing",
        "ours too large": "failed",
        "theirs too large": "missing",
        "theirs": "missing",
        "theirs wrong": "failed",
        "no time": "skipped",
    }
    assert rows["number 0"]["status"] == "failed"
    assert "number 1" not in rows
    assert rows["theirs"]["reason"] == "ZeroDivisionError: division by zero"
    # Of the stage: two more have failed.
    assert (rows["numbers"]["ok"], rows["numbers"]["failed"]) == (4, 3)


def test_chosen_stages_replace_their_own_rows_only(stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    specs = stages(well=1, wrong=1)
    assert run(tmp_path, specs) == 1
    (tmp_path / "stage_that_well.py").write_text("def run(stage): stage.attempt('new', lambda: {})")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert run(tmp_path, specs, "--stages", "well") == 0
    rows = read(tmp_path)
    assert set(rows["well"]) == {"new"}
    assert set(rows["wrong"]) == {"wrong", "after"}
    assert (tmp_path / "out" / "smoke.json").read_bytes() == (tmp_path / "runs" / "smoke.json").read_bytes()
    assert (tmp_path / "out" / "well.log").exists()
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, specs, "--stages", "wel")


def test_kernels_are_compiled_ahead_for_a_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = ["import sys, time", f"open(r'{tmp_path}/' + '-'.join(sys.argv[1:]), 'w')", "time.sleep(600)"]
    (tmp_path / "endless_compilation.py").write_text("\n".join(lines))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("benchmarks.gpu.ahead.MOST", 1)
    settings = Settings("s", "", 5, False, str(tmp_path / "r.json"), [], str(tmp_path / "journal"))
    stage = Stage(settings)
    compile_ahead("endless_compilation", stage, share=0.2)
    assert (tmp_path / "0-1").exists()
    assert 3 < stage.left() < 4
    stage.attempt("a case", dict)
    (tmp_path / "0-1").unlink()
    compile_ahead("endless_compilation", Stage(settings))
    assert not (tmp_path / "0-1").exists(), "a second process of a stage need not"


def test_a_damaged_results_file_is_begun_anew(tmp_path: Path):
    results = Results(tmp_path / "r.json", [])
    results.put({"stage": "a", "case": "b", "status": "ok"})
    text = results.path.read_text()
    results.path.write_text(text[: len(text) // 2])
    results.put({"stage": "a", "case": "c", "status": "ok"})
    assert [r["case"] for r in results.read()["rows"]] == ["c"]


def test_bars():
    rows = [
        {"case": "a", "status": "ok", "bars": {"encode / GEMM": 1.2, "topk / encode": 1.8}},
        {"case": "b", "status": "failed", "bars": {"TopKSAE / GEMM": 1.0}},
    ]
    lines = {line[:20].strip(): line for line in bars.table(rows).splitlines()}
    assert lines["encode / bare GEMM,"].endswith("<= 1.15  1.2  NOT REACHED")
    assert lines["linear + relu + torc"].endswith(">= 1.8  1.8  reached")
    assert lines["TopKSAE step (autogr"].endswith("no number")


def test_a_true_stage_in_a_process_of_its_own(tmp_path: Path):
    assert main(["--smoke", "--runs", str(tmp_path / "runs"), "--stages", "kernels"]) == 0
    assert read(tmp_path)["kernels"]["tests"]["ok"] >= 3


PEERS = {
    "sparsify": "sparsify",
    "dictionary_learning": "dictionary_learning",
    "SAELens": "sae_lens",
    "SAELens, use_sparse_activations": "sae_lens",
}


@pytest.mark.parametrize("name", ["large", "soak", "parity", "benchmark", "launches", "tune", "counters"])
def test_a_true_stage_on_the_cpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    results = tmp_path / "runs" / "smoke.json"
    settings = Settings(name, "", 60, True, str(results), [], str(tmp_path / "journal"))
    importlib.import_module(f"benchmarks.gpu.stages.{name}").run(Stage(settings))
    rows = read(tmp_path)[name]
    assert {row["status"] for row in rows.values()} <= {"ok", "missing"}
    if name == "soak":
        assert rows["4 shapes"]["ok"] == 4
    if name == "parity":
        assert rows["JointSAE, fp32"]["drift"]["largest"] < 1e-4
    if name in ("launches", "tune"):
        assert rows["smoke bfloat16 gradients"]["reason"] == "kernels need an NVIDIA GPU, or TRITON_INTERPRET=1"
    if name == "benchmark":
        assert rows["encode, modern"]["bars"]["encode / GEMM"] > 0
        dense = rows["dense joint step, modern"]
        assert dense["ms"]["step"]["calls"] == 3
        assert dense["errors"]["reconstruction"] > 0
        assert dense["step / floor"] == pytest.approx(dense["ms"]["step"]["median"] / dense["floor_ms"], rel=1e-2)
        assert rows["million features"]["reason"] == "needs an NVIDIA GPU (make gpu)"
        assert rows["JointSAE step in a CUDA graph, laptop"]["reason"] == "a CUDA graph needs an NVIDIA GPU"
        for name, module in PEERS.items():
            if importlib.util.find_spec(module):
                assert rows[f"{name} step, modern"]["status"] == "ok", rows[f"{name} step, modern"]["reason"]


class Absent:
    """In place of a module: each function says that it is missing."""

    def __getattr__(self, name: str) -> Callable[..., dict]:
        def missing(*arguments: object) -> dict:
            raise Missing("of no interest here")

        return missing


@pytest.fixture
def steps_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that runs stage `benchmark` with another steps.step, and returns its rows of steps."""

    def rows(step: Callable[..., dict]) -> dict[str, dict]:
        monkeypatch.setattr(benchmark, "kernels", Absent())
        monkeypatch.setattr(benchmark, "sweeps", Absent())
        monkeypatch.setattr(benchmark.roofs, "copy", lambda *_: {"bytes_per_second": 1e12})
        monkeypatch.setattr(benchmark.roofs, "gemm", lambda *_: {"flops": 1e14})
        for name in ("million", "sparsify", "graph"):
            monkeypatch.setattr(steps, name, getattr(Absent(), name))
        monkeypatch.setattr(steps, "step", step)
        settings = Settings("s", "", 60, True, str(tmp_path / "runs" / "smoke.json"), [], str(tmp_path / "journal"))
        benchmark.run(Stage(settings))
        found = {case: row for case, row in read(tmp_path)["s"].items() if " step" in case}
        return {case: row for case, row in found.items() if "sparsify" not in case and "graph" not in case}

    return rows


@pytest.mark.parametrize(
    ("error", "plain", "peers"),
    [
        (torch.cuda.OutOfMemoryError("too large"), "missing", "missing"),
        (TypeError("not that way"), "failed", "missing"),
        (WrongAnswer("another function"), "failed", "failed"),
    ],
)
def test_whose_errors_are_failures(error: Exception, plain: str, peers: str, steps_alone):
    def step(*_: object) -> dict:
        raise error

    rows = steps_alone(step)
    found = {case.removesuffix(" step, modern"): row["status"] for case, row in rows.items()}
    assert {name: found.pop(name) for name in PEERS if name in found} == dict.fromkeys(list(PEERS)[1:], peers)
    dense = {name: found.pop(name) for name in list(found) if name.startswith(("PyTorch", "dense"))}
    assert dense == dict.fromkeys(dense, plain)
    assert len(dense) == 4
    assert found == dict.fromkeys(found, "failed")
    assert {"fastsae TopKSAE, Trainer", "fastsae JointSAE, Trainer"} <= found.keys()


def test_steps_that_write_no_gradients_have_no_floor(steps_alone):
    spread = {"step": {"median": 1.0}}
    facts = {"ms": spread, "activation_bytes": None, "step / GEMM": 2.0}
    rows = steps_alone(lambda *_: facts)
    with_floor = {case for case, row in rows.items() if "floor_ms" in row}
    assert {case for case in rows if case not in with_floor} == {
        "TopKSAE step in backward, modern",
        "JointSAE step in backward, modern",
    }
    assert {case for case, row in rows.items() if "step / floor" in row} == with_floor


@pytest.mark.parametrize(("ours", "raised"), [(True, TypeError), (False, Missing)])
def test_ours_beside_sparsify_fails_as_ours(ours: bool, raised: type[Exception], monkeypatch: pytest.MonkeyPatch):
    def checked(candidate: Candidate, *_: object) -> tuple[None, dict]:
        if (candidate is steps.TOPK) == ours:
            raise TypeError("not that way")
        return None, {}

    monkeypatch.setattr(steps, "checked", checked)
    with pytest.raises(raised, match="not that way"):
        steps.sparsify(benchmark.SMOKE, place(smoke=True))


def test_a_machine_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert benchmarks.machine.answer("echo", "told") == "told"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert benchmarks.machine.versions()["commit"] == "unknown"


@pytest.mark.parametrize(
    ("ends_with", "raised", "message"),
    [(0, None, ""), (sanitizer.FOUND, AssertionError, "Invalid __global__ read"), (3, Missing, "could not run")],
)
def test_what_compute_sanitizer_ends_with(ends_with, raised, message, tmp_path: Path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '========='\necho '========= Invalid __global__ read'\nexit {ends_with}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(sanitizer, "find", lambda _: str(tool))
    with pytest.raises(raised, match=message) if raised else contextlib.nullcontext():
        sanitizer._under("memcheck", ["true"], 10)


def test_where_there_is_no_compute_sanitizer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sanitizer, "find", lambda _: None)
    with pytest.raises(Missing, match="not on this machine"):
        sanitizer._under("memcheck", ["true"], 10)


# As ncu prints it: what it says first, the names, the units, the rows.
PRINTED = """==PROF== Connected to process 1
"ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum","lts__t_sector_hit_rate.pct"
"","","ns","byte","%"
"0","groupmax_kernel","1,200","3,000","12.5"
"1","select_kernel","500","100","n/a"
"""


def test_what_ncu_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (part,) = [p for p in parts("modern") if p.case == "encode"]
    (tmp_path / "printed").write_text(PRINTED + '"2","select_slow_kernel","1","2","3"\n')
    tool = tmp_path / "ncu"
    tool.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/asked\ncat {tmp_path}/printed\n")
    tool.chmod(0o755)
    monkeypatch.setattr(counters, "find", lambda _: str(tool))
    rows = counters.counted(part, 60)
    assert [row["kernel"] for row in rows] == ["groupmax_kernel", "select_kernel", "select_slow_kernel"]
    assert (rows[0]["ns"], rows[0]["bytes_read"], rows[0]["l2_hit_pct"]) == (1200, 3000, 12.5)
    assert "l2_hit_pct" not in rows[1], "it was not counted"
    asked = (tmp_path / "asked").read_text()
    assert asked.endswith("-m benchmarks.gpu.one_part modern bfloat16 encode\n")
    assert "--clock-control none" in asked
    (tmp_path / "printed").write_text(PRINTED)
    with pytest.raises(AssertionError, match=r"ncu saw 2 launches .* expected 3"):
        counters.counted(part, 60)
    tool.write_text("#!/bin/sh\necho no permission >&2\nexit 1\n")
    with pytest.raises(Missing, match=r"exit code 1\): no permission"):
        counters.counted(part, 60)


def test_a_profiler_that_takes_too_long_is_ended_with_what_it_started(tmp_path: Path):
    told = tmp_path / "pid"
    assert run_for(1, ["sh", "-c", f"sleep 600 & echo $! > {told}; wait"]) is None
    deadline = time.monotonic() + 5
    while alive(int(told.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int(told.read_text()))
    done = run_for(5, ["sh", "-c", "echo $HERE; exit 3"], {"HERE": "here"})
    assert done is not None
    assert (done.returncode, done.stdout) == (3, "here\n")


def test_what_is_only_run_when_named(stages, tmp_path: Path):
    specs = stages(well=1, wrong=1)
    specs[1] = dataclasses.replace(specs[1], asked=True)
    assert run(tmp_path, specs) == 0
    assert run(tmp_path, specs, "--stages", "wrong") == 1


class Altered(Autograd):
    """JointSAE with one thing wrong."""

    def __init__(self, fault: str, shape: Shape, place: Place) -> None:
        super().__init__(shape, place, joint=True)
        self.fault = fault
        if fault == "weight":
            with torch.no_grad():
                self.sae.W_lin.zero_()

    def gradients(self) -> dict[str, torch.Tensor]:
        found = super().gradients()
        if self.fault == "gradient":
            found["V"] = 1.1 * found["V"]
        if self.fault == "absent":
            del found["V"]
        return found


@pytest.mark.parametrize(
    ("fault", "message"),
    [("none", None), ("weight", "reconstruction is off"), ("gradient", "d V is off"), ("absent", "no gradient .d V")],
)
def test_a_mismatch_is_not_timed(fault: str, message: str | None):
    altered = Candidate("fastsae altered", "joint", partial(Altered, fault))
    shape, where = benchmark.SMOKE, place(smoke=True)
    with pytest.raises(WrongAnswer, match=message) if message else contextlib.nullcontext():
        provider, errors = steps.checked(altered, shape, where)
        assert errors.keys() == {"reconstruction", *(f"d {name}" for name in weights(shape, where, joint=True))}
        assert provider.gradients() == {}, "they hold memory, and would be added to"
    assert not correct.truth._kept, "it holds memory that steps are in need of"
