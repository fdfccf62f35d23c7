"""Reconstruction error, and the part of each pathway in it, on rows the SAE was not trained on."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastsae.activations.store import Rows
from fastsae.evaluate.intervals import DocumentSums, DocumentTotals, Interval
from fastsae.evaluate.pathways import FULL, IDENTITY, ablations, pathways
from fastsae.fp64 import in_fp64
from fastsae.modules import SparseAutoencoder, evaluating
from fastsae.report import table


@dataclass(frozen=True)
class PathwayShare:
    """Part of one summand in the reconstruction; its mean over rows, which biases can make, counts for nothing."""

    variance_share: Interval
    """Squared deviation of the summand from its mean over that of x: its size, not its use."""
    unique_share: Interval
    """FVU added when the summand is held at its mean: its use beside the others, which were trained to rely on it."""
    mean_abs: float
    """Mean absolute output, biases included (paper 4.2)."""


@dataclass(frozen=True)
class Reconstruction:
    """Means over all rows, intervals over documents. All in the normalised space the SAE was trained in, but
    `fvu_raw` and `cosine`."""

    rows: int
    documents: int
    """0 when plain tensors were measured: there are no intervals then."""
    mse: Interval
    fvu: Interval
    """Fraction of variance unexplained: squared error over the variance about the mean of these rows."""
    fvu_raw: Interval
    """FVU on raw activations, where dimensions of large variance dominate."""
    cosine: Interval
    """Cosine between raw activation and raw reconstruction."""
    l0: Interval
    """Active features per row."""
    dead_share: float
    """Share of features active on none of these rows."""
    conditions: dict[str, Interval]
    """FVU with pathways left out, biases and all, by what is kept."""
    pathways: dict[str, PathwayShare]
    error_reduction_against_own_identity_pathway: Interval | None
    """The paper's "error reduction": 1 - mse / mse of the identity pathway of the same SAE, which was never trained to
    reconstruct alone. No comparison with a TopK SAE. None without integration."""
    interaction_share_of_mean_abs: float | None
    """The paper's split by mean absolute output: interaction over linear + interaction. None unless there are both."""
    sums: DocumentSums = field(repr=False)
    """Per document, for paired comparisons."""

    def __str__(self) -> str:
        """Tables, for reading: by what is kept of the reconstruction, and by pathway."""
        over = f" in {self.documents:,} documents or groups, with 95 % intervals over them" if self.documents else ""
        lines = [
            f"Reconstruction of {self.rows:,} rows{over}",
            f"MSE {self.mse:.4f}   cosine {self.cosine:.4f}   L0 {self.l0:.1f}   dead in these rows "
            f"{self.dead_share:.1%}   FVU of raw activations {self.fvu_raw:.4f}",
            "",
            table([{"reconstruction": name, "FVU": f"{fvu:.4f}"} for name, fvu in self.conditions.items()]),
        ]
        shares = [
            {
                "pathway": name,
                "share of the variance": f"{share.variance_share:.4f}",
                "FVU more without it": f"{share.unique_share:.4f}",
            }
            for name, share in self.pathways.items()
        ]
        return "\n".join([*lines, "", table(shares)])


def reconstruction(
    sae: SparseAutoencoder, activations: Iterable[Tensor | Rows], names: tuple[str, ...] = ()
) -> Reconstruction:
    """Measure `sae` on raw activations, read once: (B, d_in) tensors, or Rows with the `names` of their documents.

    Sums are kept in fp64, so the result does not depend on the batch size beyond rounding of the batches themselves.
    Variances are about the mean of all rows, which is held fixed when documents are resampled.
    """
    summands = ("identity", *pathways(sae))
    firing = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.W_enc.device)
    totals = DocumentTotals(names or ("",))
    errors = torch.zeros(len(totals.names), sae.d_in, dtype=torch.float64, device="cpu")
    deviations = {name: _Deviations(len(totals.names), sae.d_in) for name in ("x", "raw", *summands)}
    with evaluating(sae):
        for batch in activations:
            if isinstance(batch, Rows) != bool(names):
                raise TypeError(
                    "reconstruction: expected Rows with the names of their documents, or plain tensors without"
                )
            rows, documents = batch[:2] if isinstance(batch, Rows) else (batch, torch.zeros(len(batch), device="cpu"))
            raw = rows.to(sae.W_enc.device)
            x = sae.normalizer(raw)
            code = sae.encode(x)
            parts = sae.summands(code)
            kept = ablations(sae, parts)
            residual = in_fp64(x) - in_fp64(kept[FULL])
            restored = sae.normalizer.invert(kept[FULL])
            firing += code.firing_counts()
            sums = {f"error {name}": (in_fp64(x) - in_fp64(y)).square().sum(dim=1) for name, y in kept.items()}
            sums |= {f"abs {name}": in_fp64(getattr(parts, name)).abs().sum(dim=1) for name in summands}
            sums["raw error"] = (in_fp64(raw) - in_fp64(restored)).square().sum(dim=1)
            sums["cosine"] = torch.cosine_similarity(raw.to(restored), restored, dim=-1)
            sums["l0"] = (code.values > 0).sum(dim=-1)
            totals.add(documents, sums)
            residual, at = residual.cpu(), documents.long().cpu()
            errors.index_add_(0, at, residual)
            for name, deviation in deviations.items():
                y = {"x": x, "raw": raw}.get(name)
                deviation.add(getattr(parts, name) if y is None else y, residual, at)
    if totals.rows < 2:
        raise ValueError(
            f"reconstruction: expected at least 2 rows of activations to measure a variance; got {totals.rows}"
        )
    for name, deviation in deviations.items():
        squared = deviation.squared(totals.rows)
        totals.put(f"variance {name}", squared)
        if name in summands:
            totals.put(f"unique {name}", squared + 2 * deviation.with_residual(errors, totals.rows))
    sums = totals.finish()
    sums.sums["entries"] = sums.sums["rows"] * sae.d_in
    return of_sums(sums, int((firing == 0).sum()) / sae.d_sae, bool(names))


def of_sums(sums: DocumentSums, dead_share: float, documented: bool = True) -> Reconstruction:
    """Make the result of `reconstruction` from sums that it left before."""
    summands = tuple(name[4:] for name in sums.sums if name.startswith("abs "))
    fvu = {name[6:]: sums.ratio(name, "variance x", least=0) for name in sums.sums if name.startswith("error ")}
    shares = {
        name: PathwayShare(
            variance_share=sums.ratio(f"variance {name}", "variance x", least=0),
            unique_share=sums.ratio(f"unique {name}", "variance x"),
            mean_abs=sums.total(f"abs {name}") / sums.total("entries"),
        )
        for name in summands
    }
    both = len(summands) == 3
    integration = sum(shares[name].mean_abs for name in summands[1:])
    return Reconstruction(
        rows=int(sums.total("rows")),
        documents=len(sums.names) if documented else 0,
        mse=sums.ratio("error full", "entries", least=0),
        fvu=fvu[FULL],
        fvu_raw=sums.ratio("raw error", "variance raw", least=0),
        cosine=sums.ratio("cosine", "rows", least=-1, most=1),
        l0=sums.ratio("l0", "rows", least=0),
        dead_share=dead_share,
        conditions=fvu,
        pathways=shares,
        error_reduction_against_own_identity_pathway=sums.reduction(f"error {FULL}", f"error {IDENTITY}")
        if IDENTITY in fvu
        else None,
        interaction_share_of_mean_abs=shares["interaction"].mean_abs / integration if both and integration else None,
        sums=sums,
    )


class _Deviations:
    """Per document: squared deviations of y from its mean over all rows, and their product with a residual.

    Shifted by the first batch's mean: variances of far-off data stay accurate.
    """

    def __init__(self, documents: int, d_in: int) -> None:
        zeros = torch.zeros(documents, dtype=torch.float64, device="cpu")
        self.rows, self.squares, self.products = zeros, zeros.clone(), zeros.clone()
        self.sums = torch.zeros(documents, d_in, dtype=torch.float64, device="cpu")
        self.shift: Tensor | None = None

    def add(self, y: Tensor, residual: Tensor, documents: Tensor) -> None:
        if self.shift is None and len(y):
            self.shift = in_fp64(y).mean(dim=0)
        if self.shift is not None:
            y = (in_fp64(y) - self.shift).cpu()
            self.rows.index_add_(0, documents, torch.ones(len(y), dtype=torch.float64, device="cpu"))
            self.squares.index_add_(0, documents, y.square().sum(dim=1))
            self.products.index_add_(0, documents, (y * residual).sum(dim=1))
            self.sums.index_add_(0, documents, y)

    def squared(self, rows: int) -> Tensor:
        mean = self.sums.sum(dim=0) / rows
        return self.squares - 2 * self.sums @ mean + self.rows * (mean @ mean)

    def with_residual(self, residuals: Tensor, rows: int) -> Tensor:
        """`residuals`: sums of the residual by document, (documents, d_in)."""
        return self.products - residuals @ (self.sums.sum(dim=0) / rows)
