"""Advice on packages that only some parts of fastsae need."""

LAB = 'install fastsae with its "lab" extra: `pip install ".[lab]"` in a clone of the repository'
