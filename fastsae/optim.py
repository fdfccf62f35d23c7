"""The optimizer's steps around torch's fused Adam."""

import torch
from torch import Tensor

# Rows handled at once, so that a temporary of that many rows stays in cache.
_ROWS = 4096


def clip_by_scaling(optimizer: torch.optim.Adam, max_norm: float) -> Tensor:
    """Clip the gradients of a fused Adam to the global norm `max_norm`, without a pass of its own; returns the norm.

    Fused Adam divides gradients by `optimizer.grad_scale` while it reads them.
    """
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    optimizer.grad_scale = (norm / max_norm).clamp(min=1.0).float()  # type: ignore[attr-defined]  # read by Adam.step
    return norm


@torch.no_grad()
def normalize_rows_(W: Tensor) -> None:
    """Scale each row of W (d_sae, d_in) to norm 1, in place."""
    for rows in W.split(_ROWS):
        rows.div_(rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny))


@torch.no_grad()
def remove_parallel_(grad: Tensor, W: Tensor) -> None:
    """Take out of each row of `grad` its part along the same row of W, in place; rows of W have norm 1."""
    for g, w in zip(grad.split(_ROWS), W.split(_ROWS), strict=True):
        g.addcmul_((g * w).sum(dim=1, keepdim=True), w, value=-1)
