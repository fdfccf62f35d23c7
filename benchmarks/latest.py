"""A cache of one: what it held is given back before the next is made, since both would not fit."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

P, T = ParamSpec("P"), TypeVar("T")


class Latest(Generic[P, T]):
    """`function`, whose last result is kept."""

    def __init__(self, function: Callable[P, T]) -> None:
        functools.update_wrapper(self, function)
        self._function, self._signature = function, inspect.signature(function)
        self._kept: dict[Any, T] = {}

    def __call__(self, *arguments: P.args, **named: P.kwargs) -> T:
        bound = self._signature.bind(*arguments, **named)
        bound.apply_defaults()
        key = tuple(bound.arguments.items())
        if key not in self._kept:
            self.forget()
            self._kept[key] = self._function(*arguments, **named)
        return self._kept[key]

    def forget(self) -> None:
        self._kept.clear()
