"""The CPU backend against the specification: every operation, every gradient, every awkward shape."""

import pytest
import torch
from helpers import (
    CASES,
    NAMES,
    Case,
    assert_b_dec,
    assert_every_gradient,
    assert_scaled,
    assert_selection,
    joint,
    leaves,
)
from torch import Tensor

import fastsae
from fastsae import ops
from fastsae.backends import explain, reference
from fastsae.backends.cpu import blocks, screen

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


@pytest.fixture(params=["screened", "blocks of features", "one block"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With bf16 instructions and without; there the tests' few rows are encoded as many are, and as few are."""
    monkeypatch.setattr(screen, "_saves_time", lambda *_: request.param == "screened")
    monkeypatch.setattr(blocks, "FEW_ROWS", 64 if request.param == "one block" else 0)


on_every_processor = pytest.mark.usefixtures("processor")


# ---- topk_encode ----------------------------------------------------------------------------------------------------


@on_every_processor
@every_dtype
@every_case
def test_topk_encode_is_the_exact_selection(case: Case, dtype: torch.dtype):
    p = case.inputs(dtype)
    assert_selection(case, p, *ops.topk_encode(p["x"], p["W_enc"], p["b_enc"], case.K, backend="cpu"))


@every_case
def test_topk_encode_takes_the_same_features_as_the_reference(case: Case):
    p = case.inputs(torch.float64)
    ours = ops.topk_encode(p["x"], p["W_enc"], p["b_enc"], case.K, backend="cpu")
    theirs = ops.topk_encode(p["x"], p["W_enc"], p["b_enc"], case.K, backend="reference")
    assert torch.equal(ours[1], theirs[1])


@on_every_processor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.kind in ("ties", "constant", "all negative")], ids=lambda c: c.name
)
def test_ties_go_to_the_lower_index_in_the_fast_dtypes_too(case: Case, dtype: torch.dtype):
    p = case.inputs(dtype)
    ours = ops.topk_encode(p["x"], p["W_enc"], p["b_enc"], case.K, backend="cpu")
    theirs = reference.topk_encode(p["x"].double(), p["W_enc"].double(), p["b_enc"].double(), case.K)
    assert torch.equal(ours[1], theirs[1])


@on_every_processor
@every_case
def test_chunks_of_rows_change_nothing(case: Case, monkeypatch: pytest.MonkeyPatch):
    p = case.inputs(torch.float32)
    whole = ops.topk_encode(p["x"], p["W_enc"], p["b_enc"], case.K, backend="cpu")
    monkeypatch.setattr(blocks, "PRE_ACTIVATION_BYTES", 3 * 4 * case.M)
    chunked = ops.topk_encode(p["x"], p["W_enc"], p["b_enc"], case.K, backend="cpu")
    assert torch.equal(whole[1], chunked[1])
    torch.testing.assert_close(whole[0], chunked[0], rtol=1e-5, atol=1e-6)


@on_every_processor
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("M", [100, 3000, 40000])
def test_nan_is_seen(sign: float, M: int):
    x, W = torch.randn(4, 8), torch.randn(M, 8)
    x[2, 3] = torch.tensor(float("nan")).copysign(torch.tensor(sign))
    values, _ = ops.topk_encode(x, W, torch.zeros(M), 4, backend="cpu")
    assert values[2].isnan().all()
    assert values[[0, 1, 3]].isfinite().all()


@on_every_processor
@pytest.mark.parametrize("M", [300, 5000])
def test_features_restricts_who_competes(M: int):
    x, W, b = torch.randn(6, 16), torch.randn(M, 16), torch.randn(M)
    features = torch.randperm(M)[: M // 3].sort().values
    values, indices = ops.topk_encode(x, W, b, 5, features=features, backend="cpu")
    mask = torch.full((M,), -torch.inf)
    mask[features] = 0.0
    expected = torch.relu(x @ W.T + b + mask).topk(5)
    torch.testing.assert_close(values, expected.values)
    assert torch.isin(indices, features).all()
    theirs = ops.topk_encode(x, W, b, 5, features=features, backend="reference")
    assert torch.equal(indices, theirs[1])


@on_every_processor
@every_dtype
@every_case
def test_scale_ranks_features_and_changes_nothing_else(case: Case, dtype: torch.dtype):
    assert_scaled(case, case.inputs(dtype), "cpu")


@on_every_processor
@pytest.mark.parametrize("restricted", [False, True])
def test_scaled_features_are_those_of_the_reference(restricted: bool):
    x, W, b, scale = torch.randn(6, 16), torch.randn(5000, 16), torch.randn(5000), torch.rand(5000)
    features = torch.randperm(5000)[:900].sort().values if restricted else None
    ours, theirs = (ops.topk_encode(x, W, b, 9, backend, features, scale=scale)[1] for backend in ("cpu", "reference"))
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, ops.topk_encode(x, W, b, 9, "cpu", features)[1])


@pytest.mark.parametrize("need_x", [False, True])
@every_dtype
def test_b_dec_is_subtracted_and_gets_its_gradient(dtype: torch.dtype, need_x: bool):
    assert_b_dec(dtype, need_x, "cpu", "cpu")


# ---- gradients ------------------------------------------------------------------------------------------------------


@every_dtype
@every_case
def test_every_gradient(case: Case, dtype: torch.dtype):
    assert_every_gradient(case, case.inputs(dtype), "cpu")


@pytest.mark.parametrize("case", [c for c in CASES if c.B], ids=lambda c: c.name)
def test_gradients_by_the_formulas_of_the_paper(case: Case):
    p = leaves(case.inputs(torch.float64))
    r = joint(p, case, "cpu")
    delta, d_u = torch.randn_like(r["out"]), torch.randn_like(r["z"])
    torch.autograd.backward((r["out"], r["z"]), (delta, d_u))
    values, indices, n = r["values"].detach(), r["indices"], case.N
    expected = {name: torch.zeros_like(p[name]) for name in NAMES}
    for b in range(case.B):
        S = sum(values[b, j] * p["V"][indices[b, j]] for j in range(n)).detach()
        for j, f in enumerate(indices[b].tolist()):
            a = values[b, j]
            d_a = p["W_dec"][f] @ delta[b]
            expected["W_dec"][f] += a * delta[b]
            if j < n:
                v = p["V"][f]
                d_a = d_a + p["W_lin"][f] @ delta[b] + (d_u[b] * v * (S - a * v)).sum()
                expected["W_lin"][f] += a * delta[b]
                expected["V"][f] += a * d_u[b] * (S - a * v.detach())
            d_h = d_a.detach() * (a > 0)
            expected["b_enc"][f] += d_h
            expected["W_enc"][f] += d_h * p["x"][b].detach()
            expected["x"][b] += d_h * p["W_enc"][f].detach()
    for name in NAMES:
        torch.testing.assert_close(
            p[name].grad, expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend: str):
    case = Case("gradcheck", 3, 4, 20, 4, 3, 3)
    p = leaves(case.inputs(torch.float64))

    def f(*tensors: Tensor) -> tuple[Tensor, ...]:
        r = joint(dict(zip(NAMES, tensors, strict=True)), case, backend)
        return r["values"], r["out"], r["z"]

    assert torch.autograd.gradcheck(f, tuple(p.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_repeated_features_within_a_row_add_up(dtype: torch.dtype):
    indices = torch.tensor([[3, 3, 1], [0, 2, 0]])
    grads = {}
    for backend in ("cpu", "reference"):
        torch.manual_seed(1)
        values = torch.rand(2, 3, dtype=dtype).requires_grad_()
        W, V = torch.randn(5, 4, dtype=dtype).requires_grad_(), torch.randn(5, 6, dtype=dtype).requires_grad_()
        out = ops.sparse_decode(values, indices, W, backend=backend)
        z = ops.pairwise_interaction(values, indices, V, backend=backend)
        (out.square().sum() + z.square().sum()).backward()
        grads[backend] = (out, z, values.grad, W.grad, V.grad)
    for ours, theirs in zip(grads["cpu"], grads["reference"], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_strided_and_expanded_inputs_and_gradients():
    x = torch.randn(6, 32, dtype=torch.float64)[:, ::2].requires_grad_()
    W = torch.randn(16, 300, dtype=torch.float64).T.requires_grad_()
    results = {}
    for backend in ("cpu", "reference"):
        values, indices = ops.topk_encode(x, W, torch.zeros(300).double(), 4, backend=backend)
        out = ops.sparse_decode(values[:, :3], indices[:, :3], W, backend=backend)
        grads = torch.autograd.grad(out, (x, W), torch.ones(1, 1).double().expand_as(out), retain_graph=True)
        transposed = torch.autograd.grad(out, (x, W), torch.arange(96.0).double().view(16, 6).T)
        results[backend] = (out, *grads, *transposed)
    for ours, theirs in zip(results["cpu"], results["reference"], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_same_bits_every_run():
    case = Case("determinism", 64, 32, 4000, 16, 8, 8)
    inputs = case.inputs(torch.float32)
    runs = []
    for _ in range(5):
        p = leaves(inputs)
        r = joint(p, case, "cpu")
        torch.autograd.backward((r["out"], r["z"]), (inputs["g_out"], inputs["g_z"]))
        runs.append([r["values"], r["out"], r["z"], *(p[name].grad for name in NAMES)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


# ---- torch integration ----------------------------------------------------------------------------------------------


def samples() -> list[tuple[str, tuple]]:
    x, W, b = torch.randn(5, 8).requires_grad_(), torch.randn(60, 8).requires_grad_(), torch.randn(60).requires_grad_()
    V, W2 = torch.randn(60, 3).requires_grad_(), torch.randn(60, 8).requires_grad_()
    values, indices = reference.topk_encode(x.detach(), W.detach(), b.detach(), 4)
    values = values.requires_grad_()
    g, gz, gv = torch.randn(5, 8), torch.randn(5, 3), torch.randn(5, 4)
    s, bias, target = torch.randn(5, 3), torch.randn(8).requires_grad_(), torch.randn(5, 8).requires_grad_()
    plain = values.detach()
    return [
        ("topk_encode", (x, W, b, None, 4, None, None, torch.float32, "cpu")),
        ("topk_encode", (x, W, b, bias, 4, torch.arange(0, 60, 2), None, torch.float32, "cpu")),
        ("topk_encode", (x, W, b, bias, 4, None, torch.rand(60), torch.float32, "cpu")),
        ("topk_encode_backward", (gv, plain, indices, x.detach(), W.detach(), None, True, True, False, "cpu")),
        ("topk_encode_backward", (gv, plain, indices, x.detach(), W.detach(), g[0], False, False, True, "cpu")),
        ("joint_decode", (values, indices, W, None, None, None, None, 4, "cpu")),
        ("joint_decode", (values, indices, None, None, V, None, None, 4, "cpu")),
        ("joint_decode", (values, indices, W, W2, V, None, None, 2, "cpu")),
        ("joint_decode", (values, indices, W, W2, None, bias, target, 2, "cpu")),
        (
            "joint_decode_backward",
            (g, None, None, plain, indices, W.detach(), None, None, 4, True, False, False, "cpu"),
        ),
        (
            "joint_decode_backward",
            (g, gz, s, plain, indices, W.detach(), W2.detach(), V.detach(), 2, True, False, True, "cpu"),
        ),
    ]


@pytest.mark.parametrize("number", range(len(samples())), ids=[name for name, _ in samples()])
def test_opcheck(number: int):
    name, arguments = samples()[number]
    torch.library.opcheck(getattr(torch.ops.fastsae, name).default, arguments)


@pytest.mark.parametrize(
    ("architecture", "compiler"), [("topk", "aot_eager"), ("joint", "aot_eager"), ("joint", "inductor")]
)
def test_torch_compile_in_one_graph(architecture: str, compiler: str):
    torch.compiler.reset()
    make = {"topk": fastsae.TopKSAE, "joint": fastsae.JointSAE}[architecture]
    sae = make(16, 500, 6).eval()
    x = torch.randn(9, 16)
    sae(x).loss.backward()
    eager = {name: p.grad for name, p in sae.named_parameters()}
    sae.zero_grad()
    torch.compile(sae, fullgraph=True, backend=compiler)(x).loss.backward()
    for name, p in sae.named_parameters():
        torch.testing.assert_close(p.grad, eager[name], rtol=1e-4, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


# ---- which backend -----------------------------------------------------------------------------------------------


def test_fp16_is_served_by_the_reference():
    values, _ = ops.topk_encode(torch.randn(4, 8).half(), torch.randn(20, 8).half(), torch.randn(20).half(), 3)
    assert values.dtype == torch.float16


def test_explain_names_the_backend_and_why_not_the_others(monkeypatch: pytest.MonkeyPatch):
    sae = fastsae.TopKSAE(1024, 65536, 64, device="cpu")
    monkeypatch.setattr(screen, "_saves_time", lambda *_: True)
    assert "chunks of 2048; 256 MiB of bf16 bounds" in explain(torch.empty(2048, 1024), sae)
    monkeypatch.setattr(screen, "_saves_time", lambda *_: False)
    text = explain(torch.empty(2048, 1024), sae)
    assert "backend: cpu" in text
    assert "chunks of 1024; 256 MiB of pre-activations" in text
    assert "not cuda: it serves CUDA tensors, these are on cpu" in text
    sae.backend = "reference"
    assert "not cpu: 'reference' was asked for" in explain(torch.empty(2048, 1024), sae)
