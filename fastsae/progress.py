"""Progress bars. No work fails for want of one."""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from fastsae import packages


def bar(items: Iterable[Any] | None = None, **options: Any) -> Any:
    """A bar of tqdm, with its options; where that is not there, a warning, and something that shows nothing."""
    if packages.is_there("tqdm"):
        from tqdm import tqdm

        return tqdm(items, **options)
    instead = packages.stand_in("tqdm") or "tqdm is not installed"
    warnings.warn(f"no progress bar is shown: {instead}", stacklevel=3)
    return _Nothing(items)


class _Nothing:
    """What is done with bars, without one."""

    def __init__(self, items: Iterable[Any] | None) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items or ())

    def __enter__(self) -> "_Nothing":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: int = 1) -> None:
        pass

    def set_postfix(self, *_: Any, **options: Any) -> None:
        pass

    def close(self) -> None:
        pass
