"""Memory layouts that cuBLAS is fast on: aligned strides, and no gap in a result that a bias is added to."""

from typing import Any

import pytest
import torch
from torch import Tensor

from csrc_triton import dense_code, plan
from csrc_triton.adam import Gradient
from csrc_triton.topk_encode import topk_encode
from fastsae import ops


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[Tensor]]]:
    """The products made meanwhile, each with its operands and its result."""
    seen: list[tuple[str, list[Tensor]]] = []

    class Noting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if function in (torch.addmm, torch.mm, torch.matmul, Tensor.matmul, Tensor.__matmul__):
                matrices = [t for t in (*args, result) if isinstance(t, Tensor) and t.dim() == 2]
                seen.append((function.__name__, matrices))
            return result

    with Noting():
        yield seen


def is_aligned(matrix: Tensor) -> bool:
    """Whether rows, or columns of a transposed matrix, begin at multiples of 16 bytes."""
    return max(matrix.stride()) * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0


@pytest.mark.parametrize("d_sae", [50, 200, 1000])
@pytest.mark.parametrize("restricted", [False, True], ids=["all", "features"])
@pytest.mark.parametrize("wide", [False, True], ids=["as they are", "fp32 weights"])
def test_a_bias_is_added_to_a_result_without_gaps(
    d_sae: int, restricted: bool, wide: bool, device: str, products: list, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(plan, "_MOST_COPIED", 400)
    x, W, b = (torch.randint(-2, 3, s, device=device).half() for s in ((4, 16), (d_sae, 16), (d_sae,)))
    features = torch.arange(0, d_sae, 2, device=device) if restricted else None
    n = d_sae if features is None else len(features)
    chosen = plan.encode(4, 2**20, n, 3, 2, 2**20, copied=wide or restricted)  # so long a sum is left to cuBLAS
    values, indices = topk_encode(x, W.float() if wide else W, b, 3, features, chosen)
    made = [matrices for name, matrices in products if name == "addmm"]
    assert made
    for matrices in made:
        assert matrices[-1].is_contiguous()
        assert all(map(is_aligned, matrices))
    expected = ops.topk_encode(x.float(), W.float(), b.float(), 3, "reference", features)
    assert torch.equal(values.float(), expected[0])
    assert torch.equal(indices, expected[1])


@pytest.mark.parametrize("budget", [1, 1000, 2**20])
@pytest.mark.parametrize("d_sae", [13, 64, 150])
def test_a_dense_code_is_aligned(d_sae: int, budget: int, device: str, products: list):
    values, indices = torch.rand(6, 3, device=device), torch.randint(d_sae, (6, 3), device=device)
    d_out, W = torch.randn(6, 8, device=device), torch.randn(d_sae, 8, device=device)
    gradient = Gradient(torch.empty(d_sae, 8, device=device), add=False)
    dense_code.dense_decode(values, indices, W, None, 3, budget)
    dense_code.dense_decode_backward(values, indices, d_out, W, gradient, budget)
    dense_code.dense_weight_gradient(values, indices, d_out, gradient, budget)
    assert {name for name, _ in products} >= {"mm"}
    assert len(products) >= 4
    for name, matrices in products:
        assert all(map(is_aligned, matrices)), (name, [(t.shape, t.stride()) for t in matrices])
