"""Questions of training to the processes that may share the work, and the answers of a single process.

`fastsae.distributed` answers for many. A rank is a process; the first one writes logs and files.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fastsae import files

T = TypeVar("T")


class Alone:
    """One process: all rows, all features, nobody to agree with."""

    count = 1
    first = True
    adding = 1
    """Processes whose gradients are added up."""

    # ---- whose rows, whose features ---------------------------------------------------------------------------------

    def own_rows(self, batch: Tensor) -> Tensor:
        """The rows of a whole batch that this process trains on."""
        return batch

    def check_rows(self, batch: Tensor) -> None:
        """Raise ValueError unless all processes have this batch."""

    def batch_rows(self, own: int) -> int:
        """The rows of the whole batch, of which `own` are ours."""
        return own

    def own_features(self, indices: Tensor, others: int) -> Tensor:
        """Features by their place in this process' weights; `others` for those that lie elsewhere."""
        return indices

    # ---- numbers that all have in common ----------------------------------------------------------------------------

    def worst(self, state: int) -> int:
        """The largest of all processes' states."""
        return state

    def every(self, flags: Tensor) -> Tensor:
        """Combine flags: each is up if it is up on all processes."""
        return flags

    def share(self, loss: Tensor) -> Tensor:
        """Scale the mean over this process' rows to its share of the mean over the batch."""
        return loss

    def mean(self, own: Tensor) -> Tensor:
        """The mean over the batch, from the mean over our rows."""
        return own

    def count_rows(self, own: int) -> int:
        """A number over the batch, from the number over our rows."""
        return own

    def count_features(self, own: int) -> int:
        """A number of features, from the number of ours."""
        return own

    def equalise(self, *tensors: Tensor) -> None:
        """Make tensors on all processes those of the first one."""

    def least(self, counters: Tensor) -> None:
        """Each of our features' counters becomes the smallest that any process has for it, in place."""

    def add_gradients(self, parameters: Mapping[str, Tensor]) -> None:
        """Every .grad becomes the sum over the processes that trained on other rows, in place."""

    def norm(self, gradients: dict[str, Tensor]) -> Tensor:
        """The norm of all gradients together."""
        return torch.nn.utils.get_total_norm(list(gradients.values()))

    # ---- files ------------------------------------------------------------------------------------------------------

    def together(self, what: Callable[[], T]) -> T:
        """Do something on every process; where it fails on one, all raise."""
        return what()

    def first_does(self, what: Callable[[], T], *, for_hours: bool = False) -> T | None:
        """Have the first process do something; where it fails, all raise. `for_hours`: the others wait for it as long
        as it lives."""
        return what()

    @contextmanager
    def locked(self, folder: Path, who: str) -> Iterator[None]:
        """files.locked, held by the first process for all."""
        with files.locked(folder, who):
            yield

    @contextmanager
    def watched(self, run_dir: Path | None) -> Iterator[None]:
        """Inside the block, raise an error that says so if another process is lost."""
        yield

    def write_tensors(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """files.write_tensors, of whole tensors."""
        files.write_tensors(path, tensors)

    def on_files(self, folder: Path, names: list[str], what: Callable[[Path], T]) -> dict[str, T]:
        """`what` of each file of a folder, which processes share among themselves; the names are those of the first."""
        return {name: what(folder / name) for name in names}


ALONE = Alone()
