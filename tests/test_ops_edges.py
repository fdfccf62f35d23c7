"""Cases in which the operations could go wrong unseen: numbers that are none, odd memory, and torch's own modes."""

import copy
import functools
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_matches
from torch import Tensor
from torch.autograd import forward_ad

import fastsae
from fastsae import ops
from fastsae.backends import cpu
from fastsae.backends.cpu import blocks, encode, memory, screen
from fastsae.backends.cpu.select import group_size

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
BACKENDS = ("cpu", "reference")


def joint() -> fastsae.JointSAE:
    sae = fastsae.JointSAE(8, 64, 4, d_embedding=6).eval()
    for p in sae.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return sae


every_sae = pytest.mark.parametrize("make", [joint, lambda: fastsae.TopKSAE(8, 64, 4)], ids=["joint", "topk"])


def strongest(pre: Tensor, features: list[int], k: int) -> tuple[Tensor, Tensor]:
    """The rule in plain Python: NaN first, then by value, then by index."""

    def rank(entry: tuple[float, int]) -> tuple[bool, float, int]:
        value, index = entry
        is_nan = value != value
        return (not is_nan, 0.0 if is_nan else -value, index)

    rows = [sorted(zip(row, features, strict=True), key=rank)[:k] for row in pre.relu().double().tolist()]
    values = torch.tensor([[v for v, _ in row] for row in rows], dtype=torch.float64).view(-1, k)
    return values, torch.tensor([[i for _, i in row] for row in rows], dtype=torch.int64).view(-1, k)


@functools.cache
def infinity(dtype: torch.dtype) -> float:
    """Infinity, or NaN where torch's product of matrices makes that of it, as oneDNN's of bf16 does on some processors
    without bf16 instructions: in large products, so that blocks of features would give other values."""
    x, W = torch.tensor([[2, 2, torch.inf]] * 5, dtype=dtype), torch.tensor([[1, 1, 1], [1, 1, 0]] * 300, dtype=dtype)
    return float((x @ W.T)[0, 0])


@every_dtype
@pytest.mark.parametrize("seed", range(40))
def test_random_shapes_against_plain_python(seed: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Small whole numbers, so that every dtype computes the same, with ties, NaN, infinities, subsets and chunks."""
    monkeypatch.setattr(screen, "_saves_time", lambda *_: seed % 2 == 0)
    monkeypatch.setattr(blocks, "FEW_ROWS", 64 if seed % 3 else 0)
    draw = random.Random(seed)
    torch.manual_seed(seed)
    B, D, M = draw.choice([0, 1, 5]), draw.choice([1, 3, 16]), int(2 ** draw.uniform(0, 12.5))
    k = min(M, draw.choice([1, 2, 7, 100]))
    x, W = torch.randint(-2, 3, (B, D)).to(dtype), torch.randint(-1, 2, (M, D)).to(dtype)
    b = torch.randint(-3, draw.choice([-2, 1, 4]), (M,)).to(dtype)
    if draw.random() < 0.4:
        b[draw.randrange(M)] = draw.choice([torch.nan, -torch.nan, torch.inf, -torch.inf])
    if draw.random() < 0.4 and B:
        x[draw.randrange(B), draw.randrange(D)] = draw.choice([torch.nan, -torch.nan, infinity(dtype)])
    features = torch.randperm(M)[: draw.randint(k, M)].sort().values if draw.random() < 0.4 else None
    competing = torch.arange(M) if features is None else features
    expected = strongest((x @ W.T + b)[:, competing], competing.tolist(), k)
    monkeypatch.setattr(blocks, "PRE_ACTIVATION_BYTES", draw.choice([1, 50_000, 2**28]))
    for backend in BACKENDS:
        values, indices = ops.topk_encode(x, W, b, k, backend, features)
        torch.testing.assert_close(indices, expected[1], rtol=0, atol=0, msg=lambda m, who=backend: f"{who}: {m}")
        torch.testing.assert_close(values.double(), expected[0], rtol=0, atol=0, equal_nan=True)


def test_the_table_reaches_every_way_of_ranking():
    """The random shapes above must not all take one path."""
    assert {group_size(m, k, torch.float32) for m in (40, 300, 5000) for k in (1, 2, 7, 100)} == {1, 8, 16, 32, 64}
    assert cpu.plan(100, 8, 5000, 2, torch.float32).rows == 100


def test_one_row_at_a_time(monkeypatch: pytest.MonkeyPatch):
    seen = []
    pre_activations = encode._pre_activations
    monkeypatch.setattr(blocks, "PRE_ACTIVATION_BYTES", 1)
    monkeypatch.setattr(screen, "_saves_time", lambda *_: False)
    monkeypatch.setattr(
        encode, "_pre_activations", lambda x, *rest: (seen.append(len(x)), pre_activations(x, *rest))[1]
    )
    ops.topk_encode(torch.randn(5, 4), torch.randn(3000, 4), torch.randn(3000), 2, backend="cpu")
    assert seen == [1] * 5


def test_the_memory_of_pre_activations_can_be_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blocks, "PRE_ACTIVATION_BYTES", blocks.PRE_ACTIVATION_BYTES)  # put back afterwards
    cpu.set_pre_activation_bytes(3 * 4 * 2048)
    assert cpu.plan(100, 8, 2048, 2, torch.float32).rows == 3
    with pytest.raises(ValueError, match="set_pre_activation_bytes: expected at least 1; got 0"):
        cpu.set_pre_activation_bytes(0)


@pytest.mark.parametrize("M", [70, 3000])
def test_gradients_of_a_subset_are_those_of_a_dictionary_without_the_others(M: int):
    x, W, b = (t.double().requires_grad_() for t in (torch.randn(9, 6), torch.randn(M, 6), torch.randn(M)))
    features = torch.randperm(M)[: M // 2].sort().values
    weight = torch.rand(9, 4, dtype=torch.float64)
    values, _ = ops.topk_encode(x, W, b, 4, "cpu", features)
    ours = torch.autograd.grad((values * weight).sum(), (x, W, b))
    expected = torch.autograd.grad(
        (ops.topk_encode(x, W[features], b[features], 4, backend="reference")[0] * weight).sum(), (x, W, b)
    )
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want)


def strided(t: Tensor) -> Tensor:
    """Copy the numbers into every second column of a wider tensor."""
    wide = torch.full((t.shape[0], 2 * t.shape[1]), 7, dtype=t.dtype)
    wide[:, ::2] = t
    return wide[:, ::2]


@every_dtype
@pytest.mark.parametrize("n", [1, 3, 5])
def test_odd_strides_everywhere(n: int, dtype: torch.dtype):
    values, indices = torch.rand(7, 5).to(dtype), torch.randint(11, (7, 5))
    weights = [torch.randn(11, width).to(dtype) for width in (6, 6, 3)]
    gradients = torch.randn(7, 6).to(dtype), torch.randn(7, 3).to(dtype)

    def run(backend: str, kind: torch.dtype, lay=lambda t: t) -> list[Tensor]:
        leaves = [lay(t.to(kind)).detach().requires_grad_() for t in (values, *weights)]
        a, i = leaves[0], lay(indices)
        out, z = ops.joint_decode(a, i, *leaves[1:], n, backend=backend)
        extra = ops.sparse_decode(a[:, :1], i[:, :1], leaves[1], backend)
        more = ops.pairwise_interaction(a[:, ::2], i[:, ::2], leaves[3], backend)
        d_out, d_z = (lay(g.to(kind)) for g in gradients)
        torch.autograd.backward((out, z, extra, more), (d_out, d_z, d_out, d_z))
        return [
            out.detach(),
            z.detach(),
            extra.detach(),
            more.detach(),
            *(t.grad for t in leaves if t.grad is not None),
        ]

    ours, exact, eager = run("cpu", dtype, strided), run("reference", torch.float64), run("reference", dtype)
    assert len(ours) == len(exact) == 8
    for number, (got, want, theirs) in enumerate(zip(ours, exact, eager, strict=True)):
        # Squares of sums, and their gradients, are differences of terms about this large.
        assert_matches(f"result {number}", got, want, theirs, scale=4 * want.abs().max().item() + 10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_a_whole_joint_step_by_the_formulas_of_the_paper(p: float, backend: str):
    """docs/architecture.md, the equations, and their gradients by hand; b_dec as the SAE convention has it."""
    sae = fastsae.JointSAE(
        6, 40, 5, k_integration=3, d_embedding=4, dropout=p, pre_bias=True, backend=backend, dtype=torch.float64
    )
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(8, 6, dtype=torch.float64)
    torch.manual_seed(5)
    keep = F.dropout(torch.ones(8, 4, dtype=torch.float64), p)  # the mask the step below will draw
    torch.manual_seed(5)
    output = sae(x)
    output.loss.backward()

    with torch.no_grad():
        w = dict(sae.named_parameters())
        h = (x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]
        A = torch.zeros_like(h).scatter(1, output.code.indices, output.code.values)  # dense code
        J = torch.zeros_like(h).scatter(1, output.code.indices[:, :3], output.code.values[:, :3])
        S, Q = J @ w["V"], J.square() @ w["V"].square()
        u = keep * (S.square() - Q) / 2
        z = u @ w["W1"].T + w["b1"]
        g = z.relu()
        y = A @ w["W_dec"] + w["b_dec"] + J @ w["W_lin"] + w["b_lin"] + g @ w["W2"].T + w["b2"]
        torch.testing.assert_close(output.reconstruction, y)
        delta = 2 * (y - x) / y.numel()
        dz = delta @ w["W2"] * (z > 0)
        du = dz @ w["W1"] * keep
        t = du * S
        in_J = torch.zeros_like(h).scatter(1, output.code.indices[:, :3], 1.0)
        da = delta @ w["W_dec"].T + in_J * (delta @ w["W_lin"].T + t @ w["V"].T - J * (du @ w["V"].square().T))
        dh = da * (A > 0)
        expected = {
            "W_enc": dh.T @ (x - w["b_dec"]),
            "b_enc": dh.sum(0),
            "W_dec": A.T @ delta,
            "b_dec": delta.sum(0) - (dh @ w["W_enc"]).sum(0),
            "W_lin": J.T @ delta,
            "b_lin": delta.sum(0),
            "V": J.T @ t - (J.square().T @ du) * w["V"],
            "W1": dz.T @ u,
            "b1": dz.sum(0),
            "W2": delta.T @ g,
            "b2": delta.sum(0),
        }
    assert expected.keys() == w.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(w[name].grad, grad, msg=lambda m, name=name: f"{name}: {m}")


# ---- torch's modes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=["inference_mode", "no_grad"])
def test_an_evaluation_first_does_not_spoil_the_training(mode, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory._thread, "pool", {}, raising=False)  # the workspaces are made inside the mode
    sae = fastsae.JointSAE(8, 300, 4)
    x = torch.randn(5, 8)
    with mode():
        sae(x)
    sae(x).loss.backward()
    assert sae.W_enc.grad is not None
    assert sae.W_enc.grad.abs().sum() > 0


def test_autocast_leaves_the_sums_in_fp32():
    sae = fastsae.JointSAE(8, 300, 4, interaction=False)
    x = torch.randn(5, 8)
    expected = sae(x).reconstruction
    with torch.autocast("cpu", torch.bfloat16):
        output = sae(x)
    torch.testing.assert_close(output.reconstruction, expected)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1.37), (torch.bfloat16, 1.0), (torch.float16, 65536)])
def test_a_scaled_loss_is_not_rounded_to_narrow_weights(dtype: torch.dtype, scale: float):
    """One rounding of the difference and one of the gradient, which cancel over many; the factor's would not, nor the
    activations'. bf16 has no 1.37 within 0.2 %; fp16 holds neither 65536 nor, to any digit, 2 / 2^22."""
    out = torch.randn(64, 65536).to(dtype).requires_grad_()
    x = out.detach().float() + 0.1 * torch.randn(64, 65536)
    (ops._SquaredError.apply(out, x) * scale).backward()
    exact = 2 * (out.detach().double() - x.double()) * scale / out.numel()
    assert out.grad is not None
    grad = out.grad.double()
    assert (grad - exact).norm() < 0.003 * exact.norm()
    assert float((grad * exact).sum() / exact.square().sum()) == pytest.approx(1, abs=2e-5)


def test_gradients_of_gradients_are_refused_by_the_fast_backend():
    values, indices = torch.rand(3, 2, dtype=torch.float64), torch.randint(9, (3, 2))
    W = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.sparse_decode(values, indices, W, "cpu").pow(3).sum(), W, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again.*backend='reference'"):
        torch.autograd.grad(grad.sum(), W)
    (grad,) = torch.autograd.grad(ops.sparse_decode(values, indices, W, "reference").pow(3).sum(), W, create_graph=True)
    assert torch.autograd.grad(grad.sum(), W)[0].abs().sum() > 0


@every_sae
def test_a_gradient_penalty_is_refused_and_no_part_of_it_left_out(make):
    """The gradient with respect to x depends on the weights, though the loss it comes from is a plain number."""
    sae = make()
    x = torch.randn(5, 8, requires_grad=True)
    loss = sae(x).loss
    (ordinary,) = torch.autograd.grad(loss, x, retain_graph=True)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(grad, ordinary)
    for p in (x, sae.W_enc, sae.W_dec):
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(grad.square().sum() + p.sum(), p, retain_graph=True)
    again = torch.utils.checkpoint.checkpoint(lambda y: sae(y).loss, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again, x, create_graph=True)[0], ordinary)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("make", [fastsae.TopKSAE, fastsae.JointSAE])
def test_many_gradients_at_once_are_those_one_by_one(make: type[fastsae.TopKSAE], dtype: torch.dtype):
    sae = make(6, 30, 4, pre_bias=True, backend="cpu", dtype=dtype).eval()
    x = torch.randn(5, 6, dtype=dtype, requires_grad=True)
    inputs, output = [x, *sae.parameters()], sae(x)
    for out in (output.loss, output.reconstruction, output.code.values):
        d_outs, wanted = torch.randn(3, *out.shape, dtype=out.dtype), inputs if out is not output.code.values else [x]

        def gradients(d_out: Tensor, out: Tensor = out, wanted: list[Tensor] = wanted, **batched: bool) -> Any:
            return torch.autograd.grad(out, wanted, d_out, retain_graph=True, **batched)

        expected = [torch.stack(grads) for grads in zip(*map(gradients, d_outs), strict=True)]
        assert all(grad.any() for grad in expected)
        for got in (gradients(d_outs, is_grads_batched=True), torch.func.vmap(gradients)(d_outs)):
            torch.testing.assert_close(list(got), expected)


def test_many_gradients_at_once_are_refused_where_they_are_to_be_differentiated():
    sae, x = fastsae.TopKSAE(6, 30, 4, backend="cpu"), torch.randn(5, 6, requires_grad=True)
    out = sae(x).reconstruction

    def gradients(d_out: Tensor, **batched: bool) -> Any:
        return torch.autograd.grad(out, x, d_out, retain_graph=True, create_graph=True, **batched)

    for way in (functools.partial(gradients, is_grads_batched=True), torch.func.vmap(gradients)):
        with pytest.raises(RuntimeError, match=r"cannot be differentiated again.*backend='reference'"):
            way(torch.ones(3, 5, 6))


def test_the_narrow_loss_is_refused_too():
    out = torch.randn(5, 8).bfloat16().requires_grad_()
    (grad,) = torch.autograd.grad(ops._SquaredError.apply(out, torch.randn(5, 8)), out, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(grad.sum(), out)


DERIVATIVES = {
    "jvp": lambda sae, x, v: torch.func.jvp(lambda y: sae(y).loss, (x,), (v,))[1],
    "jvp of the code": lambda sae, x, v: torch.func.jvp(lambda y: sae.encode(y).values, (x,), (v,))[1],
    "jacfwd": lambda sae, x, v: torch.func.jacfwd(lambda y: sae(y).reconstruction)(x[0]),
    "jacrev": lambda sae, x, v: torch.func.jacrev(lambda y: sae(y).reconstruction)(x[0]),
    "hessian": lambda sae, x, v: torch.func.hessian(lambda y: sae(y).loss)(x[0]),
    "vmap of grad": lambda sae, x, v: torch.func.vmap(torch.func.grad(lambda y: sae(y).loss))(x),
    "functional_call": lambda sae, x, v: torch.func.grad(
        lambda weights: torch.func.functional_call(sae, weights, (x,)).loss
    )(dict(sae.named_parameters()))["W_enc"],
    "compiled jvp": lambda sae, x, v: torch.compile(
        lambda y, w: torch.func.jvp(lambda z: sae(z).loss, (y,), (w,))[1], backend="aot_eager", fullgraph=True
    )(x, v),
    "dual numbers": lambda sae, x, v: dual(sae, x, v),
}


def dual(sae, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(sae(forward_ad.make_dual(x, v)).loss).tangent


@every_sae
@pytest.mark.parametrize("which", DERIVATIVES)
def test_derivatives_that_only_pytorch_can_take_are_taken_by_the_reference(which: str, make):
    """Hand-written backwards would leave them 0, without a word."""
    sae = make()
    x, v = torch.randn(5, 8), torch.randn(5, 8)
    exact = copy.deepcopy(sae).double()
    exact.backend = "reference"
    want = DERIVATIVES[which](exact, x.double(), v.double())
    assert want.abs().max() > 1e-3
    torch.testing.assert_close(DERIVATIVES[which](sae, x, v).double(), want, rtol=1e-4, atol=1e-5)
    sae.backend = "cpu"
    if which == "compiled jvp":
        return
    with pytest.raises(RuntimeError, match=r"'cpu' cannot serve this call: torch.func and forward-mode"):
        DERIVATIVES[which](sae, x, v)


@pytest.mark.parametrize("dynamic", [None, True])
def test_several_shares_of_dropout_compile(dynamic: bool | None):
    """The second share is another number, and from then on no constant to the compiler."""
    torch.compiler.reset()
    for dropout in (0.15, 0.3):
        sae = fastsae.JointSAE(8, 64, 4, dropout=dropout)
        compiled = torch.compile(sae, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        compiled(torch.randn(5, 8)).loss.backward()
        assert sae.W1.grad.abs().sum() > 0


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_a_share_that_cannot_be_dropped(dropout: float):
    z, W1, b1, W2 = torch.ones(2, 3), torch.ones(3, 3), torch.ones(3), torch.ones(5, 3)
    with pytest.raises(ValueError, match=r"interaction_mlp: dropout must be in \[0, 1\); got"):
        ops.interaction_mlp(z, W1, b1, W2, None, dropout)
