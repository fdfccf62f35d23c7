"""Weight gradients written into memory that is kept from step to step."""

from collections.abc import Iterable
from types import TracebackType

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
        self._by_address: dict[int, Tensor] = {}
        self._buffers: dict[Tensor, Tensor] = {}

    def __enter__(self) -> "GradientBuffers":
        global _active
        if _active is not None:
            raise RuntimeError(
                "GradientBuffers: already active. One Trainer at a time can be in a step; run others in own processes"
            )
        for p in self._parameters:
            p.grad = None
        # Looked up anew: .to() moves a parameter, and another one may come to lie where it was.
        self._by_address = {p.data_ptr(): p for p in self._parameters if p.requires_grad}
        _active = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _active
        _active = None

    def claim(self, weight: Tensor) -> tuple[Tensor, bool] | None:
        """The buffer for this weight's gradient and whether to add to it; None if the weight is not ours."""
        parameter = self._by_address.get(weight.data_ptr())
        if parameter is None or parameter.shape != weight.shape or parameter.stride() != weight.stride():
            return None
        if parameter.grad is not None:
            return parameter.grad, True
        buffer = self._buffers.get(parameter)
        if buffer is None or buffer.dtype != parameter.dtype or buffer.device != parameter.device:
            buffer = self._buffers[parameter] = torch.empty_like(parameter, requires_grad=False)
        parameter.grad = buffer
        return buffer, False


# Not thread-local: on CUDA autograd runs backward in a thread of its own.
_active: GradientBuffers | None = None


def active() -> GradientBuffers | None:
    return _active
