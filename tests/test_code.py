"""SparseCode: parts of it, other places for it, and how it is shown."""

import pytest
import torch

from fastsae import SparseCode

VALUES = torch.tensor([[3.0, 1.5, 0.5], [2.0, 0.0, 0.0], [0.25, 0.125, 0.0], [9.0, 8.0, 7.0]])
CODE = SparseCode(VALUES, torch.arange(12).view(4, 3), 20)


def same(a: SparseCode, b: SparseCode) -> bool:
    return torch.equal(a.values, b.values) and torch.equal(a.indices, b.indices) and a.d_sae == b.d_sae


@pytest.mark.parametrize("tokens", [2, -1, slice(1, 3), [3, 0], torch.tensor([2, 2]), VALUES[:, 0] > 1, ..., None])
def test_tokens_are_chosen_as_rows_of_a_tensor_are(tokens):
    assert same(CODE[tokens], SparseCode(CODE.values[tokens], CODE.indices[tokens], 20))


def test_tokens_of_several_axes():
    code = SparseCode(VALUES.view(2, 2, 3), CODE.indices.view(2, 2, 3), 20)
    assert len(code) == 2
    assert same(code[1, 0], CODE[2])
    assert same(code[:, 1], CODE[[1, 3]])
    assert same(code[code.values[..., 1] > 0], CODE[[0, 2, 3]])
    assert [tuple(part.values.shape) for part in code] == [(2, 3), (2, 3)]
    with pytest.raises(IndexError, match=r"an index chooses tokens, of shape \(2, 2\): too many indices"):
        code[0, 0, 0]


def test_gradients_pass_through_a_choice():
    values = VALUES.clone().requires_grad_()
    SparseCode(values, CODE.indices, 20)[1:3].values.sum().backward()
    assert values.grad.sum(dim=1).tolist() == [0, 3, 3, 0]


def test_the_code_of_one_token_has_no_tokens():
    for use in (len, list, lambda one: one[0]):
        with pytest.raises(IndexError, match="needs several tokens; this is the code of one"):
            use(CODE[0])
    with pytest.raises(IndexError):
        CODE[4]
    assert len(CODE) == len(list(CODE)) == 4


def test_to_another_place_or_dtype():
    half = CODE.to(torch.float16)
    assert (half.values.dtype, half.indices.dtype) == (torch.float16, torch.int64)
    assert CODE.to(dtype=torch.float64).values.dtype == torch.float64
    there = CODE.to("meta")
    assert there.values.is_meta
    assert there.indices.is_meta


def test_it_is_shown_in_a_line():
    shown = "SparseCode(4 tokens, k=3 of 20 features, 2.2 active on average, of the first 0: 3, 1: 1.5, 2: 0.5; 3: 2)"
    assert repr(CODE) == shown
    assert repr(SparseCode(VALUES[:0], CODE.indices[:0], 20)).startswith("SparseCode(0 tokens, k=3 of 20 features, 0.0")
    assert repr(CODE.to("meta")) == "SparseCode(4 tokens, k=3 of 20 features, torch.float32)"
    assert "8 tokens" in repr(SparseCode(torch.zeros(8, 2), torch.zeros(8, 2, dtype=torch.int64), 5))


def test_it_is_a_table_in_a_notebook():
    html = CODE._repr_html_()
    assert "<p>SparseCode: 4 tokens, k=3 of 20 features, 2.2 active on average</p>" in html
    assert "<tr><td>1</td><td>1</td><td>3: 2</td></tr>" in html
    many = SparseCode(torch.ones(50, 3), torch.arange(3).expand(50, 3), 20)
    assert many._repr_html_().count("<tr>") == 11
    assert "<table>" not in CODE.to("meta")._repr_html_()
