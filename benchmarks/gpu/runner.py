"""Runs stages one after another, each in processes of its own that are killed at their time limit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gpu.journal import Journal
from benchmarks.gpu.results import Results
from benchmarks.gpu.stage import DEVICE_LOST, Settings

ROOT = Path(__file__).parents[2]

# A case that kills or hangs its process costs a new process; so many of them and the stage is given up.
PROCESSES = 10

# Kept back for the kill, the summary and the files.
RESERVE = 5.0


@dataclass(frozen=True)
class StageSpec:
    """A stage: a module with run(stage), and its share of the time."""

    name: str
    about: str
    module: str
    share: float
    correctness: bool = True
    """Whether its running out of time is a failure: nothing has been shown then."""
    asked: bool = False
    """Whether it runs only when it is named."""


STAGES = [
    StageSpec("kernels", "tests/kernels on the device", "benchmarks.gpu.stages.kernels", 130),
    StageSpec("large", "offsets past 2^31", "benchmarks.gpu.stages.large", 40),
    StageSpec("soak", "random shapes against fp64", "benchmarks.gpu.stages.soak", 70),
    StageSpec("sanitizer", "compute-sanitizer on one small step", "benchmarks.gpu.stages.sanitizer", 40),
    StageSpec("parity", "200 steps beside the reference backend", "benchmarks.gpu.stages.parity", 60),
    StageSpec("benchmark", "the bars, and what dispatch is fitted to", "benchmarks.gpu.stages.benchmark", 200, False),
    StageSpec("launches", "each kernel beside its roof", "benchmarks.gpu.stages.launches", 100, False, asked=True),
    StageSpec("tune", "each kernel in other block shapes", "benchmarks.gpu.stages.tune", 300, False, asked=True),
    StageSpec("counters", "what the device counts of each kernel", "benchmarks.gpu.stages.counters", 140, False, True),
]


@dataclass(frozen=True)
class Run:
    """Settings that all stages of one call share."""

    results: Results
    folder: Path
    """Folder for logs and journals."""
    smoke: bool
    copies: Path | None = None
    """A second folder for logs."""


@dataclass(frozen=True)
class Outcome:
    """End of a stage: ok, failed, timeout, or not run."""

    stage: StageSpec
    status: str
    seconds: float
    limit: float
    counts: dict[str, int]

    @property
    def bad(self) -> bool:
        return self.status == "failed" or (self.status != "ok" and self.stage.correctness)


def run_stages(stages: Sequence[StageSpec], seconds: float, run: Run) -> list[Outcome]:
    """Run the stages within `seconds` in all. What one leaves of its share, the later ones divide."""
    end, outcomes = time.monotonic() + seconds - RESERVE, []
    run.folder.mkdir(parents=True, exist_ok=True)
    for number, stage in enumerate(stages):
        limit = (end - time.monotonic()) * stage.share / sum(s.share for s in stages[number:])
        outcome = _run_stage(stage, limit, run)
        outcomes.append(outcome)
        run.results.finish(stage.name, asdict(outcome) | {"stage": stage.name, "date": time.strftime("%F %T")})
        log = run.folder / f"{stage.name}.log"
        if run.copies is not None and log.exists():
            shutil.copy(log, run.copies)
        say(f"{stage.name}: {outcome.status} in {outcome.seconds:.0f} s (limit {limit:.0f} s) {_counts(outcome)}")
        if outcome.status != "ok":
            failed = [r for r in run.results.rows(stage.name) if r["status"] in ("failed", "unfinished")]
            say("\n".join(f"    {r['case']}: {r.get('reason', '')}" for r in failed[:20]))
            say(f"  end of {log}:\n{_tail(log, 15)}")
    return outcomes


def _run_stage(stage: StageSpec, limit: float, run: Run) -> Outcome:
    started = time.monotonic()
    journal = Journal(run.folder / f"{stage.name}.journal")
    log = run.folder / f"{stage.name}.log"
    for old in (journal.path, log):
        old.unlink(missing_ok=True)
    run.results.drop(stage.name)
    status = "failed"
    for _ in range(PROCESSES):
        left = started + limit - time.monotonic()
        how = _run_process(stage, left, run, journal, log) if left > 0 else None
        case = journal.current()
        if how is None:
            status = "timeout"
            if case is not None:
                _put(run, stage, case["begin"], "unfinished", "the stage's time was up")
            break
        if how == "":
            status = "ok"
            break
        if case is not None:
            _put(run, stage, case["begin"], "failed", how)
            journal.end(case["begin"], "failed")
        elif how != str(DEVICE_LOST):  # outside of any case: it would end there again
            _put(run, stage, "(between cases)", "failed", how)
            break
    counts = Counter(row["status"] for row in run.results.rows(stage.name))
    if status == "ok" and counts["failed"]:
        status = "failed"
    return Outcome(stage, status, round(time.monotonic() - started, 1), round(limit, 1), dict(counts))


def _run_process(stage: StageSpec, seconds: float, run: Run, journal: Journal, log: Path) -> str | None:
    """Run the stage until it ends: "" if well, None if at its limit, else how it ended."""
    settings = Settings(
        name=stage.name,
        module=stage.module,
        seconds=seconds,
        smoke=run.smoke,
        results=str(run.results.path),
        copies=[str(path) for path in run.results.copies],
        journal=str(journal.path),
    )
    deadline = time.monotonic() + seconds
    with log.open("a") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.process", json.dumps(asdict(settings))],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=_environment(run.smoke),
            start_new_session=True,  # so that what it starts can be killed with it
        )
        try:
            while (code := process.poll()) is None:
                if time.monotonic() > deadline:
                    return None
                case = journal.current()
                if case is not None and time.time() > case["until"]:
                    return f"no end within {case['limit']:g} s; killed"
                time.sleep(0.1)
        finally:
            _kill(process)
    if code < 0:
        return f"killed by signal {-code} ({signal.Signals(-code).name})"
    if code == DEVICE_LOST:
        return str(code)
    return "" if code == 0 else f"ended with code {code}: {_tail(log, 1)}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and everything it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    try:
        process.wait(timeout=RESERVE)
    except subprocess.TimeoutExpired:
        say(f"process {process.pid} does not die: its GPU may be stuck; going on without it")


def _environment(smoke: bool) -> dict[str, str]:
    environment = dict(os.environ)
    path = [str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in path if p)
    environment["PYTHONUNBUFFERED"] = "1"
    if not smoke:
        environment.pop("TRITON_INTERPRET", None)
        # Shapes of very different sizes follow one another: without it their fragments do not join again.
        environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    return environment


def _put(run: Run, stage: StageSpec, case: str, status: str, reason: str) -> None:
    run.results.put({"stage": stage.name, "case": case, "status": status, "reason": reason})


def _tail(log: Path, lines: int) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else ""


def _counts(outcome: Outcome) -> str:
    return ", ".join(f"{n} {status}" for status, n in sorted(outcome.counts.items()))


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line a stage."""
    lines = [f"{'stage':<11}{'outcome':<9}{'seconds':>8}{'limit':>7}  cases"]
    lines += [f"{o.stage.name:<11}{o.status:<9}{o.seconds:>8.0f}{o.limit:>7.0f}  {_counts(o)}" for o in outcomes]
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201  # the command's answer
