"""Memory that is kept from call to call: a fresh large tensor costs more to page in than its contents to compute."""

import threading

import torch
from torch import Tensor

_thread = threading.local()


def workspace(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of uninitialised memory that the next call with this name gets again (in the same thread)."""
    pool: dict[str, Tensor] = _thread.__dict__.setdefault("pool", {})
    size = torch.Size(shape).numel() * dtype.itemsize
    if name not in pool or len(pool[name]) < size:
        pool.pop(name, None)  # before the larger one is made: both at once would be twice the memory
        with torch.inference_mode(False):  # memory first used in inference mode must serve training later
            pool[name] = torch.empty(size, dtype=torch.uint8)
    return pool[name][:size].view(dtype).view(shape)


def release() -> None:
    """Give this thread's kept memory back; the next call that needs some takes it anew."""
    _thread.__dict__.pop("pool", None)
