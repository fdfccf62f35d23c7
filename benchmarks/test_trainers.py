"""Speed for a user of another package: rows per second of its own training loop, with its SAE and with ours."""

import statistics

import pytest

from benchmarks.cases import SHAPES
from benchmarks.conftest import suite_of
from benchmarks.measured import gemm
from benchmarks.outcomes import Missing, WrongAnswer
from benchmarks.place import CPU
from benchmarks.timing import summary
from benchmarks.trainers import LOOPS
from benchmarks.trainers.base import Batches, timed_sae

# The first iterations pay for imports and first allocations.
WARM = 2
# Losses of the stock TopK and of ours, from the same weights and batches; of the joint, whose loss is another, nothing.
ALLOWED = 1e-3
# Of so many iterations, some with steps between them: dictionary_learning's first one has a learning rate of 0.
COMPARED = 4


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    shapes = [SHAPES[name] for name in suite_of(metafunc.config).trainers]
    whos = {name: ("stock", "topk", *["joint"] * loop.has_joint) for name, loop in LOOPS.items()}
    chosen = [(shape, name, who) for shape in shapes for name in LOOPS for who in whos[name]]
    ids = [f"{shape.name}-{name}-{who}" for shape, name, who in chosen]
    metafunc.parametrize(("shape", "trainer", "who"), chosen, ids=ids)


def test_trainer(shape, trainer, who, benchmark, rows, suite):
    benchmark.group = f"{shape.name}: {trainer}"
    row = {"benchmark": "trainer", "trainer": trainer, "who": who, "shape": shape.name}
    steps = WARM + suite.trainer_steps
    batches = Batches(shape, gemm(shape, CPU))
    try:
        loop = LOOPS[trainer](shape, who, steps)
    except Missing as reason:
        rows.append(row | {"missing": str(reason)})
        pytest.skip(f"{trainer}: {reason}")
    with timed_sae(loop) as (losses, seconds):
        benchmark.pedantic(loop.run, args=(batches,), rounds=1)
    if who == "topk":
        compare(losses, rows, trainer, shape.name)  # before there is a row
    found = summary(batches.seconds[WARM:steps])
    rows.append(
        row
        | {"version": loop.version, **found, "losses": losses[:COMPARED]}
        | {"rows_per_second": round(shape.B / found["median"], 1)}
        | {"sae_median": round(statistics.median(seconds[WARM:steps]), 6)}
        | {"gemm_seconds": [round(s, 6) for s in batches.gemm_seconds[WARM:steps]]}
    )


def compare(losses: list[float], rows: list, trainer: str, shape: str) -> None:
    """Raise WrongAnswer unless the first losses are those of the stock SAE in the same loop."""
    stock = [
        r
        for r in rows
        if (r.get("trainer"), r.get("who"), r.get("shape")) == (trainer, "stock", shape) and "losses" in r
    ]
    if not stock:
        pytest.skip(f"{trainer}: compared with nothing, its own SAE did not run")
    for ours, theirs in zip(losses[:COMPARED], stock[0]["losses"], strict=True):
        if abs(ours / theirs - 1) > ALLOWED:
            raise WrongAnswer(f"{trainer}: the loss is {ours:.6g} with fastsae, {theirs:.6g} without")
