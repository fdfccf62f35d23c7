"""Rows of one results file, and choosing among them."""

from collections.abc import Iterable
from typing import Any

from benchmarks.cases import PHASES, SHAPES, Shape

Row = dict[str, Any]
Results = dict[str, Any]
ARCHITECTURES = {"topk": "TopK", "joint": "joint"}
# What others of the architecture are compared with, where they train in the plain way.
TRAINERS = {"topk": "fastsae TopKSAE, Trainer", "joint": "fastsae JointSAE, Trainer"}
EVERY_PHASE = (*PHASES, "step")


def select(results: Results, benchmark: str, **wanted: Any) -> list[Row]:
    """Rows that were measured."""
    rows = [r for r in results["rows"] if r["benchmark"] == benchmark and "missing" not in r]
    return [r for r in rows if all(r.get(key) == value for key, value in wanted.items())]


def unique(names: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(names))


def is_ours(provider: str) -> bool:
    return provider.startswith("fastsae")


def who(row: Row) -> tuple[str | None, str | None]:
    """Architecture and provider; a roof has none of the first."""
    return row.get("architecture"), row.get("provider")


def our_trainer(row: Row) -> str:
    """Our Trainer of the row's architecture training as the row's provider does (its recipe), by name."""
    name = TRAINERS[row["architecture"]]
    return name if row["recipe"] == "plain" else f"{name}, {row['recipe']}"


def architectures(rows: Iterable[Row]) -> list[str]:
    """Those among `rows`, in the order of ARCHITECTURES."""
    found = {r["architecture"] for r in rows}
    return [kind for kind in ARCHITECTURES if kind in found]


def by_architecture(row: Row) -> int:
    """A key to sort by."""
    return list(ARCHITECTURES).index(row["architecture"])


def step_shapes(results: Results) -> list[Shape]:
    """Shapes at which whole steps were measured."""
    return [SHAPES[name] for name in unique(r["shape"] for r in select(results, "step", phase="step"))]


def phase_shapes(results: Results) -> list[Shape]:
    """Shapes at which steps were measured phase by phase."""
    return [SHAPES[name] for name in unique(r["shape"] for r in select(results, "step") if r["phase"] in PHASES)]


def steps_at(results: Results, shape: Shape) -> list[Row]:
    """Whole steps by architecture, our Trainer first, by each of its recipes."""
    rows = select(results, "step", phase="step", shape=shape.name)
    return sorted(rows, key=lambda r: (by_architecture(r), r["provider"] != our_trainer(r)))


def missing_steps(results: Results, shape: Shape) -> tuple[list[Row], list[Row]]:
    """Rows missing for reasons of their own, and those of ours because no GPU or no bf16 is available."""
    rows = [r for r in results["rows"] if r["benchmark"] == "step" and "missing" in r and r["shape"] == shape.name]
    wanting = [r for r in rows if is_ours(r["provider"]) and ("GPU" in r["missing"] or "bf16" in r["missing"])]
    return [r for r in rows if r not in wanting], wanting
