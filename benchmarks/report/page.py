"""docs/benchmarks.md: a section of tables and plots for each results file."""

from benchmarks.gpu import bars
from benchmarks.report import gpus, tables
from benchmarks.report.cells import figures
from benchmarks.report.plots import plots
from benchmarks.report.results import RESULTS, is_of_gpu
from benchmarks.report.rows import Results, missing_steps, phase_shapes, select, step_shapes, unique

PAGE = "docs/benchmarks.md"
HOW_TO_READ = """\
Times are medians, with the fastest and the slowest round beside them; all providers train with torch's fused Adam, in
fp32, from the same weights, and none is timed before its reconstruction and gradients agree with the specification in
fp64, at whole batches where a section does not say at how many rows. *encode* and *decode* are the forward's two halves
without a graph, *backward* goes from a recorded loss to all gradients, *optimizer* is everything after that; *step* is
all of it as the provider's users run it, and not the sum.

- **/ bare GEMM**: over the encoder's matrix product alone, `x @ W_enc.T + b_enc`, measured before each round of the
  row. A shared machine drifts by more than what is compared.
- **/ counted floor**: over a bound from counted work, not a measurement: each phase's operations at the rate of the
  bare GEMM, or the bytes expected for a random batch at that of a copy of memory, whichever takes longer, and the
  phases one after another (`benchmarks/cases.py`). Of the dictionary's rows a random batch uses
  d_sae (1 - (1 - k/d_sae)^B). The floor counts fp32: encoding screened in bf16 can fall below it.
- **/ fastsae Trainer**: the ratio of a row's / bare GEMM to that of our Trainer training the same way (clipping,
  unit-norm decoder rows) on the same architecture; below 1, the row is faster. sparsify keeps decoder rows at norm 1,
  SAELens clips gradients, dictionary_learning does both; our rows "unit norm", "clipped" and "clipped, unit norm" are
  our Trainer doing the same.
- **peak memory**: of a step, with parameters, gradients and the optimizer's state. GB are 10^9 bytes.
- **torch.compile**: what is compiled is the loss, so encode and decode are left out. So is peak memory: compiling
  leaves memory behind.
- **sparsify** is driven by a loop of ours as its Trainer does; it has no trainer without a language model.
- **SAELens** runs with `rescale_acts_by_decoder_norm` off (decoder rows have norm 1 at the start) and fused Adam."""


INSIDE = """\
Each package's own loop, its options as it ships them, with its TopK SAE in it and with ours from the same weights on
the same batches (losses agree to 0.1 %). *times as fast* is the ratio of the / bare GEMM columns; *outside the SAE* is
the share of an iteration that is neither forward nor backward of the SAE: clipping, optimizer, bookkeeping. sparsify
runs on a model that does nothing but hand over activations."""


def page(found: dict[str, Results]) -> str:
    """docs/benchmarks.md: everything that is committed."""
    parts = ["# Benchmarks", f"Made by `python -m benchmarks.report` from `{RESULTS}/`; edits are lost.", HOW_TO_READ]
    for name, results in found.items():
        parts += _of_gpu(name, results) if is_of_gpu(results) else _of_cpu(name, results)
    return "\n\n".join(parts) + "\n"


def _of_cpu(name: str, results: Results) -> list[str]:
    parts = [f"## {name}", _described(results)]
    parts += [f"Suite `{results['suite']}`, {results['seconds'] / 60:.0f} minutes."]
    parts.append(f"Largest relative error among all that was timed: {tables.worst_error(results)}.")
    parts.append("### Training steps")
    for shape in step_shapes(results):
        parts += [f"Shape `{shape.name}`:", tables.step_table(results, shape, missing_steps(results, shape)[0])]
        parts += [tables.faster_steps(results, shape), tables.floor_line(results, shape)]
        parts += filter(None, [tables.compared_line(results, shape)])
    drawn = plots(results)
    for shape in phase_shapes(results):
        parts += [f"### Phases, shape `{shape.name}`", *tables.phases(results, shape)]
        parts.append(_picture(name, f"phases-{shape.name}", "phases of a training step"))
    for shape_name in unique(r["shape"] for r in select(results, "op")):
        parts += [f"### Operations, shape `{shape_name}`", *tables.operations(results, shape_name)]
    if "scaling" in drawn:
        parts += ["### Scaling", "One size changes at a time; bands are from the fastest round to the slowest."]
        parts.append(_picture(name, "scaling", "seconds of a step over d_sae, k, batch rows and d_in"))
    if "memory" in drawn:
        parts.append(_picture(name, "memory", "peak memory of a step over batch rows and d_sae"))
    if "quality" in drawn:
        parts += ["### Quality", *tables.quality(results), _picture(name, "quality", "FVU over steps")]
    for shape_name in unique(r["shape"] for r in select(results, "trainer")):
        parts += [f"### Inside other trainers, shape `{shape_name}`", INSIDE, tables.trainers(results, shape_name)]
    for row in select(results, "harvest"):
        parts += [
            "### Harvest",
            f"{row['tokens']:,} tokens at width {row['d_in']} into a store: {figures(row['median'])} s.",
        ]
    return parts + tables.missing(results)


def _of_gpu(name: str, results: Results) -> list[str]:
    rows = [r for r in results["rows"] if r["stage"] == "benchmark"]
    parts = [f"## {name}", _described(results), f"```\n{bars.table(rows)}\n```"]
    parts += ["### Stages", tables.stages(results), "### Measured", tables.cases(rows)]
    return parts + gpus.kernels(results["rows"])


def _described(results: Results) -> str:
    """Hardware and versions."""
    return "\n".join(
        f"- {what}: {', '.join(f'{key} {value}' for key, value in results[what].items())}"
        for what in ("hardware", "versions")
    )


def _picture(name: str, plot: str, text: str) -> str:
    return f"![{text}](benchmarks/{name}-{plot}.png)"
