"""Random shapes, dtypes and strides against the reference in fp64. A failed one is repeated by its seed alone:

python -m benchmarks.gpu.stages.soak SEED              one shape
python -m benchmarks.gpu.stages.soak NUMBER COUNT      of the whole stage, every COUNTth shape
"""

import random
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from helpers import Case, assert_matches
from torch import Tensor

from benchmarks.gpu.ahead import compile_ahead
from benchmarks.gpu.stage import Stage
from benchmarks.place import Place, place
from fastsae import ops
from fastsae.backends import reference

SHAPES = 200
FIRST_SEED = 20_000
NAMES = ("x", "W_enc", "b_enc", "W_dec", "W_lin", "V")
# From lists and not from ranges: kernels are compiled per D, K, N and E, which costs more than running them.
WIDTHS = (1, 17, 64, 100, 256, 333, 768, 1024)
FEATURES = (97, 1000, 1025, 4096, 20_011, 32_768)
ACTIVE = (1, 3, 8, 32, 64, 130)
EMBEDDINGS = (1, 20, 64, 128)
ROWS = (1, 2, 7, 64, 129, 300)
ROUNDINGS = 4
KINDS = ("normal", "normal", "normal", "ties", "constant", "few positive", "all negative", "one cluster")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STRIDES = ("contiguous", "transposed", "columns")


@dataclass(frozen=True)
class Drawn:
    """The case that a seed stands for."""

    case: Case
    dtype: torch.dtype
    strides: str
    """Memory layout of x and the gradients."""
    linear: bool
    interaction: bool

    def facts(self) -> dict[str, Any]:
        return (
            asdict(self.case)
            | {"dtype": str(self.dtype)[6:], "strides": self.strides}
            | {
                "linear": self.linear,
                "interaction": self.interaction,
            }
        )


def draw(seed: int, smoke: bool) -> Drawn:
    r = random.Random(seed)
    M = r.choice(FEATURES[:1] if smoke else FEATURES)
    K = r.choice([k for k in (ACTIVE[:3] if smoke else ACTIVE) if k <= M])
    N = r.choice(sorted({1, max(1, K // 2), K}))
    B, D = (3, r.choice(WIDTHS[:2])) if smoke else (r.choice(ROWS), r.choice(WIDTHS))
    case = Case(f"seed {seed}", B, D, M, K, N, r.choice(EMBEDDINGS), r.choice(KINDS))
    return Drawn(case, r.choice(DTYPES), r.choice(STRIDES), r.random() < 0.8, r.random() < 0.8)


def run(stage: Stage) -> None:
    where = place(stage.smoke)
    count = 4 if stage.smoke else SHAPES
    compile_ahead(__name__, stage)
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        if stage.left() < 3:
            break
        drawn = draw(seed, stage.smoke)
        print(f"seed {seed}: {drawn.facts()}", flush=True)  # noqa: T201  # goes to the stage's log
        stage.attempt(f"seed {seed}", lambda d=drawn, s=seed: check(d, s, where), limit=40, group=f"{count} shapes")
    if not stage.journal.ended():
        stage.row(f"{count} shapes", "failed", reason="no time for a single one")


def check(drawn: Drawn, seed: int, where: Place) -> dict[str, Any]:
    """Encode, decode and every gradient of one shape. Raises AssertionError, saying which."""
    case, dtype = drawn.case, drawn.dtype
    # smoke: the CPU backend has no fp16
    dtype = torch.float32 if where.backend == "cpu" and dtype == torch.float16 else dtype
    torch.manual_seed(seed)
    with where.device:
        p = case.inputs(dtype)
    p = {name: lay(t, drawn.strides) if name in ("x", "g_out", "g_z") else t for name, t in p.items()}
    try:
        _check_encode(case, p, where)
        _check_decode(drawn, p, where)
    except Exception as error:
        error.args = (f"seed {seed}, {drawn.facts()}: {error}",)
        raise
    return {}


def lay(t: Tensor, strides: str) -> Tensor:
    """Give a tensor of the same numbers with another layout in memory."""
    if strides == "transposed":
        return t.T.contiguous().T
    if strides == "columns":
        return torch.cat([t, t, t], dim=1)[:, t.shape[1] : 2 * t.shape[1]]
    return t


def _check_encode(case: Case, p: dict[str, Tensor], where: Place) -> None:
    x, W, b = (p[n].detach().requires_grad_() for n in ("x", "W_enc", "b_enc"))
    values, indices = ops.topk_encode(x, W, b, case.K, backend=where.backend)
    with torch.no_grad():
        exact = torch.relu(x.double() @ W.double().T + b.double())
        eager = torch.relu(x @ W.T + b)
        ranked = exact.topk(case.K, dim=1).values
        # The j-th largest moves by no more than the largest error of any.
        assert_matches("values, ranked", values, ranked, eager.topk(case.K, dim=1).values, slack=4.0)
        assert_matches("values at their indices", values, exact.gather(1, indices), eager.gather(1, indices), slack=4.0)
        if (values[:, :-1] < values[:, 1:]).any():
            raise AssertionError("encode: not strongest first")
        if (indices.sort(dim=1).values.diff(dim=1) == 0).any():
            raise AssertionError("encode: indices repeat within a row")
        if case.kind in ("ties", "constant"):  # exact in every dtype
            expected = reference.topk_encode(x.double(), W.double(), b.double(), case.K)[1]
            if not torch.equal(indices, expected):
                raise AssertionError("encode: ties do not go to the lower index")
    g_values = torch.randn_like(values)
    got = torch.autograd.grad(values, [x, W, b], g_values)

    def gradients(to: torch.dtype) -> tuple[Tensor, ...]:
        """Compute the gradients of the values at our indices, so that dtypes are compared on one selection."""
        leaves = [t.detach().to(to).requires_grad_() for t in (x, W, b)]
        pre = (leaves[0] @ leaves[1].T + leaves[2]).gather(1, indices) * (values > 0)
        return torch.autograd.grad(pre, leaves, g_values.to(to))

    exact_grads, eager_grads = gradients(torch.float64), gradients(values.dtype)
    for name, ours, truth, scale in zip(("x", "W_enc", "b_enc"), got, exact_grads, eager_grads, strict=True):
        assert_matches(f"encode: gradient of {name}", ours, truth, scale, scale=_floor(truth, case, ours.dtype))


def _check_decode(drawn: Drawn, p: dict[str, Tensor], where: Place) -> None:
    case = drawn.case
    values, indices = ops.topk_encode(p["x"], p["W_enc"], p["b_enc"], case.K, backend=where.backend)
    values = values.detach() / max(values.max().item(), 1.0)  # fp16 ends at 65504, and the interaction multiplies
    names = ["W_dec", *(["W_lin"] if drawn.linear else []), *(["V"] if drawn.interaction else [])]

    def outputs(to: torch.dtype, backend: str) -> list[Tensor]:
        leaves = {"values": values.to(to).requires_grad_()} | {n: p[n].detach().to(to).requires_grad_() for n in names}
        W = (leaves["W_dec"], leaves.get("W_lin"), leaves.get("V"))
        out, z = ops.joint_decode(leaves["values"], indices, *W, case.N, backend=backend)
        pairs = [(out, p["g_out"].to(to)), *([(z, p["g_z"].to(to))] if drawn.interaction else [])]
        grads = torch.autograd.grad([o for o, _ in pairs], list(leaves.values()), [g for _, g in pairs])
        return [out.detach(), z.detach(), *grads]

    dtype = values.dtype
    ours = outputs(dtype, where.backend)
    labels = ["reconstruction", "z", "gradient of values", *(f"gradient of {n}" for n in names)]
    for name, got, exact, eager in zip(
        labels, ours, outputs(torch.float64, "reference"), outputs(dtype, "reference"), strict=True
    ):
        # z is a difference of squares.
        square = p["V"].abs().max().item() ** 2
        assert_matches(f"decode: {name}", got, exact, eager, scale=_floor(exact, case, dtype, square))


def _floor(exact: Tensor, case: Case, dtype: torch.dtype, at_least: float = 0.0) -> float:
    """Compute the error that assert_matches allows beside twice eager's, which over few entries is small by luck.

    It is some roundings of the largest entry, and some fp32 roundings of sums, which are larger on their way than at
    their end.
    """
    largest = exact.abs().max().item() if exact.numel() else 0.0
    sums = max(case.B, case.D, case.E) ** 0.5 * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
    return ROUNDINGS * (max(largest, at_least) + 2 * sums)


if __name__ == "__main__":
    number, count = map(int, sys.argv[1:3] if len(sys.argv) > 2 else (0, 0))
    seeds = range(FIRST_SEED + number, FIRST_SEED + SHAPES, count) if count else [int(sys.argv[1])]
    for seed in seeds:
        smoke = not torch.cuda.is_available()
        try:
            check(draw(seed, smoke), seed, place(smoke))
        except AssertionError as error:
            print(error)  # noqa: T201  # the command's answer
        else:
            print(f"seed {seed}: {draw(seed, smoke).facts()} agrees")  # noqa: T201  # the command's answer
