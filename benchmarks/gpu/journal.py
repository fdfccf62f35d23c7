"""Current case of a stage's process, kept on disk, so that the runner sees which case hangs or kills the process."""

import json
import time
from pathlib import Path
from typing import Any


class Journal:
    """Appended lines: a case begins, with its time limit; a case ends, with its status."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, case: str, limit: float) -> None:
        self._append({"begin": case, "until": time.time() + limit, "limit": limit})

    def end(self, case: str, status: str) -> None:
        self._append({"end": case, "status": status})

    def ended(self) -> dict[str, str]:
        """The status of every case that ended."""
        return {line["end"]: line["status"] for line in self._lines() if "end" in line}

    def current(self) -> dict[str, Any] | None:
        """The `begin` line of the case that has not ended, None between cases."""
        lines = self._lines()
        return lines[-1] if lines and "begin" in lines[-1] else None

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        text = self.path.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]  # the last may be half written
