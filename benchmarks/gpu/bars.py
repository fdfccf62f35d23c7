"""The bars the CUDA backend is built to, and whether the measured rows reach them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bar:
    """A figure that a row of stage `benchmark` holds under bars[key], and what it must not exceed or fall short of."""

    key: str
    text: str
    limit: float
    at_most: bool = True

    def reached(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit


BARS = [
    Bar("encode / GEMM", "encode / bare GEMM, modern", 1.15),
    Bar("topk / encode", "linear + relu + torch.topk / encode, modern", 1.8, at_most=False),
    Bar("TopKSAE / GEMM", "TopKSAE step (autograd, torch's fused Adam) / bare GEMM, modern", 2.2),
    Bar("TopKSAE in backward / GEMM", "TopKSAE step (AdamInBackward) / bare GEMM, modern", 2.2),
    Bar("sparsify / TopKSAE", "sparsify's module (Triton decoder, fused Adam) / TopKSAE step, modern", 2.0, False),
    Bar("dense / JointSAE, modern", "dense joint step / JointSAE step, modern", 5.0, at_most=False),
    Bar("dense / JointSAE, paper", "dense joint step / JointSAE step, paper", 2.0, at_most=False),
    Bar("memory, modern", "JointSAE activation memory / dense, modern", 1 / 8),
    Bar("memory, paper", "JointSAE activation memory / dense, paper", 1 / 8),
    Bar("million", "features trained on one GPU at d_in = 2048", 1_048_576, at_most=False),
]


def measured(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Collect the measured bars, by their keys."""
    return {key: value for row in rows if row["status"] == "ok" for key, value in row.get("bars", {}).items()}


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Each bar: what was measured, and reached or not reached."""
    found = measured(rows)
    lines = []
    for bar in BARS:
        stated = f"{'<=' if bar.at_most else '>='} {bar.limit:g}"
        if bar.key in found:
            verdict = f"{found[bar.key]:g}  {'reached' if bar.reached(found[bar.key]) else 'NOT REACHED'}"
        else:
            verdict = "no number"
        lines.append(f"{bar.text:<70} {stated:>12}  {verdict}")
    return "\n".join(lines)
