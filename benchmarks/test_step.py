"""One whole training step (forward, backward, Adam) of each provider, timed after its reconstruction is compared."""

import gc
import itertools
import statistics

import pytest
import torch

from benchmarks.providers import PROVIDERS, BareGemm, Missing, Provider, batch, reference

ROUNDS = {"smoke": 3, "bench": 7}
# The bare GEMM first and last, so that every ratio has one from the same minutes.
ORDER = [*PROVIDERS, BareGemm]


@pytest.mark.parametrize("number", range(len(ORDER)), ids=lambda n: f"{n}-{ORDER[n].__name__}")
def test_step(number: int, benchmark, shape, rows):
    gc.collect()
    kind = ORDER[number]
    row = {"benchmark": "step", "shape": shape.name, "provider": kind.name, "architecture": kind.compared_with}
    rows.append(row)
    try:
        provider = kind(shape)
    except Missing as reason:
        row["missing"] = str(reason)
        pytest.skip(f"{row['provider']}: {reason}; measured where it is installed (make bench)")
    row["provider"] = provider.name
    row["relative_error"] = compare(provider, shape, batch(shape, 0))
    # A new batch each step, as in training, and the same ones for all; made outside of what is timed.
    batches = (((batch(shape, i),), {}) for i in itertools.count(1))
    benchmark.pedantic(provider.step, setup=lambda: next(batches), rounds=ROUNDS[shape.name], warmup_rounds=1)
    seconds = benchmark.stats.stats.data
    row |= {"seconds": seconds, "median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def compare(provider: Provider, shape, x: torch.Tensor) -> float | None:
    """The largest error of the provider's reconstruction of some rows, relative to the largest entry."""
    if provider.compared_with is None:
        return None
    x = x[:32]
    expected = reference(shape, provider.compared_with, x)
    error = ((provider.reconstruct(x) - expected).abs().max() / expected.abs().max()).item()
    assert error < 1e-4, f"{provider.name} computes another function (error {error:.1e}): not timed"
    return error
