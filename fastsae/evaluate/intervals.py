"""Intervals that count documents, not tokens: tokens of one document are no independent observations."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, isnan, nan

import torch
from torch import Tensor

from fastsae.extras import LAB
from fastsae.fp64 import in_fp64

LEVEL = 0.95
FEWEST_DOCUMENTS = 5
"""Fewest documents that give an interval: the spread of fewer says next to nothing about that of others."""
_RESAMPLES, _AT_ONCE = 2000, 100
# In the logarithm: beyond every number that is measured, and below what overflows.
_FARTHEST = 100.0


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % confidence interval; the ends are NaN below five documents."""

    estimate: float
    low: float = nan
    high: float = nan

    def __format__(self, spec: str) -> str:
        """`f"{interval:.3f}"` gives "0.123 [0.101, 0.145]", and "0.123" without ends."""
        if isnan(self.low) and isnan(self.high):
            return f"{self.estimate:{spec}}"
        return f"{self.estimate:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


@dataclass(frozen=True)
class DocumentSums:
    """Sums over the rows of each document, by the name of what is summed: fp64 (documents,) each."""

    names: tuple[str, ...]
    """Names of the documents, in the order of the sums."""
    sums: dict[str, Tensor]

    def total(self, name: str) -> float:
        return float(self.sums[name].sum())

    def ratio(
        self, numerator: str | Tensor, denominator: str | Tensor, least: float = -inf, most: float = inf
    ) -> Interval:
        """sum(numerator) / sum(denominator) over documents, and its interval.

        The standard error is that of a bootstrap over whole documents (the same resamples on every call, so what is
        paired stays paired), times the quantile of Student's t with one degree of freedom less than documents.
        least, most: what no document's ratio can lie beyond. The interval is symmetric where there is no such bound, in
        the logarithm of the distance from `least` where that is the only one, in the log-odds between the two.
        """
        over, under = (self.sums[s] if isinstance(s, str) else s for s in (numerator, denominator))
        estimate = float(_divided(over.sum(), under.sum()))
        if len(over) < FEWEST_DOCUMENTS:
            return Interval(estimate)
        half = student_t(len(over) - 1) * bootstrap_variance([(over, under)]) ** 0.5
        return Interval(estimate, *_ends(estimate, half, least, most))

    def reduction(self, name: str, baseline: str) -> Interval:
        """1 - sum(name) / sum(baseline): by how much `baseline` is undercut. Both are 0 or more."""
        left = self.ratio(name, baseline, least=0)
        return Interval(1 - left.estimate, 1 - left.high, 1 - left.low)


def at_most(most: float, interval: Interval) -> Interval:
    """Cut off what lies beyond a bound that single documents can pass, and the truth cannot. An estimate that lies
    beyond it keeps its interval."""
    if not interval.estimate <= most:
        return interval
    return Interval(
        interval.estimate, interval.low, interval.high if isnan(interval.high) else min(interval.high, most)
    )


def _ends(estimate: float, half: float, least: float, most: float) -> tuple[float, float]:
    """The ends of an interval that is `half` wide to either side where nothing bounds it."""
    below, above = estimate - least, most - estimate
    if half == 0 or not (below > 0 and above > 0) or below == above == inf:  # beyond a bound by rounding, too
        return estimate - half, estimate + half
    if above == inf:
        factor = exp(min(half / below, _FARTHEST))
        return least + below / factor, least + below * factor
    factor = exp(min(half * (most - least) / (below * above), _FARTHEST))
    low, high = (below / above / factor, below / above * factor)
    return least + (most - least) * low / (1 + low), most - (most - least) / (1 + high)


def bootstrap_variance(ratios: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The variance, over resamples of the documents, of the mean of ratios of sums; each is a pair of (documents,).

    Resampling sees the spread about the sample's own mean, which is short by (n - 1) / n: made good here.
    """
    n = len(ratios[0][0])
    generator, means = torch.Generator().manual_seed(0), []
    for _ in range(_RESAMPLES // _AT_ONCE):  # all at once would be gigabytes for tens of thousands of documents
        drawn = torch.randint(n, (_AT_ONCE, n), generator=generator, device="cpu")
        resampled = [_divided(over[drawn].sum(dim=1), under[drawn].sum(dim=1)) for over, under in ratios]
        means.append(torch.stack(resampled).mean(dim=0))
    return float(torch.cat(means).var()) * n / (n - 1)


def student_t(df: float, level: float = LEVEL) -> float:
    """The two-sided quantile of Student's t."""
    try:
        from scipy.stats import t
    except ImportError as error:
        raise ImportError(f"intervals need scipy: {LAB}") from error

    return float(t.ppf((1 + level) / 2, df))


def _divided(over: Tensor, under: Tensor) -> Tensor:
    return torch.where(under == 0, nan, over / under)


class DocumentTotals:
    """Collects sums per document while rows stream by."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._sums: dict[str, Tensor] = {}
        self._rows = torch.zeros(len(names), dtype=torch.int64, device="cpu")

    def add(self, documents: Tensor, values: dict[str, Tensor]) -> None:
        """values: per row (rows,), by name; documents (rows,): the index of each row's document."""
        documents = documents.long().cpu()
        self._rows += torch.bincount(documents, minlength=len(self.names))
        for name, value in values.items():
            sums = self._sums.setdefault(name, torch.zeros(len(self.names), dtype=torch.float64, device="cpu"))
            sums.index_add_(0, documents, in_fp64(value.detach()).cpu())

    def put(self, name: str, sums: Tensor) -> None:
        """Sums that were collected elsewhere, one per document."""
        self._sums[name] = sums

    @property
    def rows(self) -> int:
        return int(self._rows.sum())

    def finish(self) -> DocumentSums:
        """The sums of the documents that had rows, their number as `rows` among them."""
        seen = self._rows > 0
        names = tuple(name for name, was in zip(self.names, seen.tolist(), strict=True) if was)
        return DocumentSums(names, {k: v[seen] for k, v in {**self._sums, "rows": self._rows.double()}.items()})
