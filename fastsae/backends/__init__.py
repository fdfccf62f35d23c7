"""Choice of the implementation that serves a call, with the reason against each of the others."""

import importlib
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastsae import packages
from fastsae.backends import cpu, reference

NAMES = ("auto", "reference", "cpu", "cuda")
_CUDA_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_NOT_INSTALLED = "triton is not installed (pip install triton; Linux only)"
_NO_TRITON = None if packages.is_there("triton") else packages.stand_in("triton") or _NOT_INSTALLED
# Triton reads it when a kernel is defined, so it is settled at import.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def refusal(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why backend `name` cannot serve tensors of this device and dtype; None when it can."""
    if name == "reference":
        return None
    if _is_transformed():
        return "torch.func and forward-mode differentiation need operations that PyTorch can transform by itself"
    if name == "cuda":
        return _cuda_refusal(device, dtype)
    if device.type != "cpu":
        return f"it serves CPU tensors, these are on {device}"
    if dtype not in cpu.DTYPES:
        return f"it serves {', '.join(str(d)[6:] for d in cpu.DTYPES)}, these are {str(dtype)[6:]}"
    return None


def _is_transformed() -> bool:
    """Whether derivatives are asked for that hand-written backwards cannot give: to those they would come out as 0."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _cuda_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if _NO_TRITON:
        return _NO_TRITON
    if torch.version.hip:
        return (
            "on ROCm it is not checked that what a program stores is seen by its other waves after a barrier, which "
            "the selection of the k largest relies on"
        )
    if device.type != "cuda" and not (device.type == "cpu" and _INTERPRETED):
        return f"it serves CUDA tensors, these are on {device} (TRITON_INTERPRET=1 runs its kernels there, for testing)"
    if dtype not in _CUDA_DTYPES:
        return f"it serves {', '.join(str(d)[6:] for d in _CUDA_DTYPES)}, these are {str(dtype)[6:]}"
    tracing = torch.compiler.is_compiling()  # where a look at the device would break the graph
    if device.type == "cuda" and not tracing and torch.cuda.get_device_capability(device) < (8, 0):
        return "its kernels need compute capability 8.0 or later"
    return None


def choose(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend for `name`: itself, or for "auto" the fastest that can serve.

    Raises ValueError for an unknown name, RuntimeError with the reason when a named backend cannot serve.
    """
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}; got {name!r}")
    if name == "auto":
        fast = "cpu" if device.type == "cpu" else "cuda"  # on the CPU "cuda" is the interpreter
        return fast if refusal(fast, device, dtype) is None else "reference"
    if reason := refusal(name, device, dtype):
        raise RuntimeError(
            f"backend {name!r} cannot serve this call: {reason}. Use backend='auto' to let fastsae choose."
        )
    return name


def implementation(name: str) -> ModuleType:
    """The module of a fast backend (one with hand-written backwards)."""
    if name == "cpu":
        return cpu
    packages.need("triton", "backend 'cuda'")
    return importlib.import_module("fastsae.backends.cuda")  # not above: Triton takes long, and is not there everywhere


def explain(x: Tensor, sae: Any) -> str:
    """Say which backend and plan `sae` uses for activations x (..., d_in), and why not the others.

    Reads only sae.backend, sae.k, sae.d_sae and sae.W_enc; for a joint SAE also k_integration, W_lin and V.
    """
    dtype = sae.W_enc.dtype
    chosen = choose(sae.backend, x.device, dtype)
    rows = x.numel() // x.shape[-1]
    lines = [f"backend: {chosen}" + (" (forced)" if sae.backend != "auto" else "")]
    if chosen == "cpu":
        plan = cpu.plan(rows, x.shape[-1], sae.d_sae, sae.k, dtype)
        what = "bf16 bounds of the pre-activations" if plan.screened else "pre-activations"
        lines.append(f"plan: {rows} rows in chunks of {plan.rows}; {plan.bytes / 2**20:.0f} MiB of {what} held, reused")
    elif chosen == "cuda":
        lines += implementation("cuda").explain(rows, sae, x.device)
    else:
        size = rows * sae.d_sae * dtype.itemsize / 2**20
        lines.append(f"plan: all {rows} rows at once; {size:.0f} MiB of pre-activations kept for the backward")
    for other in NAMES[1:]:
        if other != chosen:
            reason = refusal(other, x.device, dtype) or (
                "it is the readable specification, and slow" if other == "reference" else f"{chosen!r} was asked for"
            )
            lines.append(f"not {other}: {reason}")
    return "\n".join(lines)


__all__ = ["NAMES", "choose", "explain", "implementation", "reference", "refusal"]
