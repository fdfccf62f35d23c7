"""docs/reliability.md says what tests prove, and what the long run measured."""

import ast
import re
from pathlib import Path

import pytest

from benchmarks import long_run
from benchmarks.machine import RESULTS, newest
from fastsae import files
from fastsae.report import png

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reliability.md").read_text()


def test_every_test_that_the_page_names_exists():
    tests = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert set(named) <= tests, row


@pytest.mark.parametrize("path", sorted((RESULTS / "long_run").glob("*.json")), ids=lambda path: path.stem)
def test_the_long_run(path):
    found = files.read_json(path)
    last = found["samples"][-1]
    assert last["seconds"] >= 60 * found["settings"]["minutes"] >= 1800
    assert {s["files"] for s in found["samples"]} == {found["samples"][0]["files"]}
    assert long_run.spread(found) <= 0.02
    assert {"cpu", "cores", "threads"} <= found["hardware"].keys()
    assert {"torch", "commit"} <= found["versions"].keys()


def test_the_page_and_its_plot_are_those_of_the_results():

    found = newest("long_run")
    assert long_run.told(found) in PAGE
    assert png.description(ROOT / long_run.PLOT) == png.told("results", found)
