"""Changing one feature of the integration on its way to the reconstruction, and controls that change as much.

    x -> code -> strongest n -> z -> hidden -> interaction       identity, linear -> sum
                 linear:j       pair:i,j    secondary:s          identity:j
                 interaction:j

A clamp multiplies an activation (a_j, a_i a_j of a pair, a secondary feature's value, or a whole pathway's output), or
sets it. All that comes after follows, through the trained pooling and network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastsae import ops
from fastsae.code import SparseCode
from fastsae.evaluate.pairs import embedded, pair_products
from fastsae.modules import JointSAE, SecondarySAE, SparseAutoencoder

_KINDS = {"secondary": (1,), "pair": (2,), "identity": (1,), "linear": (0, 1), "interaction": (0, 1)}
"""Kinds of targets, and how many features each can name; none is the whole pathway."""


@dataclass(frozen=True)
class Target:
    """Object of a clamp: secondary:s, pair:i,j, a feature within one pathway (identity:j, linear:j, interaction:j), or
    the output of a whole pathway (linear, interaction)."""

    kind: str
    features: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Parse a target's name. Raises ValueError saying what names there are."""
        kind, _, numbers = text.partition(":")
        parts = tuple(numbers.split(",")) if numbers else ()
        if len(parts) not in _KINDS.get(kind, ()) or not all(p.strip().isdecimal() for p in parts):
            raise ValueError(
                "clamp: expected secondary:12, pair:3,45, identity:12, linear:12, interaction:12, linear or "
                f"interaction; got {text!r}"
            )
        return cls(kind, tuple(sorted(int(p) for p in parts)))  # a pair has one name

    def __str__(self) -> str:
        return f"{self.kind}:{','.join(map(str, self.features))}" if self.features else self.kind

    def check(self, sae: SparseAutoencoder, secondary: SecondarySAE | None) -> None:
        """Raise ValueError unless these SAEs have it."""
        joint = isinstance(sae, JointSAE)
        there = {
            "identity": True,
            "linear": joint and sae.W_lin is not None,
            "interaction": joint and sae.V is not None,
            "pair": joint and sae.V is not None,
            "secondary": secondary is not None,
        }
        if not there[self.kind]:
            raise ValueError(f"clamp: {self} needs a {self.kind} pathway or SAE, and there is none")
        width = secondary.d_sae if self.kind == "secondary" and secondary is not None else sae.d_sae
        if any(f >= width for f in self.features):
            raise ValueError(f"clamp: {self}: there are {width} features, counted from 0")
        if self.kind == "pair" and self.features[0] == self.features[1]:
            raise ValueError(f"clamp: {self}: a pair has two different features")


@dataclass(frozen=True)
class Clamp:
    """A target, and what becomes of its activation: amount times as much, or the amount itself."""

    target: Target
    amount: float
    operation: Literal["multiply", "set"] = "multiply"

    def __post_init__(self) -> None:
        if self.operation == "set" and not self.target.features:
            raise ValueError(f"clamp: only a feature can be set to a value; multiply the whole {self.target} pathway")

    def change(self, old: Tensor) -> Tensor:
        return (self.amount - 1) * old if self.operation == "multiply" else self.amount - old


class Step(NamedTuple):
    """Move of a row by a clamp: coefficient times direction, in the hidden layer or in the output."""

    space: Literal["hidden", "output"]
    coefficient: Tensor
    """(rows,)"""
    direction: Tensor
    """(width,) of a feature that has one; (rows, width)"""


class Carrier:
    """Raw activations (rows, d_in) on their way through an SAE, so that one step can be changed."""

    def __init__(self, sae: SparseAutoencoder, secondary: SecondarySAE | None, raw: Tensor) -> None:
        self.sae, self.secondary, self.raw = sae, secondary, raw
        self.x = sae.normalizer(raw.to(sae.W_enc.device))
        self.code = sae.encode(self.x)
        self.seen = sae.strongest(self.code) if isinstance(sae, JointSAE) else self.code

    @cached_property
    def hidden(self) -> Tensor:
        return self._joint.hidden(self.code)

    @cached_property
    def integration(self) -> SparseCode:
        """The code of the secondary SAE."""
        assert self.secondary is not None
        return self.secondary.encode_raw(self.hidden)

    def step(self, clamp: Clamp) -> Step:
        """Compute the move that a clamp makes of each row."""
        kind, features, sae = clamp.target.kind, clamp.target.features, self.sae
        if not features:
            whole = getattr(sae.summands(self.code), kind)
            return Step("output", clamp.change(whole.new_ones(len(whole))), whole)
        if kind == "secondary":
            assert self.secondary is not None
            old = self.integration.columns(self._at(features))[:, 0]
            direction = self.secondary.W_dec[features[0]] * self.secondary.normalizer.scale
            return Step("hidden", clamp.change(old), direction.to(self.hidden))
        if kind == "pair":
            pair = self._at(features).unsqueeze(0)
            old = pair_products(self.seen, pair)[:, 0]
            return Step("hidden", clamp.change(old), self._joint.W1 @ embedded(self._V, pair)[0])  # type: ignore[operator]
        code = self.code if kind == "identity" else self.seen
        old = code.columns(self._at(features))[:, 0]
        if kind != "interaction":
            return Step("output", clamp.change(old), (sae.W_dec if kind == "identity" else sae.W_lin)[features[0]])  # type: ignore[index]
        v = self._V[features[0]]
        s = ops.sparse_decode(self.seen.values, self.seen.indices, self._V, sae.backend)
        partners = (s - old.unsqueeze(1) * v) * v  # what each unit of a_j puts into z
        return Step("hidden", clamp.change(old), partners @ self._joint.W1.T)  # type: ignore[union-attr]

    def output_change(self, step: Step) -> Tensor:
        """Compute the change of the reconstruction by a step, in raw activations: (rows, d_in)."""
        moved = step.coefficient.unsqueeze(1) * step.direction
        if step.space == "hidden":
            moved = self._joint.interaction_from(self.hidden + moved) - self._joint.interaction_from(self.hidden)
        return moved * self.sae.normalizer.scale

    def replaced(self, change: Tensor | None, splice: bool) -> Tensor:
        """Raw activations with a change of the reconstruction in them. Spliced, they are the reconstruction; else the
        SAE's error stays, so that no change leaves the model untouched."""
        base = self.raw.to(self.x.device).to(self.sae.normalizer.scale.dtype)
        if splice:
            base = self.sae.normalizer.invert(self.sae.decode(self.code))
        return base if change is None else base + change

    def random_control(self, change: Tensor, step: Step, direction: Tensor) -> Tensor:
        """A change of the same length at every row, and of the step's sign, in one direction (d_in,)."""
        return _as_long_as(change, step.coefficient.sign().unsqueeze(1) * direction.to(change))

    def other_control(self, change: Tensor, step: Step, clamp: Clamp, other: Target) -> Tensor:
        """The step as far along the direction of another feature of the kind, and then as long in the output."""
        direction = self.step(Clamp(other, clamp.amount, clamp.operation)).direction
        assert step.direction.dim() == direction.dim() == 1, "a feature of this kind has no direction of its own"
        coefficient = step.coefficient * (step.direction.norm() / direction.norm().clamp_min(1e-30))
        return _as_long_as(change, self.output_change(Step(step.space, coefficient, direction)))

    def linear_control(self, change: Tensor, step: Step, features: Sequence[int]) -> Tensor:
        """Change the same features in a pathway that is linear in the code: W_lin, or W_dec without it. All features if
        none is named. Where none of them is active there is no change."""
        W_lin = getattr(self.sae, "W_lin", None)
        W, code = (self.sae.W_dec, self.code) if W_lin is None else (W_lin, self.seen)
        chosen = self._at(features)
        if len(chosen):
            added = code.columns(chosen) @ W[chosen]
        else:
            added = ops.sparse_decode(code.values, code.indices, W, self.sae.backend)
        return _as_long_as(change, step.coefficient.sign().unsqueeze(1) * added * self.sae.normalizer.scale)

    def _at(self, features: Sequence[int]) -> Tensor:
        return torch.tensor(list(features), dtype=torch.int64, device=self.x.device)

    @property
    def _joint(self) -> JointSAE:
        assert isinstance(self.sae, JointSAE)
        return self.sae

    @property
    def _V(self) -> Tensor:
        assert self._joint.V is not None
        return self._joint.V


def _as_long_as(change: Tensor, other: Tensor) -> Tensor:
    """`other` with the length of `change` at every row; 0 where it is 0."""
    length = other.norm(dim=1, keepdim=True)
    return torch.where(length > 0, other * (change.norm(dim=1, keepdim=True) / length.clamp_min(1e-30)), 0.0)
