"""Report of the committed results: the README's table, docs/benchmarks.md and its plots.

`python -m benchmarks.report` writes them from benchmarks/results/*.json, `--check` only compares.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report.page import PAGE, page
from benchmarks.report.plots import PLOTS, Plot, plots
from benchmarks.report.readme import README, render
from benchmarks.report.results import RESULTS, Unusable, of_cpus, read_results
from benchmarks.report.rows import Results

ROOT = Path(__file__).parents[2]


def main(arguments: Sequence[str], root: Path = ROOT) -> None:
    """Write what the results give, or check that it is there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is not what results give")
    parser.add_argument("--readme", metavar="NAME", help=f"show {RESULTS}/NAME.json in the README from now on")
    options = parser.parse_args(arguments)
    try:
        found = read_results(root / RESULTS)
        written, drawn = texts(root, found, options.readme), drawings(root, found)
    except Unusable as reason:
        sys.exit(str(reason))
    if not options.check:
        write(written, drawn, root / PLOTS)
    elif old := outdated(written, drawn, root / PLOTS):
        names = ", ".join(str(path.relative_to(root)) for path in old)
        sys.exit(f"not what {RESULTS} gives: {names}; run `python -m benchmarks.report`")


def texts(root: Path, found: dict[str, Results], name: str | None) -> dict[Path, str]:
    return {root / README: render((root / README).read_text(), found, name), root / PAGE: page(found)}


def drawings(root: Path, found: dict[str, Results]) -> dict[Path, Plot]:
    drawn = {name: plots(results) for name, results in of_cpus(found).items()}
    return {root / PLOTS / f"{name}-{what}.png": plot for name, of in drawn.items() for what, plot in of.items()}


def outdated(written: dict[Path, str], drawn: dict[Path, Plot], folder: Path) -> list[Path]:
    """Files that are not what the results give; plots of results that are there no more too."""
    old = [path for path, text in written.items() if not path.exists() or path.read_text() != text]
    old += [path for path, plot in drawn.items() if not plot.is_in(path)]
    return old + sorted(set(folder.glob("*.png")) - set(drawn))


def write(written: dict[Path, str], drawn: dict[Path, Plot], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in set(folder.glob("*.png")) - set(drawn):
        path.unlink()
    for path, text in written.items():
        path.write_text(text)
    for path, plot in drawn.items():
        plot.save(path)


if __name__ == "__main__":
    main(sys.argv[1:])
