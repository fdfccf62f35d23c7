"""The results file: rows as they come, whole after a kill at any moment."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


class Results:
    """A JSON file of hardware, versions, the outcome of each stage, and rows; and copies of it elsewhere."""

    def __init__(self, path: Path, copies: list[Path]) -> None:
        self.path, self.copies = path, copies

    def read(self) -> dict[str, Any]:
        empty = {"hardware": {}, "versions": {}, "stages": {}, "rows": []}
        try:
            return empty | json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):  # none yet, or not ours
            return empty

    def describe(self, hardware: dict[str, Any], versions: dict[str, Any]) -> None:
        self._change(lambda d: d | {"hardware": hardware, "versions": versions})

    def put(self, row: dict[str, Any]) -> None:
        """Add a row; one of the same stage and case is replaced."""
        self._change(lambda d: d | {"rows": [r for r in d["rows"] if _key(r) != _key(row)] + [row]})

    def drop(self, stage: str) -> None:
        """Forget what an earlier run of a stage found."""
        others = {name: outcome for name, outcome in self.read()["stages"].items() if name != stage}
        self._change(lambda d: d | {"stages": others, "rows": [r for r in d["rows"] if r["stage"] != stage]})

    def finish(self, stage: str, outcome: dict[str, Any]) -> None:
        self._change(lambda d: d | {"stages": d["stages"] | {stage: outcome}})

    def rows(self, stage: str) -> list[dict[str, Any]]:
        return [r for r in self.read()["rows"] if r["stage"] == stage]

    def _change(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        text = json.dumps(change(self.read()), indent=1) + "\n"
        for path in (self.path, *self.copies):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text(text)
            os.replace(temporary, path)


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["stage"], row["case"]
