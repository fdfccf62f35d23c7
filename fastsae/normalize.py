"""Activation statistics: measured once, stored with the weights, applied and inverted everywhere."""

import torch
from torch import Tensor, nn


class Normalizer(nn.Module):
    """x -> (x - mean) / scale, with mean and scale (d_in,) that are stored with the weights."""

    mean: Tensor
    scale: Tensor

    def __init__(self, d_in: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.kind = "none"
        self.register_buffer("mean", torch.zeros(d_in, device=device, dtype=dtype))
        self.register_buffer("scale", torch.ones(d_in, device=device, dtype=dtype))

    @torch.no_grad()
    def measure(self, sample: Tensor, kind: str) -> None:
        """Take the statistics of `sample` (rows, d_in).

        "zscore": mean and standard deviation per dimension (a constant dimension keeps scale 1).
        "scale": one scale, the root mean square of all entries; the mean stays 0. "none": nothing.
        """
        if sample.dim() != 2 or sample.shape[1] != len(self.mean) or len(sample) < 2:
            expected = f"at least 2 rows of width {len(self.mean)}"
            raise ValueError(f"Normalizer.measure: expected {expected}; got shape {tuple(sample.shape)}")
        sample = sample.double()
        if not sample.isfinite().all():
            row, column = (~sample.isfinite()).nonzero()[0].tolist()
            raise ValueError(
                f"Normalizer.measure: the sample holds NaN or infinity, first at row {row}, dimension {column}. "
                "Find out which activations they come from; statistics of such data would spoil the whole run."
            )
        mean, scale = torch.zeros_like(sample[0]), torch.ones_like(sample[0])
        if kind == "zscore":
            mean, scale = sample.mean(dim=0), sample.std(dim=0)
            scale = torch.where(scale > 1e-8 * scale.max(), scale, 1.0)
        elif kind == "scale":
            rms = sample.square().mean().sqrt()
            scale = scale * (rms if rms > 0 else 1.0)
        elif kind != "none":
            raise ValueError(f"Normalizer.measure: expected 'zscore', 'scale' or 'none'; got {kind!r}")
        self.kind = kind
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.kind == "none" else (x - self.mean) / self.scale

    def invert(self, y: Tensor) -> Tensor:
        return y if self.kind == "none" else y * self.scale + self.mean
