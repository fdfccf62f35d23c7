"""The architectures in plain PyTorch, from the equations: what a good engineer writes before writing kernels."""

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Shape
from benchmarks.place import Place
from benchmarks.providers.base import LR, Provider, weights
from benchmarks.providers.compiled import compiling


class _PyTorch(Provider):
    joint: bool

    def __init__(self, shape: Shape, place: Place, compiled: bool = False) -> None:
        self.shape, self.place, self.training = shape, place, True
        self.w = {name: nn.Parameter(t) for name, t in weights(shape, place, self.joint).items()}
        self.optimizer = torch.optim.Adam(self.w.values(), lr=LR, fused=True)
        self.forward = torch.compile(self._loss) if compiled else self._loss

    @abstractmethod
    def _loss(self, x: Tensor, training: bool) -> Tensor:
        """The mean squared error, dropout on in training."""

    def loss(self, x: Tensor) -> Tensor:
        with self.place.precision(), compiling():
            return self.forward(x, self.training)

    def backward(self, loss: Tensor) -> None:
        with compiling():
            loss.backward()

    def train(self, mode: bool) -> None:
        self.training = mode

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.w


class SparseTopK(_PyTorch):
    """linear, relu, torch.topk, embedding_bag."""

    joint = False

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with self.place.precision():
            pre = F.linear(x - self.w["b_dec"], self.w["W_enc"], self.w["b_enc"])
        values, indices = torch.relu(pre).topk(self.shape.K, dim=1)
        return values.float(), indices  # embedding_bag takes values and weights of one dtype

    def decode(self, code: tuple[Tensor, Tensor]) -> Tensor:
        values, indices = code
        return F.embedding_bag(indices, self.w["W_dec"], per_sample_weights=values, mode="sum") + self.w["b_dec"]

    def _loss(self, x: Tensor, training: bool) -> Tensor:
        return F.mse_loss(self.decode(self.encode(x)), x)


class DenseTopK(_PyTorch):
    """The code as a (B, d_sae) tensor, decoded by a matrix product."""

    joint = False

    def encode(self, x: Tensor) -> Tensor:
        with self.place.precision():
            pre = F.linear(x - self.w["b_dec"], self.w["W_enc"], self.w["b_enc"])
            values, indices = torch.relu(pre).topk(self.shape.K, dim=1)
            return torch.zeros_like(pre).scatter(1, indices, values)

    def decode(self, code: Tensor) -> Tensor:
        with self.place.precision():
            return code @ self.w["W_dec"] + self.w["b_dec"]

    def _loss(self, x: Tensor, training: bool) -> Tensor:
        return F.mse_loss(self.decode(self.encode(x)).float(), x)


class DenseJoint(_PyTorch):
    """Two (B, d_sae) codes, of all and of the strongest features, and matrix products for every sum."""

    joint = True
    dropout = 0.15  # JointSAE's default

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, N = self.w, self.shape.N
        with self.place.precision():
            pre = F.linear(x, w["W_enc"], w["b_enc"])
            values, indices = torch.relu(pre).topk(self.shape.K, dim=1)
            code = torch.zeros_like(pre).scatter(1, indices, values)
            strongest = torch.zeros_like(pre).scatter(1, indices[:, :N], values[:, :N])
        return code, strongest

    def decode(self, code: Any, training: bool = False) -> Tensor:
        w, (every, strongest) = self.w, code
        with self.place.precision():
            s, q = strongest @ w["V"], strongest.square() @ w["V"].square()
            z = F.dropout((s.float().square() - q.float()) / 2, self.dropout, training)
            hidden = torch.relu(F.linear(z, w["W1"], w["b1"]))
            linear = strongest @ w["W_lin"] + w["b_lin"]
            return every @ w["W_dec"] + linear + F.linear(hidden, w["W2"], w["b2"])

    def _loss(self, x: Tensor, training: bool) -> Tensor:
        return F.mse_loss(self.decode(self.encode(x), training).float(), x)
