"""Which implementation serves a call, and why not the others."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastsae.backends import cpu, reference

NAMES = ("auto", "reference", "cpu", "cuda")


def refusal(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why backend `name` cannot serve tensors of this device and dtype; None when it can."""
    if name == "reference":
        return None
    if name == "cuda":
        return "its Triton kernels are not part of this version"
    if device.type != "cpu":
        return f"it serves CPU tensors, these are on {device}"
    if dtype not in cpu.DTYPES:
        return f"it serves {', '.join(str(d)[6:] for d in cpu.DTYPES)}, these are {str(dtype)[6:]}"
    return None


def choose(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend for `name`: itself, or for "auto" the fastest that can serve.

    Raises ValueError for an unknown name, RuntimeError with the reason when a named backend cannot serve.
    """
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}; got {name!r}")
    if name == "auto":
        return next(n for n in ("cuda", "cpu", "reference") if refusal(n, device, dtype) is None)
    if reason := refusal(name, device, dtype):
        raise RuntimeError(
            f"backend {name!r} cannot serve this call: {reason}. Use backend='auto' to let fastsae choose."
        )
    return name


def implementation(name: str) -> ModuleType:
    """The module of a fast backend (one with hand-written backwards)."""
    return {"cpu": cpu}[name]


def explain(x: Tensor, sae: Any) -> str:
    """Which backend and plan `sae` uses for activations x (..., d_in), and why not the others.

    Reads only sae.backend, sae.k, sae.d_sae and the dtype of sae.W_enc.
    """
    dtype = sae.W_enc.dtype
    chosen = choose(sae.backend, x.device, dtype)
    rows = x.numel() // x.shape[-1]
    lines = [f"backend: {chosen}" + (" (forced)" if sae.backend != "auto" else "")]
    if chosen == "cpu":
        plan = cpu.plan(rows, x.shape[-1], sae.d_sae, sae.k, dtype)
        what = "bf16 bounds of the pre-activations" if plan.screened else "pre-activations"
        lines.append(f"plan: {rows} rows in chunks of {plan.rows}; {plan.bytes / 2**20:.0f} MiB of {what} held, reused")
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
