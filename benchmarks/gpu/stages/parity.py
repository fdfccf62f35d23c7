"""200 training steps beside the reference backend's, from the same weights on the same batches.

Top-k is not continuous: one rounding, and another feature is taken; so two correct runs drift apart. How far is
measured and not guessed: a second reference run, its weights moved by one rounding, drifts from the first. Ours may
drift ALLOWED times as far, plus a floor. Narrow weights and moments round at every step; their losses must end where
those of fp32 do.
"""

import contextlib
import statistics
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

import fastsae
from benchmarks.gpu.stage import Stage, excused
from benchmarks.place import Place, place
from fastsae.narrow import NarrowAdam, OptimizerState
from fastsae.optim import AdamInBackward

ALLOWED = 3.0
# Relative to the loss: what a difference below is not worth looking at.
FLOOR = {"fp32": 1e-4, "bf16": 3e-3}
STEPS = {False: 200, True: 3}
LR = 1e-3
# (dtype of weights, state of NarrowAdam). On a CPU these losses end within 0.1 % of those of fp32; bf16 weights under
# torch's Adam, which loses small updates, 0.65 % away.
NARROW: dict[str, tuple[torch.dtype, OptimizerState]] = {
    "bf16 weights": (torch.bfloat16, "fp32"),
    "fp32 weights, 8-bit state": (torch.float32, "8bit"),
    "bf16 weights, 8-bit state": (torch.bfloat16, "8bit"),
}
NARROW_ALLOWED = 0.004


def run(stage: Stage) -> None:
    where = place(stage.smoke)
    for architecture in ("TopKSAE", "JointSAE"):
        for precision in ("fp32", "bf16"):
            pair = Pair(architecture, precision, where, stage.smoke)
            for in_backward in (False, True):
                name = f"{architecture}, {precision}{', AdamInBackward' if in_backward else ''}"
                stage.attempt(name, lambda p=pair, i=in_backward: p.compare(i), limit=90)
        whole = Pair(architecture, "fp32", where, stage.smoke)
        for name, (dtype, state) in NARROW.items():
            stage.attempt(f"{architecture}, {name}", partial(whole.compare_narrow, dtype, state), limit=120)


class Pair:
    """One architecture in one precision: runs of the reference backend, and ours beside them."""

    def __init__(self, architecture: str, precision: str, where: Place, smoke: bool) -> None:
        self.architecture, self.precision, self.where, self.smoke = architecture, precision, where, smoke

    def losses(self, backend: str, moved: bool = False, in_backward: bool = False) -> list[float]:
        """Train a whole run and give its losses. moved: start from weights that differ by one rounding."""
        sae = build(self.architecture, backend, self.where, self.smoke)
        if moved:
            eps = torch.finfo(torch.bfloat16 if self.precision == "bf16" else torch.float32).eps
            with torch.no_grad():
                for p in sae.parameters():
                    signs = torch.randn(p.shape, generator=self.where.generator(2), device=p.device).sign()
                    p.mul_(1 + eps * signs)
        if in_backward:
            return self.trained(sae, AdamInBackward(sae.parameters(), lr=LR))
        return self.trained(sae, torch.optim.Adam(sae.parameters(), lr=LR, fused=True))

    def trained(self, sae: fastsae.TopKSAE | fastsae.JointSAE, optimizer: torch.optim.Optimizer) -> list[float]:
        draw = planted(self.where, *((8, 16, 32) if self.smoke else (1024, 256, 2048)))
        return train(sae, optimizer, draw, STEPS[self.smoke], self.precision, self.where)

    @cached_property
    def reference(self) -> list[float]:
        return self.losses("reference")

    @cached_property
    def natural(self) -> dict[str, float]:
        """Drift of the reference from itself that a rounding of the weights alone causes."""
        return drift(self.reference, self.losses("reference", moved=True))

    def compare(self, in_backward: bool) -> dict[str, Any]:
        ours = self.losses(self.where.backend, in_backward=in_backward)
        drifted = drift(self.reference, ours)
        allowed = {what: ALLOWED * far + FLOOR[self.precision] for what, far in self.natural.items()}
        for what, most in allowed.items():
            if not drifted[what] <= most:
                raise AssertionError(f"{what}: drift {drifted[what]:.2e}, allowed {most:.2e}")
        if not self.smoke and not ours[-1] < 0.8 * ours[0]:
            raise AssertionError(f"the loss did not fall: {ours[0]:.4g} to {ours[-1]:.4g}")
        return {
            "steps": len(ours),
            "first_loss": {"reference": self.reference[0], "ours": ours[0]},
            "last_loss": {"reference": self.reference[-1], "ours": ours[-1]},
            "drift": drifted,
            "drift_of_moved_reference": self.natural,
            "allowed": allowed,
        }

    def compare_narrow(self, dtype: torch.dtype, state: OptimizerState) -> dict[str, Any]:
        with excused(ImportError):
            sae = build(self.architecture, self.where.backend, self.where, self.smoke, dtype)
            optimizer = NarrowAdam(sae.parameters(), lr=LR, optimizer_state=state)
        ours = self.trained(sae, optimizer)
        drifted = drift(self.reference, ours)
        if not self.smoke and not drifted["last quarter"] <= NARROW_ALLOWED:
            raise AssertionError(f"last quarter: {drifted['last quarter']:.2e} from fp32, allowed {NARROW_ALLOWED}")
        last = {"fp32": self.reference[-1], "ours": ours[-1]}
        return {"steps": len(ours), "last_loss": last, "drift": drifted, "allowed": NARROW_ALLOWED}


def build(
    architecture: str, backend: str, where: Place, smoke: bool, dtype: torch.dtype = torch.float32
) -> fastsae.TopKSAE | fastsae.JointSAE:
    """Make an SAE with the same weights at each call, but for their rounding to `dtype`."""
    d_in, d_sae, k = (16, 64, 4) if smoke else (256, 4096, 32)
    torch.manual_seed(0)
    to = {"init": "unit", "backend": backend, "device": where.device, "dtype": dtype}
    if architecture == "TopKSAE":
        return fastsae.TopKSAE(d_in, d_sae, k, **to)
    return fastsae.JointSAE(d_in, d_sae, k, d_embedding=8 if smoke else 64, dropout=0.0, **to)


def planted(where: Place, rows: int, width: int, features: int) -> Callable[[int], Tensor]:
    """Batch number i: sparse sums of planted directions, as activations of a language model are taken to be."""
    directions = torch.randn(features, width, generator=where.generator(1), device=where.device)
    directions /= directions.norm(dim=1, keepdim=True)

    def draw(number: int) -> Tensor:
        g = where.generator(100 + number)
        active = torch.rand(rows, features, generator=g, device=where.device) < 8 / features
        strength = torch.rand(rows, features, generator=g, device=where.device) + 0.5
        noise = torch.randn(rows, width, generator=g, device=where.device)
        return (active * strength) @ directions + 0.02 * noise

    return draw


def train(
    sae: fastsae.TopKSAE | fastsae.JointSAE,
    optimizer: torch.optim.Optimizer,
    draw: Callable[[int], Tensor],
    steps: int,
    precision: str,
    where: Place,
) -> list[float]:
    losses = []
    for number in range(steps):
        x = draw(number).to(sae.W_enc.dtype)
        with where.precision() if precision == "bf16" else contextlib.nullcontext():
            loss = sae(x).loss
        with optimizer.in_backward() if isinstance(optimizer, AdamInBackward) else contextlib.nullcontext():
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).double().tolist()


def drift(a: list[float], b: list[float]) -> dict[str, float]:
    """Relative differences of two runs' losses: of the first, of any, and of the mean of the last quarter."""
    relative = [abs(x - y) / x for x, y in zip(a, b, strict=True)]
    last = max(1, len(a) // 4)
    mean_a, mean_b = statistics.fmean(a[-last:]), statistics.fmean(b[-last:])
    return {"first": relative[0], "largest": max(relative), "last quarter": abs(mean_a - mean_b) / mean_a}
