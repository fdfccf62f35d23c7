"""Dense codes, as other packages hand them on in inference."""

from torch import Tensor


def strongest_first(dense: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """A code (..., d_sae) as values and indices (..., k), strongest first; wider if somebody made more features active.

    Negative activations, which no encoder gives but an intervention may, are strong by their size.
    """
    width = max([k, *dense.count_nonzero(dim=-1).flatten().tolist()])
    indices = dense.abs().topk(width, dim=-1).indices
    return dense.gather(-1, indices), indices
