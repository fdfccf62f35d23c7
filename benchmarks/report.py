"""`python -m benchmarks.report` writes the README's tables from the committed results; `--check` only compares."""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.cases import SHAPES
from benchmarks.machine import RESULTS, results_file
from benchmarks.providers import BareGemm, JointTrainerStep, TopKTrainerStep

ROOT = Path(__file__).parents[1]


def tables(results: dict[str, Any]) -> str:
    """Step times, memory and harvest of one results file, as Markdown."""
    hardware, versions = results["hardware"], results["versions"]
    of = {name: [r for r in results["rows"] if r["benchmark"] == name] for name in ("step", "memory", "harvest")}
    steps = {r["provider"]: r for r in of["step"]}  # the bare GEMM is there twice, first and last
    gemm = statistics.median(s for r in of["step"] if r["provider"] == BareGemm.name for s in r["seconds"])
    ours = {p.compared_with: steps[p.name]["median"] for p in (TopKTrainerStep, JointTrainerStep)}
    shape = SHAPES[of["step"][0]["shape"]]
    lines = [
        f"| training step, fp32, B={shape.B} d_in={shape.D} d_sae={shape.M} k={shape.K} | seconds | / bare GEMM "
        "| / fastsae |",
        "|---|---:|---:|---:|",
    ]
    for name, row in steps.items():
        if "missing" in row:
            lines.append(f"| {name} | {row['missing']} | | |")
            continue
        median = gemm if name == BareGemm.name else row["median"]
        ratio = f"{median / ours[row['architecture']]:.2f}" if row["architecture"] else ""
        shown = f"**{name}**" if name.startswith("fastsae") else name
        lines.append(f"| {shown} | {median:.2f} | {median / gemm:.2f} | {ratio} |")
    lines.append("")
    for row in of["memory"]:
        small, large = row["batch_sizes"]
        growth = row["growth_bytes"] / 1e6
        lines.append(f"Peak memory of a {row['provider']} step grows by {growth:.0f} MB from B={small} to B={large}.")
    lines += [
        f"Harvesting {row['tokens']:,} tokens at width {row['d_in']} from the embedded model into a store takes "
        f"{row['seconds']:.0f} s."
        for row in of["harvest"]
    ]
    lines += [
        "",
        f"Medians of one run on {hardware['cpu']}, {hardware['threads']} threads, torch {versions['torch']}, "
        f'fused Adam in all, {hardware["date"]}; `make bench`. "/ fastsae" compares with our Trainer on the same '
        "architecture.",
    ]
    return "\n".join(lines)


def render(readme: str, results: dict[str, Any]) -> str:
    """The README with its benchmark section made anew."""
    place = re.compile(r"(?<=<!-- benchmarks -->\n).*(?=<!-- /benchmarks -->)", re.S)
    if not place.search(readme):
        raise ValueError("README.md must hold a section between <!-- benchmarks --> and <!-- /benchmarks -->")
    return place.sub(lambda _: tables(results) + "\n", readme)


def main() -> None:
    """Write the README's benchmark section, or check that it is what the results say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=results_file(), help="default: of this machine")
    parser.add_argument("--check", action="store_true", help="fail if the README disagrees with the results")
    options = parser.parse_args()
    if not options.results.is_file():
        sys.exit(f"{options.results} does not exist; run `make bench`, or name one of {RESULTS}")
    readme = ROOT / "README.md"
    made = render(readme.read_text(), json.loads(options.results.read_text()))
    if not options.check:
        readme.write_text(made)
    elif made != readme.read_text():
        sys.exit(f"README.md disagrees with {options.results}; run `python -m benchmarks.report`")


if __name__ == "__main__":
    main()
