"""Driver of pytest-benchmark, and the times that a row holds."""

import statistics
import time
from collections.abc import Callable
from typing import Any

# Rounds; of what takes longer than LONG seconds, two.
LEAST, MOST, LONG = 3, 30, 10.0


def timed(
    benchmark: Any,
    function: Callable[..., object],
    seconds: float,
    once: float,
    setup: Callable[[], tuple[tuple[Any, ...], dict[str, Any]] | None] | None = None,
) -> dict[str, Any]:
    """Rounds of `function` for about `seconds`, one taking about `once`; nothing here warms up.

    setup() runs before each round, outside of the time, and may return (args, kwargs) for it.
    """
    least = LEAST if once < LONG else 2
    rounds = int(min(max(seconds / max(once, 1e-6), least), MOST))
    benchmark.pedantic(function, setup=setup, rounds=rounds)
    return summary(benchmark.stats.stats.data)


def summary(seconds: list[float]) -> dict[str, Any]:
    """Median and spread, and every round, in seconds."""
    return {
        "median": round(statistics.median(seconds), 6),
        "min": round(min(seconds), 6),
        "max": round(max(seconds), 6),
        "seconds": [round(s, 6) for s in seconds],
    }


def wall(function: Callable[..., object], *arguments: Any) -> float:
    begun = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begun
