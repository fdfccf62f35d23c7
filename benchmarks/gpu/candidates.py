"""Whose steps are timed: ours, the same written densely, sparsify's. fp32 weights, bf16 products, fused Adam."""

from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsae
from benchmarks import providers
from benchmarks.cases import Shape
from benchmarks.gpu.place import Place
from benchmarks.gpu.stage import Missing
from fastsae.optim import AdamInBackward


def weights(shape: Shape, place: Place, joint: bool) -> dict[str, Tensor]:
    """As providers.weights, but made on the device, and W_lin as large as W_dec: a comparison must see its absence."""

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=g, device=place.device).mul_(std)

    def zeros(size: int) -> Tensor:
        return torch.zeros(size, device=place.device)

    g = place.generator(0)
    W = normal(shape.M, shape.D)
    F.normalize(W, dim=1, out=W)
    made = {"W_enc": W, "W_dec": W.clone(), "b_enc": zeros(shape.M)}
    if not joint:
        return made | {"b_dec": zeros(shape.D)}
    made |= {"W_lin": normal(shape.M, shape.D, std=shape.D**-0.5), "V": normal(shape.M, shape.E, std=0.05)}
    made |= {"W1": normal(shape.E, shape.E, std=0.1), "W2": normal(shape.D, shape.E, std=0.1)}
    return made | {"b_lin": zeros(shape.D), "b1": zeros(shape.E), "b2": zeros(shape.D)}


def batches(shape: Shape, place: Place, count: int = 3) -> Callable[[], Tensor]:
    """A function that returns one of `count` batches in turn."""
    made = [torch.randn(shape.B, shape.D, generator=place.generator(n), device=place.device) for n in range(count)]
    drawn = 0

    def draw() -> Tensor:
        nonlocal drawn
        drawn += 1
        return made[drawn % count]

    return draw


class Ours(providers.Provider):
    """fastsae's module under plain autograd; with in_backward, Adam updates rows inside the backward."""

    def __init__(self, shape: Shape, place: Place, joint: bool, in_backward: bool = False) -> None:
        kind = fastsae.JointSAE if joint else fastsae.TopKSAE
        self.name = f"fastsae {kind.__name__}, {'AdamInBackward' if in_backward else 'Adam'}"
        self.place = place
        to = {"backend": place.backend, "device": place.device}
        if joint:
            self.sae = fastsae.JointSAE(shape.D, shape.M, shape.K, k_integration=shape.N, d_embedding=shape.E, **to)
        else:
            self.sae = fastsae.TopKSAE(shape.D, shape.M, shape.K, **to)
        self.sae.load_state_dict(self.sae.state_dict() | weights(shape, place, joint))
        if in_backward:
            self.optimizer = AdamInBackward(self.sae.parameters(), lr=providers.LR)
        else:
            self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=providers.LR, fused=True)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        self.sae.eval()
        with self.place.bf16():
            reconstruction = self.sae(x).reconstruction
        self.sae.train()
        return reconstruction

    def forward(self, x: Tensor) -> Tensor:
        with self.place.bf16():
            return self.sae(x).loss

    def step(self, x: Tensor) -> Tensor:
        loss = self.forward(x)
        with self.optimizer.in_backward() if isinstance(self.optimizer, AdamInBackward) else nullcontext():
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class _OnDevice(providers.Provider):
    """An architecture of benchmarks/providers.py, its weights on the device."""

    place: Place
    w: dict[str, nn.Parameter]

    def _prepare(self, shape: Shape, place: Place, joint: bool) -> None:
        self.place = place
        self.w = {name: nn.Parameter(t) for name, t in weights(shape, place, joint).items()}
        self.optimizer = torch.optim.Adam(self.w.values(), lr=providers.LR, fused=True)

    def loss(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def step(self, x: Tensor) -> None:
        self.loss(x).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class DenseJoint(_OnDevice, providers.DenseJoint):
    def __init__(self, shape: Shape, place: Place, compiled: bool = False) -> None:
        self.shape = shape
        self._prepare(shape, place, joint=True)
        if compiled:
            self.name += ", torch.compile"
            self.forward = torch.compile(self.forward)

    def loss(self, x: Tensor) -> Tensor:
        with self.place.bf16():
            return F.mse_loss(self.forward(x, training=True).float(), x)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        with self.place.bf16():
            return self.forward(x, training=False)


class EagerTopK(_OnDevice, providers.SparseTopK):
    def __init__(self, shape: Shape, place: Place) -> None:
        self.K = shape.K
        self._prepare(shape, place, joint=False)

    def loss(self, x: Tensor) -> Tensor:
        return F.mse_loss(self.forward(x), x)

    def forward(self, x: Tensor) -> Tensor:
        """embedding_bag takes values and weights of one dtype only, so its part is fp32."""
        w = self.w
        with self.place.bf16():
            pre = torch.relu(F.linear(x - w["b_dec"], w["W_enc"], w["b_enc"]))
        values, indices = pre.topk(self.K, dim=1)
        return F.embedding_bag(indices, w["W_dec"], per_sample_weights=values.float(), mode="sum") + w["b_dec"]

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.forward(x)


class Sparsify(providers.Provider):
    """EleutherAI sparsify's module with its Triton decoder (bf16 products by itself, on CUDA) and fused Adam."""

    def __init__(self, shape: Shape, place: Place) -> None:
        try:
            from sparsify import SparseCoder, SparseCoderConfig
        except Exception as error:  # an import of Triton code may fail in many ways
            raise Missing(f"sparsify cannot be imported ({type(error).__name__}: {error})") from error
        self.name = f"sparsify SparseCoder {version('eai-sparsify')}"
        self.sae = SparseCoder(shape.D, SparseCoderConfig(num_latents=shape.M, k=shape.K), device=place.device)
        w = weights(shape, place, joint=False)
        names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
        self.sae.load_state_dict({theirs: w[ours] for theirs, ours in names.items()})
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=providers.LR, fused=True)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae(x).sae_out

    def step(self, x: Tensor) -> None:
        self.sae(x).fvu.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def trainer_step(self, x: Tensor) -> None:
        """As its Trainer does, which keeps decoder rows at norm 1."""
        self.sae.set_decoder_norm_to_unit_norm()
        self.sae(x).fvu.backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
