"""The README's sections: the table of one CPU's results at one shape, and the bars that GPUs reached."""

import re

from benchmarks.report import gpus
from benchmarks.report.page import PAGE
from benchmarks.report.results import RESULTS, Unusable, of_cpus
from benchmarks.report.rows import Results, missing_steps, step_shapes
from benchmarks.report.tables import faster_steps, floor_line, step_table, worst_error
from fastsae.report import markdown

README = "README.md"
RECIPES = "Peers that clip gradients or keep decoder rows at norm 1 are compared with our Trainer doing the same."
_SECTION = re.compile(r"<!-- benchmarks: (\S+) -->\n.*?<!-- /benchmarks -->", re.S)


def render(readme: str, found: dict[str, Results], name: str | None = None) -> str:
    """The README, its sections made anew: from the results it names (or `name`), and from all of GPUs."""
    section = _SECTION.search(readme)
    if section is None:
        raise Unusable(
            f"{README} must hold a section between <!-- benchmarks: NAME --> and <!-- /benchmarks -->, NAME being the "
            f"stem of a file in {RESULTS}: {', '.join(found)}"
        )
    name = name or section[1]
    of_any_cpu = of_cpus(found)
    if name not in of_any_cpu:
        raise Unusable(
            f"{README} is to show {name}, and {RESULTS} has no CPU's results of that name; "
            f"name one with `python -m benchmarks.report --readme NAME`: {', '.join(of_any_cpu)}"
        )
    made = f"<!-- benchmarks: {name} -->\n{readme_section(name, found[name])}\n<!-- /benchmarks -->"
    text = readme[: section.start()] + made + readme[section.end() :]
    try:
        return markdown.with_section(text, "gpu benchmarks", gpus.readme_section(found))
    except ValueError as error:
        raise Unusable(f"{README}: {error}") from error


def readme_section(name: str, results: Results) -> str:
    """The table of one shape, and what must be known to read it."""
    shapes = sorted(step_shapes(results), key=lambda s: (s.name == "bench", s.B * s.D * s.M))
    shape = shapes[-1]
    missing, wanting = missing_steps(results, shape)
    lines = [step_table(results, shape, missing), "", RECIPES]
    lines += [faster_steps(results, shape), floor_line(results, shape), ""]
    if wanting:
        lines.append(
            f"Not measured here (no GPU, or no native bf16, available): {'; '.join(r['provider'] for r in wanting)}."
        )
    hardware, versions = results["hardware"], results["versions"]
    lines.append(
        "Largest relative error of a reconstruction or a gradient among all that was timed, against the specification "
        f"in fp64: {worst_error(results)}. {hardware['cpu']}, {hardware['threads']} threads, "
        f"{hardware['instructions']}, torch {versions['torch']}, commit {versions['commit']}, {hardware['date']}; "
        f"`make bench`, {results['seconds'] / 60:.0f} minutes. [All tables and plots]({PAGE}#{name})."
    )
    return "\n".join(lines)
