"""The optimizer's step as dictionary_learning makes it, without fresh gradients and with fused Adam."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fastsae.gradients import GradientBuffers
from fastsae.optim import clip_by_scaling, normalize_rows_, remove_parallel_


class Step:
    """Backward, clipping at 1.0 (dictionary_learning's own, hard-coded), Adam, unit-norm rows where they are wanted.

    `optimizer` becomes a fused one, which takes the same steps.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], optimizer: torch.optim.Adam, unit_norm: nn.Parameter | None = None
    ) -> None:
        self._optimizer, self._unit_norm = optimizer, unit_norm
        self._buffers = GradientBuffers(parameters)
        for group in optimizer.param_groups:
            group["fused"], group["foreach"] = True, False

    def __call__(self, loss: Callable[[], Tensor]) -> Tensor:
        """One step down the loss that `loss` computes; returns it."""
        with self._buffers:
            value = loss()
            value.backward()
        W = self._unit_norm
        if W is not None and W.grad is not None:
            remove_parallel_(W.grad, W)
        clip_by_scaling(self._optimizer, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if W is not None:
            normalize_rows_(W)
        return value.detach()
