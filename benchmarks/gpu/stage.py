"""Inside a stage's process: cases that fail alone, rows written as they come. Imports no torch: a stage does that."""

import gc
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.journal import Journal
from benchmarks.gpu.results import Results
from benchmarks.outcomes import Missing, WrongAnswer

# The exit code with which a process asks for another one to go on, its own GPU context being unusable.
DEVICE_LOST = 75


@dataclass(frozen=True)
class Settings:
    """Settings that the runner gives to a stage's process."""

    name: str
    module: str
    seconds: float
    smoke: bool
    results: str
    copies: list[str]
    journal: str


class Stage:
    """The argument of a stage's run(stage)."""

    def __init__(self, settings: Settings) -> None:
        self.name, self.smoke = settings.name, settings.smoke
        self.results = Results(Path(settings.results), [Path(c) for c in settings.copies])
        self.journal = Journal(Path(settings.journal))
        self._ended = self.journal.ended()  # by a process before this one
        self._deadline = time.monotonic() + settings.seconds

    def left(self) -> float:
        """Seconds until this process is killed."""
        return self._deadline - time.monotonic()

    def done(self, case: str) -> bool:
        return case in self._ended

    def row(self, case: str, status: str, **facts: Any) -> dict[str, Any]:
        row = {"stage": self.name, "case": case, "status": status, **facts}
        self.results.put(row)
        shown = facts.get("reason", "")
        print(f"[{self.name}] {status}: {case} {shown}", flush=True)  # noqa: T201  # goes to the stage's log
        return row

    def attempt(
        self,
        case: str,
        function: Callable[[], dict[str, Any]],
        *,
        limit: float = 60.0,
        needs: float = 0.0,
        group: str | None = None,
        theirs: bool = False,
    ) -> dict[str, Any] | None:
        """Make one row of what `function` returns, or of why it returned nothing; None when it did not succeed.

        limit: seconds after which the runner kills this process and starts another for the cases after this one.
        needs: seconds without which the case is not begun. group: of many small cases only failures get a row of their
        own, and the group one row with counts. theirs: someone else's code runs, whose errors are no failure of ours; a
        wrong answer is one.
        """
        if self.done(case):
            before = [r for r in self.results.rows(self.name) if r["case"] == case and r["status"] == "ok"]
            return before[0] if before else None
        if self.left() < needs:
            self.row(case, "skipped", reason=f"{self.left():.0f} s left, it needs {needs:.0f} s")
            return None
        self.journal.begin(case, limit)
        started = time.monotonic()
        facts: dict[str, Any] = {}
        status = "failed"
        try:
            with excused(*([Exception] if theirs else [])):
                facts = function()
            status = "ok"
        except Missing as reason:
            status, facts = "missing", {"reason": str(reason)}
        except Exception as error:
            facts = {"reason": _reason(error)}
        # After the handler, which held the failed frames and all their tensors.
        lost = device_lost() if status != "ok" or group is None else None
        if lost:
            status, facts["reason"] = "failed", f"{facts.get('reason', '')} (and then the device: {lost})"
        self.conclude(case, status, group, seconds=round(time.monotonic() - started, 2), **facts)
        if lost:
            sys.exit(DEVICE_LOST)
        return facts if status == "ok" else None

    def conclude(self, case: str, status: str, group: str | None, **facts: Any) -> None:
        """Write down how a case that was begun in the journal ended."""
        self._ended[case] = status
        if group is None or status == "failed":
            self.row(case, status, **facts)
        self.journal.end(case, status)
        if group is not None:
            self.results.put({"stage": self.name, "case": group, "status": "ok", **Counter(self._ended.values())})


@contextmanager
def excused(*errors: type[Exception]) -> Iterator[None]:
    """Make of these errors, which are no failure of ours, Missing; a wrong answer is raised as it is."""
    try:
        yield
    except (Missing, WrongAnswer):
        raise
    except errors as error:
        raise Missing(_reason(error)) from error


def _reason(error: Exception) -> str:
    """For a row; the rest of it goes to the stage's log."""
    traceback.print_exception(error, file=sys.stdout)
    return " ".join(f"{type(error).__name__}: {error}".strip().splitlines())[:500]


def device_lost() -> str | None:
    """Why the GPU of this process cannot be used any more, None if it can; its unused memory is given back."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return None
