"""SecondarySAE: the features of the integration network itself (arXiv 2507.00269)."""

import zlib
from typing import Any, Protocol

import torch
from torch import Tensor

from fastsae.config import SecondarySAEConfig
from fastsae.modules.base import uncompiled
from fastsae.modules.joint import JointSAE
from fastsae.modules.topk import TopKSAE


class SecondarySAE(TopKSAE):
    """A TopKSAE of what the integration network of a trained JointSAE holds before its ReLU:

        hidden = W1 z + b1,  z = (s^2 - q) / 2 over the k_integration strongest features of the base

    Its d_in is the base's d_embedding, and it knows nothing else of the base. The paper's has no decoder bias, 25
    d_embedding features, and one in fifty of them active.

        sae = fastsae.SecondarySAE.on(base)         # base: a trained JointSAE or SequentialSAE
        fastsae.Trainer(sae, fastsae.TrainerConfig(steps=1000)).fit(stream_of_hidden)
        sae.encode_raw(base.hidden(base.encode_raw(raw)))
    """

    architecture = "secondary"
    config_class = SecondarySAEConfig

    def __init__(self, d_in: int, d_sae: int, k: int, *, pre_bias: bool = False, **options: Any) -> None:
        super().__init__(d_in, d_sae, k, pre_bias=pre_bias, **options)

    @classmethod
    def on(cls, base: JointSAE, d_sae: int | None = None, k: int | None = None) -> "SecondarySAE":
        """A new one for the hidden layer of `base`, on its device and in its dtype. Raises ValueError without one."""
        base = uncompiled(base)
        if not isinstance(base, JointSAE) or base.V is None:
            what = f"{type(base).__name__} without interaction" if isinstance(base, JointSAE) else type(base).__name__
            raise ValueError(f"SecondarySAE.on: expected a JointSAE with its pairwise pathway as the base; got {what}")
        d_sae = 25 * base.config.d_embedding if d_sae is None else d_sae
        k = max(1, d_sae // 50) if k is None else k
        device, dtype = base.W_enc.device, base.W_enc.dtype
        return cls(base.config.d_embedding, d_sae, k, backend=base.backend, device=device, dtype=dtype)


class _Rows(Protocol):
    """Blocks of raw activations, with their documents and positions."""

    block_rows: list[int]

    def block(self, i: int) -> Tensor: ...

    def rows(self, i: int) -> Any: ...


class HiddenActivations:
    """Activations of a model, block by block, as the hidden layer of the integration network of `base` has them.

    source: what activations come from, an ActivationStore or ModelActivations; so this is one too. The base reads them
    as it was trained to: with its normalisation, k and k_integration, and no dropout.
    """

    def __init__(self, source: _Rows, base: JointSAE) -> None:
        self.source, self.base = source, base
        self.block_rows, self.d_in = source.block_rows, base.config.d_embedding
        fingerprint = zlib.crc32(repr(base.config).encode())
        for t in base.state_dict().values():  # the normalisation is among them
            fingerprint = zlib.crc32(t.flatten()[:64].cpu().double().numpy().tobytes(), fingerprint)
        self.identity: dict[str, Any] = getattr(source, "identity", {}) | {"base": fingerprint}

    def block(self, i: int) -> Tensor:
        """The hidden layer for each row of block i: (block_rows[i], d_embedding)."""
        return self._hidden(self.source.block(i))

    def rows(self, i: int) -> Any:
        """Rows of block i, with the document and the position of each."""
        rows = self.source.rows(i)
        return rows._replace(activations=self._hidden(rows.activations))

    def _hidden(self, raw: Tensor) -> Tensor:
        with torch.no_grad():
            return self.base.hidden(self.base.encode_raw(raw))
