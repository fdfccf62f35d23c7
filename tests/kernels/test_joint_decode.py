"""Encode, decode and every gradient, in every way a plan can take, against the specification in fp64."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from helpers import KERNEL_CASES, Case, assert_every_gradient, assert_matches, joint, leaves
from torch import Tensor

from csrc_triton import feature_order, plan, weight_gradients
from fastsae import ops
from fastsae.backends import cuda
from fastsae.gradients import GradientBuffers

Way = Callable[[pytest.MonkeyPatch], None]


def gather(monkeypatch: pytest.MonkeyPatch) -> None:
    pass


def split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly every feature has more entries than an item."""
    for module in (feature_order, weight_gradients):
        monkeypatch.setattr(module, "SEGMENT", 1)


def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """d_in beyond what registers hold."""
    monkeypatch.setattr(cuda, "WIDEST", 2)


def dense(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, forward="dense", backward="dense", encoder_backward="dense")


def dense_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    dense(monkeypatch)
    cuda.set_pre_activation_bytes(500)


def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, shared=True)


def force(monkeypatch: pytest.MonkeyPatch, **ways: object) -> None:
    chosen = plan.decode
    monkeypatch.setattr(plan, "decode", lambda *a: dataclasses.replace(chosen(*a), **ways))


def test_every_gradient(case: Case, inputs: dict[str, Tensor], slack: float):
    assert_every_gradient(case, inputs, "cuda", slack)


@pytest.mark.parametrize("way", [split, wide, dense, dense_in_blocks], ids=lambda w: w.__name__)
@pytest.mark.parametrize("name", ["plain", "k = d_sae", "empty batch"])
def test_every_way_of_every_plan(way: Way, name: str, device: str, monkeypatch: pytest.MonkeyPatch):
    way(monkeypatch)
    case = next(c for c in KERNEL_CASES if c.name == name)
    assert_every_gradient(case, {n: t.to(device) for n, t in case.inputs(torch.float32).items()}, "cuda")


@pytest.mark.parametrize("way", [shared, dense], ids=lambda w: w.__name__)
def test_one_gather_serves_both_decoders_of_the_same_code(way: Way, device: str, monkeypatch: pytest.MonkeyPatch):
    shared(monkeypatch)
    way(monkeypatch)
    case = Case("k = n", 4, 20, 90, 5, 5, 3)
    assert_every_gradient(case, {n: t.to(device) for n, t in case.inputs(torch.float32).items()}, "cuda")


@pytest.mark.parametrize("way", [gather, dense], ids=lambda w: w.__name__)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_loss_is_fp32_whatever_the_target_is(way: Way, dtype: torch.dtype, device: str, monkeypatch):
    """As a compiled model expects it."""
    way(monkeypatch)
    values, W = (torch.randn(*shape, device=device).to(dtype) for shape in ((3, 2), (9, 4)))
    indices, target = torch.tensor([[3, 1], [0, 2], [8, 0]], device=device), torch.randn(3, 4, device=device)
    for to in (torch.float64, dtype):
        out, loss = ops.reconstruct(values, indices, W, None, None, 2, target=target.to(to), backend="cuda")
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, (out - target.to(to)).float().square().mean(), rtol=5e-3, atol=0)


def test_repeated_and_unused_features(device: str):
    """Features repeat within a row, are used by one row, or by none."""
    indices = torch.tensor([[3, 3, 1], [0, 2, 0], [3, 0, 3]], device=device)
    grads = {}
    for backend in ("cuda", "reference"):
        torch.manual_seed(1)
        values, W, V = (torch.randn(*s).to(device).requires_grad_() for s in ((3, 3), (9, 4), (9, 6)))
        out = ops.sparse_decode(values, indices, W, backend=backend)
        z = ops.pairwise_interaction(values, indices, V, backend=backend)
        (out.square().sum() + z.square().sum()).backward()
        grads[backend] = (out, z, values.grad, W.grad, V.grad)
    for ours, theirs in zip(grads["cuda"], grads["reference"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def strided(t: Tensor) -> Tensor:
    """Copy the numbers into every second column of a wider tensor."""
    wide = torch.full((t.shape[0], 2 * t.shape[1]), 7, dtype=t.dtype, device=t.device)
    wide[:, ::2] = t
    return wide[:, ::2]


def test_odd_strides_everywhere(dtype: torch.dtype, device: str, slack: float):
    values, indices = torch.rand(5, 4).to(dtype), torch.randint(11, (5, 4))
    weights = [torch.randn(11, width).to(dtype) for width in (6, 6, 3)]
    gradients = torch.randn(5, 6).to(dtype), torch.randn(1, 3).to(dtype)

    def run(backend: str, kind: torch.dtype, lay: Callable[[Tensor], Tensor] = lambda t: t) -> list[Tensor]:
        leaf = [lay(t.to(device, kind)).detach().requires_grad_() for t in (values, *weights)]
        i = lay(indices.to(device))
        out, z = ops.joint_decode(leaf[0], i, *leaf[1:], 2, backend=backend)
        more = ops.sparse_decode(leaf[0][:, ::3], i[:, ::3], leaf[1].T.contiguous().T, backend)
        d_out, d_z = (g.to(device, kind) for g in gradients)
        torch.autograd.backward((out, z, more), (lay(d_out), d_z.expand_as(z), d_out))
        return [out.detach(), z.detach(), more.detach(), *(t.grad for t in leaf if t.grad is not None)]

    ours, exact, eager = run("cuda", dtype, strided), run("reference", torch.float64), run("reference", dtype)
    assert len(ours) == len(exact) == 7
    for number, (got, want, theirs) in enumerate(zip(ours, exact, eager, strict=True)):
        assert_matches(f"result {number}", got, want, theirs, slack, scale=4 * want.abs().max().item() + 10)


@pytest.mark.parametrize("way", [gather, split, dense], ids=lambda w: w.__name__)
def test_the_same_bits_every_run(way: Way, device: str, monkeypatch: pytest.MonkeyPatch):
    way(monkeypatch)
    case = Case("determinism", 4, 12, 50, 3, 2, 5)
    inputs = {name: t.to(device) for name, t in case.inputs(torch.float32).items()}
    runs = []
    for _ in range(5 if way is gather else 2):
        p = leaves(inputs)
        r = joint(p, case, "cuda")
        torch.autograd.backward((r["out"], r["z"]), (inputs["g_out"], inputs["g_z"]))
        runs.append([r["values"], r["out"], r["z"], *(t.grad for t in p.values())])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("way", [gather, split], ids=lambda w: w.__name__)
def test_rows_of_several_blocks(way: Way, device: str, monkeypatch: pytest.MonkeyPatch):
    """d_in beyond a block of joint_decode (1024) and of weight_gradient (2048)."""
    way(monkeypatch)
    case = Case("several blocks", 2, 2100, 4, 2, 2, 3)
    inputs = {n: t.to(device) for n, t in case.inputs(torch.float32).items()}
    assert_every_gradient(case, inputs, "cuda")
    indices, target = torch.tensor([[0, 3], [1, 3]], device=device), torch.randn(2, 2100, device=device)
    values = torch.rand(2, 2, device=device)
    out, loss = ops.reconstruct(values, indices, inputs["W_dec"], None, None, 2, target=target, backend="cuda")
    torch.testing.assert_close(loss, (out - target).square().mean())
    torch.testing.assert_close(out, ops.sparse_decode(values, indices, inputs["W_dec"], "reference"))


# ---- bias, loss, and where gradients go ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [gather, dense], ids=lambda w: w.__name__)
@pytest.mark.parametrize("need_target", [False, True])
def test_bias_and_loss(
    way: Way, need_target: bool, dtype: torch.dtype, device: str, slack: float, monkeypatch: pytest.MonkeyPatch
):
    way(monkeypatch)
    indices = torch.randint(30, (5, 4), device=device)
    made = {"values": (5, 4), "W_dec": (30, 7), "W_lin": (30, 7), "bias": (7,), "target": (5, 7)}
    numbers = {name: torch.randn(*shape).to(dtype) for name, shape in made.items()}
    extra = torch.randn(5, 7).to(dtype)
    results = []
    for backend, kind in (("cuda", dtype), ("reference", torch.float64), ("reference", dtype)):
        p = {name: t.to(device, kind, copy=True) for name, t in numbers.items()}
        for name, t in p.items():
            t.requires_grad_(name != "target" or need_target)
        out, loss = ops.reconstruct(
            p["values"],
            indices,
            p["W_dec"],
            p["W_lin"],
            None,
            2,
            bias=torch.stack([p["bias"], p["bias"]], dim=1)[:, 0],  # every second number
            target=p["target"],
            backend=backend,
        )
        (loss + (out * extra.to(device, kind)).sum()).backward()
        results.append([out.detach(), loss.detach().to(kind), *(t.grad for t in p.values() if t.grad is not None)])
    assert len(results[0]) == 6 + need_target
    for number, (got, exact, eager) in enumerate(zip(*results, strict=True)):
        assert_matches(f"result {number}", got, exact, eager, slack, scale=2 * exact.abs().max().item())


def test_gradients_only_where_they_are_wanted(device: str):
    values, indices = torch.rand(5, 4, device=device), torch.randint(30, (5, 4), device=device)
    W_dec, W_lin, V = (torch.randn(30, w, device=device).requires_grad_() for w in (6, 6, 3))
    W_lin.requires_grad_(False)
    out, z = ops.joint_decode(values, indices, W_dec, W_lin, V, 2, "cuda")
    (out.sum() + z.sum()).backward()
    expected = ops.joint_decode(values, indices, W_dec, W_lin, V, 2, "reference")
    theirs = torch.autograd.grad(expected[0].sum() + expected[1].sum(), (W_dec, V))
    assert W_lin.grad is None
    torch.testing.assert_close((W_dec.grad, V.grad), theirs)


@pytest.mark.parametrize("way", [gather, split, wide, dense], ids=lambda w: w.__name__)
def test_gradient_buffers(way: Way, device: str, monkeypatch: pytest.MonkeyPatch):
    """Written into, and added to for the second use of a weight."""
    way(monkeypatch)
    values, indices = torch.rand(5, 3, device=device), torch.randint(9, (5, 3), device=device)
    weights = [torch.randn(9, w, device=device).requires_grad_() for w in (6, 6, 3)]

    def loss() -> Tensor:
        once = ops.joint_decode(values, indices, *weights, 2, backend="cuda")
        again = ops.joint_decode(values.flip(1), indices.flip(1), *weights, 3, backend="cuda")
        return sum((t.square().sum() for t in (*once, *again)), torch.zeros((), device=device))

    assert_buffers_hold(loss, weights)


@pytest.mark.parametrize("way", [gather, dense], ids=lambda w: w.__name__)
def test_gradient_buffers_of_the_encoder(way: Way, device: str, monkeypatch: pytest.MonkeyPatch):
    way(monkeypatch)
    x, W_enc, b_enc = (torch.randn(*s, device=device) for s in ((3, 6), (40, 6), (40,)))

    def loss() -> Tensor:
        return sum(ops.topk_encode(x, W_enc, b_enc, k, backend="cuda")[0].square().sum() for k in (1, 2))

    assert_buffers_hold(loss, [W_enc.requires_grad_(), b_enc.requires_grad_()])


def assert_buffers_hold(loss: Callable[[], Tensor], weights: list[Tensor]) -> None:
    expected = torch.autograd.grad(loss(), weights)
    buffers = GradientBuffers(weights)
    for _ in range(2):
        with buffers:
            loss().backward()
        for weight, want in zip(weights, expected, strict=True):
            torch.testing.assert_close(weight.grad, want, rtol=1e-4, atol=1e-4)
            weight.grad.fill_(torch.nan)


def test_the_feature_order_is_made_once_for_both_backwards(device: str, monkeypatch: pytest.MonkeyPatch):
    seen = []
    work_items = cuda.work_items
    monkeypatch.setattr(cuda, "work_items", lambda *a: (seen.append(a), work_items(*a))[1])
    case = Case("order", 3, 8, 40, 2, 2, 3)
    p = leaves({name: t.to(device) for name, t in case.inputs(torch.float32).items()})
    joint(p, case, "cuda")["out"].sum().backward()
    assert len(seen) == 1


def test_the_order_made_on_another_stream_is_not_taken(device: str, monkeypatch: pytest.MonkeyPatch):
    indices = torch.randint(9, (4, 2), device=device)
    monkeypatch.setattr(cuda, "_stream", lambda t: 1)
    assert cuda._keep_order(indices, 9) is cuda._take_order(indices, 9)
    kept = cuda._keep_order(indices, 9)
    monkeypatch.setattr(cuda, "_stream", lambda t: 2)
    assert cuda._take_order(indices, 9) is not kept


def test_the_order_of_another_code_is_not_taken(device: str):
    case = Case("order", 3, 8, 40, 2, 2, 3)
    p = leaves({name: t.to(device) for name, t in case.inputs(torch.float32).items()})
    values, indices = ops.topk_encode(p["x"], p["W_enc"], p["b_enc"], 2, backend="cuda")
    others = (indices + 1) % 40
    (expected,) = torch.autograd.grad(
        ops.topk_encode(p["x"], p["W_enc"], p["b_enc"], 2, backend="reference")[0].sum(), p["W_enc"]
    )
    ops.sparse_decode(torch.rand(3, 2, device=device).requires_grad_(), others, p["W_dec"], "cuda").sum().backward()
    (got,) = torch.autograd.grad(values.sum(), p["W_enc"])
    torch.testing.assert_close(got, expected)
