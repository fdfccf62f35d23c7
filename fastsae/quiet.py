"""Imports of packages that are loud about what does not concern us."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports() -> Iterator[None]:
    """Import without warnings in the log: torchao, which transformers imports too, warns of each of its own libraries
    that was built for another machine, none of which is needed here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
