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


def check_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, values: Tensor, indices: Tensor, dtype: torch.dtype | None = None
) -> float:
    """Some rows of a code: their values, that nothing left out is larger, order, distinctness.

    dtype: what the products were computed in, if not that of x. Returns the largest error of a value.
    """
    dtype = dtype or x.dtype
    exact = torch.relu(pre_activations(x, W_enc, b_enc))
    eager = torch.relu(F.linear(x.to(dtype), W_enc.to(dtype), b_enc.to(dtype)))
    largest = exact.max().item()
    allowed = 2 * (eager.double() - exact).abs().max().item() + torch.finfo(dtype).eps * largest
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


def joint_reconstruction(w: dict[str, Tensor], x: Tensor, K: int, N: int) -> Tensor:
    """The reconstruction of few rows in fp64, without dropout; w as in fastsae, W_lin and the rest optional."""
    d = {name: t.double() for name, t in w.items() if t.dim() == 1 or name in ("W1", "W2")}
    x = x.double() - d.get("b_dec", 0.0)
    values, indices = torch.relu(pre_activations(x, w["W_enc"], w["b_enc"])).topk(K, dim=1)

    def weighted(W: Tensor, n: int) -> Tensor:
        return values[:, :n, None] * W[indices[:, :n]].double()

    out = weighted(w["W_dec"], K).sum(dim=1) + d.get("b_dec", 0.0)
    if "W_lin" in w:
        terms = weighted(w["V"], N)
        z = (terms.sum(dim=1).square() - terms.square().sum(dim=1)) / 2
        hidden = torch.relu(F.linear(z, d["W1"], d["b1"]))
        out = out + weighted(w["W_lin"], N).sum(dim=1) + d["b_lin"] + F.linear(hidden, d["W2"], d["b2"])
    return out


def relative_error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()
