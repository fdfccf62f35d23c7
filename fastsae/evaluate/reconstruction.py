"""How well activations are reconstructed, on rows the SAE was not trained on."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsae.modules import SparseAutoencoder, evaluating


@dataclass(frozen=True)
class Reconstruction:
    """Means over all rows. `mse` and `fvu` are in the normalised space the SAE was trained in, `fvu_raw` is not."""

    rows: int
    mse: float
    fvu: float
    """Fraction of variance unexplained: squared error over the variance about the mean of these rows."""
    fvu_raw: float
    """The same on raw activations, where dimensions of large variance dominate."""
    cosine: float
    """Cosine between raw activation and raw reconstruction, averaged over rows."""
    l0: float
    """Active features per row."""
    dead_share: float
    """Share of features active on none of these rows."""


def reconstruction(sae: SparseAutoencoder, activations: Iterable[Tensor]) -> Reconstruction:
    """Measure `sae` on raw activations, an iterable of (B, d_in) tensors that is read once.

    Sums are kept in fp64, so the result does not depend on the batch size beyond rounding of the batches themselves.
    """
    device = sae.W_enc.device
    rows, l0, cosine = 0, 0, torch.zeros((), dtype=torch.float64, device=device)
    fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
    spaces = {name: _Moments(sae.d_in, device) for name in ("normalised", "raw")}
    with evaluating(sae):
        for batch in activations:
            raw = batch.to(device)
            x = sae.normalizer(raw)
            output = sae(x)
            restored = sae.normalizer.invert(output.reconstruction)
            spaces["normalised"].add(x, output.reconstruction)
            spaces["raw"].add(raw, restored)
            cosine += torch.cosine_similarity(raw.to(restored), restored, dim=-1).double().sum()
            l0 += int((output.code.values > 0).sum())
            fired += output.code.firing_counts()
            rows += len(raw)
    if rows < 2:
        raise ValueError(f"reconstruction: expected at least 2 rows of activations to measure a variance; got {rows}")
    return Reconstruction(
        rows=rows,
        mse=float(spaces["normalised"].squared_error.sum()) / (rows * sae.d_in),
        fvu=spaces["normalised"].fvu(rows),
        fvu_raw=spaces["raw"].fvu(rows),
        cosine=float(cosine) / rows,
        l0=l0 / rows,
        dead_share=float((fired == 0).double().mean()),
    )


class _Moments:
    """Sums over rows, per dimension. Shifted by the first batch's mean: variances of far-off data stay accurate."""

    def __init__(self, d_in: int, device: torch.device) -> None:
        zeros = torch.zeros(d_in, dtype=torch.float64, device=device)
        self.shift: Tensor | None = None
        self.sum, self.sum_of_squares, self.squared_error = zeros, zeros.clone(), zeros.clone()

    def add(self, x: Tensor, reconstruction: Tensor) -> None:
        if self.shift is None and len(x):
            self.shift = x.double().mean(dim=0)
        if self.shift is not None:
            centred = x.double() - self.shift
            self.sum = self.sum + centred.sum(dim=0)
            self.sum_of_squares = self.sum_of_squares + centred.square().sum(dim=0)
            self.squared_error = self.squared_error + (x.double() - reconstruction.double()).square().sum(dim=0)

    def fvu(self, rows: int) -> float:
        variance = self.sum_of_squares - self.sum.square() / rows
        return float(self.squared_error.sum() / variance.sum())
