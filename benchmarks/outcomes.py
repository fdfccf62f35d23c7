"""Ends of a measurement without a number. Imports no torch: stages of `make gpu` start without it."""


class Missing(Exception):
    """This cannot be measured here; the message says why, and stands in the row."""


class WrongAnswer(AssertionError):
    """A provider computes another function."""
