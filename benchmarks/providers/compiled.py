"""torch.compile, or the reason why it cannot be had here."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.exc import BackendCompilerFailed

from benchmarks.outcomes import Missing


def compiled_or_missing(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`function` under torch.compile. Raises Missing when called where there is no working compiler.

    What dynamo cannot trace is no such reason, and is raised as it is.
    """
    inner = torch.compile(function, **options)

    @functools.wraps(function)
    def called(*arguments: Any, **named: Any) -> Any:
        try:
            return inner(*arguments, **named)
        except Exception as error:
            backend = isinstance(error, BackendCompilerFailed) or type(error).__module__.startswith("torch._inductor")
            if not backend:
                raise
            raise Missing(f"torch.compile fails here ({' '.join(str(error).split())[:200]})") from error

    return called
