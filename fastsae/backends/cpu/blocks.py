"""Layout of pre-activations: by blocks of features, one chunk of rows at a time."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.backends.cpu.memory import workspace

PRE_ACTIVATION_BYTES = 256 * 2**20
# A block of pre-activations this wide is still in cache when its group maxima are taken, and MKL writes it faster.
BLOCK = 1024
# Up to so many rows all of it stays in cache, and starting a product for each block costs more than that saves.
FEW_ROWS = 64


def set_pre_activation_bytes(limit: int) -> None:
    """Set the bytes pre-activations may take at once (default 256 MiB); at least one row is always held."""
    global PRE_ACTIVATION_BYTES
    if limit < 1:
        raise ValueError(f"set_pre_activation_bytes: expected at least 1; got {limit}")
    PRE_ACTIVATION_BYTES = limit


def block_width(d_sae: int, rows: int | None = None) -> int:
    """Features per block; for so few rows that blocks do not pay, all of them."""
    few = rows is not None and rows <= FEW_ROWS
    return BLOCK if d_sae > BLOCK and not few else -(-d_sae // 64) * 64


def n_blocks(d_sae: int, width: int) -> int:
    return -(-d_sae // width)


def rows_held(rows: int, d_sae: int, bytes_each: int) -> int:
    """Compute the number of `rows` rows that are held at once, at `bytes_each` for one pre-activation."""
    width = block_width(d_sae)
    return max(1, min(rows, PRE_ACTIVATION_BYTES // (bytes_each * n_blocks(d_sae, width) * width)))


class Encoder(NamedTuple):
    """The features that compete for a place in the code: all rows of W_enc, or those listed in `features`."""

    W_enc: Tensor
    b_enc: Tensor
    features: Tensor | None
    scale: Tensor | None = None
    """(d_sae): features are ranked by scale times their pre-activation."""

    @property
    def d_sae(self) -> int:
        return len(self.W_enc if self.features is None else self.features)

    def block(self, i: int, width: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """W_enc, b_enc and scale of the i-th block of `width` features; the last one may be narrower."""
        part = slice(i * width, min((i + 1) * width, self.d_sae))
        rows = part if self.features is None else self.features[part]
        return self.W_enc[rows], self.b_enc[rows], None if self.scale is None else self.scale[rows]

    def scaled_block(self, i: int, width: int) -> tuple[Tensor, Tensor]:
        """W_enc and b_enc of the i-th block, multiplied by scale."""
        W, b, scale = self.block(i, width)
        if scale is None:
            return W, b
        scaled = workspace("scaled_W", (width, W.shape[1]), W.dtype)[: len(W)]
        return torch.mul(W, scale.unsqueeze(1), out=scaled), b * scale

    def pre_activations(self, dots: Tensor, ids: Tensor) -> Tensor:
        """Pre-activations of the competitors `ids`, scaled, from their inner products with rows of W_enc."""
        features = self.name(ids)
        pre = dots + self.b_enc[features]
        return pre if self.scale is None else pre * self.scale[features]

    def unscaled(self, values: Tensor, ids: Tensor) -> Tensor:
        """Take the scale out of ranked pre-activations of the competitors `ids`."""
        if self.scale is None:
            return values
        return torch.where(values == 0, values, values / self.scale[self.name(ids)])

    def name(self, ids: Tensor) -> Tensor:
        """The features of W_enc that competed under the numbers `ids`."""
        return ids if self.features is None else self.features[ids]
