"""Whether a package is there. A stub or a mock, which test suites and other libraries put in its place, is not it."""

import importlib.util
import sys


def stand_in(name: str) -> str | None:
    """Describe what sys.modules holds in the place of package `name`; None if it is the package, or nothing yet."""
    module = sys.modules.get(name)
    if module is None or isinstance(getattr(module, "__file__", None), str):
        return None
    return f"sys.modules[{name!r}] is {module!r}, which is not the package but a stub or mock that something put there"


def is_there(name: str) -> bool:
    """Whether package `name` could be imported, without doing so."""
    if name in sys.modules:
        return sys.modules[name] is not None and stand_in(name) is None
    found = importlib.util.find_spec(name)
    return bool(found and found.origin)  # a folder of that name, say, has no origin


def need(name: str, what: str) -> None:
    """Raise ImportError where a stub or mock stands for package `name`, which `what` is about to import."""
    instead = stand_in(name)
    if instead is not None:
        raise ImportError(f"{what} needs {name}, but {instead}. Take it out, or do this in another process")
