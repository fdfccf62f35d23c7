"""Destinations of large weight gradients: by default, memory that is kept from step to step.

A claim belongs to graphs, not to the process. An operation that is called while its thread is in a step notes that
step. Its backward, in whichever thread it runs, asks that step alone.
"""

import threading
from collections.abc import Iterable, Sequence
from enum import Enum
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor


class GradientBuffers:
    """While active, graphs of fastsae's ops write large weight gradients into buffers kept between steps.

        buffers = GradientBuffers(sae.parameters())
        with buffers:
            sae(x).loss.backward()      # p.grad of the large weights is now the same memory at each step

    A gradient that is written for the first time since __enter__ replaces what the buffer held; later ones add to it,
    as autograd would. Entering sets every .grad to None, so parameters that get no gradient keep none. A fresh
    (d_sae, d_in) tensor costs more to page in than the gradient costs to compute. Weights with hooks, and what
    torch.autograd.grad asks for, get ordinary gradients; so do graphs built outside or in other threads.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = list(parameters)
        self._buffers: dict[Tensor, Tensor] = {}
        self._step: Step | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or what is unpickled, makes buffers of its own."""
        return {"_parameters": self._parameters, "_buffers": {}, "_step": None}

    def __enter__(self) -> "GradientBuffers":
        for p in self._parameters:
            p.grad = None
        self._step = begin(self, self._parameters)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._step is not None
        end(self._step)

    def claim(self, parameter: Tensor, backend: str) -> tuple[Tensor, bool] | None:
        """The buffer for the gradient and whether to add to it; None if the backend cannot write there."""
        if backend == "cuda" and not _is_plain(parameter):
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


class Claimant(Protocol):
    """An object that chooses, while a backward runs, the destinations of the gradients of large weights."""

    def claim(self, parameter: Tensor, backend: str) -> Any:
        """Tell the backend's backward what to do with the gradient of `parameter`; None: return it."""


class Step:
    """The graphs that one thread builds for one claimant, between begin() and end()."""

    def __init__(self, claimant: Claimant, parameters: Sequence[Tensor]) -> None:
        self.claimant, self.open = claimant, True
        self._parameters = parameters

    def claim(self, node: Any, backend: str) -> Any:
        """Choose what to do with the gradient that goes to `node` of the graph; None: return it."""
        parameter: Any = getattr(node, "variable", None)  # of the node that adds to its .grad
        if not self.open or not any(p is parameter for p in self._parameters) or not parameter.requires_grad:
            return None
        if fate(node) is not Fate.PASSED_ON or _is_hooked(parameter, node):
            return None
        return self.claimant.claim(parameter, backend)


class _Thread(threading.local):
    step: Step | None = None


_thread = _Thread()


def begin(claimant: Claimant, parameters: Sequence[Tensor]) -> Step:
    """Have `claimant` asked about the graphs that this thread builds from now on; one at a time."""
    current = active()
    if current is not None:
        raise RuntimeError(
            f"{type(claimant).__name__}: {type(current.claimant).__name__} is already active in this thread, in whose "
            "step another cannot begin. End that step first, or make this one in another thread"
        )
    _thread.step = Step(claimant, parameters)
    return _thread.step


def end(step: Step) -> None:
    """Graphs of `step` get ordinary gradients from now on."""
    step.open = False
    if _thread.step is step:
        _thread.step = None


def active() -> Step | None:
    """The step that this thread is in."""
    step = _thread.step
    return step if step is not None and step.open else None


class Fate(Enum):
    """Use that the running backward makes of a gradient."""

    DROPPED = "nobody asked for it"
    RETURNED = "torch.autograd.grad returns it"
    PASSED_ON = "it goes on, or is added to .grad"


def fate(node: Any) -> Fate:
    """Find out what the running backward does with a gradient that goes to `node` of the graph."""
    if node is None:
        return Fate.DROPPED
    try:
        return Fate.PASSED_ON if torch._C._will_engine_execute_node(node) else Fate.DROPPED
    except RuntimeError:  # torch's only answer for a leaf that torch.autograd.grad was asked for
        return Fate.RETURNED


def _is_hooked(parameter: Tensor, node: Any) -> bool:
    """Whether someone wants to see the gradient on its way, or to change it."""
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:  # type: ignore[attr-defined]
        return True
    return _holds_hooks(node.register_prehook) or _holds_hooks(node.register_hook)


def _holds_hooks(register: Any) -> bool:
    """Whether hooks were registered. A node shows them to no one but who registers another."""
    handle = register(_nothing)
    hooks = handle.hooks_dict_ref()
    del hooks[handle.id]
    return bool(hooks)


def _nothing(*_: Any) -> None:
    pass
