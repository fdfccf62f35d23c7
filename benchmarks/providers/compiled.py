"""Guard for providers that use torch.compile, which needs a working compiler."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch._dynamo.exc import BackendCompilerFailed

from benchmarks.outcomes import Missing


@contextmanager
def compiling() -> Iterator[None]:
    """Around forwards and backwards that may compile. Raises Missing where there is no working compiler.

    What dynamo cannot trace is no such reason, and is raised as it is.
    """
    try:
        yield
    except Exception as error:
        if not (isinstance(error, BackendCompilerFailed) or type(error).__module__.startswith("torch._inductor")):
            raise
        raise Missing(f"torch.compile fails here ({' '.join(str(error).split())[:200]})") from error
