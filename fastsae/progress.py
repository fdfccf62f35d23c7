"""Progress of what takes long: a bar in a terminal or notebook, elsewhere a line in the log now and then."""

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar

from fastsae import packages

logger = logging.getLogger("fastsae")
T = TypeVar("T")
_shown: ContextVar[bool] = ContextVar("shown", default=True)
_of: ContextVar[str] = ContextVar("of", default="")
# Nothing is shown of what takes less; in a log, a line every so often.
_DELAY, _BETWEEN_LINES = 2.0, 30.0
_LINE = "{desc}: {n_fmt}/{total_fmt} {unit} in {elapsed}, {remaining} left, {rate_fmt}{postfix}"


class _Lines:
    """A file for tqdm whose lines go to the log."""

    def write(self, text: str) -> None:
        if line := text.strip():
            logger.info(line)

    def flush(self) -> None:
        """Nothing is held back."""


class _Silent(nullcontext[Any]):
    """A bar that shows nothing, where tqdm may be missing too."""

    def __enter__(self) -> "_Silent":
        return self

    def update(self, n: float = 1) -> None: ...
    def set_postfix(self, *_: Any, **__: Any) -> None: ...
    def close(self) -> None: ...


@contextmanager
def shown(yes: bool) -> Iterator[None]:
    """Show progress inside, or, once one caller has said no, none."""
    token = _shown.set(yes and _shown.get())
    try:
        yield
    finally:
        _shown.reset(token)


@contextmanager
def of(name: str) -> Iterator[None]:
    """Begin the names of all bars inside with `name`, where several things are gone through alike."""
    token = _of.set(f"{_of.get()}{name}: ")
    try:
        yield
    finally:
        _of.reset(token)


def named(what: str) -> str:
    """The name of a bar for `what`."""
    return _of.get() + what


def bar(what: str, total: int | None, unit: str, done: int = 0, *, leave: bool = True, delay: float = _DELAY) -> Any:
    """A context manager with tqdm's update(n), set_postfix(numbers) and close().

    what: a noun that tells this bar from others. done: units done before. leave: whether it stays when it is full.
    delay: seconds before it appears.
    """
    if not _shown.get():
        return _Silent()
    if not packages.is_there("tqdm"):
        instead = packages.stand_in("tqdm") or "tqdm is not installed"
        warnings.warn(f"no progress is shown: {instead}", stacklevel=3)
        return _Silent()
    options: dict[str, Any] = {
        "desc": named(what),
        "total": total,
        "unit": unit,
        "initial": done,
        "unit_scale": unit in ("row", "token"),
        "delay": delay,
    }
    if _is_notebook():
        from tqdm.auto import tqdm

        return tqdm(**options, leave=leave)
    from tqdm import tqdm

    if sys.stderr is not None and sys.stderr.isatty():
        return tqdm(**options, leave=leave)
    return tqdm(**options, file=_Lines(), bar_format=_LINE, mininterval=_BETWEEN_LINES, maxinterval=2 * _BETWEEN_LINES)


def over(what: str, items: Sequence[T], unit: str) -> Iterator[T]:
    """The items, under a bar that is gone after the last one."""
    with bar(what, len(items), unit, leave=False) as shown_so_far:
        for item in items:
            yield item
            shown_so_far.update(1)


def _is_notebook() -> bool:
    return "ipykernel" in sys.modules
