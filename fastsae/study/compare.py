"""Comparison of the arms' outcomes: means, paired differences, and their intervals over seeds and documents."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, nan

import torch
from torch import Tensor

from fastsae.evaluate.intervals import LEVEL, Interval, bootstrap_variance, student_t
from fastsae.evaluate.metrics import CE_INCREASE, FVU, KL, LOSS_RECOVERED, Metric
from fastsae.study.arms import QUESTIONS, Question
from fastsae.study.run import Outcome

METRICS = (FVU, KL, CE_INCREASE)
"""Metrics that arms are compared by: less is better."""
SHOWN = (
    LOSS_RECOVERED,
    Metric("KL / random error of its size", "kl full", "epsilon full"),
    Metric("error less than of own identity pathway", "error identity", "error identity", minus="error full"),
    Metric("KL less than of own identity pathway", "kl identity", "kl identity", minus="kl full"),
)
"""Metrics shown for each arm that compare nothing. The last two are the paper's figures."""


@dataclass(frozen=True)
class Comparison:
    """One question, one metric."""

    metric: str
    difference: Interval
    """The arm less the baseline, paired by seed and document: below 0 the arm is better."""
    relative: Interval
    """The difference over the baseline's mean, taken as known."""

    @property
    def shown(self) -> int:
        """-1: the arm is shown to be better, 1: to be worse, 0: neither."""
        return -1 if self.difference.high < 0 else 1 if self.difference.low > 0 else 0


@dataclass(frozen=True)
class Answer:
    """A question, its comparisons, and what they come to."""

    question: Question
    comparisons: tuple[Comparison, ...]
    verdict: str


def mean_over_seeds(ratios: Sequence[tuple[Tensor, Tensor]], level: float = LEVEL) -> Interval:
    """The mean over seeds of ratios of sums over documents, for seeds and documents like these.

    ratios: per seed, numerator and denominator (documents,), the same documents each. The variance is that of the mean
    over seeds plus that of a bootstrap over documents of the mean; degrees of freedom after Satterthwaite (1946).
    """
    estimates = torch.stack([over.sum() / under.sum() for over, under in ratios])
    seeds, documents = len(ratios), len(ratios[0][0])
    estimate = float(estimates.mean())
    if seeds < 2 or documents < 2:
        return Interval(estimate)
    by_seed, by_document = float(estimates.var()) / seeds, bootstrap_variance(ratios)
    variance = by_seed + by_document
    if variance == 0:
        return Interval(estimate, estimate, estimate)
    df = variance**2 / (by_seed**2 / (seeds - 1) + by_document**2 / (documents - 1))
    half = student_t(df, level) * variance**0.5
    return Interval(estimate, estimate - half, estimate + half)


def arm_mean(outcomes: Sequence[Outcome], metric: Metric) -> Interval:
    return mean_over_seeds([metric.of(o) for o in outcomes])


def compare(arm: Sequence[Outcome], baseline: Sequence[Outcome], metric: Metric, level: float = LEVEL) -> Comparison:
    """Paired by seed and document. Raises ValueError if the two were not measured on the same."""
    pairs = list(zip(arm, baseline, strict=True))
    if any(a.seed != b.seed or a.sums.names != b.sums.names for a, b in pairs):
        raise ValueError("study: two arms were measured on different seeds or documents: outcomes of two studies")
    difference = mean_over_seeds([metric.paired(a, b) for a, b in pairs], level)
    scale = abs(arm_mean(baseline, metric).estimate) or nan
    return Comparison(
        metric.name, difference, Interval(difference.estimate / scale, difference.low / scale, difference.high / scale)
    )


def answers(outcomes: dict[str, list[Outcome]], metrics: Sequence[Metric] = METRICS) -> list[Answer]:
    """Every question, answered as far as the intervals go: those of one question hold together in 95 %."""
    found, level = [], 1 - (1 - LEVEL) / len(metrics)
    for question in QUESTIONS:
        arm, baseline = outcomes[question.arm], outcomes[question.baseline]
        comparisons = tuple(compare(arm, baseline, metric, level) for metric in metrics)
        found.append(Answer(question, comparisons, verdict(question, comparisons)))
    return found


def verdict(question: Question, comparisons: Sequence[Comparison]) -> str:
    """The answer in plain words."""
    if any(isnan(c.difference.low) for c in comparisons):
        return "Undecided: one seed, or one document, shows nothing about another."
    said = "; ".join(_in_words(c) for c in comparisons)
    shown = {c.shown for c in comparisons}
    if shown == {-1}:
        return f"Yes: {question.arm} is better than {question.baseline} ({said})."
    if shown == {1}:
        return f"No: {question.arm} is worse than {question.baseline} ({said})."
    if shown == {0}:
        return f"Not shown: no difference between {question.arm} and {question.baseline} is beyond chance ({said})."
    if 1 not in shown:
        return f"In part better: {question.arm} is better than {question.baseline} in some of the measures ({said})."
    if -1 not in shown:
        return f"In part worse: {question.arm} is worse than {question.baseline} in some of the measures ({said})."
    return f"Mixed: {question.arm} is better than {question.baseline} in one measure and worse in another ({said})."


def _in_words(c: Comparison) -> str:
    r = c.relative
    return f"{c.metric} {r.estimate:+.1%} [{r.low:+.1%}, {r.high:+.1%}]"
