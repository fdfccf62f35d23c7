"""The specification: every operation in plain PyTorch, as in the equations. Any device, any float dtype.

Shapes: x (B, d_in), W_enc W_dec W_lin (d_sae, d_in), V (d_sae, E), values and indices (B, k). Dense (B, d_sae) and
(B, k, d_in) tensors are made here without regret: this file is to be read and compared with, not to be fast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    features: Tensor | None = None,
    b_dec: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """values, indices = the k largest of relu((x - b_dec) @ W_enc.T + b_enc), strongest first, ties to the lower index.

    features (n,) int64, ascending: only these compete (the others are treated as if they did not exist).
    scale (d_sae), not negative: features are ranked by scale * relu(pre), and those of 0 take no part.
    """
    if b_dec is not None:
        x = x - b_dec
    if features is not None:
        W_enc, b_enc = W_enc[features], b_enc[features]
        scale = None if scale is None else scale[features]
    activations = torch.relu(x @ W_enc.T + b_enc)
    if scale is not None:
        activations = activations * (scale > 0)
    ranked = activations if scale is None else activations * scale
    indices = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    values = activations.gather(1, indices)
    return values, indices if features is None else features[indices]


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """identity = sum_j a_j W_dec[i_j]"""
    return (values.unsqueeze(-1) * W_dec[indices]).sum(dim=1)


def pairwise_interaction(values: Tensor, indices: Tensor, V: Tensor) -> Tensor:
    """z = (s^2 - q) / 2, the sum over pairs i < j of (a_i V_i) * (a_j V_j), elementwise (paper eq. of FM pooling)."""
    _, s, q = decode_sums(values, indices, None, None, V, values.shape[1])
    return (s.square() - q) / 2


def decode_sums(
    values: Tensor, indices: Tensor, W_dec: Tensor | None, W_lin: Tensor | None, V: Tensor | None, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """identity + linear, s = sum_j a_j V[i_j] and q = sum_j (a_j V[i_j])^2; the last three of the n strongest only."""
    strongest, their_indices = values[:, :n], indices[:, :n]
    out = values.new_empty(len(values), 0) if W_dec is None else sparse_decode(values, indices, W_dec)
    if W_lin is not None:
        out = out + sparse_decode(strongest, their_indices, W_lin)
    if V is None:
        return out, values.new_empty(len(values), 0), values.new_empty(len(values), 0)
    terms = strongest.unsqueeze(-1) * V[their_indices]
    return out, terms.sum(dim=1), terms.square().sum(dim=1)


def joint_decode(
    values: Tensor, indices: Tensor, W_dec: Tensor, W_lin: Tensor | None, V: Tensor | None, n: int
) -> tuple[Tensor, Tensor]:
    """identity + linear sum (B, d_in), and z (B, E); the linear and pairwise parts see the n strongest only.

    W_lin = None leaves the linear sum out; V = None makes z empty, (B, 0).
    """
    out, s, q = decode_sums(values, indices, W_dec, W_lin, V, n)
    return out, (s.square() - q) / 2


def interaction_mlp(
    z: Tensor, W1: Tensor, b1: Tensor, W2: Tensor, b2: Tensor | None, dropout: float = 0.0, training: bool = False
) -> Tensor:
    """interaction = W2 relu(W1 dropout(z) + b1) + b2, without b2 where it is None."""
    if training and dropout:
        z = F.dropout(z, dropout)
    return F.linear(torch.relu(F.linear(z, W1, b1)), W2, b2)


def squared_error(out: Tensor, target: Tensor) -> Tensor:
    """mean((out - target)^2), of narrow numbers in fp32: the eight bits of bf16 would hide what training does."""
    precise = torch.promote_types(out.dtype, torch.float32)
    return F.mse_loss(out.to(precise), target.to(precise))
