"""Large results against fp64 on a sample of rows: the truth there, eager PyTorch in the same dtype as the scale."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Features per piece of a matrix product in fp64.
_PIECE = 32768


def pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """x @ W_enc.T + b_enc in fp64, for few rows x; W_enc is converted a piece at a time."""
    pieces = [
        x.double() @ W.double().T + b.double() for W, b in zip(W_enc.split(_PIECE), b_enc.split(_PIECE), strict=True)
    ]
    return torch.cat(pieces, dim=1)


def check_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, values: Tensor, indices: Tensor) -> float:
    """Some rows of a code: their values, that nothing left out is larger, order, distinctness.

    Returns the largest error of a value.
    """
    exact = torch.relu(pre_activations(x, W_enc, b_enc))
    eager = torch.relu(F.linear(x, W_enc.to(x.dtype), b_enc.to(x.dtype)))
    largest = exact.max().item()
    allowed = 2 * (eager.double() - exact).abs().max().item() + torch.finfo(x.dtype).eps * largest
    ours = values.double()
    if not ours.isfinite().all():
        raise AssertionError(f"encode: {int((~ours.isfinite()).sum())} values are not finite")
    error = (ours - exact.gather(1, indices)).abs().max().item()
    if error > allowed:
        raise AssertionError(f"encode: a value is wrong by {error:.2e}, allowed {allowed:.2e}")
    left_out = exact.scatter(1, indices, -1.0).amax(dim=1)
    beaten = (left_out - ours[:, -1]).max().item()
    if beaten > allowed:
        raise AssertionError(f"encode: a feature left out is larger by {beaten:.2e}, allowed {allowed:.2e}")
    if (ours[:, :-1] < ours[:, 1:]).any():
        raise AssertionError("encode: not strongest first")
    ordered = indices.sort(dim=1).values
    if (ordered[:, :-1] == ordered[:, 1:]).any():
        raise AssertionError("encode: indices repeat within a row")
    return error
