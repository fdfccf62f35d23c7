"""Kernel launches of training steps at named shapes: compiled by `offline`, and timed on a machine with a GPU."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from csrc_triton import plan
from csrc_triton.adam import AdamStep, Gradient
from csrc_triton.feature_order import WorkItems, work_items
from csrc_triton.interaction_mlp import interaction_mlp, interaction_mlp_backward
from csrc_triton.joint_decode import joint_decode
from csrc_triton.launch import Launch, noting
from csrc_triton.topk_encode import topk_encode
from csrc_triton.weight_gradients import Decoder, decode_backward, feature_sums, gathered_dot, weight_gradient

# About 3 % of an H200's memory: what topk_encode may hold of pre-activations.
BUDGET = 4 << 30


@dataclass(frozen=True)
class Shape:
    """Sizes of one training step, named as in docs/architecture.md, and what of it is compiled in which dtypes."""

    B: int
    D: int
    M: int
    K: int
    N: int
    E: int
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    cases: tuple[str, ...] = ("encode", "decode", "integrate", "gradients")


_SMALL = Shape(B=4096, D=768, M=32768, K=32, N=16, E=128, dtypes=(torch.float32,))
SHAPES = {
    "modern": Shape(B=8192, D=4096, M=131072, K=64, N=32, E=256),
    "paper": Shape(B=4096, D=3200, M=50000, K=1024, N=512, E=300),
    "million": Shape(B=8192, D=2048, M=1048576, K=64, N=32, E=128, cases=("encode", "gradients")),
    "widest": Shape(B=4096, D=8192, M=65536, K=64, N=32, E=256, cases=("gradients",)),
    "precise": Shape(B=4096, D=4096, M=65536, K=64, N=32, E=256, dtypes=(torch.float32,), cases=("gradients",)),
    "few": Shape(B=1024, D=512, M=1000, K=200, N=100, E=64, dtypes=(torch.bfloat16, torch.float32), cases=("encode",)),
    "wider": Shape(B=4096, D=16384, M=65536, K=64, N=32, E=256, cases=("wide gradients",)),
    "small": _SMALL,
    # The gathers come out as in `modern`; fp16 as bf16, but for how numbers become keys, and the matrix instructions.
    # So few columns that our product takes the maxima on the way.
    "narrow": replace(_SMALL, D=384, dtypes=(torch.bfloat16, torch.float16), cases=("encode", "integrate")),
    # What is 1 becomes a constant of the compilation.
    "one": Shape(B=1, D=768, M=32768, K=1, N=1, E=64, dtypes=(torch.bfloat16, torch.float32)),
    # Nothing is divisible by 16, so that no load is known to be aligned.
    "odd": Shape(B=4097, D=1001, M=30011, K=37, N=19, E=37, dtypes=(torch.bfloat16, torch.float32)),
}


class Step:
    """A training step at one shape: what its launchers take, named as in docs/architecture.md.

    Its tensors have no memory; who overrides `tensor` gives them some.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        B, D, M, K, E = shape.B, shape.D, shape.M, shape.K, shape.E
        self.shape, self.dtype = shape, dtype
        self.x, self.out, self.delta = (self.tensor(B, D) for _ in range(3))
        self.values, self.indices = self.tensor(B, K), self.tensor(B, K, dtype=torch.int64)
        self.W_enc, self.W_dec, self.W_lin, self.V = (self.tensor(M, width) for width in (D, D, D, E))
        self.b_enc, self.bias = self.tensor(M), self.tensor(D)
        self.W1, self.b1, self.W2 = self.tensor(E, E), self.tensor(E), self.tensor(D, E)
        self.s, self.q = (self.tensor(B, E, dtype=torch.float32) for _ in range(2))

    def tensor(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(size, dtype=dtype or self.dtype, device="meta")

    def fp32(self, *weights: Tensor) -> list[Tensor]:
        """The parameters of a module under autocast, which the gathers read as they are."""
        return [self.tensor(*weight.shape, dtype=torch.float32) for weight in weights]

    def adam(self, weight: Tensor, unit_norm: bool = False) -> AdamStep:
        master, exp_avg, exp_avg_sq = self.fp32(weight, weight, weight)
        copy = None if self.dtype == torch.float32 else weight
        corrections = self.tensor(2, dtype=torch.float32)
        return AdamStep(master, exp_avg, exp_avg_sq, copy, corrections, 0.9, 0.999, 1e-8, unit_norm, [])


def _topk_encode(t: Step) -> None:
    s = t.shape
    topk_encode(t.x, t.W_enc, t.b_enc, s.K, None, plan.encode(s.B, s.D, s.M, s.K, t.dtype.itemsize, BUDGET))


def _is_dense(t: Step) -> bool:
    """Whether the plan leaves the decoder to matrix products, and only V is gathered."""
    s = t.shape
    itemsize = t.dtype.itemsize
    return plan.decode(s.B, s.D, s.M, s.K, s.N, True, itemsize, itemsize, BUDGET, False).backward == "dense"


def _joint_decode(t: Step) -> None:
    if _is_dense(t):
        joint_decode(t.values, t.indices, None, None, t.V, None, None, t.shape.N)
        return
    n, weights = t.shape.N, [t.W_dec, t.W_lin, t.V]
    joint_decode(t.values, t.indices, t.W_dec, None, None, t.bias, t.x, n)
    for W_dec, W_lin, V in (weights, t.fp32(*weights)):
        joint_decode(t.values, t.indices, W_dec, W_lin, V, t.bias, None, n)


def _interaction_mlp(t: Step) -> None:
    seed = t.tensor(1, dtype=torch.int64)
    for path in ("triton", "cublas"):
        interaction_mlp(t.out, t.s, t.q, t.W1, t.b1, t.W2, t.bias, t.x, 0.15, seed, path)
        interaction_mlp_backward(t.delta, t.s, t.q, t.W1, t.b1, t.W2, 0.15, seed, True, path)


def _gradients(t: Step) -> None:
    d_values = t.tensor(*t.values.shape)
    items = work_items(t.indices, t.shape.M)
    feature_sums(items, d_values, t.shape.M)

    def written(weight: Tensor) -> Decoder:
        return Decoder(*t.fp32(weight), Gradient(*t.fp32(weight), add=False))

    def used_up(weight: Tensor) -> Decoder:
        return Decoder(weight, t.adam(weight, unit_norm=weight is t.W_dec))

    for decoder in (written, used_up):
        _decoder_gradients(t, items, decoder, d_values)
    weight_gradient(items, d_values, t.x, Gradient(*t.fp32(t.W_enc), add=False))
    weight_gradient(items, d_values, t.x, t.adam(t.W_enc))


def _decoder_gradients(t: Step, items: WorkItems, decoder: Callable[[Tensor], Decoder], d_values: Tensor) -> None:
    n, d_s, d_q = t.shape.N, t.tensor(*t.s.shape), t.tensor(*t.q.shape)
    if _is_dense(t):
        decode_backward(items, t.values, n, None, d_s, d_q, None, None, decoder(t.V), d_values, True)
        return
    dec, lin, v = decoder(t.W_dec), decoder(t.W_lin), decoder(t.V)
    decode_backward(items, t.values, n, t.delta, None, None, dec, None, None, d_values, False)
    decode_backward(items, t.values, n, t.delta, d_s, d_q, dec, lin, v, d_values, False)


def _wide_gradients(t: Step) -> None:
    items, n, d_values = work_items(t.indices, t.shape.M), t.shape.N, t.tensor(*t.values.shape)
    gathered_dot(t.indices, t.delta, t.W_dec, t.W_lin, n, d_values)
    weight_gradient(items, t.values, t.delta, Gradient(t.W_lin, add=False), n)


CASES: dict[str, Callable[[Step], None]] = {
    "encode": _topk_encode,
    "decode": _joint_decode,
    "integrate": _interaction_mlp,
    "gradients": _gradients,
    "wide gradients": _wide_gradients,
}


@dataclass(frozen=True)
class Part:
    """The launches of one case at one shape, which has a name, in one dtype."""

    name: str
    shape: Shape
    dtype: torch.dtype
    case: str

    @property
    def heading(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}"

    @property
    def title(self) -> str:
        return f"{self.heading} {self.case}"

    def run(self, step: Callable[[Shape, torch.dtype], Step] = Step) -> None:
        CASES[self.case](step(self.shape, self.dtype))

    def launches(self) -> list[Launch]:
        with noting() as launches:
            self.run()
        return launches


def parts(*shapes: str) -> list[Part]:
    """Everything that is compiled at these shapes."""
    named = [(name, SHAPES[name]) for name in shapes]
    return [Part(name, shape, dtype, case) for name, shape in named for dtype in shape.dtypes for case in shape.cases]
