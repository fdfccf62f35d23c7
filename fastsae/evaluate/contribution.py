"""Share of each pathway in a feature's work: by the norms of its weights, and by the change from leaving it out.

Shares of weight norms correlate with the norms themselves, whatever was learned. So each number stands beside its
frozen-init null: the same with all weights as trained but W_lin and V, which are redrawn from their initialisation.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsae.code import SparseCode
from fastsae.fp64 import fp64_device, in_fp64
from fastsae.modules import JointSAE, SparseAutoencoder
from fastsae.modules.joint import STD_AT_INIT

DRAWS = 5
"""Redraws of W_lin and V behind each null."""
PAPER_THRESHOLD = 0.2
"""Squared norm at which the paper splits its features."""
CHUNK = 2**20
"""Entries of one temporary of the leave-one-out; some six of them live at once."""


@dataclass(frozen=True)
class BesideNull:
    """A number, and what the frozen-init null gives in its place."""

    value: float
    """With the trained weights."""
    null_mean: float
    """Mean over the redraws."""
    null_min: float
    """Lowest of the redraws."""
    null_max: float
    """Highest of the redraws."""


@dataclass(frozen=True)
class NormSplit:
    """Mean weight-norm shares of the features below and above a squared norm of W_dec, by pathway."""

    threshold: float
    """Low is at most this, high is above."""
    features_low: int
    """Number of features of low squared norm."""
    features_high: int
    """Number of features of high squared norm."""
    low: dict[str, BesideNull]
    """Pathway -> mean share among the low."""
    high: dict[str, BesideNull]
    """Pathway -> mean share among the high."""


@dataclass(frozen=True)
class WeightNormShare:
    """The paper's shares: of |W_dec[i]| + |W_lin[i]| + |V[i]|, L2 norms. They say nothing about activations."""

    by_median: NormSplit | None
    """Split at the median squared norm; None if all squared norms are equal."""
    by_paper_threshold: NormSplit | None
    """Split at the paper's 0.2; None if a side is empty."""
    spearman: dict[str, BesideNull | None]
    """Pathway -> rank correlation of its share with the squared norm of W_dec."""


@dataclass(frozen=True)
class Contribution:
    """A feature's contribution to a pathway: the squared change of its output when the feature is left out, summed over
    rows. For identity and linear that is sum a² |w|²; for interaction the network is run without the feature."""

    rows: int
    """Rows it was measured on: the first of those read."""
    features: int
    """Features that contribute anything on these rows; the correlations are over them."""
    share: dict[str, dict[str, float] | None]
    """Firing group -> pathway -> share of the group's summed contribution; None if the group contributes nothing."""
    spearman: dict[str, BesideNull | None]
    """Firing group -> rank correlation of the integration's share of contribution with the squared norm of W_dec."""


class Weights(NamedTuple):
    """Weights of the features in each pathway, as far as the null redraws them."""

    identity: Tensor
    """Squared norms of the rows of W_dec, (d_sae,) fp64."""
    linear: Tensor | None
    """Squared norms of the rows of W_lin."""
    V: Tensor | None


def squared_norms(rows: Tensor) -> Tensor:
    """Compute the squared norm of each row, in fp64."""
    return torch.linalg.vector_norm(rows.to(fp64_device(rows.device)), dim=1, dtype=torch.float64).square()


def trained(sae: JointSAE) -> Weights:
    return Weights(squared_norms(sae.W_dec), None if sae.W_lin is None else squared_norms(sae.W_lin), sae.V)


def redrawn(sae: JointSAE, rng: np.random.Generator) -> Weights:
    linear = V = None
    if sae.W_lin is not None:  # only the norms are needed: those of normal rows are chi-squared
        drawn = torch.from_numpy(STD_AT_INIT["W_lin"] ** 2 * rng.chisquare(sae.d_in, sae.d_sae))
        linear = drawn.to(fp64_device(sae.W_lin.device))
    if sae.V is not None:
        V = torch.from_numpy(STD_AT_INIT["V"] * rng.standard_normal(tuple(sae.V.shape), dtype=np.float32)).to(sae.V)
    return Weights(squared_norms(sae.W_dec), linear, V)


def integrates(sae: SparseAutoencoder) -> bool:
    return isinstance(sae, JointSAE) and (sae.W_lin is not None or sae.V is not None)


def weight_norm_share(sae: SparseAutoencoder, rng: np.random.Generator) -> WeightNormShare | None:
    """None for an SAE without integration."""
    if not isinstance(sae, JointSAE) or not integrates(sae):
        return None
    shares = norm_shares(trained(sae))
    nulls = [norm_shares(redrawn(sae, rng)) for _ in range(DRAWS)]
    size = squared_norms(sae.W_dec).cpu()

    def beside(statistic: Callable[[Tensor], float | None]) -> dict[str, BesideNull | None]:
        return {
            pathway: beside_null(statistic(share), [statistic(null[pathway]) for null in nulls])
            for pathway, share in shares.items()
        }

    def split(threshold: float) -> NormSplit | None:
        low = size <= threshold
        if low.all() or not low.any():
            return None
        means = [beside(lambda share, side=side: float(share[side].mean())) for side in (low, ~low)]
        below, above = ({pathway: m for pathway, m in mean.items() if m is not None} for mean in means)
        return NormSplit(threshold, int(low.sum()), int((~low).sum()), below, above)

    return WeightNormShare(
        by_median=split(float(size.median())),
        by_paper_threshold=split(PAPER_THRESHOLD),
        spearman=beside(lambda share: spearman(share, size)),
    )


def contribution(
    sae: SparseAutoencoder, code: SparseCode, groups: dict[str, Tensor], rng: np.random.Generator
) -> Contribution | None:
    """Measure contributions of a flat code's features, by groups of indices. None for an SAE without integration."""
    if not isinstance(sae, JointSAE) or not integrates(sae):
        return None
    size = squared_norms(sae.W_dec).cpu()
    parts = contributions(sae, trained(sae), code)
    share, seen = shares_of(parts)["integration"], torch.stack(list(parts.values())).sum(dim=0) > 0
    nulls = [shares_of(contributions(sae, redrawn(sae, rng), code))["integration"] for _ in range(DRAWS)]

    def correlation(group: Tensor) -> BesideNull | None:
        among = group[seen[group]]
        return beside_null(spearman(share[among], size[among]), [spearman(null[among], size[among]) for null in nulls])

    def totals(group: Tensor) -> dict[str, float] | None:
        if not seen[group].any():
            return None
        return {p: float(s) for p, s in shares_of({p: part[group].sum() for p, part in parts.items()}).items()}

    return Contribution(
        rows=len(code.values),
        features=int(seen.sum()),
        share={name: totals(group) for name, group in groups.items()},
        spearman={name: correlation(group) for name, group in groups.items()},
    )


def norm_shares(weights: Weights) -> dict[str, Tensor]:
    """Pathway -> share of each feature, (d_sae,) on the CPU."""
    squares = {
        "identity": weights.identity,
        "linear": weights.linear,
        "interaction": None if weights.V is None else squared_norms(weights.V),
    }
    return shares_of({pathway: s.sqrt().cpu() for pathway, s in squares.items() if s is not None})


def shares_of(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each part's share of the sum, and that of all but identity as "integration"."""
    total = torch.stack(list(parts.values())).sum(dim=0)
    shares = {pathway: part / total for pathway, part in parts.items()}
    rest = torch.stack([part for pathway, part in parts.items() if pathway != "identity"]).sum(dim=0)
    return {**shares, "integration": rest / total}


def contributions(sae: JointSAE, weights: Weights, code: SparseCode) -> dict[str, Tensor]:
    """Pathway -> contribution of each feature, (d_sae,) fp64 on the CPU."""
    strongest = sae.strongest(code)
    parts = {"identity": _sum_of_squares(code) * weights.identity}
    if weights.linear is not None:
        parts["linear"] = _sum_of_squares(strongest) * weights.linear
    if weights.V is not None:
        parts["interaction"] = _leave_one_out(sae, weights.V, strongest)
    return {pathway: part.cpu() for pathway, part in parts.items()}


def _sum_of_squares(code: SparseCode) -> Tensor:
    values = in_fp64(code.values)
    total = values.new_zeros(code.d_sae)
    return total.index_add_(0, code.indices.reshape(-1).to(total.device), values.square().reshape(-1))


def _leave_one_out(sae: JointSAE, V: Tensor, code: SparseCode) -> Tensor:
    """sum over rows of |N(code) - N(code without the feature)|², N the network over the pairwise interactions z."""
    compute = torch.promote_types(V.dtype, torch.float32)
    W1, b1, W2 = (getattr(sae, name).to(compute) for name in ("W1", "b1", "W2"))
    R = torch.linalg.qr(W2, mode="r").R  # |W2 g| = |R g|, and R is only as wide as the embedding
    total = torch.zeros(code.d_sae, dtype=torch.float64, device=fp64_device(V.device))
    for values, indices in _chunks(code, V.shape[1]):
        terms = values.to(compute)[..., None] * V[indices].to(compute)
        s = terms.sum(dim=1, keepdim=True)
        z = (s.square() - terms.square().sum(dim=1, keepdim=True)) / 2
        hidden = z @ W1.T + b1
        # Without the term t of the feature, z loses t (s - t): exact, where two values of z would cancel.
        without = hidden - (terms * (s - terms)) @ W1.T
        change = (hidden.relu() - without.relu()) @ R.T
        total.index_add_(0, indices.reshape(-1).to(total.device), in_fp64(change.square().sum(dim=-1)).reshape(-1))
    return total


def _chunks(code: SparseCode, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(1, CHUNK // (code.k * width))
    return zip(code.values.split(rows), code.indices.split(rows), strict=True)


def spearman(a: Tensor, b: Tensor) -> float | None:
    """Rank correlation; None where there are fewer than 3 values or one side is constant."""
    from scipy.stats import spearmanr

    if len(a) < 3 or a.min() == a.max() or b.min() == b.max():
        return None
    return float(spearmanr(a.numpy(), b.numpy()).statistic)  # pyright: ignore[reportAttributeAccessIssue]


def beside_null(value: float | None, nulls: list[float | None]) -> BesideNull | None:
    """None where the number or its null is not defined."""
    drawn = [null for null in nulls if null is not None]
    if value is None or len(drawn) < len(nulls):
        return None
    return BesideNull(value, sum(drawn) / len(drawn), min(drawn), max(drawn))
