"""TopKSAE: the plain TopK sparse autoencoder."""

import torch
from torch import Tensor

from fastsae.code import SparseCode
from fastsae.config import Init, TopKSAEConfig
from fastsae.modules.base import Components, SparseAutoencoder


class TopKSAE(SparseAutoencoder):
    """reconstruction = sum_{j<k} a_j W_dec[i_j] + b_dec, with a the k largest of relu(W_enc (x - b_dec) + b_enc).

    Parameters W_enc W_dec (d_sae, d_in), b_enc (d_sae), b_dec (d_in) if pre_bias.

        sae = fastsae.TopKSAE(d_in=768, d_sae=32768, k=32)
        output = sae(x)                     # x (..., 768): output.reconstruction, output.loss, output.code
    """

    architecture = "topk"
    config_class = TopKSAEConfig

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        *,
        pre_bias: bool = True,
        init: Init = "paper",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(TopKSAEConfig(d_in, d_sae, k, pre_bias, init), backend, device, dtype)
        self.reset_parameters()

    def _reconstruct(self, code: SparseCode, target: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.ops.reconstruct(
            code.values,
            code.indices,
            self.W_dec,
            None,
            None,
            code.k,
            bias=self.b_dec,
            target=target,
            backend=self.backend,
        )

    def summands(self, code: SparseCode) -> Components:
        identity = self.decode(code)
        return Components(identity, torch.zeros_like(identity), torch.zeros_like(identity))
