"""Interface of every provider: a training step, its phases, and the facts that make it comparable with the others."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Shape
from benchmarks.place import Place

LR = 1e-3


class Provider(ABC):
    """One way to train one architecture, begun from `weights(shape, place, joint)`.

    The loss it differentiates is `scale(x)` times the mean squared error, so that gradients of providers can be
    compared. Each optimizer is Adam with fused=True.
    """

    version: str | None = None
    """Version of the package that does the work, if it is not ours."""
    optimizer: torch.optim.Optimizer
    transposed: tuple[str, ...] = ()
    """Parameters that lie the other way round than fastsae's."""
    used_up: tuple[str, ...] = ()
    """Weights whose gradients the backward uses up itself; those of all others must be there after it."""

    @abstractmethod
    def encode(self, x: Tensor) -> Any:
        """The code of x, in the provider's own form."""

    @abstractmethod
    def decode(self, code: Any) -> Tensor:
        """The reconstruction from that form."""

    @abstractmethod
    def loss(self, x: Tensor) -> Tensor:
        """The loss of a training step, its graph recorded."""

    def scale(self, x: Tensor) -> float:
        return 1.0

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        """Everything between the gradients and the next step."""
        self.optimizer.step()

    def step(self, x: Tensor) -> Tensor:
        """A whole training step, as the provider's users make it; returns the loss."""
        self.optimizer.zero_grad()
        loss = self.loss(x)
        self.backward(loss)
        self.update()
        return loss.detach()

    def train(self, mode: bool) -> None:
        """Dropout on or off, where the architecture has it."""
        return

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """Under fastsae's names."""

    def gradients(self) -> dict[str, Tensor]:
        """After a backward: those that are there, laid out as fastsae's."""
        return {name: self._laid_out(name, p.grad) for name, p in self.parameters().items() if p.grad is not None}

    def weights(self) -> dict[str, Tensor]:
        """The parameters, laid out as fastsae's."""
        return {name: self._laid_out(name, p.detach()) for name, p in self.parameters().items()}

    def _laid_out(self, name: str, t: Tensor) -> Tensor:
        return t.T if name in self.transposed else t

    def parameter_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.parameters().values())


@dataclass(frozen=True)
class Candidate:
    """A provider by name, not made yet."""

    name: str
    architecture: str
    """topk or joint: what it computes, and what it is compared with."""
    make: Callable[[Shape, Place], Provider]
    """Builds the provider. Raises Missing where it cannot run."""
    recipe: str = "plain"
    """Training recipe beyond Adam: see ours.recipe. Loss curves are compared within one recipe."""
    compiled: bool = False
    small_only: bool = False
    """Too slow for larger shapes than those of the phases."""

    @property
    def joint(self) -> bool:
        return self.architecture == "joint"

    @property
    def ours(self) -> bool:
        return self.name.startswith("fastsae")


def weights(shape: Shape, place: Place, joint: bool) -> dict[str, Tensor]:
    """Draw the weights that all providers begin from, names as in fastsae.

    Rows of W_enc = W_dec have norm 1, so that providers that normalise decoder rows, or rank by their norms, compute
    the same. No other weight is so small that its absence could go unseen, biases included.
    """
    g = place.generator(0)
    W = place.normal(g, shape.M, shape.D)
    F.normalize(W, dim=1, out=W)

    def bias(size: int) -> Tensor:
        return place.normal(g, size, std=0.05)

    made = {"W_enc": W, "W_dec": W.clone(), "b_enc": bias(shape.M)}
    if not joint:
        return made | {"b_dec": bias(shape.D)}
    made |= {"W_lin": place.normal(g, shape.M, shape.D, std=shape.D**-0.5)}
    made |= {"V": place.normal(g, shape.M, shape.E, std=0.05), "W1": place.normal(g, shape.E, shape.E, std=0.1)}
    made |= {"W2": place.normal(g, shape.D, shape.E, std=0.1)}
    return made | {"b_lin": bias(shape.D), "b1": bias(shape.E), "b2": bias(shape.D)}


def batch(shape: Shape, place: Place, number: int) -> Tensor:
    return place.normal(place.generator(1000 + number), shape.B, shape.D)
