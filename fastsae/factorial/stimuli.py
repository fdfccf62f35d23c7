"""2x2 stimuli: texts that differ in two factors, and the prompts and words that an effect is read from. As JSON:

    {
      "format": 1,
      "name": "formality-emotion",
      "description": "what was varied, and what was held equal",
      "factors": [{"name": "formality", "high": "formal", "low": "casual"},
                  {"name": "emotion", "high": "emotional", "low": "neutral"}],
      "cells": {"high high": {"texts": ["...", ...], "words": ["...", ...]},
                "high low": ..., "low high": ..., "low low": ...},
      "prompts": ["...", ...]
    }

A cell is named by the level of the first factor, then of the second. Discovery needs the texts; clamping needs prompts
and words, which may both be left out.
"""

import difflib
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsae import files

FORMAT = 1
LEVELS = ("high high", "high low", "low high", "low low")
_FOLDER = Path(__file__).with_name("sets")
_HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair: JSON can hold one, no tokenizer reads it
SHIPPED = ("formality_emotion", "code_files", "code_failure")
"""Sets written for this project: English sentences, and two in the domain of the embedded language model."""


@dataclass(frozen=True)
class Factor:
    """One of the two things that are varied."""

    name: str
    high: str
    low: str


@dataclass(frozen=True)
class Cell:
    """One combination of levels."""

    texts: tuple[str, ...]
    """At least two, for there to be a spread within the cell."""
    words: tuple[str, ...]
    """That a text of this cell would use."""


@dataclass(frozen=True)
class Stimuli:
    """A set of stimuli that was checked."""

    name: str
    description: str
    factors: tuple[Factor, Factor]
    cells: dict[str, Cell]
    """By level of the first factor, then the second, in the order of LEVELS."""
    prompts: tuple[str, ...]

    @classmethod
    def load(cls, source: str | Path) -> "Stimuli":
        """Load a file, or a set of ours by its name. Raises FileNotFoundError, or ValueError saying what is wrong."""
        path = _FOLDER / f"{source}.json" if str(source) in SHIPPED else Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"stimuli: {source} is neither a file nor a set of ours ({', '.join(SHIPPED)})")
        return _checked(files.read_json(path), str(path))

    def label(self, level: str) -> str:
        """A cell by the names of its levels: "formal, emotional"."""
        return ", ".join(getattr(f, one) for f, one in zip(self.factors, level.split(), strict=True))

    @property
    def clampable(self) -> bool:
        """Whether there are prompts and words to read an effect from."""
        return bool(self.prompts)


def _checked(found: Any, where: str) -> Stimuli:
    _keys(found, where, {"format", "name", "description", "factors", "cells", "prompts"}, {"description", "prompts"})
    if found["format"] != FORMAT:
        raise ValueError(f"{where}: format is {found['format']!r}, this fastsae reads {FORMAT}")
    factors = found["factors"]
    if not isinstance(factors, list) or len(factors) != 2:
        raise ValueError(f"{where}: factors: expected a list of two; got {_short(factors)}")
    for i, factor in enumerate(factors):
        _keys(factor, f"{where}: factors[{i}]", {"name", "high", "low"})
    texts = [text for factor in factors for text in factor.values()]
    for name, text in {"name": found["name"], "description": found.get("description", "")}.items():
        _require(isinstance(text, str), f"{where}: {name}", "text", text)
    named = re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", found["name"]) is not None
    _require(named, f"{where}: name", "letters, digits, _ . and -, 100 at most, since it names a file", found["name"])
    told = all(isinstance(t, str) and t.strip() and not _HALF.search(t) for t in texts)
    _require(told, f"{where}: factors", "names and levels as text", factors)
    names = [factor["name"] for factor in factors]
    _require(len({*names, "interaction"}) == 3, f"{where}: factors", "two names, neither of them 'interaction'", names)
    for factor in factors:
        _require(factor["high"] != factor["low"], f"{where}: factors", "levels that differ", factor)
    _keys(found["cells"], f"{where}: cells", set(LEVELS))
    cells = {}
    for level in LEVELS:
        cell, at = found["cells"][level], f"{where}: cells[{level!r}]"
        _keys(cell, at, {"texts", "words"}, {"words"})
        cells[level] = Cell(_texts(cell["texts"], f"{at}.texts"), _texts(cell.get("words", []), f"{at}.words"))
        _require(len(cells[level].texts) >= 2, f"{at}.texts", "at least 2 texts", len(cells[level].texts))
    prompts = _texts(found.get("prompts", []), f"{where}: prompts")
    every = {part: [text for cell in cells.values() for text in getattr(cell, part)] for part in ("texts", "words")}
    for part, found_there in {**every, "prompts": prompts}.items():  # each is a unit of a test: twice, it counts twice
        twice = sorted(text for text, times in Counter(text.strip() for text in found_there).items() if times > 1)
        once = "each once" if part == "prompts" else "each in one cell and once"
        _require(not twice, f"{where}: {part}", f"{once}, blanks around not counted", twice)
    blank = [word for word in every["words"] if word != word.strip()]
    _require(not blank, f"{where}: words", "no blanks around a word, as one is put in front of it", blank)
    there = {level: bool(cell.words) for level, cell in cells.items()}
    if any(there.values()) != bool(prompts) or len(set(there.values())) > 1:
        raise ValueError(
            f"{where}: clamping needs prompts, and words in every cell; there are {len(prompts)} prompts, and "
            f"{ {level: len(cell.words) for level, cell in cells.items()} } words. Leave all of them out, or none"
        )
    if any(len(cell.words) < 2 for cell in cells.values()) and prompts:
        raise ValueError(f"{where}: words: expected at least 2 in every cell, to know how much words differ")
    _require(len(prompts) != 1, f"{where}: prompts", "at least 2, to know how much prompts differ", prompts)
    one, other = (Factor(**factor) for factor in factors)
    return Stimuli(found["name"], found.get("description", ""), (one, other), cells, prompts)


def _keys(found: Any, where: str, known: set[str], optional: Collection[str] = ()) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected an object with {sorted(known)}; got {_short(found)}")
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(sorted(known))}."
            raise ValueError(f"{where}: unknown key {key!r}.{hint}")
    if missing := known.difference(optional, found):
        raise ValueError(f"{where}: {sorted(missing)} missing")


def _texts(found: Any, where: str) -> tuple[str, ...]:
    if not isinstance(found, list) or not all(isinstance(text, str) and text.strip() for text in found):
        raise ValueError(f"{where}: expected a list of texts, none of them empty; got {_short(found)}")
    for text in found:
        _require(not _HALF.search(text), where, "text of whole characters", text)
    return tuple(found)


def _require(condition: bool, where: str, expected: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"{where}: expected {expected}; got {_short(got)}")


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
