"""fastsae, by each backend and each way to train with it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import fastsae
from benchmarks.cases import Shape
from benchmarks.outcomes import Missing
from benchmarks.place import Place
from benchmarks.providers.base import LR, Provider, weights
from benchmarks.providers.compiled import compiling
from fastsae.backends.cpu import encode
from fastsae.optim import AdamInBackward


class Autograd(Provider):
    """The module in a loop of one's own: loss.backward() and torch's Adam."""

    def __init__(self, shape: Shape, place: Place, joint: bool, compiled: bool = False) -> None:
        self.place = place
        on = {"backend": place.backend, "device": place.device}
        if joint:
            self.sae = fastsae.JointSAE(shape.D, shape.M, shape.K, k_integration=shape.N, d_embedding=shape.E, **on)
        else:
            self.sae = fastsae.TopKSAE(shape.D, shape.M, shape.K, **on)
        self.sae.load_state_dict(self.sae.state_dict() | weights(shape, place, joint))
        self.forward = torch.compile(self.sae, fullgraph=True) if compiled else self.sae
        self.optimizer = self.make_optimizer()

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.sae.parameters(), lr=LR, fused=True)

    def encode(self, x: Tensor) -> fastsae.SparseCode:
        with self.place.precision():
            return self.sae.encode(x)

    def decode(self, code: fastsae.SparseCode) -> Tensor:
        with self.place.precision():
            return self.sae.decode(code)

    def loss(self, x: Tensor) -> Tensor:
        with self.place.precision(), compiling():
            return self.forward(x).loss

    def backward(self, loss: Tensor) -> None:
        with compiling():
            loss.backward()

    def train(self, mode: bool) -> None:
        self.sae.train(mode)

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.sae.named_parameters())


class InBackward(Autograd):
    """Adam steps large weights inside the backward, so their gradients are never held."""

    used_up = ("W_enc", "W_dec", "W_lin", "V")

    def make_optimizer(self) -> torch.optim.Optimizer:
        if self.place.backend != "cuda":
            raise Missing("steps are made inside the backward by the CUDA backend only")
        return AdamInBackward(self.sae.parameters(), lr=LR)

    def backward(self, loss: Tensor) -> None:
        with self.optimizer.in_backward():  # type: ignore[union-attr]
            loss.backward()


def recipe(name: str, shape: Shape) -> dict[str, Any]:
    """Options of our Trainer that make its steps those of a peer: a peer's loss is d_in times ours where it clips."""
    return {
        "plain": {},
        "unit norm": {"unit_norm_decoder": True},
        "clipped": {"clip_grad_norm": 1 / shape.D},
        "clipped, unit norm": {"clip_grad_norm": 1 / shape.D, "unit_norm_decoder": True},
    }[name]


class TrainerStep(Autograd):
    """fastsae.Trainer: kept gradient buffers, fused Adam, counts of what fired."""

    def __init__(self, shape: Shape, place: Place, joint: bool, screened: bool = True, trained: str = "plain") -> None:
        if not screened and (place.on_gpu or not _screens(shape)):
            raise Missing("encoding is not screened in bf16 here; the row of the Trainer is this path")
        self._path = nullcontext if screened else _unscreened
        super().__init__(shape, place, joint)
        # Its largest count of steps, which only a schedule would read.
        options = {"steps": 10**9, "lr": LR, "normalize": "none", "progress": False}
        self.trainer = fastsae.Trainer(self.sae, fastsae.TrainerConfig(**options, **recipe(trained, shape)))
        self.optimizer = self.trainer._optimizer

    def encode(self, x: Tensor) -> fastsae.SparseCode:
        with self._path():
            return super().encode(x)

    def loss(self, x: Tensor) -> Tensor:
        with self._path(), self.place.precision():
            self._output = self.sae(x)
        return self._output.loss

    def backward(self, loss: Tensor) -> None:
        with self.trainer._buffers:
            loss.backward()

    def update(self) -> None:
        self.trainer._apply_gradients()
        self.trainer._count_fired(self._output)

    def step(self, x: Tensor) -> Tensor:
        with self._path(), self.place.precision():
            checked = self.trainer._checked(x, None)  # type: ignore[arg-type]  # asked only where x is not finite
            output = self.trainer._train_step(checked).output  # type: ignore[arg-type]
        return output.loss


def reference(shape: Shape, place: Place, joint: bool) -> Provider:
    """The specification itself."""
    return Autograd(shape, place.with_backend("reference"), joint)


def on_cuda(shape: Shape, place: Place, joint: bool, in_backward: bool = False) -> Provider:
    """The Triton kernels under plain autograd, or with Adam in the backward."""
    if not place.on_gpu and place.backend != "cuda":
        raise Missing("needs an NVIDIA GPU (make gpu)")
    return (InBackward if in_backward else Autograd)(shape, place.with_backend("cuda"), joint)


def _screens(shape: Shape) -> bool:
    return encode.plan(shape.B, shape.D, shape.M, shape.K, torch.float32).screened


@contextmanager
def _unscreened() -> Iterator[None]:
    planned = encode.plan

    def plain(*arguments: Any) -> encode.Plan:
        return planned(*arguments)._replace(screened=False)

    encode.plan = plain
    try:
        yield
    finally:
        encode.plan = planned
