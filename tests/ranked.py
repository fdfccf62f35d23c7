"""One training run, on one process or on many, and what came out of it: what the distributed tests compare."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fastsae
from fastsae import distributed
from fastsae.distributed.layout import BY_FEATURE
from fastsae.train import Trainer

D, M, K, E, B = 12, 64, 6, 5, 24
COUNTED = ("l0", "dead_share")  # exact, however many ranks count

MAKERS = {
    "topk": lambda **o: fastsae.TopKSAE(D, M, K, **o),
    "many": lambda **o: fastsae.TopKSAE(D, M, 20, **o),  # more than each of four ranks has features
    "joint": lambda **o: fastsae.JointSAE(D, M, K, k_integration=4, d_embedding=E, pre_bias=True, **o),
    "one pair": lambda **o: fastsae.JointSAE(D, M, K, k_integration=2, d_embedding=E, **o),
    "no pairs": lambda **o: fastsae.JointSAE(D, M, K, k_integration=1, d_embedding=E, dropout=0.0, **o),
    "all": lambda **o: fastsae.JointSAE(D, M, K, k_integration=K, d_embedding=E, dropout=0.5, **o),
    "linear": lambda **o: fastsae.JointSAE(D, M, K, interaction=False, **o),
    "interaction": lambda **o: fastsae.JointSAE(D, M, K, linear=False, d_embedding=E, **o),
    "sequential": lambda **o: fastsae.SequentialSAE(D, M, K, d_embedding=E, **o),
}


def new(name: str, dtype: torch.dtype = torch.float64, **options: Any):
    """An SAE as every rank makes it: large weights, so that all pathways matter in a few steps."""
    torch.manual_seed(5)
    sae = MAKERS[name](dtype=dtype, **options)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return sae


def activations(n: int = 100, rows: int = B, seed: int = 7) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    planted = torch.randn(30, D, generator=generator)
    for _ in range(n):
        code = torch.rand(rows, 30, generator=generator) * (torch.rand(rows, 30, generator=generator) < 0.1)
        yield (code @ planted).double() + 0.01 * torch.randn(rows, D, generator=generator).double()


class Recording(Trainer):
    """A Trainer that remembers its log, on every rank."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.lines: list[dict[str, float]] = []

    def _metrics(self, *arguments: Any) -> dict[str, float]:
        self.lines.append(super()._metrics(*arguments) | {"rows_per_second": 0.0})
        return self.lines[-1]


def config(**changes: Any) -> fastsae.TrainerConfig:
    defaults = {"steps": 6, "lr": 1e-2, "normalize_rows": 48, "log_every": 1, "progress": False}
    return fastsae.TrainerConfig(**(defaults | changes))


def trained(
    name: str, features: int, options: dict[str, Any], rows: int = B, stream: Iterator[Tensor] | None = None
) -> dict[str, Any]:
    """A run on this process: alone (features = 0), or as a rank of a layout."""
    sae = new(name)
    if features:
        sae = distributed.shard(sae, distributed.start(features))
    trainer = Recording(sae, config(**options))
    trainer.fit(stream or activations(rows=rows))
    return {
        "lines": trainer.lines,
        "weights": {name: t.detach().clone() for name, t in sae.state_dict().items()},
        "counters": trainer._rows_since_fired[:-1].clone(),
        "rng": torch.get_rng_state(),
    }


def whole(results: list[dict[str, Any]], features: int) -> dict[str, Tensor]:
    """The weights of a group of feature ranks, put together; every group must hold the same bits."""
    groups = [results[i : i + features] for i in range(0, len(results), features)]
    found = []
    for group in groups:
        parts = [r["weights"] | {"rows_since_fired": r["counters"]} for r in group]
        for name in parts[0]:
            if name not in BY_FEATURE:
                assert all(torch.equal(part[name], parts[0][name]) for part in parts), f"{name} differs between ranks"
        found.append({n: torch.cat([part[n] for part in parts]) if n in BY_FEATURE else t for n, t in parts[0].items()})
    for other in found[1:]:
        assert [name for name in other if not torch.equal(other[name], found[0][name])] == []
    return found[0]


def assert_equal_to_rounding(
    results: list[dict[str, Any]], features: int, alone: dict[str, Any], rtol: float = 1e-9
) -> None:
    for result in results:
        assert len(result["lines"]) == len(alone["lines"])
        for ours, theirs in zip(result["lines"], alone["lines"], strict=True):
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                allowed = 0 if key in COUNTED else rtol * abs(value)
                assert abs(ours[key] - value) <= allowed, (ours["step"], key, ours[key], value)
    expected = alone["weights"] | {"rows_since_fired": alone["counters"]}
    for name, t in whole(results, features).items():
        torch.testing.assert_close(t, expected[name], rtol=rtol, atol=rtol, msg=lambda m, name=name: f"{name}: {m}")
