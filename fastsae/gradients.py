"""What becomes of large weight gradients: by default, memory that is kept from step to step."""

from collections.abc import Iterable
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor


class GradientBuffers:
    """While active, the backward of fastsae's ops writes large weight gradients into buffers kept between steps.

        buffers = GradientBuffers(sae.parameters())
        with buffers:
            sae(x).loss.backward()      # p.grad of the large weights is now the same memory at each step

    A gradient that is written for the first time since __enter__ replaces what the buffer held; later ones add to it,
    as autograd would. Entering sets every .grad to None, so parameters that get no gradient keep none. A fresh
    (d_sae, d_in) tensor costs more to page in than the gradient costs to compute.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = list(parameters)
        self._weights = Weights([])
        self._buffers: dict[Tensor, Tensor] = {}

    def __enter__(self) -> "GradientBuffers":
        for p in self._parameters:
            p.grad = None
        self._weights = Weights(self._parameters)
        activate(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        deactivate()

    def claim(self, weight: Tensor, backend: str) -> tuple[Tensor, bool] | None:
        """The buffer for this weight's gradient and whether to add to it; None if the weight is not ours."""
        parameter = self._weights.find(weight)
        if parameter is None or (backend == "cuda" and not _is_plain(parameter)):
            return None
        if parameter.grad is not None:
            return parameter.grad, True
        buffer = self._buffers.get(parameter)
        if buffer is None or buffer.dtype != parameter.dtype or buffer.device != parameter.device:
            buffer = self._buffers[parameter] = torch.empty_like(parameter, requires_grad=False)
        parameter.grad = buffer
        return buffer, False


def _is_plain(parameter: Tensor) -> bool:
    """Whether kernels can write its gradient: they count on rows one after another."""
    return parameter.is_contiguous() and (parameter.grad is None or parameter.grad.is_contiguous())


class Weights:
    """Parameters as the ops see them: detached, by their place in memory."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        # Looked up anew at each step: .to() moves a parameter, and another one may come to lie where it was.
        self._by_address = {p.data_ptr(): p for p in parameters if p.requires_grad}

    def find(self, weight: Tensor) -> Tensor | None:
        """The parameter that `weight` is, None for other tensors and for views of another layout."""
        p = self._by_address.get(weight.data_ptr())
        return p if p is not None and p.shape == weight.shape and p.stride() == weight.stride() else None


class Claimant(Protocol):
    """Who says, while a backward runs, what becomes of the gradients of large weights."""

    def claim(self, weight: Tensor, backend: str) -> Any:
        """What the backend's backward shall do with the gradient of `weight`; None: return it."""


# Not thread-local: on CUDA autograd runs backward in a thread of its own.
_active: Claimant | None = None


def activate(claimant: Claimant) -> None:
    """Have `claimant` asked from now on; one at a time."""
    global _active
    if _active is not None:
        raise RuntimeError(
            f"{type(claimant).__name__}: {type(_active).__name__} is already active. One Trainer at a time can be in a "
            "step; run others in own processes"
        )
    _active = claimant


def deactivate() -> None:
    global _active
    _active = None


def active() -> Claimant | None:
    return _active
