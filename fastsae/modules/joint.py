"""JointSAE: a TopK SAE trained together with feature integration (arXiv 2507.00269)."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsae.code import SparseCode
from fastsae.config import Init, JointSAEConfig
from fastsae.modules.base import Components, SparseAutoencoder

STD_AT_INIT = {"W_lin": 0.01, "b_lin": 0.0, "V": 0.05, "W1": 0.01, "b1": 0.0, "W2": 0.01, "b2": 0.0}
"""Standard deviation of each integration parameter at initialisation; normal, mean 0."""


class JointSAE(SparseAutoencoder):
    """reconstruction = identity + linear + interaction, all from one sparse code, trained together.

        identity    = sum_{j<k} a_j W_dec[i_j]                                  (+ b_dec if pre_bias)
        linear      = sum_{j<n} a_j W_lin[i_j] + b_lin
        interaction = W2 relu(W1 dropout(z) + b1) + b2,  z = (s^2 - q) / 2,
                      s = sum_{j<n} a_j V[i_j],  q = sum_{j<n} (a_j V[i_j])^2

    n = k_integration (None: k // 2), or the width of the code if it is narrower. With n = k the linear pathway is a
    second decoder over the same code, whose gradient equals that of W_dec.
    Parameters W_enc W_dec W_lin (d_sae, d_in), b_enc (d_sae), b_lin b2 (d_in), V (d_sae, d_embedding),
    W1 (d_embedding, d_embedding), b1 (d_embedding), W2 (d_in, d_embedding), b_dec (d_in) if pre_bias.

        sae = fastsae.JointSAE(d_in=768, d_sae=32768, k=32)
        output = sae(x)                     # x (..., 768): output.reconstruction, output.loss, output.code
        parts = sae.components(x)           # parts.identity, parts.linear, parts.interaction
    """

    architecture = "joint"
    config_class: ClassVar[type[JointSAEConfig]] = JointSAEConfig  # type: ignore  # each class narrows it
    config: JointSAEConfig

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        *,
        k_integration: int | None = None,
        d_embedding: int = 128,
        dropout: float = 0.15,
        linear: bool = True,
        interaction: bool = True,
        pre_bias: bool = False,
        init: Init = "paper",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        config = self.config_class(
            d_in, d_sae, k, pre_bias, init, k_integration, d_embedding, dropout, linear, interaction
        )
        super().__init__(config, backend, device, dtype)
        if interaction and config.n == 1 and not self.W_enc.is_meta:  # where one is loaded, it is known
            warnings.warn(
                f"{type(self).__name__}: k_integration is 1 (half of k = {k}, if it was not given): one feature makes "
                "no pair, so the interaction is a constant. Set k_integration to 2 or more, or interaction=False.",
                stacklevel=3,  # `named` stands between
            )

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        E = d_embedding
        self.W_lin = parameter(d_sae, d_in) if linear else None
        self.b_lin = parameter(d_in) if linear else None
        self.V = parameter(d_sae, E) if interaction else None
        self.W1 = parameter(E, E) if interaction else None
        self.b1 = parameter(E) if interaction else None
        self.W2 = parameter(d_in, E) if interaction else None
        self.b2 = parameter(d_in) if interaction else None
        self.reset_parameters()

    def laws(self) -> dict[str, Callable[[Tensor], object]]:
        there = {name: std for name, std in STD_AT_INIT.items() if getattr(self, name) is not None}
        return super().laws() | {name: partial(Tensor.normal_, mean=0.0, std=std) for name, std in there.items()}

    @property
    def k_integration(self) -> int:
        return self.config.n

    @property
    def _pathways(self) -> str:
        c = self.config
        added = [
            f"linear (k_integration={c.n})" if c.linear else "",
            f"interaction (k_integration={c.n}, d_embedding={c.d_embedding}, dropout={c.dropout:g})"
            if c.interaction
            else "",
        ]
        return ", ".join([super()._pathways, *filter(None, added)])

    def _reconstruct(self, code: SparseCode, target: Tensor | None) -> tuple[Tensor, Tensor]:
        biases = [b for b in (self.b_dec, self.b_lin, self.b2) if b is not None]
        return self.ops.reconstruct(
            code.values,
            code.indices,
            self.W_dec,
            self.W_lin,
            self.V,
            min(self.k_integration, code.k),
            bias=sum(biases[1:], biases[0]) if biases else None,
            mlp=None if self.V is None else self._mlp,
            dropout=self.config.dropout if self.training else 0.0,
            target=target,
            backend=self.backend,
        )

    def summands(self, code: SparseCode) -> Components:
        flat, strongest = code.flatten(), self.strongest(code).flatten()
        identity = self.identity(flat)
        linear = interaction = torch.zeros_like(identity)
        if self.W_lin is not None and self.b_lin is not None:
            linear = self.ops.sparse_decode(strongest.values, strongest.indices, self.W_lin, self.backend) + self.b_lin
        if self.V is not None:
            z = self.ops.pairwise_interaction(strongest.values, strongest.indices, self.V, self.backend)
            interaction = self.ops.interaction_mlp(z, *self._mlp, self.b2, self.config.dropout, self.training)
        shape = (*code.values.shape[:-1], self.d_in)
        return Components(*(part.view(shape) for part in (identity, linear, interaction)))

    def strongest(self, code: SparseCode) -> SparseCode:
        """The part of a code that integration sees: its k_integration strongest features."""
        n = self.k_integration
        return SparseCode(code.values[..., :n], code.indices[..., :n], self.d_sae)

    def hidden(self, code: SparseCode) -> Tensor:
        """Hidden layer of the integration network before its ReLU, W1 z + b1: (..., d_embedding). No dropout."""
        W1, b1, _ = self._mlp
        strongest = self.strongest(code).flatten()
        with self._graph_of(code.values):
            z = self.ops.pairwise_interaction(strongest.values, strongest.indices, self.V, self.backend)  # type: ignore[arg-type]  # there is an mlp
            return F.linear(z, W1, b1).view(*code.values.shape[:-1], self.config.d_embedding)

    def interaction_from(self, hidden: Tensor) -> Tensor:
        """The pairwise pathway from there on, W2 relu(hidden) + b2: (..., d_in)."""
        return F.linear(hidden.relu(), self._mlp[2], self.b2)

    @property
    def _mlp(self) -> tuple[Tensor, Tensor, Tensor]:
        W1, b1, W2 = self.W1, self.b1, self.W2
        if W1 is None or b1 is None or W2 is None:
            raise RuntimeError("JointSAE: interaction=False, there is no pairwise pathway")
        return W1, b1, W2
