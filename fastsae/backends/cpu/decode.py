"""From the code to the reconstruction and to the pairwise sums, and the gradients."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsae.backends.cpu.memory import workspace
from fastsae.backends.cpu.sparse import Destination, gathered_dot, weight_gradient
from fastsae.backends.reference import squared_error
from fastsae.code import FeatureOrder, feature_order


def joint_decode(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor | None,
    W_lin: Tensor | None,
    V: Tensor | None,
    bias: Tensor | None,
    target: Tensor | None,
    n: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """identity + linear sum + bias (B, d_in), s and q (B, E), and the mean squared error; see ops.joint_decode."""
    sums = torch.promote_types(values.dtype, torch.float32)
    out = values.new_empty(len(values), 0) if W_dec is None else sparse_decode(values, indices, W_dec)
    strongest, their_indices = values[:, :n].contiguous(), indices[:, :n].contiguous()
    if W_lin is not None:
        out += sparse_decode(strongest, their_indices, W_lin)
    if bias is not None:
        out += bias
    width = 0 if V is None else V.shape[1]
    if V is None or n == 1:  # no pairs; s^2 - q would leave roundings, and Adam would learn from them
        s, q = (values.new_zeros(len(values), width, dtype=sums) for _ in range(2))
    else:
        s = sparse_decode(strongest, their_indices, V).to(sums)
        q = sparse_decode(strongest.square(), their_indices, _squared(V)).to(sums)
    return out, s, q, s.new_zeros(()) if target is None else squared_error(out, target)


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """See reference.sparse_decode."""
    if values.shape[1] == 0:
        return values.new_zeros(len(values), W_dec.shape[1])
    try:
        return F.embedding_bag(indices.contiguous(), W_dec, per_sample_weights=values.contiguous(), mode="sum")
    except RuntimeError as error:  # with several threads torch does not say what is wrong
        least, most = indices.min().item(), indices.max().item()
        if least < 0 or most >= len(W_dec):
            raise RuntimeError(
                f"sparse_decode: indices of features must lie in [0, {len(W_dec)}); got {least} to {most}"
            ) from error
        raise


def joint_decode_backward(
    d_out: Tensor | None,
    d_s: Tensor | None,
    d_q: Tensor | None,
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor | None,
    W_lin: Tensor | None,
    V: Tensor | None,
    n: int,
    need_W_dec: bool,
    need_W_lin: bool,
    need_V: bool,
    out: tuple[Destination | None, Destination | None, Destination | None] = (None, None, None),
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """d_values (B, k), d_W_dec, d_W_lin (d_sae, d_in), d_V (d_sae, E); None for gradients that are written to `out`."""
    d_values = torch.zeros_like(values, memory_format=torch.contiguous_format)
    d_weights: list[Tensor | None] = [None, None, None]
    if W_dec is not None:
        d_out = values.new_zeros(len(values), W_dec.shape[1]) if d_out is None else d_out.contiguous()
        order = feature_order(indices, len(W_dec))
        d_values, d_weights[0] = _decode_backward(order, d_out, values, W_dec, need_W_dec, out[0])
    weight = W_lin if V is None else V
    if weight is not None:
        strongest, order = values[:, :n].contiguous(), feature_order(indices[:, :n], len(weight))
        if W_lin is not None and d_out is not None:
            d_strongest, d_weights[1] = _decode_backward(order, d_out, strongest, W_lin, need_W_lin, out[1])
            d_values[:, :n] += d_strongest
        if V is not None:
            d_s, d_q = (_or_zeros(d, values, V) for d in (d_s, d_q))
            d_strongest, d_weights[2] = _sums_backward(order, d_s, d_q, strongest, V, need_V, out[2])
            d_values[:, :n] += d_strongest
    return d_values, *(None if given else grad for given, grad in zip(out, d_weights, strict=True))  # type: ignore


def _decode_backward(
    order: FeatureOrder, d_out: Tensor, values: Tensor, W_dec: Tensor, need_W: bool, out: Destination | None
) -> tuple[Tensor, Tensor | None]:
    d_values = gathered_dot(order, d_out, W_dec).view_as(values)
    return d_values, weight_gradient(order, values, d_out, out) if need_W else None


def _sums_backward(
    order: FeatureOrder, d_s: Tensor, d_q: Tensor, values: Tensor, V: Tensor, need_V: bool, out: Destination | None
) -> tuple[Tensor, Tensor | None]:
    """d_values: d_s . V_i + 2 a d_q . V_i^2, and d_V: sum a d_s + 2 (sum a^2 d_q) V_i."""
    if values.shape[1] == 1:  # there s and q are zero whatever V is
        values, d_s, d_q = torch.zeros_like(values), torch.zeros_like(d_s), torch.zeros_like(d_q)
    of_sum, of_squares = gathered_dot(order, d_s, V), gathered_dot(order, d_q, _squared(V))
    d_values = of_sum.view_as(values) + 2 * values * of_squares.view_as(values)
    if not need_V:
        return d_values, None
    d_V = weight_gradient(order, values, d_s, out)
    square_terms = workspace("square_terms", tuple(V.shape), V.dtype)
    weight_gradient(order, values.square(), d_q, (square_terms, False))
    return d_values, d_V.addcmul_(square_terms, V, value=2)


def _or_zeros(gradient: Tensor | None, values: Tensor, V: Tensor) -> Tensor:
    return values.new_zeros(len(values), V.shape[1]) if gradient is None else gradient.to(V.dtype)


def _squared(V: Tensor) -> Tensor:
    return torch.mul(V, V, out=workspace("squared", tuple(V.shape), V.dtype))
