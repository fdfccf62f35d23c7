"""Metrics that SAEs are compared by: ratios of sums over documents, alone and paired."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fastsae.evaluate.intervals import DocumentSums


class WithSums(Protocol):
    """One SAE, measured."""

    @property
    def sums(self) -> DocumentSums: ...


@dataclass(frozen=True)
class Metric:
    """A ratio of two sums over documents, each the sum of some terms less that of another."""

    name: str
    numerator: str
    denominator: str
    minus: str | None = None
    """Term subtracted from the numerator."""
    denominator_minus: str | None = None
    """Term subtracted from the denominator."""

    def of(self, measured: WithSums) -> tuple[Tensor, Tensor]:
        """Numerator and denominator by document."""
        sums = measured.sums.sums
        over, under = sums[self.numerator], sums[self.denominator]
        if self.minus is not None:
            over = over - sums[self.minus]
        return over, under if self.denominator_minus is None else under - sums[self.denominator_minus]

    def paired(self, measured: WithSums, baseline: WithSums) -> tuple[Tensor, Tensor]:
        """Give numerator and denominator, by document, of the difference to a baseline on the same documents."""
        over, under = self.of(measured)
        baseline_over, baseline_under = self.of(baseline)
        # Where rows are normalised alike, both have the same denominator.
        return over - baseline_over * (under.sum() / baseline_under.sum()), under

    def known(self, measured: WithSums) -> bool:
        """Whether all of it was measured."""
        terms = (self.numerator, self.denominator, self.minus, self.denominator_minus)
        return all(term is None or term in measured.sums.sums for term in terms)


FVU = Metric("FVU", "error full", "variance x")
KL = Metric("KL", "kl full", "predictions")
CE_INCREASE = Metric("CE increase", "ce full", "predictions", minus="ce clean")
LOSS_RECOVERED = Metric("loss recovered", "ce ablated", "ce ablated", minus="ce full", denominator_minus="ce clean")
L0 = Metric("L0", "l0", "rows")
