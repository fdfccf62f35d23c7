"""The MLP's kernels against its formulas in fp64: both paths, every gradient, every awkward shape."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from helpers import assert_matches
from torch import Tensor

from csrc_triton import interaction_mlp as module
from csrc_triton.interaction_mlp import Path, cost, interaction_mlp, interaction_mlp_backward, pool
from csrc_triton.launch import noting

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRADIENTS = ("d_s", "d_q", "d_W1", "d_b1", "d_W2", "d_bias")


@dataclass(frozen=True)
class Shape:
    """Rows, width of the reconstruction, width of the embedding."""

    name: str
    B: int
    D: int
    E: int


SHAPES = [
    Shape("plain", 16, 24, 32),
    Shape("one row", 1, 24, 20),
    Shape("empty batch", 0, 24, 20),
    Shape("primes", 37, 101, 67),
    Shape("one embedding", 5, 20, 1),
    Shape("one output", 9, 1, 16),
    Shape("exact blocks", 64, 128, 64),
    Shape("one past the blocks", 65, 129, 129),
]
DTYPES = {  # of base, target and delta; of the weights
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "autocast": (torch.float32, torch.bfloat16),
}
both_paths = pytest.mark.parametrize("path", ["triton", "cublas"])


class Inputs(NamedTuple):
    """Arguments of the launchers, by their names, and a gradient `delta` of the reconstruction."""

    base: Tensor
    s: Tensor
    q: Tensor
    W1: Tensor
    b1: Tensor
    W2: Tensor
    bias: Tensor
    target: Tensor
    delta: Tensor

    def forward(
        self, dropout: float, seed: Tensor | None, path: Path, target: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        return interaction_mlp(*self[:7], self.target if target else None, dropout, seed, path)

    def backward(
        self, dropout: float, seed: Tensor | None, path: Path, need_weights: bool = True
    ) -> tuple[Tensor | None, ...]:
        return interaction_mlp_backward(self.delta, *self[1:6], dropout, seed, need_weights, path)


def inputs(B: int, D: int, E: int, dtypes: tuple[torch.dtype, torch.dtype] = DTYPES["float32"]) -> Inputs:
    """z is 0.5 to 1.5 in size and W1 mostly its diagonal: no pre-activation is so near 0 that rounding decides."""
    outer, inner = dtypes
    s, z = torch.randn(B, E), (0.5 + torch.rand(B, E)) * torch.randn(B, E).sign()
    W1 = 4 * torch.eye(E) + torch.randn(E, E) / 10 / E**0.5
    return Inputs(
        base=torch.randn(B, D).to(DEVICE, outer),
        s=s.to(DEVICE),
        q=(s * s - 2 * z).to(DEVICE),
        W1=W1.to(DEVICE, inner),
        b1=torch.randn(E).sign().to(DEVICE, inner),
        W2=(torch.randn(D, E) / E**0.5).to(DEVICE, inner),
        bias=torch.randn(D).to(DEVICE, inner),
        target=torch.randn(B, D).to(DEVICE, outer),
        delta=torch.randn(B, D).to(DEVICE, outer),
    )


def seed_of(value: int) -> Tensor:
    return torch.tensor([value], device=DEVICE)


def mask_of(B: int, E: int, dropout: float, seed: Tensor | None) -> Tensor:
    """mask / (1 - dropout): zt where z is 1."""
    zeros = torch.zeros(B, E, device=DEVICE)
    return pool(zeros, zeros - 2, dropout, seed, torch.float32)


def formulas(given: Inputs, mask: Tensor, exact: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Reconstruction, squared error and gradients by autograd, in fp64 or as eager PyTorch would."""
    leaves = [(t.double() if exact else t).detach().requires_grad_() for t in given]
    base, s, q, W1, b1, W2, bias, target, delta = leaves
    zt = ((s * s - q) / 2 * mask).to(W1.dtype)
    pre = zt @ W1.T + b1
    if exact:
        assert (pre.abs() > 0.05).all()
    out = (base + (torch.relu(pre) @ W2.T + bias)).to(base.dtype)
    error = (out if exact else out.float()) - target
    gradients = torch.autograd.grad(out, [s, q, W1, b1, W2, bias], delta)
    return out.detach(), error.detach().square().sum(), list(gradients)


def slack(dtypes: tuple[torch.dtype, torch.dtype]) -> float:
    """Triton's interpreter cuts bf16 off instead of rounding it."""
    return 4.0 if torch.bfloat16 in dtypes and DEVICE == "cpu" else 2.0


# Random numbers take the interpreter seconds: the largest shape draws none, and only one shape does in every dtype.
CASES = [
    pytest.param(shape, dropout, dtypes, id=f"{shape.name}-{dropout}-{name}")
    for shape in SHAPES
    for dropout in (0.0, 0.4)
    for name, dtypes in DTYPES.items()
    if not dropout or shape.name == "primes" or (shape.E <= 64 and name in ("float32", "bfloat16"))
]


@both_paths
@pytest.mark.parametrize(("shape", "dropout", "dtypes"), CASES)
def test_matches_the_formulas(
    shape: Shape, dropout: float, dtypes: tuple[torch.dtype, torch.dtype], path: Path
) -> None:
    check(shape, dropout, dtypes, path)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_segments_of_several_steps(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As batches have that are larger than the interpreter can take: here, because fewer programs are wanted."""
    monkeypatch.setattr(module, "_PROGRAMS", 2)
    check(Shape("two segments", 50, 24, 20), dropout, DTYPES["float32"], "triton")


def check(shape: Shape, dropout: float, dtypes: tuple[torch.dtype, torch.dtype], path: Path) -> None:
    """Reconstruction, error and every gradient against the formulas."""
    given = inputs(shape.B, shape.D, shape.E, dtypes)
    seed = seed_of(2**40 + 7) if dropout else None
    mask = mask_of(shape.B, shape.E, dropout, seed)
    exact_out, exact_error, exact_gradients = formulas(given, mask, exact=True)
    eager_out, _, eager_gradients = formulas(given, mask, exact=False)

    out, error = given.forward(dropout, seed, path)
    assert out.dtype == given.base.dtype
    assert_matches("reconstruction", out, exact_out, eager_out, slack(dtypes))
    # |sum (e + d)^2 - sum e^2| <= 2 |e| |d| + |d|^2 for d off the exact reconstruction
    off = slack(dtypes) * (eager_out.double() - exact_out).norm() + 1e-6 * exact_out.norm()
    assert error is not None
    assert error.shape == ()
    assert error.dtype == torch.float32
    assert (error.double() - exact_error).abs() <= 2 * exact_error.sqrt() * off + off**2

    # d_s and d_q are stored in fp32, of products rounded more coarsely.
    coarser = torch.finfo(given.W1.dtype).eps / torch.finfo(torch.float32).eps
    gradients = given.backward(dropout, seed, path)
    for name, got, exact, eager in zip(GRADIENTS, gradients, exact_gradients, eager_gradients, strict=True):
        assert got is not None
        assert got.dtype == (torch.float32 if name in ("d_s", "d_q") else given.W1.dtype)
        scale = exact.abs().max().item() * coarser if name in ("d_s", "d_q") and shape.B else None
        assert_matches(name, got, exact, eager, slack(dtypes), scale)


# ---- what is optional -----------------------------------------------------------------------------------------------


@both_paths
def test_without_a_target_there_is_no_error(path: Path) -> None:
    given = inputs(9, 20, 12)
    out, error = given.forward(0.0, None, path, target=False)
    assert error is None
    torch.testing.assert_close(out, given.forward(0.0, None, path)[0], rtol=0, atol=0)


@both_paths
def test_frozen_weights_get_no_gradient_and_change_none(path: Path) -> None:
    given, seed = inputs(9, 20, 12), seed_of(3)
    frozen, all_of_them = (given.backward(0.4, seed, path, need_weights=need) for need in (False, True))
    assert frozen[2:] == (None, None, None, None)
    torch.testing.assert_close(frozen[:2], all_of_them[:2], rtol=0, atol=0)


@both_paths
def test_inputs_of_any_strides(path: Path) -> None:
    """Copies of all inputs whose rows lie apart; and a gradient that is one number seen everywhere, as sum() sends."""
    given, seed = inputs(9, 20, 12), seed_of(3)
    apart = Inputs(*(torch.stack([t, t], -1)[..., 0] for t in given))
    assert not any(t.is_contiguous() for t in apart)
    torch.testing.assert_close(apart.forward(0.4, seed, path), given.forward(0.4, seed, path), rtol=0, atol=0)
    torch.testing.assert_close(apart.backward(0.4, seed, path), given.backward(0.4, seed, path), rtol=0, atol=0)
    ones = torch.ones((), device=DEVICE).expand(9, 20)
    expanded, full = (given._replace(delta=t).backward(0.4, seed, path) for t in (ones, ones.clone()))
    torch.testing.assert_close(expanded, full, rtol=0, atol=0)


@both_paths
def test_a_gradient_of_another_dtype(path: Path) -> None:
    given = inputs(9, 20, 12, DTYPES["float16"])
    wide, narrow = (given._replace(delta=given.delta.to(d)).backward(0.0, None, path) for d in (torch.float32, None))
    torch.testing.assert_close(wide, narrow, rtol=0, atol=0)


@both_paths
def test_the_error_is_that_of_the_reconstruction_before_rounding(path: Path) -> None:
    given = inputs(5, 7, 3, DTYPES["bfloat16"])
    given = Inputs(*(torch.zeros_like(t) for t in given))
    ones = torch.ones_like(given.base)
    given = given._replace(base=ones, target=ones, bias=torch.full_like(given.bias, 2.0**-12))
    out, error = given.forward(0.0, None, path)
    assert (out == 1).all()
    assert error is not None
    assert error.item() == 5 * 7 * 2.0**-24


@both_paths
def test_nan_is_not_lost(path: Path) -> None:
    given = inputs(9, 20, 12)
    given.s[4, 5] = torch.nan
    out, error = given.forward(0.0, None, path)
    assert error is not None
    assert error.isnan()
    assert out.isnan().all(dim=1).tolist() == [row == 4 for row in range(9)]
    gradients = dict(zip(GRADIENTS, given.backward(0.0, None, path), strict=True))
    for name in ("d_s", "d_W1", "d_W2"):
        gradient = gradients[name]
        assert gradient is not None
        assert gradient.isnan().any()


# ---- dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_the_share_kept(dropout: float) -> None:
    """Five standard deviations of n independent draws: a right generator fails for one seed in a million."""
    mask = mask_of(60, 100, dropout, seed_of(0))
    kept = mask > 0
    bound = 5 * (dropout * (1 - dropout) / kept.numel()) ** 0.5
    assert abs(kept.float().mean().item() - (1 - dropout)) < bound
    torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / (1 - dropout)))


def philox(seed: int, offset: int) -> float:
    """The first of the four numbers of Philox-4x32-10 (Salmon et al. 2011), in [0, 1)."""
    low = 2**32 - 1
    c0, c1, c2, c3 = offset & low, offset >> 32, 0, 0
    k0, k1 = seed & low, seed >> 32
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b & low, a >> 32 ^ c3 ^ k1, a & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return min(c0, low - c0) / 2**31  # read as int32, the negative ones folded onto the others


@pytest.mark.parametrize(("B", "E"), [(30, 20), (20, 30)])
def test_every_place_has_a_draw_of_its_own(B: int, E: int) -> None:
    seed = 2**40 + 7
    draws = torch.tensor([[philox(seed, row * E + column) for column in range(E)] for row in range(B)])
    assert ((mask_of(B, E, 0.4, seed_of(seed)) > 0).cpu() == (draws >= 0.4)).all()


def test_the_seed_decides_the_mask() -> None:
    first, again, other, high = (mask_of(20, 30, 0.5, seed_of(s)) for s in (1, 1, 2, 1 + 2**32))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    for different in (other, high):
        assert 0.3 < (first == different).float().mean() < 0.7  # 600 draws: within ten standard deviations of a half


def test_the_mask_of_a_row_does_not_depend_on_the_batch() -> None:
    few, many = (mask_of(rows, 30, 0.5, seed_of(1)) for rows in (3, 50))
    torch.testing.assert_close(few, many[:3], rtol=0, atol=0)


# ---- the same bits, the same costs ----------------------------------------------------------------------------------


@both_paths
def test_five_runs_give_the_same_bits(path: Path) -> None:
    given = inputs(100, 30, 20, DTYPES["bfloat16"])  # several segments of tokens
    runs = [(*given.forward(0.0, None, path), *given.backward(0.0, None, path)) for _ in range(5)]
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=0, atol=0)


@pytest.mark.parametrize(("itemsize", "dtype"), [(2, torch.bfloat16), (4, torch.float32)])
@pytest.mark.parametrize(("B", "D", "E"), [(8192, 4096, 256), (4096, 3200, 300), (300, 101, 37)])
def test_the_cost_is_what_the_launches_add_up_to(B: int, D: int, E: int, itemsize: int, dtype: torch.dtype) -> None:
    meta = Inputs(*(t.to("meta") for t in inputs(1, 1, 1, (dtype, dtype))))
    sizes = ((B, D), (B, E), (B, E), (E, E), (E,), (D, E), (D,), (B, D), (B, D))
    given = Inputs(*(t.new_empty(size) for t, size in zip(meta, sizes, strict=True)))
    with noting() as launches:
        given.forward(0.1, meta.s, "triton", target=True)
        given.backward(0.1, meta.s, "triton")
    for launch in launches:
        assert set(launch.arguments) == set(launch.kernel.arg_names)
    costs = cost(B, D, E, itemsize)
    assert costs["triton"][1] == costs["cublas"][1] == sum(launch.flops for launch in launches)
    partials = sum(launch.arguments["d_weight_ptr"].nbytes for launch in launches if "d_weight_ptr" in launch.arguments)
    # Beside the launches, torch adds the partial gradients up.
    moved = sum(launch.bytes_moved for launch in launches) + partials + itemsize * (D * E + E * E)
    assert costs["triton"][0] == pytest.approx(moved, rel=0.02)  # but for vectors
    assert costs["cublas"][0] > costs["triton"][0] - 2 * partials
