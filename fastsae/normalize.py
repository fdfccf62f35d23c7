"""Activation statistics: measured once, stored with the weights, applied and inverted everywhere."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.code import check_tensors
from fastsae.fp64 import in_fp64

# Rows so many times as far out as 85 % are no measure of the others. The norms of attention sinks are some
# 20 to 1000 times those of other tokens.
_FAR = 10
# A dimension is silent where its standard deviation is below this share of the mean one, or of its own mean: some
# roundings of fp32, or a tenth of one in narrow dtypes, whose values lie far apart: of a hundred rows one is off.
_SILENT, _ROUNDING, _ROUNDING_NARROW = 1e-4, 1e-6, 0.1


def far_rows(norms: Tensor) -> Tensor:
    """Flags of the norms (B,) that are more than ten times as large as 85 % of them."""
    if len(norms) == 0:
        return norms > 0
    ordinary = norms.sort().values[17 * (len(norms) - 1) // 20]
    return (norms > _FAR * ordinary) & (ordinary > 0)


class Normalizer(nn.Module):
    """x -> (x - mean) / scale, with mean and scale (d_in,) that are stored with the weights.

    The statistics are at least fp32, also beside bf16 weights: activations far from zero would lose their differences
    if they were rounded before the mean is taken off.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, d_in: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        """Dtype of forward's result: that of the SAE."""
        precise = torch.promote_types(dtype, torch.float32)
        self.register_buffer("mean", torch.zeros(d_in, device=device, dtype=precise))
        self.register_buffer("scale", torch.ones(d_in, device=device, dtype=precise))

    @property
    def measured(self) -> bool:
        """Whether there are statistics, or x stays as it is."""
        return bool((self.mean != 0).any() or (self.scale != 1).any())

    @torch.no_grad()
    def measure(self, sample: Tensor, kind: str) -> int:
        """Take the statistics of `sample` (rows, d_in), and return how many rows were left out of them.

        "zscore": mean and standard deviation per dimension (one that is constant but for rounding keeps scale 1).
        "scale": one scale, the root mean square of all entries; the mean stays 0. "none": nothing.
        Rows more than ten times as far from the median as 85 % are left out, with a warning: few of them, such
        as attention sinks, would decide the statistics of all.
        """
        check_tensors("Normalizer.measure", x=sample)
        if sample.dim() != 2 or sample.shape[1] != len(self.mean) or len(sample) < 2:
            expected = f"at least 2 rows of width {len(self.mean)}"
            raise ValueError(f"Normalizer.measure: expected {expected}; got shape {tuple(sample.shape)}")
        rounding = max(_ROUNDING, _ROUNDING_NARROW * torch.finfo(sample.dtype).eps)
        sample = in_fp64(sample)
        if not sample.isfinite().all():
            row, column = (~sample.isfinite()).nonzero()[0].tolist()
            raise ValueError(
                f"Normalizer.measure: the sample holds NaN or infinity, first at row {row}, dimension {column}. "
                "Find out which activations they come from; statistics of such data would spoil the whole run."
            )
        far = 0
        if kind != "none":
            sample, far = _without_far_rows(sample)
        mean, scale = torch.zeros_like(sample[0]), torch.ones_like(sample[0])
        if kind == "zscore":
            mean, scale = sample.mean(dim=0), sample.std(dim=0)
            silent = (scale <= _SILENT * scale.mean()) | (scale <= rounding * mean.abs())
            scale = torch.where(silent, 1.0, scale)
        elif kind == "scale":
            rms = sample.square().mean().sqrt()
            scale = scale * (rms if rms > 0 else 1.0)
        elif kind != "none":
            raise ValueError(f"Normalizer.measure: expected 'zscore', 'scale' or 'none'; got {kind!r}")
        self.mean.copy_(mean.to(self.mean.dtype))
        self.scale.copy_(scale.to(self.scale.dtype))
        return far

    def forward(self, x: Tensor) -> Tensor:
        """Raw activations (..., d_in) of any float dtype, normalised, in the dtype of the SAE."""
        check_tensors("Normalizer", x=x)
        if x.dim() == 0 or x.shape[-1] != len(self.mean):
            raise ValueError(
                f"Normalizer: x must end in d_in = {len(self.mean)}; got shape {tuple(x.shape)}. Is this the "
                "activation the SAE was made for?"
            )
        if not x.is_floating_point():
            raise TypeError(f"Normalizer: x must be a float tensor; got {x.dtype}. Convert it with .float().")
        return ((x - self.mean) / self.scale).to(self.dtype)

    def invert(self, y: Tensor) -> Tensor:
        """Normalised activations (..., d_in) to raw ones, in the dtype of the statistics."""
        check_tensors("Normalizer.invert", x=y)
        return y * self.scale + self.mean

    def extra_repr(self) -> str:
        if self.mean.is_meta or not self.measured:
            return "" if self.mean.is_meta else "not measured: activations stay as they are"
        least, most = self.scale.min().item(), self.scale.max().item()
        if least == most and not self.mean.any():
            return f"one scale, {least:.3g}"
        return f"mean and scale by dimension, scales {least:.3g} to {most:.3g}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Apply .to(), .cuda(), .bfloat16() and so on: the statistics move with the SAE, but keep their precision."""
        self.dtype = fn(torch.empty(1, dtype=self.dtype, device=self.mean.device)).dtype
        precise = torch.promote_types(self.dtype, torch.float32)

        def keep(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == precise else t.to(moved.device, precise)

        return super()._apply(keep, recurse)


def _without_far_rows(sample: Tensor) -> tuple[Tensor, int]:
    """The rows that count, and how many do not; warns of these."""
    some = sample[:: max(1, len(sample) // 1024)]
    middle = some.sort(dim=0).values[len(some) // 2]
    # Some rows at a time: the sample is large.
    norms = torch.cat([(rows - middle).norm(dim=1) for rows in sample.split(1024)])
    far = far_rows(norms)
    n = int(far.sum())
    if n and len(sample) - n >= 2:  # of two rows neither tells which one is ordinary
        warn_of_far_rows("Normalizer.measure", norms, far, " (left out of the statistics)")
        return sample[~far], n
    return sample, 0


def warn_of_far_rows(where: str, norms: Tensor, far: Tensor, note: str = "") -> None:
    """Say how many rows lie far out, how far, and what can be done about them."""
    times = (norms.max() / norms[~far].median()).item()
    warnings.warn(
        f"{where}: {int(far.sum())} of {len(far)} rows ({int(far.sum()) / len(far):.2%}) are up to {times:,.0f} times "
        f"as large as the median row, as attention sinks are{note}. They weigh most in loss and FVU: the log has "
        "fvu_ordinary for the other rows, and TrainerConfig(outliers='skip') trains without them",
        stacklevel=3,
    )
