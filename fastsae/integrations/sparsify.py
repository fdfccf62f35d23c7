"""fastsae in EleutherAI's sparsify: inside `with accelerate():` its Trainer makes SparseCoders that train by fastsae.

    from fastsae.integrations.sparsify import accelerate
    with accelerate():
        Trainer(TrainConfig(SparseCoderConfig(k=32), ...), dataset, model).fit()

Nothing stays patched after the block; checkpoints are sparsify's own.
"""

# These classes take the place of others, whose types are narrower than their use.
# pyright: basic

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

try:
    import sparsify.trainer as trainer
    from sparsify import SparseCoder
    from sparsify.sparse_coder import ForwardOutput
except ImportError as error:
    raise ImportError(
        f"fastsae.integrations.sparsify needs sparsify ({error}): pip install eai-sparsify; 1.3.3 is tested"
    ) from error

from fastsae import ops

__all__ = ["FastSparseCoder", "accelerate"]


class FastSparseCoder(SparseCoder):
    """sparsify's SparseCoder, whose forward never holds a (batch, num_latents) tensor.

    The same losses. Gradients differ where the stock module's are not those of its loss:
    - the encoder's part of AuxK and Multi-TopK is there (stock drops it),
    - a latent selected with an activation of 0, because fewer than k are positive, gets none (stock gives it one).
    """

    def __init__(self, d_in: int, cfg: Any, *args: Any, **options: Any) -> None:
        if cfg.activation != "topk":
            raise ValueError(
                f"FastSparseCoder: activation {cfg.activation!r} is not supported, only 'topk'; train it outside of "
                "accelerate()"
            )
        super().__init__(d_in, cfg, *args, **options)

    @torch.autocast("cuda", dtype=torch.bfloat16, enabled=torch.cuda.is_bf16_supported())  # as the stock module's
    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        dead_mask: Tensor | None = None,
        total_variance: Tensor | None = None,
    ) -> ForwardOutput:
        y = x if y is None else y
        k, x = self.cfg.k, x.to(self.dtype)
        found = min(4 * k, self.num_latents) if self.cfg.multi_topk else k
        values, indices = self._topk(x, found)
        sae_out = self._decoded(values[:, :k], indices[:, :k]) + self.b_dec
        if self.W_skip is not None:
            sae_out = sae_out + x @ self.W_skip.mT
        error = y - sae_out
        if total_variance is None:
            total_variance = (y - y.mean(0)).pow(2).sum()
        fvu = error.pow(2).sum() / total_variance
        auxk_loss = self._auxk_loss(x, error.detach(), dead_mask) / total_variance
        multi_topk_fvu = sae_out.new_tensor(0.0)
        if self.cfg.multi_topk:  # what is returned then is the larger code, and its reconstruction
            sae_out = self._decoded(values, indices) + self.b_dec
            multi_topk_fvu = (sae_out - y).pow(2).sum() / total_variance
        return ForwardOutput(sae_out, values, indices, fvu, auxk_loss, multi_topk_fvu)

    def _topk(self, x: Tensor, k: int, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        b_dec = None if self.cfg.transcode else self.b_dec
        return ops.topk_encode(x, self.encoder.weight, self.encoder.bias, k, features=features, b_dec=b_dec)

    def _decoded(self, values: Tensor, indices: Tensor) -> Tensor:
        if self.W_dec is None:
            raise RuntimeError("FastSparseCoder: it was made with decoder=False, and cannot decode")
        return ops.sparse_decode(values.contiguous(), indices.contiguous(), self.W_dec)

    def _auxk_loss(self, x: Tensor, error: Tensor, dead_mask: Tensor | None) -> Tensor:
        dead = None if dead_mask is None else dead_mask.nonzero().squeeze(1)
        if dead is None or len(dead) == 0:
            return error.new_tensor(0.0)
        heuristic = error.shape[-1] // 2
        e_hat = self._decoded(*self._topk(x, min(heuristic, len(dead)), dead))
        return min(len(dead) / heuristic, 1.0) * (e_hat - error).pow(2).sum()


class _InItsPlace(type):
    """Makes FastSparseCoders, and knows every SparseCoder: a Trainer may have been made before the block."""

    def __call__(cls, *args: Any, **options: Any) -> FastSparseCoder:
        return FastSparseCoder(*args, **options)

    def __instancecheck__(cls, coder: Any) -> bool:
        return isinstance(coder, SparseCoder)


class _SparseCoder(metaclass=_InItsPlace):
    pass


class _Open:
    """Number of open blocks, and the class the first found; blocks may end in any order, as those of threads do."""

    lock, blocks, stock = threading.Lock(), 0, SparseCoder


@contextmanager
def accelerate() -> Iterator[None]:
    """Have sparsify's Trainers that are made in the block make FastSparseCoders, which go on to be fast after it.

    While a block is open, other threads' Trainers make them too.
    """
    with _Open.lock:
        if _Open.blocks == 0:
            _Open.stock = trainer.SparseCoder
            trainer.SparseCoder = _SparseCoder  # type: ignore[misc]  # what Trainer calls
        _Open.blocks += 1
    try:
        yield
    finally:
        with _Open.lock:
            _Open.blocks -= 1
            if _Open.blocks == 0:
                trainer.SparseCoder = _Open.stock  # type: ignore[misc]
