"""Intervals: by definition, and how often they hold the truth in simulated replicates."""

import sys
from math import exp, inf, isnan, log

import pytest
import torch

from fastsae.evaluate.intervals import DocumentSums, DocumentTotals, Interval, at_most, student_t

REPLICATES = 1000


def documents(n: int, effect: float, generator: torch.Generator) -> DocumentSums:
    """Documents of 20 to 200 tokens; all tokens of one share its deviation, so that tokens are no independent rows."""
    rows = torch.randint(20, 200, (n,), generator=generator).double()
    own = effect + torch.randn(n, generator=generator).double()
    noise = torch.randn(n, generator=generator).double() * rows.sqrt()
    return DocumentSums(tuple(map(str, range(n))), {"rows": rows, "x": own * rows + noise})


@pytest.mark.parametrize("n", [12, 32])
def test_they_cover_at_their_nominal_rate(n):
    generator = torch.Generator().manual_seed(n)
    covered = 0
    for _ in range(REPLICATES):
        interval = documents(n, 3.0, generator).ratio("x", "rows")
        covered += interval.low <= 3.0 <= interval.high
    assert 0.93 <= covered / REPLICATES <= 0.97  # 95 %, give or take three standard errors of a share of 1000


def test_intervals_over_tokens_would_not():
    """Why documents are resampled: the simulation can tell."""
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for _ in range(REPLICATES):
        sums = documents(32, 3.0, generator)
        mean, rows = sums.total("x") / sums.total("rows"), sums.total("rows")
        covered += abs(mean - 3.0) <= 1.96 * 2**0.5 / rows**0.5  # variance 1 within and 1 between documents
    assert covered / REPLICATES < 0.5


@pytest.mark.parametrize(("kind", "n"), [("positive", 5), ("cosine", 12)])
def test_within_what_is_possible_they_cover_as_well(kind, n):
    """Documents with a share of errors each, skewed as errors are: the truth is that of all documents."""
    generator = torch.Generator().manual_seed(n)
    least, most = (0.0, inf) if kind == "positive" else (-1.0, 1.0)
    covered = 0
    for _ in range(REPLICATES // 2):
        sums = documents(n, 0.0, generator)
        of_each = (0.4 * sums.sums["x"] / sums.sums["rows"]).exp() * 0.02
        truth = 0.02 * exp(0.4**2 * (1 + 1 / 87) / 2)  # of 20 to 200 tokens, 87 are the harmonic mean
        of_each, truth = (of_each, truth) if kind == "positive" else (1 - of_each, 1 - truth)
        interval = DocumentSums(sums.names, {"x": of_each, "n": torch.ones(n)}).ratio("x", "n", least, most)
        assert least <= interval.low <= interval.estimate <= interval.high <= most
        covered += interval.low <= truth <= interval.high
    assert 0.92 <= covered / (REPLICATES // 2) <= 0.98  # skewed: a little less than 95 % of few documents


def test_no_interval_reaches_beyond_what_is_possible():
    """One document has nearly all of it: symmetric ends would be below 0 and above 1."""
    names, ones = tuple("abcdef"), torch.ones(6).double()
    sums = DocumentSums(names, {"x": torch.tensor([0.01, 0.01, 0.01, 0.01, 0.02, 0.9]).double(), "n": ones})
    plain = sums.ratio("x", "n")
    assert plain.low < 0
    half = plain.high - plain.estimate
    positive = sums.ratio("x", "n", least=0)
    assert log(positive.high / positive.estimate) == pytest.approx(half / plain.estimate)
    assert log(positive.estimate / positive.low) == pytest.approx(half / plain.estimate)
    share = sums.ratio("x", "n", least=0, most=1)
    assert 0 < share.low < share.estimate < share.high < 1
    odds = [log(p / (1 - p)) for p in (share.low, share.estimate, share.high)]
    assert odds[1] - odds[0] == pytest.approx(odds[2] - odds[1])
    assert odds[2] - odds[1] == pytest.approx(half / (plain.estimate * (1 - plain.estimate)))
    less = sums.reduction("x", "n")
    assert (less.low, less.estimate, less.high) == (1 - positive.high, 1 - plain.estimate, 1 - positive.low)
    same = DocumentSums(names, {"x": ones, "n": ones}).ratio("x", "n", least=-1, most=1)
    assert (same.low, same.high) == (1, 1), "all at the bound"
    assert at_most(1, Interval(0.9, 0.7, 1.1)) == Interval(0.9, 0.7, 1)
    assert at_most(1, Interval(1.05, 0.9, 1.2)) == Interval(1.05, 0.9, 1.2)
    assert isnan(at_most(1, Interval(0.9)).high)


def test_a_ratio_by_definition():
    rows = torch.tensor([2.0, 4.0, 2.0, 4.0, 2.0, 4.0]).double()
    sums = DocumentSums(tuple("abcdef"), {"x": torch.tensor([1.0, 5.0] * 3).double(), "rows": rows})
    interval = sums.ratio("x", "rows")
    assert interval.estimate == 1.0
    assert interval.high - interval.estimate == pytest.approx(interval.estimate - interval.low)
    # Resampled, m of the 6 are of the first kind: the ratio is (m + 5 (6 - m)) / (2 m + 4 (6 - m)).
    odds = torch.tensor([1.0, 6, 15, 20, 15, 6, 1]).double() / 64
    m = torch.arange(7).double()
    ratios = (m + 5 * (6 - m)) / (2 * m + 4 * (6 - m))
    variance = (odds * ratios.square()).sum() - (odds * ratios).sum().square()
    assert interval.high - interval.estimate == pytest.approx(student_t(5) * float(6 / 5 * variance) ** 0.5, rel=0.1)
    assert sums.reduction("x", "rows").estimate == 0.0


@pytest.mark.parametrize("n", [1, 4, 5])
def test_few_documents_have_no_interval(n):
    sums = DocumentSums(tuple("abcde"[:n]), {"x": torch.arange(1.0, n + 1), "rows": torch.ones(n)})
    for interval in (sums.ratio("x", "rows"), sums.reduction("x", "rows"), sums.ratio("x", "rows", least=0)):
        assert isnan(interval.low) == isnan(interval.high) == (n < 5)
    assert sums.ratio("x", "rows").estimate == (n + 1) / 2
    assert f"{Interval(1.0):.1f}" == "1.0"
    assert f"{Interval(1.0, 0.5, 2.0):.1f}" == "1.0 [0.5, 2.0]"


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r"intervals need scipy: install .* `pip install \"\.\[lab\]\"`"):
        DocumentSums(tuple("abcde"), {"x": torch.ones(5), "rows": torch.ones(5)}).ratio("x", "rows")


def test_totals_leave_out_documents_without_rows():
    totals = DocumentTotals(("a", "b", "c"))
    totals.add(torch.tensor([0, 2, 0]), {"x": torch.tensor([1.0, 2.0, 3.0])})
    totals.add(torch.tensor([2]), {"x": torch.tensor([5.0])})
    sums = totals.finish()
    assert (sums.names, totals.rows) == (("a", "c"), 4)
    assert sums.sums["x"].tolist() == [4.0, 7.0]
    assert sums.sums["rows"].tolist() == [2.0, 2.0]
