"""SequentialSAE: feature integration trained on the residual of a finished TopK SAE (arXiv 2507.00269)."""

from typing import Any

import torch

from fastsae.config import SequentialSAEConfig
from fastsae.modules.base import uncompiled
from fastsae.modules.joint import JointSAE
from fastsae.modules.topk import TopKSAE

FROZEN = ("W_enc", "b_enc", "W_dec", "b_dec")


class SequentialSAE(JointSAE):
    """A frozen TopK SAE, and the neural factorization machine (NFM) that learns its residual: the paper's sequential
    approach.

        e    = x - identity,  identity = sum_{j<k} a_j W_dec[i_j]               (+ b_dec if the base has one)
        loss = mean((linear + interaction - e)^2) = mean((identity + linear + interaction - x)^2)

    So this is a JointSAE (see there for linear and interaction) whose W_enc, b_enc, W_dec and b_dec do not require
    gradients: identity is the base's reconstruction, and code, loss and reconstruction are the joint one's.

        base = fastsae.load("runs/topk/sae")
        sae = fastsae.SequentialSAE.on(base, k_integration=16)
        fastsae.Trainer(sae, fastsae.TrainerConfig(steps=1000)).fit(activations)
    """

    architecture = "sequential"
    config_class = SequentialSAEConfig

    def __init__(self, d_in: int, d_sae: int, k: int, **options: Any) -> None:
        super().__init__(d_in, d_sae, k, **options)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in FROZEN)

    @classmethod
    def on(
        cls,
        sae: TopKSAE,
        *,
        k_integration: int | None = None,
        d_embedding: int = 128,
        dropout: float = 0.15,
        linear: bool = True,
        interaction: bool = True,
    ) -> "SequentialSAE":
        """A new NFM on a copy of `sae`, whose weights, normalisation, device, dtype and backend it keeps."""
        sae = uncompiled(sae)
        if not isinstance(sae, TopKSAE):
            raise ValueError(f"SequentialSAE.on: expected a TopKSAE as the base; got {type(sae).__name__}")
        new = cls(
            sae.d_in,
            sae.d_sae,
            sae.k,
            k_integration=k_integration,
            d_embedding=d_embedding,
            dropout=dropout,
            linear=linear,
            interaction=interaction,
            pre_bias=sae.config.pre_bias,
            init=sae.config.init,
            backend=sae.backend,
            device=sae.W_enc.device,
            dtype=sae.W_enc.dtype,
        )
        with torch.no_grad():
            new.load_state_dict(sae.state_dict(), strict=False)
        new.reads = sae.reads
        return new
