"""Destinations of a gradient row: stored, added to what is there, or used up at once in a step of Adam."""

from typing import Any, NamedTuple, TypeGuard

import triton
import triton.language as tl
from torch import Tensor

STORE, ADD, ADAM, ADAM_UNIT = (tl.constexpr(mode) for mode in range(4))


class Gradient(NamedTuple):
    """Written to `out` (M, width), or added to what it holds."""

    out: Tensor
    add: bool

    def arguments(self, name: str) -> dict[str, object]:
        """The kernel arguments for the weight called `name`."""
        made = dict.fromkeys((f"{name}_{p}_ptr" for p in ("exp_avg", "exp_avg_sq", "copy", "corrections")), None)
        return {f"{name}_out_ptr": self.out, **made, f"{name.upper()}_MODE": ADD.value if self.add else STORE.value}


class AdamStep(NamedTuple):
    """No gradient is written: each row of the weight makes its step of Adam as soon as its gradient is known."""

    weight: Tensor
    """(M, width), updated."""
    exp_avg: Tensor
    exp_avg_sq: Tensor
    """Adam's moments, updated."""
    copy: Tensor | None
    """The weight in the dtype products are computed in, updated as well."""
    corrections: Tensor
    """(2) fp32 on the device, which a captured graph reads anew: lr / (1 - beta1^t) and 1 / sqrt(1 - beta2^t)."""
    beta1: float
    beta2: float
    eps: float
    unit_norm: bool
    """Take the part along the row out of its gradient, and bring the row back to norm 1."""
    made: list[bool]
    """Not empty once a backward has taken the step on."""

    def arguments(self, name: str) -> dict[str, object]:
        """The kernel arguments for the weight called `name`."""
        return {
            f"{name}_out_ptr": self.weight,
            f"{name}_exp_avg_ptr": self.exp_avg,
            f"{name}_exp_avg_sq_ptr": self.exp_avg_sq,
            f"{name}_copy_ptr": self.copy,
            f"{name}_corrections_ptr": self.corrections,  # of its own: a weight may have made fewer steps
            f"{name.upper()}_MODE": (ADAM_UNIT if self.unit_norm else ADAM).value,
        }


Destination = Gradient | AdamStep


# By what they hold: after a reload of this module those made before it are of other classes than these.


def is_gradient(destination: Any) -> TypeGuard[Gradient]:
    return hasattr(destination, "add")


def is_step(destination: Any) -> TypeGuard[AdamStep]:
    return hasattr(destination, "exp_avg")


def absent(name: str) -> dict[str, object]:
    """The kernel arguments for a weight that gets no gradient."""
    pointers = ("out", "exp_avg", "exp_avg_sq", "copy", "corrections")
    return {**{f"{name}_{p}_ptr": None for p in pointers}, f"{name.upper()}_MODE": STORE.value}


def hyperparameters(*destinations: Destination | None) -> dict[str, object]:
    """The kernel arguments all weights of one launch share."""
    step = next((d for d in destinations if is_step(d)), None)
    if step is None:
        return {"beta1": 0.0, "rest1": 0.0, "beta2": 0.0, "rest2": 0.0, "eps": 0.0}
    return {
        "beta1": step.beta1,
        "rest1": 1 - step.beta1,  # not from beta1 in fp32, where 1 - 0.999 is 1e-5 off
        "beta2": step.beta2,
        "rest2": 1 - step.beta2,
        "eps": step.eps,
    }


@triton.jit
def finish_row(
    grad,
    offs,
    mask,
    out_ptr,  # the gradient, or the weight in a step of Adam
    exp_avg_ptr,
    exp_avg_sq_ptr,
    copy_ptr,
    corrections_ptr,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    MODE: tl.constexpr,
):
    """Store, add, or step (Kingma and Ba, algorithm 1); `grad` fp32, zero where masked. Unit norm needs whole rows."""
    if MODE == STORE:
        tl.store(out_ptr + offs, grad.to(out_ptr.dtype.element_ty), mask=mask)
    elif MODE == ADD:
        before = tl.load(out_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + offs, (before + grad).to(out_ptr.dtype.element_ty), mask=mask)
    else:
        # All loads come before the first reduction, at whose barriers they would wait.
        weight = tl.load(out_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        exp_avg = tl.load(exp_avg_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        exp_avg_sq = tl.load(exp_avg_sq_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        step_size, to_root = tl.load(corrections_ptr), tl.load(corrections_ptr + 1)
        if MODE == ADAM_UNIT:
            grad -= tl.sum(grad * weight, axis=0) * weight
        exp_avg = beta1 * exp_avg + rest1 * grad
        exp_avg_sq = beta2 * exp_avg_sq + rest2 * grad * grad
        tl.store(exp_avg_ptr + offs, exp_avg.to(exp_avg_ptr.dtype.element_ty), mask=mask)
        tl.store(exp_avg_sq_ptr + offs, exp_avg_sq.to(exp_avg_sq_ptr.dtype.element_ty), mask=mask)
        weight -= step_size * exp_avg / (tl.sqrt(exp_avg_sq) * to_root + eps)
        if MODE == ADAM_UNIT:
            norm = tl.sqrt(tl.sum(tl.where(mask, weight * weight, 0.0), axis=0))
            weight = weight / tl.where(norm > 0, norm, 1.0)
        tl.store(out_ptr + offs, weight.to(out_ptr.dtype.element_ty), mask=mask)
        if copy_ptr is not None:
            tl.store(copy_ptr + offs, weight.to(copy_ptr.dtype.element_ty), mask=mask)
