"""EleutherAI sparsify's module, driven as its Trainer drives it, which cannot run without a language model."""

import os
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Shape
from benchmarks.outcomes import Missing
from benchmarks.place import Place
from benchmarks.providers.base import LR, Provider, weights


def without_triton() -> None:
    """Before it is imported: without a GPU its Triton decoder is chosen, and fails."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"


NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}


class Sparsify(Provider):
    """`unit_norm`: decoder rows are kept at norm 1, as its Trainer does by default."""

    def __init__(self, shape: Shape, place: Place, unit_norm: bool = True) -> None:
        if not place.on_gpu:
            without_triton()
        try:
            from sparsify import SparseCoder, SparseCoderConfig
        except Exception as error:  # importing Triton code may fail in many ways
            raise Missing(f"cannot be imported ({type(error).__name__}: {error})") from error
        self.version, self.unit_norm, self.place = version("eai-sparsify"), unit_norm, place
        self.sae = SparseCoder(shape.D, SparseCoderConfig(num_latents=shape.M, k=shape.K), device=place.device)
        w = weights(shape, place, joint=False)
        self.sae.load_state_dict({theirs: w[ours] for theirs, ours in NAMES.items()})
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=LR, fused=True)
        self.fired = torch.zeros(shape.M, dtype=torch.bool, device=place.device)

    def encode(self, x: Tensor) -> Any:
        with self.place.precision():  # as its forward has by itself, on a GPU
            return self.sae.encode(x)

    def decode(self, code: Any) -> Tensor:
        with self.place.precision():
            return self.sae.decode(code.top_acts, code.top_indices)

    def loss(self, x: Tensor) -> Tensor:
        out = self.sae(x)
        self.fired[out.latent_indices.flatten()] = True
        return out.fvu

    def scale(self, x: Tensor) -> float:
        return x.numel() / (x - x.mean(dim=0)).square().sum().item()

    def update(self) -> None:
        """Rows are brought to norm 1 after the step, and not before the next forward: the same, and in this phase."""
        if self.unit_norm:
            self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        if self.unit_norm:
            self.sae.set_decoder_norm_to_unit_norm()

    def parameters(self) -> dict[str, nn.Parameter]:
        return {NAMES[name]: p for name, p in self.sae.named_parameters()}
