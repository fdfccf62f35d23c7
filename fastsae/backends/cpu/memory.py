"""Memory that is used again: a fresh large tensor costs more to page in than its contents to compute."""

import threading
import weakref

import torch
from torch import Tensor

# glibc hands out smaller memory again by itself; this much it maps and unmaps each time.
RECYCLED = 32 * 2**20

_thread = threading.local()
_free: dict[int, list[Tensor]] = {}  # by size in bytes


def workspace(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of uninitialised memory that the next call with this name gets again (in the same thread)."""
    pool: dict[str, Tensor] = _thread.__dict__.setdefault("pool", {})
    size = torch.Size(shape).numel() * dtype.itemsize
    if name not in pool or len(pool[name]) < size:
        pool.pop(name, None)  # before the larger one is made: both at once would be twice the memory
        pool[name] = _bytes(size)
    return pool[name][:size].view(dtype).view(shape)


def recycled(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of uninitialised memory, which belongs to whoever holds it or a view of it.

    When nobody does any more, as after `optimizer.zero_grad()`, the next one of the same size lies there. Where none of
    this size is free, free memory of other sizes, which belonged to another model, is given back to the system.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if size < RECYCLED:
        return torch.empty(shape, dtype=dtype, device="cpu")
    try:
        memory = _free[size].pop()
    except (KeyError, IndexError):
        _free.clear()
        memory = _bytes(size)
    lease = memory.numpy()  # dies with the storage of the tensor that is made of it
    weakref.finalize(lease, _give_back, memory).atexit = False
    return torch.from_numpy(lease).view(dtype).view(shape)


def release() -> None:
    """Give this thread's workspaces and all free memory back to the system; the next call takes some anew."""
    _thread.__dict__.pop("pool", None)
    _free.clear()


def _give_back(memory: Tensor) -> None:
    _free.setdefault(len(memory), []).append(memory)


def _bytes(size: int) -> Tensor:
    with torch.inference_mode(False):  # memory first used in inference mode must serve training later
        return torch.empty(size, dtype=torch.uint8, device="cpu")
