"""The results for people: tables, sentences and plots, all from study.json."""

from pathlib import Path
from typing import Any

from fastsae import files
from fastsae.report import interval
from fastsae.report.markdown import put_section, table
from fastsae.report.png import save, told

Found = dict[str, Any]
PLOTS = ("differences.png", "sizes.png")


def arm_rows(found: Found) -> list[dict[str, str]]:
    """One row an arm: its size, its cost, and each metric's mean with its 95 % interval."""
    rows = []
    for arm in found["arms"]:
        row = {
            "arm": arm["arm"],
            "d_sae": f"{arm['d_sae']:,}",
            "parameters": f"{arm['parameters'] / 1e6:.2f} M",
            "steps": f"{arm['steps']:,}",
            "training TFLOP": f"{arm['training_flops'] / 1e12:.1f}",
            "lr": f"{arm['lr']:g}",
            "dead": f"{arm['dead_share']:.1%}",
        }
        rows.append(row | {name: interval(value) for name, value in arm["metrics"].items()})
    return rows


def shown_rows(found: Found) -> list[dict[str, str]]:
    """One row an arm: what is measured of it and compares nothing, with 95 % intervals."""
    names = list(dict.fromkeys(name for arm in found["arms"] for name in arm["shown"]))
    return [
        {"arm": arm["arm"]} | {name: interval(arm["shown"][name]) if name in arm["shown"] else "" for name in names}
        for arm in found["arms"]
    ]


def verdicts(found: Found) -> list[str]:
    """The questions and their answers in plain words."""
    return [f"{answer['question']['text']}\n  {answer['verdict']} {_cost(answer)}" for answer in found["answers"]]


def _cost(answer: Found) -> str:
    more = answer["cost"]
    return f"({more['parameters']:.2f} times the parameters, {more['training_flops']:.2f} times the training FLOPs.)"


def write(found: Found, folder: Path) -> Path:
    """Write study.md and its plots into `folder`; returns the page."""
    draw_differences(found, folder / PLOTS[0])
    draw_sizes(found, folder / PLOTS[1])
    page = folder / "study.md"
    title = "# Does integration help?"
    files.write_atomically(page, lambda p: p.write_text("\n".join([title, "", markdown(found)]), encoding="utf-8"))
    return page


def publish(results: Path, page: Path) -> None:
    """Bring what a page written by hand holds between the two marks up to date, its plots in a folder of its name."""
    found, plots = files.read_json(results), page.with_suffix("")
    put_section(page, "results", markdown(found, f"{plots.name}/"))
    plots.mkdir(exist_ok=True)
    draw_differences(found, plots / PLOTS[0])
    draw_sizes(found, plots / PLOTS[1])


def markdown(found: Found, plots: str = "") -> str:
    """Conditions, table, answers and plots; `plots` is where the plots lie, ending in a slash."""
    study, data, environment = found["study"], found["data"], found["environment"]
    meanings = [f"- `{arm['arm']}`: {arm['meaning']}" for arm in found["arms"]]
    answers = [f"**{a['question']['text']}**  \n{a['verdict']} {_cost(a)}\n" for a in found["answers"]]
    grid = sorted(study["lrs"])
    ends = [arm["arm"] for arm in found["arms"] if len(grid) > 1 and arm["lr"] in (grid[0], grid[-1])]
    at_end = f" At an end of the grid, so that one beyond might be better: {', '.join(ends)}." if ends else ""
    conditions = (
        f"{data['hook']} of model {data['model']} on {data['text']}: {data['training_rows']:,} activations to train "
        f"on, {data['held_out_tokens']:,} tokens of {found['held_out_documents']} held-out documents to measure on. "
        f"Every arm: k = {study['k']}, batches of {data['batch_size']:,}, {study['seeds']} seeds, a learning rate "
        f"chosen among {', '.join(f'{lr:g}' for lr in study['lrs'])} by its fit of training documents.{at_end} "
        "A feature is dead that was active on none of the last tenth of its training rows. "
        "Intervals are over seeds and documents: 95 % in the tables; those of differences, paired by seed and "
        f"document, hold together for one question in 95 %. The first question is the primary one; there are "
        f"{len(found['answers'])}, and the intervals of the others are not widened for that."
    )
    where = (
        f"{environment['date']}, {environment['processor']}, {environment['threads']} threads, "
        f"torch {environment['torch']}, fastsae {environment['fastsae']}."
    )
    return "\n".join(
        [
            *answers,
            f"![Differences]({plots}{PLOTS[0]})",
            "",
            _table(arm_rows(found)),
            "",
            *meanings,
            "",
            _table(shown_rows(found)),
            "",
            "Against its own identity pathway, as in the paper: that pathway was never trained to reconstruct alone, "
            "so this compares nothing with a TopK SAE.",
            "",
            f"![Sizes]({plots}{PLOTS[1]})",
            "",
            conditions,
            "",
            where,
            "",
        ]
    )


def _table(rows: list[dict[str, str]]) -> str:
    return table(list(rows[0]), (row.values() for row in rows))


def draw_differences(found: Found, path: Path) -> None:
    """Relative differences with their intervals, a panel a metric, a line a question."""
    names = [c["metric"] for c in found["answers"][0]["comparisons"]]
    labels = [f"{a['question']['arm']} vs\n{a['question']['baseline']}" for a in found["answers"]]

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for axes, metric in zip(panels, names, strict=True):
            for place, answer in enumerate(found["answers"]):
                value = next(c["relative"] for c in answer["comparisons"] if c["metric"] == metric)
                if value["low"] is not None:
                    axes.plot([100 * value["low"], 100 * value["high"]], [place, place], color="#2563a8", linewidth=2)
                axes.plot([100 * value["estimate"]], [place], "o", color="#2563a8")
            axes.axvline(0, color="#666666", linewidth=1)
            axes.set(title=metric, xlabel="difference, % of the baseline\n(left: the arm is better)")
            axes.set_yticks(range(len(labels)), labels)
            axes.grid(alpha=0.3)
        panels[0].invert_yaxis()

    save(path, (3.2 * len(names) + 1.2, 1.4 + 0.5 * len(labels)), draw, told("results", found))


def draw_sizes(found: Found, path: Path) -> None:
    """Each arm's metrics over its parameters."""
    names = list(found["arms"][0]["metrics"])

    def draw(figure: Any) -> None:
        for axes, metric in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            for arm in found["arms"]:
                value, size = arm["metrics"][metric], arm["parameters"] / 1e6
                if value["low"] is not None:
                    axes.plot([size, size], [value["low"], value["high"]], color="#9aa1ad", linewidth=1)
                axes.plot([size], [value["estimate"]], "o", label=arm["arm"])
            axes.set(xlabel="million parameters", title=metric)
            axes.grid(alpha=0.3)
        figure.axes[-1].legend(fontsize=7.5)

    save(path, (3.6 * len(names), 3.4), draw, told("results", found))
