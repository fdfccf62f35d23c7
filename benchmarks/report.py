"""`python -m benchmarks.report` writes the README's tables from the committed results; `--check` only compares."""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def tables(results: dict[str, Any]) -> str:
    """Step times and memory of one results file, as Markdown."""
    hardware, versions = results["hardware"], results["versions"]
    steps = [r for r in results["rows"] if r["benchmark"] == "step"]
    gemm = statistics.median(s for r in steps if r["provider"] == "bare GEMM" for s in r["seconds"])
    lines = ["| training step, fp32, B=2048 d_in=1024 d_sae=65536 k=64 | seconds | / bare GEMM |", "|---|---:|---:|"]
    shown = set()
    for row in steps:
        if row["provider"] in shown:
            continue
        shown.add(row["provider"])
        if "missing" in row:
            lines.append(f"| {row['provider']} | {row['missing']} | |")
            continue
        median = gemm if row["provider"] == "bare GEMM" else row["median"]
        name = f"**{row['provider']}**" if row["provider"].startswith("fastsae") else row["provider"]
        lines.append(f"| {name} | {median:.2f} | {median / gemm:.2f} |")
    lines.append("")
    for row in (r for r in results["rows"] if r["benchmark"] == "memory"):
        small, large = row["batch_sizes"]
        growth = row["growth_bytes"] / 1e6
        lines.append(f"Peak memory of a {row['provider']} step grows by {growth:.0f} MB from B={small} to B={large}.")
    lines += [
        "",
        f"Medians of one run on {hardware['cpu']}, {hardware['threads']} threads, torch {versions['torch']}, "
        f"fused Adam in all, {hardware['date']}; `make bench`.",
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
    parser.add_argument("--check", action="store_true", help="fail if the README disagrees with the results")
    check = parser.parse_args().check
    found = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    if not found:
        sys.exit("benchmarks/results holds no results; run `make bench` first")
    readme = ROOT / "README.md"
    made = render(readme.read_text(), json.loads(found[0].read_text()))
    if not check:
        readme.write_text(made)
    elif made != readme.read_text():
        sys.exit("README.md disagrees with benchmarks/results; run `python -m benchmarks.report`")


if __name__ == "__main__":
    main()
