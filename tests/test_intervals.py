"""Intervals: by definition, and how often they hold the truth in simulated replicates."""

import sys

import pytest
import torch

from fastsae.evaluate.intervals import DocumentSums, DocumentTotals, Interval, student_t

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


def test_a_ratio_by_definition():
    sums = DocumentSums(("a", "b"), {"x": torch.tensor([1.0, 5.0]).double(), "rows": torch.tensor([2.0, 4.0]).double()})
    interval = sums.ratio("x", "rows")
    assert interval.estimate == 1.0
    assert interval.high - interval.estimate == pytest.approx(interval.estimate - interval.low)
    # Resampled, the ratio is 0.5, 1 or 1.25 with probabilities 1/4, 1/2, 1/4.
    deviation = (0.25 * 0.5**2 + 0.5 * 1 + 0.25 * 1.25**2 - (0.25 * 0.5 + 0.5 + 0.25 * 1.25) ** 2) ** 0.5
    assert interval.high - interval.estimate == pytest.approx(student_t(1) * 2**0.5 * deviation, rel=0.1)
    assert sums.reduction("x", "rows").estimate == 0.0


def test_one_document_has_no_interval():
    interval = DocumentSums(("a",), {"x": torch.ones(1), "rows": torch.ones(1)}).ratio("x", "rows")
    assert interval.estimate == 1.0
    assert interval.low != interval.low
    assert f"{interval:.1f}" == "1.0"
    assert f"{Interval(1.0, 0.5, 2.0):.1f}" == "1.0 [0.5, 2.0]"


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r"intervals need scipy: install .* `pip install \"\.\[lab\]\"`"):
        DocumentSums(("a", "b"), {"x": torch.ones(2), "rows": torch.ones(2)}).ratio("x", "rows")


def test_totals_leave_out_documents_without_rows():
    totals = DocumentTotals(("a", "b", "c"))
    totals.add(torch.tensor([0, 2, 0]), {"x": torch.tensor([1.0, 2.0, 3.0])})
    totals.add(torch.tensor([2]), {"x": torch.tensor([5.0])})
    sums = totals.finish()
    assert (sums.names, totals.rows) == (("a", "c"), 4)
    assert sums.sums["x"].tolist() == [4.0, 7.0]
    assert sums.sums["rows"].tolist() == [2.0, 2.0]
