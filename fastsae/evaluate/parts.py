"""The finished stages of a measurement, kept beside the run until all are done."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastsae import files
from fastsae.evaluate.intervals import DocumentSums

T = TypeVar("T")


class Parts:
    """Stages in RUN/eval.parts, a file each; those of another measurement are overwritten."""

    def __init__(self, run: Path | None, key: dict[str, Any]) -> None:
        """run: None keeps nothing. key: JSON-able, what the numbers depend on: the SAE, model, text and device."""
        self.folder, self._key = None if run is None else run / "eval.parts", key
        self.done: list[str] = []
        """Stages that are kept, in the order in which they were asked for."""

    def has(self, stage: str) -> bool:
        return self._read(stage) is not None

    def stage(
        self,
        name: str,
        measure: Callable[[], T],
        sums: Callable[[T], tuple[DocumentSums, dict[str, float]]],
        again: Callable[[DocumentSums, dict[str, float]], T],
    ) -> T:
        """Give the result of `measure`, or an earlier one. It is kept as sums by document and further numbers."""
        kept = self._read(name)
        if kept is not None:
            self.done.append(name)
            return again(*kept)
        found = measure()
        self._write(name, *sums(found))
        return found

    def remove(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, stage: str, sums: DocumentSums, numbers: dict[str, float]) -> None:
        if self.folder is None:
            return
        kept = {name: values.tolist() for name, values in sums.sums.items()}
        content = {"key": self._key, "documents": sums.names, "sums": kept, "numbers": numbers}
        try:
            self.folder.mkdir(exist_ok=True)
            files.write_json(self.folder / f"{stage}.json", content)
        except OSError as error:  # no reason to lose what was measured
            warnings.warn(f"eval: {stage} is not kept, and would be measured again: {error}", stacklevel=4)
        else:
            self.done.append(stage)

    def _read(self, stage: str) -> tuple[DocumentSums, dict[str, float]] | None:
        """None where there is nothing, or it is of another measurement or damaged: it is measured again."""
        if self.folder is None:
            return None
        path = self.folder / f"{stage}.json"
        try:
            with files.expected_in(path, "it is measured again"):
                found = files.read_object(path)
                if found["key"] != self._key:
                    return None
                names, numbers = tuple(found["documents"]), dict(found["numbers"])
                sums = {
                    name: torch.tensor(values, dtype=torch.float64, device="cpu")
                    for name, values in found["sums"].items()
                }
                if not sums or any(values.shape != (len(names),) for values in sums.values()):
                    raise TypeError(f"a sum for each of {len(names)} documents")
                return DocumentSums(names, sums), numbers
        except OSError:
            return None
        except ValueError as error:
            warnings.warn(f"eval: {error}", stacklevel=4)
            return None


NOTHING_KEPT = Parts(None, {})
