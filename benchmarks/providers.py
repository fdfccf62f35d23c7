"""Who is measured: each provider does one whole training step, and can show its reconstruction for comparison.

All get the same weights and the same batches. W_enc = W_dec has unit-norm rows, so that providers that normalise
decoder rows, or rank by them, compute the same function. All use Adam with fused=True.
"""

import os
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsae
from benchmarks.cases import Shape

LR = 1e-4


class Missing(Exception):
    """This provider cannot run here; the message says why."""


class Provider:
    """One way to do a training step. `compared_with` names the architecture whose reconstruction it must give."""

    name: str
    compared_with: str | None = "topk"

    def reconstruct(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def step(self, x: Tensor) -> Any:
        raise NotImplementedError


def weights(shape: Shape, joint: bool = False) -> dict[str, Tensor]:
    """The common weights, names as in fastsae."""
    g = torch.Generator().manual_seed(0)
    W = F.normalize(torch.randn(shape.M, shape.D, generator=g), dim=1)
    made = {"W_enc": W, "W_dec": W.clone(), "b_enc": torch.zeros(shape.M)}
    if joint:
        made["W_lin"] = torch.randn(shape.M, shape.D, generator=g) * 0.01
        made["V"] = torch.randn(shape.M, shape.E, generator=g) * 0.05
        made["W1"] = torch.randn(shape.E, shape.E, generator=g) * 0.1
        made["W2"] = torch.randn(shape.D, shape.E, generator=g) * 0.1
        made["b_lin"], made["b1"], made["b2"] = (torch.zeros(n) for n in (shape.D, shape.E, shape.D))
    else:
        made["b_dec"] = torch.zeros(shape.D)
    return made


class BareGemm(Provider):
    """The encoder's matrix product alone, into memory that is kept: the roof of every ratio."""

    name, compared_with = "bare GEMM", None

    def __init__(self, shape: Shape) -> None:
        w = weights(shape)
        self.W, self.b, self.out = w["W_enc"], w["b_enc"], torch.empty(shape.B, shape.M)

    def step(self, x: Tensor) -> None:
        torch.addmm(self.b, x, self.W.T, out=self.out)


class _Fastsae(Provider):
    def __init__(self, shape: Shape) -> None:
        if self.compared_with == "joint":
            self.sae = fastsae.JointSAE(shape.D, shape.M, shape.K, k_integration=shape.N, d_embedding=shape.E)
        else:
            self.sae = fastsae.TopKSAE(shape.D, shape.M, shape.K)
        state = self.sae.state_dict() | weights(shape, joint=self.compared_with == "joint")
        self.sae.load_state_dict(state)
        self.prepare()

    def prepare(self) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        self.sae.eval()
        reconstruction = self.sae(x).reconstruction
        self.sae.train()
        return reconstruction


class _TrainerStep(_Fastsae):
    def prepare(self) -> None:
        config = fastsae.TrainerConfig(steps=1000, lr=LR, normalize="none", progress=False)
        self.trainer = fastsae.Trainer(self.sae, config)

    def step(self, x: Tensor) -> None:
        self.trainer._train_step(self.sae.normalizer(x))


class _PlainAutograd(_Fastsae):
    def prepare(self) -> None:
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=LR, fused=True)

    def step(self, x: Tensor) -> None:
        self.sae(x).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class TopKTrainerStep(_TrainerStep):
    name = "fastsae TopKSAE, Trainer"


class TopKPlainAutograd(_PlainAutograd):
    name = "fastsae TopKSAE, plain autograd"


class JointTrainerStep(_TrainerStep):
    name, compared_with = "fastsae JointSAE, Trainer", "joint"


class JointPlainAutograd(_PlainAutograd):
    name, compared_with = "fastsae JointSAE, plain autograd", "joint"


class SparseTopK(Provider):
    """TopK as one would write it first: relu, torch.topk, embedding_bag."""

    name = "PyTorch TopK (topk + embedding_bag)"

    def __init__(self, shape: Shape) -> None:
        self.K = shape.K
        self.w = {n: nn.Parameter(t) for n, t in weights(shape).items()}
        self.optimizer = torch.optim.Adam(self.w.values(), lr=LR, fused=True)

    def forward(self, x: Tensor) -> Tensor:
        w = self.w
        values, indices = torch.relu(F.linear(x - w["b_dec"], w["W_enc"], w["b_enc"])).topk(self.K, dim=1)
        return F.embedding_bag(indices, w["W_dec"], per_sample_weights=values, mode="sum") + w["b_dec"]

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def step(self, x: Tensor) -> None:
        F.mse_loss(self.forward(x), x).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class DenseJoint(Provider):
    """The joint architecture on dense codes: two (B, d_sae) codes, and matrix products for every sum."""

    name, compared_with = "PyTorch joint, dense", "joint"

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.w = {n: nn.Parameter(t) for n, t in weights(shape, joint=True).items()}
        self.optimizer = torch.optim.Adam(self.w.values(), lr=LR, fused=True)

    def forward(self, x: Tensor, training: bool) -> Tensor:
        w, K, N = self.w, self.shape.K, self.shape.N
        pre = torch.relu(F.linear(x, w["W_enc"], w["b_enc"]))
        values, indices = pre.topk(K, dim=1)
        code = torch.zeros_like(pre).scatter(1, indices, values)
        strongest = torch.zeros_like(pre).scatter(1, indices[:, :N], values[:, :N])
        identity, linear = code @ w["W_dec"], strongest @ w["W_lin"] + w["b_lin"]
        s, q = strongest @ w["V"], strongest.square() @ w["V"].square()
        z = F.dropout((s.square() - q) / 2, 0.15, training)
        return identity + linear + F.linear(torch.relu(F.linear(z, w["W1"], w["b1"])), w["W2"], w["b2"])

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.forward(x, training=False)

    def step(self, x: Tensor) -> None:
        F.mse_loss(self.forward(x, training=True), x).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Sparsify(Provider):
    """EleutherAI sparsify's module, driven as its Trainer does, with fused Adam; its decoder without Triton."""

    name = "sparsify SparseCoder, eager"

    def __init__(self, shape: Shape) -> None:
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # without a GPU its Triton decoder fails
        try:
            from sparsify import SparseCoder, SparseCoderConfig
        except ImportError as error:
            raise Missing(f"not installed ({error})") from error
        self.name += f" {version('eai-sparsify')}"
        self.sae = SparseCoder(shape.D, SparseCoderConfig(num_latents=shape.M, k=shape.K))
        w = weights(shape)
        names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
        self.sae.load_state_dict({theirs: w[ours] for theirs, ours in names.items()})
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=LR, fused=True)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae(x).sae_out

    def step(self, x: Tensor) -> None:
        self.sae.set_decoder_norm_to_unit_norm()
        self.sae(x).fvu.backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()


class SAELens(Provider):
    """SAELens' TopK through its own SAETrainer step, its Adam made fused."""

    name = "SAELens TopK"

    def __init__(self, shape: Shape) -> None:
        try:
            from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
            from sae_lens.config import SAETrainerConfig
            from sae_lens.training.sae_trainer import SAETrainer
        except ImportError as error:
            raise Missing(f"not installed ({error})") from error
        self.name += f" {version('sae-lens')}"
        config = TopKTrainingSAEConfig(
            d_in=shape.D, d_sae=shape.M, k=shape.K, apply_b_dec_to_input=True, rescale_acts_by_decoder_norm=False
        )
        self.sae = TopKTrainingSAE(config)
        w = weights(shape)
        w["W_enc"] = w["W_enc"].T.contiguous()
        self.sae.load_state_dict(w)
        trainer_config = SAETrainerConfig(
            total_training_samples=1000 * shape.B, train_batch_size_samples=shape.B, lr=LR, lr_end=LR
        )
        self.trainer = SAETrainer(cfg=trainer_config, sae=self.sae, data_provider=iter(()))
        for group in self.trainer.optimizer.param_groups:
            group["fused"], group["foreach"] = True, False

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae(x)

    def step(self, x: Tensor) -> None:
        self.trainer._train_step(sae=self.sae, sae_in=x)


PROVIDERS: list[type[Provider]] = [
    BareGemm,
    TopKTrainerStep,
    JointTrainerStep,
    TopKPlainAutograd,
    JointPlainAutograd,
    SparseTopK,
    Sparsify,
    SAELens,
    DenseJoint,
]


def batch(shape: Shape, number: int) -> Tensor:
    return torch.randn(shape.B, shape.D, generator=torch.Generator().manual_seed(number))


def reference(shape: Shape, architecture: str, x: Tensor) -> Tensor:
    """The specification's reconstruction, a few rows at a time."""
    from fastsae.backends import reference

    w = weights(shape, joint=architecture == "joint")

    def rows() -> Iterator[Tensor]:
        for part in x.split(8):
            values, indices = reference.topk_encode(part, w["W_enc"], w["b_enc"], shape.K)
            out, z = reference.joint_decode(values, indices, w["W_dec"], w.get("W_lin"), w.get("V"), shape.N)
            if architecture == "joint":
                out = out + w["b_lin"] + reference.interaction_mlp(z, w["W1"], w["b1"], w["W2"], w["b2"])
            yield out

    return torch.cat(list(rows()))
