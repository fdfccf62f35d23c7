"""The optimizer's steps around torch's fused Adam, and an Adam that makes its steps inside the backward."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from fastsae import gradients

# Rows handled at once, so that a temporary of that many rows stays in cache.
_ROWS = 4096


def clip_by_scaling(optimizer: torch.optim.Adam, max_norm: float) -> Tensor:
    """Clip the gradients of a fused Adam to the global norm `max_norm`, without a pass of its own; returns the norm.

    Fused Adam divides gradients by `optimizer.grad_scale` while it reads them.
    """
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


class AdamInBackward(torch.optim.Adam):
    """torch.optim.Adam(fused=True) whose steps for large weights happen in the backward, so no gradient is ever held.

        optimizer = AdamInBackward(sae.parameters(), lr=1e-3, unit_norm=[sae.W_dec])
        with optimizer.in_backward():
            sae(x).loss.backward()     # CUDA backend: W_enc, W_dec, W_lin, V make their step, their .grad stays None
        optimizer.step()               # everything else

    Equal to the plain optimizer to rounding, and so are its states, which have the same names. Where a backend or a
    plan makes gradients by matrix products, or the backend is not "cuda", gradients are written and step() uses them.
    bf16 and fp16 parameters get a state "master" in fp32, which is what is trained; moments are then fp32 too.
    unit_norm: weights (d_sae, d_in) whose rows stay at norm 1, the part of the gradient along them removed.
    Not for gradient clipping or accumulation, which need the gradients; a weight takes part once per backward.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        unit_norm: Iterable[Tensor] = (),
    ) -> None:
        super().__init__(list(params), lr=lr, betas=betas, eps=eps, fused=True)
        self._unit_norm = {id(p) for p in unit_norm}
        self._weights = gradients.Weights([])
        self._stepped: list[Tensor] = []

    @contextmanager
    def in_backward(self) -> Iterator[None]:
        """Sets every .grad to None; the backward inside makes steps."""
        self.zero_grad()
        self._stepped = []
        self._weights = gradients.Weights([p for group in self.param_groups for p in group["params"]])
        gradients.activate(self)
        try:
            yield
        finally:
            gradients.deactivate()

    def claim(self, weight: Tensor, backend: str) -> Any:
        """The step for this weight, which the backend makes row by row; None where it cannot."""
        parameter = self._weights.find(weight)
        if parameter is None or backend != "cuda":
            return None
        from csrc_triton.adam import AdamStep  # brings triton

        if any(parameter is p for p in self._stepped):
            raise RuntimeError(
                "AdamInBackward: a weight takes part twice in one backward, and its first step is made already. Use "
                "torch.optim.Adam(fused=True) there."
            )
        self._stepped.append(parameter)
        group = next(g for g in self.param_groups if any(p is parameter for p in g["params"]))
        state = self._state_of(parameter)
        # On the device, so that nobody waits: the count of steps lies there.
        t = state["step"].double() + 1
        beta1, beta2 = group["betas"]
        corrections = torch.stack([1 / (1 - beta1**t), (1 - beta2**t).rsqrt()]).float().view(2)
        master = state.get("master")
        return AdamStep(
            weight=parameter if master is None else master,
            exp_avg=state["exp_avg"],
            exp_avg_sq=state["exp_avg_sq"],
            copy=None if master is None else parameter.detach(),
            corrections=corrections,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            unit_norm=id(parameter) in self._unit_norm,
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """The steps that the backward did not make."""
        for p in self._stepped:
            if p.grad is None:
                self.state[p]["step"] += 1
        self._stepped = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_alone(p, group)

    def _step_alone(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self._state_of(p)
        weight, grad = state.get("master", p), p.grad
        grad = grad.to(weight.dtype)  # type: ignore[union-attr]
        unit_norm = id(p) in self._unit_norm
        if unit_norm:
            remove_parallel_(grad, weight)
        beta1, beta2 = group["betas"]
        adam(
            [weight],
            [grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )
        if unit_norm:
            normalize_rows_(weight)
        if weight is not p:
            p.copy_(weight)

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            precise = torch.promote_types(p.dtype, torch.float32)
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(p, dtype=precise, memory_format=torch.contiguous_format)
            if p.dtype != precise:
                state["master"] = p.detach().to(precise)
        return state
