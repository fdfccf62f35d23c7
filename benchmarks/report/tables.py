"""Markdown tables of one results file, each with what must be said below it."""

from collections.abc import Iterable
from typing import Any

from benchmarks.cases import PHASES, Shape
from benchmarks.report.cells import figures, shown, spread
from benchmarks.report.comparisons import floors, noise, over_gemm, over_trainer, standard
from benchmarks.report.rows import (
    ARCHITECTURES,
    EVERY_PHASE,
    Results,
    Row,
    architectures,
    by_architecture,
    is_ours,
    select,
    steps_at,
    unique,
)
from fastsae.report import markdown

# What over_trainer compares with.
ALIKE = "our Trainer training the same way (clipping, unit-norm decoder rows)"


def step_table(results: Results, shape: Shape, missing: list[Row]) -> str:
    """Whole training steps at one shape, and those of `missing` with their reasons."""
    header = [
        f"training step, fp32, B={shape.B} d_in={shape.D} d_sae={shape.M} k={shape.K}",
        *("seconds", "spread (min to max)", "/ bare GEMM", "/ counted floor", "/ fastsae Trainer", "peak memory GB"),
    ]
    (gemm, *_) = select(results, "gemm", shape=shape.name)
    body = [["bare GEMM", figures(gemm["median"]), spread(gemm), "1.00", "", "", ""]]
    for row in steps_at(results, shape):
        floor = floors(results["rows"], shape, row["architecture"] == "joint")["step"]
        ratio = over_trainer(results, row)
        body.append(
            [
                shown(row),
                figures(row["median"]),
                spread(row),
                f"{over_gemm(row):.2f}",
                f"{row['median'] / floor:.2f}",
                f"{ratio:.2f}" if ratio else "",
                f"{row['peak_bytes'] / 1e9:.2f}" if row.get("peak_bytes") else "",
            ]
        )
    body += [[shown(row), f"missing: {row['missing']}", "", "", "", "", ""] for row in missing]
    return markdown.table(header, body)


def faster_steps(results: Results, shape: Shape) -> str:
    others = [r for r in steps_at(results, shape) if not is_ours(r["provider"])]
    return faster(ALIKE, ((r["provider"], over_trainer(results, r)) for r in others))


def floor_line(results: Results, shape: Shape) -> str:
    seconds = {kind: floors(results["rows"], shape, kind == "joint")["step"] for kind in ARCHITECTURES}
    gemm, copy = select(results, "gemm", shape=shape.name)[0], select(results, "copy")[0]
    line = (
        f"The counted floor ({', '.join(f'{ARCHITECTURES[k]} {figures(s)} s' for k, s in seconds.items())}) is a bound "
        "computed from counted work, not a measurement: each phase's operations at the rate of the bare GEMM "
        f"({figures(gemm['flops_per_second'] / 1e9)} GFLOP/s), or the bytes expected for a random batch at that of a "
        f"copy of memory ({figures(copy['bytes_per_second'] / 1e9)} GB/s), whichever takes longer. "
        "Products by blocks of features, as ours on a CPU, can be faster than the bare GEMM."
    )
    screens = results["hardware"].get("native_bf16")
    return line + (" It counts fp32: encoding that is screened in bf16 can fall below it." if screens else "")


def compared_line(results: Results, shape: Shape) -> str:
    """At how many rows the comparison with the specification was made; nothing if at whole batches."""
    least = min(r["compared_rows"] for r in select(results, "step", shape=shape.name))
    return f"Compared with the specification at {least} rows; a batch has {shape.B}." if least < shape.B else ""


def phases(results: Results, shape: Shape) -> list[str]:
    """Milliseconds of each phase, a row a provider, under the floor of its architecture."""
    rows = select(results, "step", shape=shape.name)
    body: list[list[str]] = []
    for kind in architectures(rows):
        of_kind = [r for r in rows if r["architecture"] == kind]
        floor = floors(results["rows"], shape, kind == "joint")
        body.append([f"counted floor, {ARCHITECTURES[kind]}", *(figures(1e3 * floor[p]) for p in EVERY_PHASE)])
        for provider in unique(r["provider"] for r in of_kind):
            ms = {r["phase"]: figures(1e3 * r["median"]) for r in of_kind if r["provider"] == provider}
            first = next(r for r in of_kind if r["provider"] == provider)
            body.append([shown(first), *(ms.get(p, "") for p in EVERY_PHASE)])
    others = [r for r in rows if r["phase"] in PHASES and not is_ours(r["provider"])]
    ratios = [(f"{r['provider']} in {r['phase']}", over_trainer(results, r)) for r in others]
    return [markdown.table(["ms", *EVERY_PHASE], body), faster(f"the same phase of {ALIKE}", ratios)]


def operations(results: Results, shape: str) -> list[str]:
    body, ratios = [], []
    for row in select(results, "op", shape=shape):
        ours = select(results, "op", shape=shape, op=row["op"], direction=row["direction"], provider="fastsae")
        ratio = row["median"] / ours[0]["median"] if ours else None
        what = f"{row['op']}, {row['direction']}"
        cells = [figures(1e3 * row["median"]), spread(row, 1e3), f"{ratio:.2f}" if ratio else "", f"{row['error']:.1e}"]
        body.append([what, shown(row), *cells])
        if not is_ours(row["provider"]):
            ratios.append((f"{row['provider']} in {what}", ratio))
    header = ["operation", "by", "ms", "spread (min to max)", "/ fastsae", "error"]
    return [markdown.table(header, body, words=2), faster("the same operation of fastsae", ratios)]


def faster(whom: str, ratios: Iterable[tuple[str, float | None]]) -> str:
    """The sentence on who is faster than we are; `ratios`: other providers' times over ours, None without ours."""
    ratios = list(ratios)
    ahead = [f"{name} ({ratio:.2f} of its time)" for name, ratio in ratios if ratio is not None and ratio < 1]
    alone = [name for name, ratio in ratios if ratio is None]
    said = f"Faster than {whom}: {'; '.join(ahead)}." if ahead else f"No other provider is faster than {whom}."
    return said + (f" Not compared, not available here: {'; '.join(alone)}." if alone else "")


def quality(results: Results) -> list[str]:
    """Final FVUs, and how far they are from the standard's, beside what chance changes."""
    rows = select(results, "quality")
    body = []
    for row in sorted((r for r in rows if r["order"] == 0), key=lambda r: (by_architecture(r), r["recipe"])):
        against = standard(rows, row)
        far = "not measured"
        if against is not None:
            far = "standard" if row is against else f"{100 * (row['final'] / against['final'] - 1):+.2f} %"
        body.append([shown(row), ARCHITECTURES[row["architecture"]], row["recipe"], f"{row['final']:.4f}", far])
    chance = {kind: noise(rows, kind) for kind in ARCHITECTURES}
    told = ", ".join(f"{ARCHITECTURES[kind]} {100 * share:.2f} %" for kind, share in chance.items() if share)
    return [
        "Every provider trains on the same activations of the embedded model in the same order, from the same "
        "weights. Final FVU: the mean of the last quarter of the steps. The standard is the reference backend, and for "
        "those who clip gradients or keep decoder rows at norm 1 our Trainer doing the same: a recipe changes the "
        "curve, an implementation must not. Beside the differences: by how much the final FVU changes with the order "
        f"of the batches alone ({told or 'not measured'}).",
        markdown.table(["provider", "architecture", "recipe", "final FVU", "from the standard"], body, words=3),
    ]


WHO = {"stock": "its own TopK SAE", "topk": "**fastsae TopK**", "joint": "**fastsae joint**"}


def trainers(results: Results, shape: str) -> str:
    """Loops of other packages at one shape, with their SAE in them and with ours."""
    rows, body = select(results, "trainer", shape=shape), []
    for row in rows:
        stock = next((r for r in rows if r["trainer"] == row["trainer"] and r["who"] == "stock"), None)
        gain = over_gemm(stock) / over_gemm(row) if stock else None
        body.append(
            [
                f"{row['trainer']} ({row['version']})",
                WHO[row["who"]],
                figures(row["median"]),
                spread(row),
                figures(row["rows_per_second"]),
                f"{over_gemm(row):.2f}",
                f"{gain:.2f}" if gain else "",
                f"{1 - row['sae_median'] / row['median']:.0%}",
            ]
        )
    header = ["trainer", "SAE", "seconds an iteration", "spread (min to max)", "rows/s", "/ bare GEMM"]
    return markdown.table([*header, "times as fast", "outside the SAE"], body, words=2)


def missing(results: Results) -> list[str]:
    """List everyone who could not be measured, with the reason and the benchmarks."""
    where: dict[tuple[str, str], list[str]] = {}
    for row in results["rows"]:
        if "missing" in row:
            who = row.get("provider") or row.get("trainer", row["benchmark"])
            where.setdefault((who, " ".join(row["missing"].split())), []).append(row["benchmark"])
    lines = [f"- {who}: {why} ({', '.join(unique(them))})" for (who, why), them in where.items()]
    return ["### Missing", "\n".join(lines)] if lines else []


def worst_error(results: Results) -> str:
    """The largest error among all that was timed, and whose it is."""
    found = [(e, r, what) for r in results["rows"] for what, e in r.get("errors", {}).items()]
    found += [(r["error"], r, f"{r['op']} {r['direction']}") for r in select(results, "op")]
    error, row, what = max(found, key=lambda f: f[0])
    return f"{error:.1e} ({what}, {row['provider']})"


def stages(results: Results) -> str:
    """Tabulate the end of each stage of a GPU's run."""
    outcomes = [
        [
            stage,
            o.get("status", ""),
            f"{o.get('seconds', 0):.0f}",
            ", ".join(f"{n} {s}" for s, n in o["counts"].items()),
        ]
        for stage, o in results["stages"].items()
    ]
    return markdown.table(["stage", "outcome", "seconds", "cases"], outcomes, words=2)


def cases(rows: Iterable[Row]) -> str:
    """Tabulate the cases of a GPU's run: the medians measured, or the reason why there are none."""
    body = [[r["case"], r["status"], r.get("reason") or ", ".join(medians(r))] for r in rows]
    return markdown.table(["case", "status", "ms, medians"], body, words=3)


def medians(facts: dict[str, Any], of: tuple[str, ...] = ()) -> list[str]:
    """List all medians within a row, each named by the keys that lead to it."""
    if "median" in facts:
        return [f"{' '.join(of)} {figures(facts['median'])}"]
    inner = [(key, value) for key, value in facts.items() if isinstance(value, dict)]
    return [text for key, value in inner for text in medians(value, of if key == "ms" else (*of, key))]
