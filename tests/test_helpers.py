"""The comparison itself goes red when it should."""

import pytest
import torch
from helpers import assert_matches

EXACT = torch.randn(20, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
EAGER = EXACT.float()


def test_accepts_the_rounded_answer():
    assert_matches("y", EXACT.float(), EXACT, EAGER)


@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf")])
def test_one_wrong_element(value: float):
    wrong = EXACT.float()
    wrong[3, 4] += value
    with pytest.raises(AssertionError, match=r"error|non-finite"):
        assert_matches("y", wrong, EXACT, EAGER)


def test_a_small_error_in_scale():
    with pytest.raises(AssertionError, match="max error"):
        assert_matches("y", EXACT.float() * 1.0001, EXACT, EAGER)


def test_wrong_shape():
    with pytest.raises(AssertionError, match="shape"):
        assert_matches("y", EXACT.float().T, EXACT, EAGER)
