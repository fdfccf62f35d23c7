"""Adam for dictionaries that fill the memory: bf16 weights that lose no small updates, moments in fp32 or in 8 bits.

A step is made in fp32, some rows at a time, and rounded to bf16 at random: up as often as what is cut off says, so
that updates far below the last bit of a weight add up. 8-bit moments are those of Dettmers et al. (arXiv 2110.02861)
as torchao keeps them: codes of a fixed table, and one fp32 scale per block.
"""

import math
from collections.abc import Iterable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from fastsae import quiet
from fastsae.optim import adam_step_, load_as_saved, normalize_rows_

OptimizerState = Literal["fp32", "8bit"]

# Entries that are in fp32 at once: temporaries stay small beside any dictionary. On a GPU the twenty or so kernels of a
# part take longer to start, by estimate, than 2^20 entries take.
_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 24}
# Entries with one scale.
_BLOCK = range(64, 257)
_MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # signed?


def kinds(shape: torch.Size | tuple[int, ...], state: OptimizerState) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of what is kept between steps for a weight of `shape`, by name; its count of steps aside."""
    if state == "8bit" and is_quantised(shape):
        scales = (math.prod(shape) // block(shape[-1]),)
        codes = {f"{moment}_codes": (tuple(shape), torch.uint8) for moment in _MOMENTS}
        return codes | {f"{moment}_scale": (scales, torch.float32) for moment in _MOMENTS}
    return {moment: (tuple(shape), torch.float32) for moment in _MOMENTS}


def is_quantised(shape: torch.Size | tuple[int, ...]) -> bool:
    """Vectors and matrices with short rows keep fp32 moments. The number of rows does not matter: ranks share them."""
    return len(shape) == 2 and shape[1] >= _BLOCK.start


def block(width: int) -> int:
    """Choose the number of entries that share one scale: a part of one row. While a feature is silent its moments decay
    by one factor, which the scale takes exactly. In a scale shared with features that fire, rounding would undo it."""
    return max((n for n in _BLOCK if width % n == 0), default=width)


class NarrowAdam(torch.optim.Adam):
    """torch.optim.Adam(fused=True) for bf16 or fp32 weights, its moments in fp32 or in 8 bits.

        optimizer = NarrowAdam(sae.parameters(), lr=1e-3, optimizer_state="8bit")     # needs torchao

    Random rounding is seeded by one number a step of torch's generator on the CPU: the same seed, the same bits.
    unit_norm: weights (d_sae, d_in) whose rows are brought to norm 1 before they are rounded.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        optimizer_state: OptimizerState = "fp32",
        unit_norm: Iterable[Tensor] = (),
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)
        self._step_supports_amp_scaling = False  # a GradScaler would leave it to a step to look for infinity
        self._optimizer_state: OptimizerState = optimizer_state
        self._unit_norm = list(unit_norm)
        if optimizer_state == "8bit":
            _state_8bit()  # a missing package says so now

    def __getstate__(self) -> dict[str, Any]:
        ours = {"_optimizer_state": self._optimizer_state, "_unit_norm": self._unit_norm}
        return super().__getstate__() | ours

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises ValueError for weights of another dtype, and for options of torch's Adam that a step does not heed."""
        super().add_param_group(param_group)
        group = self.param_groups.pop()  # until it is found to be right
        _check_options(group)
        for p in group["params"]:
            if p.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(f"NarrowAdam: expected weights in float32 or bfloat16; got {p.dtype}")
        self.param_groups.append(group)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise RuntimeError("NarrowAdam.step takes no closure")
        seed = int(torch.randint(1 << 62, (), device="cpu"))
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.numel():
                    if p.device not in generators:
                        generators[p.device] = torch.Generator(p.device).manual_seed(seed)
                    self._step_of(p, group, generators[p.device])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Like torch's, but moments stay fp32 beside bf16 weights, and codes stay codes.

        Raises ValueError for options of torch's Adam that a step does not heed.
        """
        for group in state_dict["param_groups"]:
            _check_options(group)
        super().load_state_dict(state_dict)
        load_as_saved(self, state_dict)

    def _step_of(self, p: Tensor, group: dict[str, Any], generator: torch.Generator) -> None:
        assert p.grad is not None
        state, whole = self._state_of(p), p.detach()
        moments = {m: _State8bit(state, m, signed) for m, signed in _MOMENTS.items() if m not in state}
        for rows in _rows(p):
            weight = whole[rows].float().contiguous()  # itself, where it is that already
            read = [moments[m].read(rows) if m in moments else state[m][rows] for m in _MOMENTS]
            exp_avg, exp_avg_sq = read
            grad, step = p.grad[rows].float().contiguous(), state["step"].clone()
            adam_step_(weight, grad, exp_avg, exp_avg_sq, step, group, getattr(self, "grad_scale", None))
            if any(p is q for q in self._unit_norm):
                normalize_rows_(weight)
            if weight.data_ptr() != whole[rows].data_ptr():
                whole[rows] = _round_at_random(weight, generator) if p.dtype is torch.bfloat16 else weight
            for moment, values in zip(_MOMENTS, read, strict=True):
                if moment in moments:
                    moments[moment].write(rows, values)
        state["step"] += 1

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for name, (shape, dtype) in kinds(p.shape, self._optimizer_state).items():
                state[name] = torch.zeros(shape, dtype=dtype, device=p.device)
        return state


def _check_options(group: dict[str, Any]) -> None:
    for option in ("weight_decay", "amsgrad", "maximize"):
        if group.get(option):
            raise ValueError(f"NarrowAdam: {option} is not supported")


def _rows(p: Tensor) -> list[Any]:
    if p.dim() == 0:
        return [...]
    count = max(1, _AT_ONCE.get(p.device.type, _AT_ONCE["cpu"]) // p[:1].numel())
    return [slice(first, first + count) for first in range(0, len(p), count)]


def _round_at_random(exact: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 to bf16: to the neighbour further from 0 with the probability that makes the mean exact."""
    noise = torch.empty_like(exact, dtype=torch.int32).random_(0, 1 << 16, generator=generator)
    bits = (noise + exact.view(torch.int32)) & -(1 << 16)
    # NaN as a GPU writes it has all bits set but the sign: with noise added it would be read as 0.
    return torch.where(exact.isnan(), exact, bits.view(torch.float32)).to(torch.bfloat16)


class _State8bit:
    """One moment of a weight in 8 bits; its parts are ordinary tensors in the optimizer's state."""

    def __init__(self, state: dict[str, Tensor], moment: str, signed: bool) -> None:
        self._codes, self._scale = state[f"{moment}_codes"], state[f"{moment}_scale"]
        self._signed = signed
        self._table = _table(signed, self._codes.device)
        self._blocks = len(self._scale) // len(self._codes)  # of a row

    def _part(self, rows: slice) -> Any:
        scales = slice(rows.start * self._blocks, rows.stop * self._blocks)
        return _state_8bit()(self._codes[rows], self._scale[scales], self._table, self._signed, torch.float32)

    def read(self, rows: slice) -> Tensor:
        return self._part(rows).dequantize()

    def write(self, rows: slice, values: Tensor) -> None:
        _quantise(values.device.type)(self._part(rows), values)
        if not self._signed:
            # 0 in place of a small second moment would leave eps to divide by: steps of thousands of learning rates.
            # Outside of what is compiled, which refuses to write codes twice.
            self._codes[rows].clamp_(min=1)


@cache
def _table(signed: bool, device: torch.device) -> Tensor:
    return _state_8bit().zeros((1, 1), signed, 1, device).qmap


def _copy(to: Any, values: Tensor) -> None:
    to.copy_(values)


@cache
def _quantise(device: str) -> Any:
    # Some fifty passes over memory unless compiled, as torchao compiles it. A CPU would wait for its compiler instead.
    if device != "cuda":
        return _copy
    compiled = torch.compile(_copy, fullgraph=True, dynamic=False)

    def quantise(to: Any, values: Tensor) -> None:
        # As many shapes as a model's weights have, of which torch would refuse the ninth.
        with torch._dynamo.utils.disable_cache_limit():
            compiled(to, values)

    return quantise


@cache
def _state_8bit() -> Any:
    """torchao's class of 8-bit optimizer states."""
    try:
        with quiet.imports():
            from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise ImportError("optimizer_state='8bit' needs torchao: `pip install torchao` (or `.[memory]`)") from error
    return OptimState8bit
