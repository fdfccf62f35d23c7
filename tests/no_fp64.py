"""A pretended device that has no float64, as MPS has none: tensors of the CPU that say they lie elsewhere.

with no_fp64.device():
    fastsae.TopKSAE(8, 20, 3, device="mps")     # all that is computed from it, too, is on the device
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

_THERE, _CPU = torch.device("mps"), torch.device("cpu")
_LEAVE = (Tensor.cpu, Tensor.item, Tensor.tolist)


def _there(value: Any) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, OnDevice):
        return value
    if value.dtype == torch.float64:
        raise TypeError("the MPS framework doesn't support float64")
    return value.as_subclass(OnDevice)


def _here(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, OnDevice) else value


def _asked_for(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """The device that a call names, as .to(x) does too."""
    named = [kwargs.get("device"), kwargs.get("other"), *args[1:]]
    for value in named:
        if isinstance(value, Tensor):
            return value.device
        if isinstance(value, (str, torch.device)):
            try:
                return torch.device(value)
            except RuntimeError:
                continue
    return None


def _refuse_mixed(func: Any, given: list[Any]) -> None:
    """Refuse tensors that lie elsewhere, except to copy or index; single numbers are allowed, unless they are fp64."""
    elsewhere = [t for t in given if isinstance(t, Tensor) and not isinstance(t, OnDevice) and t.dim()]
    if elsewhere and func not in (Tensor.copy_, Tensor.to, Tensor.__getitem__, Tensor.__setitem__):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found mps:0 and cpu")
    if any(t.dtype == torch.float64 for t in elsewhere):
        raise TypeError("the MPS framework doesn't support float64")


class OnDevice(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:
            return _THERE
        if func is Tensor.numpy:
            raise TypeError("can't convert mps:0 device type tensor to numpy. Use Tensor.cpu()")
        _refuse_mixed(func, tree_leaves((args, kwargs)))
        asked = _asked_for(args, kwargs) if func in (Tensor.to, Tensor.new_tensor, Tensor.new_zeros) else None
        leaves = func in _LEAVE or (asked or kwargs.get("device") or _THERE) == _CPU
        own = [t for t in tree_leaves((args, kwargs)) if isinstance(t, OnDevice)]
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*_on_cpu(args), **_on_cpu(kwargs))
        if leaves:
            return tree_map(_here, found)
        same = [t for t in own if t is found]
        return same[0] if same else tree_map(_there, found)


def _on_cpu(arguments: Any) -> Any:
    return tree_map(lambda v: _CPU if v == _THERE or v == "mps" else v, arguments)


class _Factories(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.device(kwargs.get("device") or "cpu") == _THERE or (
            func is Tensor.to and not isinstance(args[0], OnDevice) and _asked_for(args, kwargs) == _THERE
        ):
            return tree_map(_there, func(*_on_cpu(args), **_on_cpu(kwargs)))
        return func(*args, **kwargs)


@contextmanager
def device() -> Iterator[None]:
    with _Factories():
        yield
