"""From the code to the reconstruction and to z, and the gradients."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsae.backends.cpu.memory import workspace
from fastsae.backends.cpu.sparse import Destination, gathered_dot, weight_gradient
from fastsae.code import FeatureOrder, feature_order


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """See reference.sparse_decode."""
    if values.shape[1] == 0:
        return values.new_zeros(len(values), W_dec.shape[1])
    return F.embedding_bag(indices.contiguous(), W_dec, per_sample_weights=values.contiguous(), mode="sum")


def sparse_decode_backward(
    d_out: Tensor,
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    need_W: bool,
    out: Destination | None = None,
) -> tuple[Tensor, Tensor | None]:
    """d_values (B, k), d_W_dec (d_sae, d_in)."""
    return _decode_backward(feature_order(indices, len(W_dec)), d_out, values, W_dec, need_W, out)


def _decode_backward(
    order: FeatureOrder, d_out: Tensor, values: Tensor, W_dec: Tensor, need_W: bool, out: Destination | None
) -> tuple[Tensor, Tensor | None]:
    d_values = gathered_dot(order, d_out, W_dec).view_as(values)
    return d_values, weight_gradient(order, values, d_out, out) if need_W else None


def pairwise_interaction(values: Tensor, indices: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """See reference.pairwise_interaction. Also returns s (B, E), which the backward needs."""
    if values.shape[1] == 1:  # no pairs; s^2 - q would leave roundings, and Adam would learn from them
        none = values.new_zeros(len(values), V.shape[1])
        return none, none.clone()
    s = sparse_decode(values, indices, V)
    q = sparse_decode(values.square(), indices, _squared(V))
    return torch.addcmul(q.neg_(), s, s).div_(2), s


def pairwise_interaction_backward(
    d_z: Tensor,
    s: Tensor,
    values: Tensor,
    indices: Tensor,
    V: Tensor,
    need_V: bool,
    out: Destination | None = None,
) -> tuple[Tensor, Tensor | None]:
    """d_values (B, k): t . V_i - a d_z . V_i^2, and d_V (d_sae, E): sum a t - (sum a^2 d_z) V_i, with t = d_z * s."""
    return _interaction_backward(feature_order(indices, len(V)), d_z, s, values, V, need_V, out)


def _interaction_backward(
    order: FeatureOrder, d_z: Tensor, s: Tensor, values: Tensor, V: Tensor, need_V: bool, out: Destination | None
) -> tuple[Tensor, Tensor | None]:
    if values.shape[1] == 1:
        values, d_z = torch.zeros_like(values), torch.zeros_like(d_z)
    t = d_z * s
    of_sum, of_squares = gathered_dot(order, t, V), gathered_dot(order, d_z, _squared(V))
    d_values = of_sum.view_as(values) - values * of_squares.view_as(values)
    if not need_V:
        return d_values, None
    d_V = weight_gradient(order, values, t, out)
    square_terms = workspace("square_terms", tuple(V.shape), V.dtype)
    weight_gradient(order, values.square(), d_z, (square_terms, False))
    return d_values, d_V.addcmul_(square_terms, V, value=-1)


def joint_decode(
    values: Tensor, indices: Tensor, W_dec: Tensor, W_lin: Tensor | None, V: Tensor | None, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.joint_decode. Also returns s (B, E), which the backward needs."""
    out = sparse_decode(values, indices, W_dec)
    strongest, their_indices = values[:, :n].contiguous(), indices[:, :n].contiguous()
    if W_lin is not None:
        out += sparse_decode(strongest, their_indices, W_lin)
    if V is None:
        return out, out.new_empty(len(out), 0), out.new_empty(len(out), 0)
    return out, *pairwise_interaction(strongest, their_indices, V)


def joint_decode_backward(
    d_out: Tensor,
    d_z: Tensor,
    s: Tensor,
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    W_lin: Tensor | None,
    V: Tensor | None,
    n: int,
    need_W_dec: bool,
    need_W_lin: bool,
    need_V: bool,
    out: tuple[Destination | None, Destination | None, Destination | None] = (None, None, None),
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """d_values (B, k), d_W_dec, d_W_lin (d_sae, d_in), d_V (d_sae, E)."""
    d_out = d_out.contiguous()
    d_values, d_W_dec = sparse_decode_backward(d_out, values, indices, W_dec, need_W_dec, out[0])
    d_W_lin = d_V = None
    if W_lin is not None or V is not None:
        strongest, order = values[:, :n].contiguous(), feature_order(indices[:, :n], len(W_dec))
        if W_lin is not None:
            d_strongest, d_W_lin = _decode_backward(order, d_out, strongest, W_lin, need_W_lin, out[1])
            d_values[:, :n] += d_strongest
        if V is not None:
            d_strongest, d_V = _interaction_backward(order, d_z, s, strongest, V, need_V, out[2])
            d_values[:, :n] += d_strongest
    return d_values, d_W_dec, d_W_lin, d_V


def _squared(V: Tensor) -> Tensor:
    return torch.mul(V, V, out=workspace("squared", tuple(V.shape), V.dtype))
