"""The optimizer's steps around torch's fused Adam, and an Adam that makes its steps inside the backward."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from fastsae import gradients

# Rows handled at once, so that a temporary of that many rows stays in cache.
_ROWS = 4096


def clip_by_scaling(optimizer: torch.optim.Adam, max_norm: float, norm: Tensor | None = None) -> Tensor:
    """Clip the gradients of a fused Adam to the global norm `max_norm`, without a pass of its own; returns the norm.

    Fused Adam divides gradients by `optimizer.grad_scale` while it reads them. `norm`: theirs, if it is known.
    """
    if norm is None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
    optimizer.grad_scale = (norm / max_norm).clamp(min=1.0).float()  # type: ignore[attr-defined]  # read by Adam.step
    return norm


@torch.no_grad()
def normalize_rows_(W: Tensor) -> None:
    """Scale each row of W (d_sae, d_in) to norm 1, in place."""
    for rows in W.split(_ROWS):
        rows.div_(rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny))


@torch.no_grad()
def remove_parallel_(grad: Tensor, W: Tensor) -> None:
    """Take out of each row of `grad` its part along the same row of W, in place; rows of W have norm 1."""
    for g, w in zip(grad.split(_ROWS), W.split(_ROWS), strict=True):
        g.addcmul_((g * w).sum(dim=1, keepdim=True), w, value=-1)


def adam_step_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    group: Mapping[str, Any],
    grad_scale: Tensor | None = None,
) -> None:
    """One step of torch's fused Adam on one weight, in place; group holds lr, betas and eps."""
    beta1, beta2 = group["betas"]
    adam(
        [weight],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step],
        fused=True,
        grad_scale=grad_scale,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=0.0,
        eps=group["eps"],
        maximize=False,
    )


def load_as_saved(optimizer: torch.optim.Adam, state_dict: dict[str, Any]) -> None:
    """Put back what torch's load_state_dict cast to the dtype of the weights: moments, codes, fp32 copies."""
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    for number, p in zip(numbers, weights, strict=True):
        for name, value in state_dict["state"].get(number, {}).items():
            optimizer.state[p][name] = value.to(p.device, copy=True)


class AdamInBackward(torch.optim.Adam):
    """torch.optim.Adam(fused=True) whose steps for large weights happen in the backward, so no gradient is ever held.

        optimizer = AdamInBackward(sae.parameters(), lr=1e-3, unit_norm=[sae.W_dec])
        with optimizer.in_backward():
            sae(x).loss.backward()     # CUDA backend: W_enc, W_dec, W_lin, V make their step, their .grad stays None
        optimizer.step()               # everything else

    Equal to the plain optimizer to rounding, and so are its states, which have the same names. Where a gradient is made
    by matrix products, in a compiled model, and on other backends, gradients are written and step() uses them.
    bf16 and fp16 parameters get a state "master" in fp32, which is what is trained; moments are then fp32 too.
    lr: a number; or a tensor () on the device of the weights, which schedulers change in place and steps captured in a
    CUDA graph follow.
    unit_norm: weights (d_sae, d_in) whose rows stay at norm 1, the part of the gradient along them removed.

    Graphs built inside in_backward(), in its thread, make steps in their backward, inside as well: one backward a step,
    in which a weight is used once. A second use raises, from autograd ("modified by an inplace operation") or from
    step(); by then the first step is made, so go on from a checkpoint. Weights with hooks, and what torch.autograd.grad
    asks for, get ordinary gradients. Not for clipping, accumulation, DistributedDataParallel or GradScaler, which need
    the gradients; so not under fp16 autocast either, where gradients vanish without a scaler.
    """

    # GradScaler leaves it to step(), which refuses. torch sets it in __init__ alone, so a copy would have lost it.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        unit_norm: Iterable[Tensor] = (),
    ) -> None:
        params = list(params)
        if not all(isinstance(p, Tensor) for p in params):
            raise TypeError("AdamInBackward: expected tensors; groups of parameters are not supported")
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)
        self._unit_norm = list(unit_norm)
        # Weights whose step a backward was given, and a list that is not empty once it has taken it on.
        self._offered: list[tuple[Tensor, list[bool]]] = []

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_unit_norm": self._unit_norm, "_offered": self._offered}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only the one group that the constructor makes. Raises TypeError for another."""
        if self.param_groups:
            raise TypeError("AdamInBackward: groups of parameters are not supported; make an optimizer for each")
        super().add_param_group(param_group)

    @contextmanager
    def in_backward(self) -> Iterator[None]:
        """Sets every .grad to None; forward and backward inside make steps."""
        self.zero_grad()
        self._offered = []
        step = gradients.begin(self, self._parameters)
        try:
            yield
        finally:
            gradients.end(step)

    @property
    def _parameters(self) -> list[Tensor]:
        return self.param_groups[0]["params"]

    def claim(self, parameter: Tensor, backend: str) -> Any:
        """The step for this weight, which the backend makes row by row; None where it cannot."""
        if backend != "cuda" or not parameter.is_contiguous():
            return None
        from csrc_triton.adam import AdamStep  # brings triton

        group, state = self.param_groups[0], self._state_of(parameter)
        # On the device, so that nobody waits: the count of steps lies there.
        t = state["step"].double() + 1
        beta1, beta2 = group["betas"]
        master = state.get("master")
        step = AdamStep(
            weight=parameter.detach() if master is None else master,
            exp_avg=state["exp_avg"],
            exp_avg_sq=state["exp_avg_sq"],
            copy=None if master is None else parameter.detach(),
            corrections=torch.stack([group["lr"] / (1 - beta1**t), (1 - beta2**t).rsqrt()]).float(),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            unit_norm=self._has_unit_norm(parameter),
            made=[],
        )
        self._offered.append((parameter, step.made))
        # Kernels write past autograd: who saved the weight, and reads it after the step, must be told.
        torch.autograd.graph.increment_version(parameter)
        return step

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """The steps that the backward did not make. Raises RuntimeError where a weight has made one and has a .grad."""
        if closure is not None or getattr(self, "grad_scale", None) is not None:
            what = "a closure" if closure is not None else "GradScaler"
            raise RuntimeError(f"AdamInBackward.step: {what} needs gradients, and some were used up in the backward")
        made = [p for p, taken in self._offered if taken]
        self._offered = []
        for p in made:
            if p.grad is not None:
                raise RuntimeError(
                    f"AdamInBackward: a weight {tuple(p.shape)} was used outside of fastsae's operations too, and made "
                    "its step without that part of its gradient. Go on from a checkpoint, with torch.optim.Adam."
                )
            self.state[p]["step"] += 1
        for p in self._parameters:
            if p.grad is not None:
                self._step_alone(p, self.param_groups[0])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Like torch's, but what is fp32 beside narrow parameters stays fp32."""
        super().load_state_dict(state_dict)
        load_as_saved(self, state_dict)

    def _step_alone(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self._state_of(p)
        weight, grad = state.get("master", p), p.grad
        grad = grad.to(weight.dtype)  # type: ignore[union-attr]
        unit_norm = self._has_unit_norm(p)
        if unit_norm:
            remove_parallel_(grad, weight)
        adam_step_(weight, grad, state["exp_avg"], state["exp_avg_sq"], state["step"], group)
        if unit_norm:
            normalize_rows_(weight)
        if weight is not p:
            p.copy_(weight)

    def _has_unit_norm(self, p: Tensor) -> bool:
        return any(p is q for q in self._unit_norm)

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            precise = torch.promote_types(p.dtype, torch.float32)
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(p, dtype=precise, memory_format=torch.contiguous_format)
            if p.dtype != precise:
                state["master"] = p.detach().to(precise)
        elif p.dtype in (torch.float16, torch.bfloat16) and "master" not in state:
            raise RuntimeError(
                f"AdamInBackward: a parameter {tuple(p.shape)} was cast to {p.dtype} after its first step, without "
                "an fp32 master; cast first, or make a new optimizer"
            )
        return state
