"""tests/kernels on the device. Each test is a case: one that hangs, or spoils the GPU context, costs only itself."""

import sys
from pathlib import Path

import pytest

from benchmarks.gpu.ahead import compile_ahead
from benchmarks.gpu.stage import DEVICE_LOST, Stage, device_lost

ROOT = Path(__file__).parents[3]
GROUP = "tests"
LIMIT = 60.0
OPTIONS = ["-p", "no:cacheprovider", "--continue-on-collection-errors", "--tb=short", "-rf"]


class _Recorder:
    """A pytest plugin that writes down each test, and leaves out those of an earlier process."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.outcome, self.reason = "ok", ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if not self.stage.done(item.nodeid)]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.stage.row(f"collecting {report.nodeid}", "failed", reason=_last_line(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.outcome, self.reason = "ok", ""
        self.stage.journal.begin(nodeid, LIMIT)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.outcome, self.reason = "failed", _last_line(report)
        elif report.skipped and self.outcome == "ok":
            self.outcome = "skipped"

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        facts = {"reason": self.reason} if self.reason else {}
        lost = device_lost() if self.outcome == "failed" else None
        if lost:
            facts["reason"] += f" (and then the device: {lost})"
        self.stage.conclude(nodeid, self.outcome, GROUP, **facts)
        if lost:
            pytest.exit("the GPU context of this process is lost", DEVICE_LOST)


def run(stage: Stage) -> None:
    """All tests of the folder; for a smoke run those of one small file, which need no kernels."""
    folder = "tests/test_helpers.py" if stage.smoke else "tests/kernels"
    if not (ROOT / folder).exists():
        stage.row(GROUP, "failed", reason=f"there is no {folder}")
        return
    compile_ahead(__name__, stage)
    code = pytest.main([*OPTIONS, folder], plugins=[_Recorder(stage)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        sys.exit(int(code))
    if "ok" not in stage.journal.ended().values():
        stage.row(GROUP, "failed", reason=f"no test of {folder} ran")


def _last_line(report: pytest.CollectReport | pytest.TestReport) -> str:
    lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
    return (lines or report.longreprtext.splitlines() or ["no message"])[0][:300]


class _Part:
    """A pytest plugin that leaves every COUNTth test in, from NUMBER."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = items[int(sys.argv[1]) :: int(sys.argv[2])]


if __name__ == "__main__":
    sys.exit(pytest.main([*OPTIONS, "tests/kernels"], plugins=[_Part()]))
