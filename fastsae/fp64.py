"""fp64 where a device has it, and on the CPU where it has none: MPS, for one."""

import torch
from torch import Tensor

_HAVE_IT = ("cpu", "cuda")


def fp64_device(device: torch.device | str) -> torch.device:
    """Choose the device for fp64 that is computed from tensors of `device`."""
    device = torch.device(device)
    return device if device.type in _HAVE_IT else torch.device("cpu")


def in_fp64(t: Tensor) -> Tensor:
    """The tensor in fp64, on fp64_device of its own."""
    return t.to(fp64_device(t.device)).double()
