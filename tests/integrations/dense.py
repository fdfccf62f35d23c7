"""Finds dense (B, d_sae) tensors."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class DenseSpy(TorchDispatchMode):
    """Inside: counts the operations that give a dense tensor whose last two dimensions are `shape`."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape, self.seen = shape, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.layout == torch.strided and tuple(t.shape[-2:]) == self.shape:
                self.seen.append(str(func))
        return out
