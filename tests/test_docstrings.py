"""The first words of docstrings: a noun phrase or an imperative, so that a reader meets the field's word first."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEVER_FIRST = re.compile(r"\s*(What|Who|Whose|Which|Of|The same|How|Where|When)\b")


def twisted(source: str) -> list[int]:
    """Find the lines of docstrings, attributes' included, that begin with one of these words."""
    alone = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr)]
    strings = [value for value in alone if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    return sorted(string.lineno for string in strings if NEVER_FIRST.match(str(string.value)))


def test_docstrings_begin_with_a_noun_phrase_or_an_imperative():
    files = [path for folder in ("fastsae", "csrc_triton", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    named = {str(path.relative_to(ROOT)): path for path in files}
    wrong = [f"{name}:{line}" for name in sorted(named) for line in twisted(named[name].read_text())]
    assert not wrong, f"{', '.join(wrong)}: begin with a noun phrase (a value) or an imperative verb (a function)"


@pytest.mark.parametrize(
    "first", ["What is", "Who is", "Whose", "Which is", "Of it", "The same", "How", "Where", "When"]
)
def test_a_twisted_beginning_is_found_wherever_it_stands(first: str):
    here = f'"""{first}."""'
    assert twisted(f"{here}\nA = 1\n{here}\nclass C:\n    {here}\n    a: int\n    {here}\n") == [1, 3, 5, 7]
    assert twisted(f"def f():\n    '''\n    {first}.'''\n    self.a = 1\n    {here}\n    return {here!r}") == [2, 5]
    assert twisted('"""However, the samedi. Number of them; of what."""') == []
