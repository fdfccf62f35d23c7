"""The steps of a run as a plain-text table, for the terminal that `pytest benchmarks` runs in."""

from collections.abc import Sequence

from benchmarks.report.cells import figures
from benchmarks.report.comparisons import over_gemm
from benchmarks.report.rows import EVERY_PHASE, Row, unique
from fastsae import report


def steps_as_text(rows: Sequence[Row]) -> str:
    """The steps of one run for a terminal, and what is missing with its reason."""
    steps = [r for r in rows if r["benchmark"] == "step"]
    timed = [r for r in steps if "missing" not in r]
    lines = []
    for shape, provider in unique((r["shape"], r["provider"]) for r in timed):
        phases = {r["phase"]: r for r in timed if (r["shape"], r["provider"]) == (shape, provider)}
        step = phases.get("step")
        cells = {p: figures(1e3 * phases[p]["median"]) if p in phases else "" for p in EVERY_PHASE}
        cells["step / GEMM"] = f"{over_gemm(step):.2f}" if step else ""
        cells["peak MB"] = f"{step['peak_bytes'] / 1e6:.0f}" if step and step.get("peak_bytes") else ""
        lines.append({"ms": f"{shape}: {provider}"} | cells)
    text = [report.table(lines)] if lines else []
    return "\n".join(text + [f"{r['shape']}: {r['provider']} missing: {r['missing']}" for r in steps if "missing" in r])
