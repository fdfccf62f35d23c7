"""Whole SAEs on the CUDA backend: a step, the optimizer inside it, the Trainer, and torch's own modes."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import assert_matches
from torch import Tensor

import fastsae
from csrc_triton import feature_order, plan, weight_gradients
from fastsae import ops
from fastsae.backends import cuda, explain, reference
from fastsae.gradients import GradientBuffers
from fastsae.optim import AdamInBackward, normalize_rows_, remove_parallel_

Make = Callable[..., fastsae.TopKSAE | fastsae.JointSAE]
D_IN, D_SAE, K = 10, 66, 4


def topk(**options: object) -> fastsae.TopKSAE:
    return fastsae.TopKSAE(D_IN, D_SAE, K, **{"backend": "cuda", **options})  # type: ignore[arg-type]


def joint(**options: object) -> fastsae.JointSAE:
    made = {"backend": "cuda", "d_embedding": 5, "pre_bias": True, **options}
    return fastsae.JointSAE(D_IN, D_SAE, K, **made)  # type: ignore[arg-type]


def linear_only(**options: object) -> fastsae.JointSAE:
    return joint(interaction=False, **options)


every_sae = pytest.mark.parametrize("make", [topk, joint, linear_only], ids=lambda m: m.__name__)


def results(sae: fastsae.TopKSAE, x: Tensor, call: Callable[[Tensor], object] | None = None) -> dict[str, Tensor]:
    """Loss, reconstruction and every gradient."""
    sae.zero_grad()
    output = (sae if call is None else call)(x)
    output.loss.backward()
    grads = {name: p.grad for name, p in sae.named_parameters()}
    return {"loss": output.loss.detach(), "reconstruction": output.reconstruction.detach(), **grads}


@every_sae
def test_a_step_is_that_of_the_reference(make: Make, device: str):
    sae = make(device=device).eval()
    x = torch.randn(2, 3, D_IN, device=device, requires_grad=True)
    ours, d_x = results(sae, x), x.grad
    sae.backend, x.grad = "reference", None
    for name, want in results(sae, x).items():
        torch.testing.assert_close(ours[name], want, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(d_x, x.grad, rtol=1e-4, atol=1e-6)


def test_dropout_follows_the_generator_of_torch(device: str):
    sae = joint(device=device, dropout=0.5)
    torch.nn.init.normal_(sae.V)
    torch.nn.init.normal_(sae.W1)
    x = torch.randn(6, D_IN, device=device)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(sae(x).loss.item())
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.parametrize("make", [topk, joint], ids=lambda m: m.__name__)
def test_torch_compile_in_one_graph(make: Make, device: str):
    torch.compiler.reset()
    sae = make(device=device).eval()
    x = torch.randn(3, D_IN, device=device)
    eager = results(sae, x)
    compiled = torch.compile(sae, fullgraph=True, backend="aot_eager")
    for name, got in results(sae, x, compiled).items():
        torch.testing.assert_close(got, eager[name], rtol=1e-4, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


@every_sae
def test_autocast_computes_narrow_and_keeps_fp32_weights(make: Make, device: str):
    """Against the same computation in fp64, with the features that the narrow product has chosen."""
    sae = make(device=device).eval()
    x = torch.randn(5, D_IN, device=device)
    with torch.autocast(device, torch.bfloat16):
        ours = results(sae, x)
        code = sae.encode(x)
    assert code.values.dtype == torch.bfloat16
    assert ours["reconstruction"].dtype == torch.float32
    assert {t.dtype for name, t in ours.items() if name != "loss"} == {torch.float32}
    exact = copy.deepcopy(sae).double()
    exact.backend = "reference"
    pre = torch.relu((x.double() - exact.b_dec) @ exact.W_enc.T + exact.b_enc).gather(1, code.indices)
    out = exact.decode(dataclasses.replace(code, values=pre))
    (out - x.double()).square().mean().backward()
    for name, p in exact.named_parameters():
        scale = p.grad.abs().max().item()
        error = (ours[name].double() - p.grad).abs().max().item()
        assert error <= 0.05 * scale, f"{name}: {error} of {scale}"
    torch.testing.assert_close(ours["reconstruction"].double(), out, rtol=0.02, atol=0.02)


# ---- the optimizer inside the backward ------------------------------------------------------------------------------


@every_sae
@pytest.mark.parametrize("autocast", [False, True])
def test_fp16_takes_the_scale_that_gradscaler_begins_with(make: Make, autocast: bool, device: str):
    """65,536: more than fp16 holds, as 2 / (B * D) alone is less."""
    sae = make(device=device, dtype=torch.float32 if autocast else torch.float16).eval()
    x = torch.randn(6, D_IN, device=device, dtype=sae.W_dec.dtype)
    exact = copy.deepcopy(sae).double()
    exact.backend = "reference"
    want = results(exact, x.double())
    sae.zero_grad()
    with torch.autocast(torch.device(device).type, torch.float16, enabled=autocast):
        loss = sae(x).loss
    (loss * 65536).backward()
    for name, p in sae.named_parameters():
        assert p.grad is not None, name
        error = (p.grad.double() / 65536 - want[name]).norm() / want[name].norm()
        assert error < 5e-3, f"{name}: {error}"


@pytest.mark.parametrize("on_device", [False, True], ids=["lr a number", "lr a tensor"])
def test_fifty_steps_inside_the_backward_are_those_of_adam(
    on_device: bool, device: str, monkeypatch: pytest.MonkeyPatch
):
    """Split and whole features, used and unused ones, three weights at once, and a schedule."""
    for module in (feature_order, weight_gradients):
        monkeypatch.setattr(module, "SEGMENT", 2)
    weights = [torch.randn(4, width, device=device) for width in (6, 6, 3)]
    ours, theirs = ([w.clone().requires_grad_() for w in weights] for _ in range(2))
    lr = torch.tensor(1e-2, device=device) if on_device else 1e-2
    fused, plain = AdamInBackward(ours, lr=lr), torch.optim.Adam(theirs, lr=1e-2, fused=True)
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 25, gamma=0.1) for optimizer in (fused, plain)]

    def loss(weights: list[Tensor], values: Tensor, indices: Tensor, backend: str) -> Tensor:
        out, z = ops.joint_decode(values, indices, *weights, 2, backend)
        return (out.square().sum() + z.square().sum()) / 10

    for step in range(50):
        values, indices = torch.rand(2, 3, device=device), torch.randint(3, (2, 3), device=device)
        with fused.in_backward():
            loss(ours, values, indices, "cuda").backward()
        assert all(w.grad is None for w in ours)
        fused.step()
        plain.zero_grad()
        loss(theirs, values, indices, "reference").backward()
        plain.step()
        for schedule in schedules:
            schedule.step()
        if step in (0, 49):
            for got, want in zip(ours, theirs, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
                state, expected = fused.state[got], plain.state[want]
                assert state["step"] == step + 1
                for moment in ("exp_avg", "exp_avg_sq"):
                    torch.testing.assert_close(state[moment], expected[moment], rtol=1e-5, atol=1e-6)
    assert (fused.param_groups[0]["lr"] is lr) == on_device  # changed in place


@pytest.mark.parametrize("way", ["gather", "dense"])
def test_unit_norm_rows(way: str, device: str, monkeypatch: pytest.MonkeyPatch):
    """The gradient's part along a row is taken out, and the row is brought back to norm 1; split features too."""
    for module in (feature_order, weight_gradients):
        monkeypatch.setattr(module, "SEGMENT", 2)
    chosen = plan.decode
    monkeypatch.setattr(plan, "decode", lambda *a: dataclasses.replace(chosen(*a), backward=way))
    W = torch.nn.functional.normalize(torch.randn(9, 6, device=device))
    ours, theirs = W.clone().requires_grad_(), W.clone().requires_grad_()
    fused, plain = AdamInBackward([ours], lr=1e-2, unit_norm=[ours]), torch.optim.Adam([theirs], lr=1e-2, fused=True)
    for _ in range(3):
        values, indices = torch.rand(5, 3, device=device), torch.randint(8, (5, 3), device=device)
        with fused.in_backward():
            ops.sparse_decode(values, indices, ours, "cuda").square().sum().backward()
        assert (ours.grad is None) == (way == "gather")  # a product writes its gradient
        fused.step()
        plain.zero_grad()
        ops.sparse_decode(values, indices, theirs, "reference").square().sum().backward()
        remove_parallel_(theirs.grad, theirs)
        plain.step()
        normalize_rows_(theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.norm(dim=1), torch.ones(9, device=device))


def test_bf16_weights_are_trained_through_fp32_copies(device: str):
    W = torch.randn(9, 6, device=device)
    ours, theirs = W.bfloat16().requires_grad_(), W.bfloat16().float().requires_grad_()
    fused, plain = AdamInBackward([ours], lr=1e-4), torch.optim.Adam([theirs], lr=1e-4, fused=True)
    values, indices = torch.rand(5, 3, device=device).bfloat16(), torch.randint(9, (5, 3), device=device)
    for _ in range(3):
        with fused.in_backward():
            ops.sparse_decode(values, indices, ours, "cuda").float().sum().backward()
        fused.step()
        plain.zero_grad()
        ops.sparse_decode(values.float(), indices, theirs, "reference").sum().backward()
        plain.step()
    master = fused.state[ours]["master"]
    torch.testing.assert_close(master, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.float(), master, rtol=2**-7, atol=0)  # the interpreter cuts off
    assert (master != theirs.bfloat16().float()).any(), "steps this small would be lost in bf16"


def test_weights_with_fewer_steps_have_their_own_bias_correction(device: str):
    """V joins late, and a weight that the loss does not reach makes no step."""
    weights = [torch.randn(5, width, device=device) for width in (6, 6, 3)]
    ours, theirs = ([w.clone().requires_grad_() for w in weights] for _ in range(2))
    fused, plain = AdamInBackward(ours, lr=1e-2), torch.optim.Adam(theirs, lr=1e-2, fused=True)
    values, indices = torch.rand(2, 3, device=device), torch.randint(5, (2, 3), device=device)
    for reach in ("out", "out", "both", "z"):

        def loss(weights: list[Tensor], backend: str, reach: str = reach) -> Tensor:
            out, z = ops.joint_decode(values, indices, *weights, 2, backend)
            return (out.square().sum() if reach != "z" else 0) + (z.square().sum() if reach != "out" else 0)

        with fused.in_backward():
            loss(ours, "cuda").backward()
        fused.step()
        plain.zero_grad()
        loss(theirs, "reference").backward()
        plain.step()
    assert [int(fused.state[w]["step"]) for w in ours] == [3, 3, 2]
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_weight_is_used_once(device: str):
    W = torch.randn(9, 6, device=device).requires_grad_()
    values, indices = torch.rand(5, 3, device=device), torch.randint(9, (5, 3), device=device)
    optimizer = AdamInBackward([W])
    with optimizer.in_backward():
        twice = ops.sparse_decode(values, indices, W, "cuda") + ops.sparse_decode(values, indices.flip(0), W, "cuda")
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            twice.sum().backward()
    with optimizer.in_backward():  # and the optimizer can be used again
        (ops.sparse_decode(values, indices, W, "cuda").sum() + W.sum()).backward()
    with pytest.raises(RuntimeError, match=r"a weight \(9, 6\) was used outside of fastsae's operations too"):
        optimizer.step()


def test_what_is_no_backward_of_the_step_makes_none(device: str):
    """A hook that changes the gradient, torch.autograd.grad, and graphs of before the step or of another thread."""
    values, indices = torch.rand(5, 3, device=device), torch.randint(9, (5, 3), device=device)

    def loss(W: Tensor, backend: str = "cuda") -> Tensor:
        return ops.sparse_decode(values, indices, W, backend).square().sum()

    W = torch.randn(9, 6, device=device)
    ours, theirs = W.clone().requires_grad_(), W.clone().requires_grad_()
    fused, plain = AdamInBackward([ours], lr=1e-2), torch.optim.Adam([theirs], lr=1e-2, fused=True)
    (expected,) = torch.autograd.grad(loss(theirs, "reference"), theirs)
    before = loss(ours)
    with fused.in_backward():
        with ThreadPoolExecutor() as another:
            elsewhere = another.submit(loss, ours).result()
        for graph in (before, elsewhere, loss(ours)):
            torch.testing.assert_close(torch.autograd.grad(graph, ours, retain_graph=True)[0], expected)
        assert torch.equal(ours, W)
        before.backward()
        assert torch.equal(ours, W)
        torch.testing.assert_close(ours.grad, expected)
    handles = [w.register_hook(lambda grad: grad * 2) for w in (ours, theirs)]
    for _ in range(2):
        with fused.in_backward():
            loss(ours).backward()
        fused.step()
        plain.zero_grad()
        loss(theirs, "reference").backward()
        plain.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        for handle in handles:
            handle.remove()


def test_many_gradients_at_once(device: str):
    """torch runs a backward for them one by one."""
    for sae in (topk(device=device), joint(device=device).eval()):
        x, jacobian = torch.randn(3, D_IN, device=device), torch.autograd.functional.jacobian

        def reconstruction(x: Tensor, sae: fastsae.TopKSAE = sae) -> Tensor:
            return sae(x).reconstruction

        vectorized, plain = (jacobian(reconstruction, x, vectorize=way) for way in (True, False))
        torch.testing.assert_close(vectorized, plain)
        assert plain.any()


def test_what_needs_gradients_is_refused(device: str):
    W = torch.randn(9, 6, device=device).requires_grad_()
    optimizer = AdamInBackward([W])
    with pytest.raises(RuntimeError, match="a closure needs gradients"):
        optimizer.step(lambda: 0.0)  # type: ignore[arg-type]
    optimizer.grad_scale = torch.ones(())  # type: ignore[attr-defined]  # what GradScaler does
    with pytest.raises(RuntimeError, match="GradScaler needs gradients"):
        optimizer.step()
    with pytest.raises(TypeError, match="groups of parameters are not supported"):
        AdamInBackward([{"params": [W], "weight_decay": 0.5}])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="groups of parameters are not supported"):
        optimizer.add_param_group({"params": [W.detach().clone()]})


def test_a_cast_after_the_first_step_is_refused(device: str):
    values, indices = torch.rand(2, 1, device=device), torch.tensor([[0], [2]], device=device)
    holder = torch.nn.ParameterDict({"W": torch.randn(4, 6, device=device)})
    optimizer = AdamInBackward(holder.values())
    for dtype in (torch.float32, torch.bfloat16):
        holder.to(dtype)
        with optimizer.in_backward():
            loss = ops.sparse_decode(values.to(dtype), indices, holder["W"], "cuda").sum()
            if dtype == torch.bfloat16:
                with pytest.raises(RuntimeError, match=r"was cast to torch\.bfloat16 after its first step"):
                    loss.backward()
            else:
                loss.backward()
                optimizer.step()


def test_its_state_is_loaded_as_it_was(device: str):
    values, indices = torch.rand(5, 3, device=device).bfloat16(), torch.randint(9, (5, 3), device=device)
    W = torch.randn(9, 6, device=device).bfloat16().requires_grad_()
    first, second = AdamInBackward([W]), AdamInBackward([W])
    with first.in_backward():
        ops.sparse_decode(values, indices, W, "cuda").sum().backward()
    first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.state[W].keys() == {"step", "exp_avg", "exp_avg_sq", "master"}
    for name, value in first.state[W].items():
        assert value.dtype == torch.float32
        assert torch.equal(second.state[W][name], value)
        assert second.state[W][name].dtype == torch.float32


def test_a_copy_made_between_backward_and_step_knows_which_steps_were_made(device: str):
    values, indices = torch.rand(5, 3, device=device), torch.randint(9, (5, 3), device=device)
    W = torch.randn(9, 6, device=device).requires_grad_()
    optimizer = AdamInBackward([W], lr=0.1, unit_norm=[W])
    for _ in range(2):
        with optimizer.in_backward():
            ops.sparse_decode(values, indices, W, "cuda").square().sum().backward()
        other, another = copy.deepcopy((W, optimizer))
        for o in (optimizer, another):
            o.step()
    for w, o in ((W, optimizer), (other, another)):
        with o.in_backward():
            ops.sparse_decode(values, indices, w, "cuda").square().sum().backward()
        assert w.grad is None
        o.step()
    assert torch.equal(W, other)
    assert another.state[other]["step"] == optimizer.state[W]["step"] == 3


def test_transposed_weights_get_ordinary_gradients(device: str):
    """Kernels write rows one after another."""
    values, indices = torch.rand(5, 3, device=device), torch.randint(9, (5, 3), device=device)
    W = torch.randn(6, 9, device=device).T.requires_grad_()
    (expected,) = torch.autograd.grad(ops.sparse_decode(values, indices, W, "reference").square().sum(), W)
    for claimant in (AdamInBackward([W]).in_backward(), GradientBuffers([W])):
        with claimant:
            ops.sparse_decode(values, indices, W, "cuda").square().sum().backward()
        torch.testing.assert_close(W.grad, expected)
        W.grad = None


@pytest.mark.parametrize("d_in", [2100, 8200])
def test_unit_norm_of_rows_that_are_taken_apart(d_in: int, device: str):
    """Beyond what one program holds, the encoder's from 2049 wide and all from 8193 wide."""
    W_enc, W_dec = (torch.nn.functional.normalize(torch.randn(2, d_in, device=device)) for _ in range(2))
    weights = [w.requires_grad_() for w in (W_enc, W_dec)]
    optimizer = AdamInBackward(weights, lr=1e-2, unit_norm=weights)
    x = torch.randn(2, d_in, device=device)
    with optimizer.in_backward():
        values, indices = ops.topk_encode(x, W_enc, torch.ones(2, device=device), 1, "cuda")
        ops.sparse_decode(values, indices, W_dec, "cuda").square().sum().backward()
    optimizer.step()
    for W in weights:
        torch.testing.assert_close(W.norm(dim=1), torch.ones(2, device=device))


def test_on_another_backend_it_is_an_ordinary_adam(device: str):
    W = torch.randn(9, 6, device=device)
    ours, theirs = W.clone().requires_grad_(), W.clone().requires_grad_()
    fused, plain = AdamInBackward([ours], lr=1e-2), torch.optim.Adam([theirs], lr=1e-2, fused=True)
    values, indices = torch.rand(5, 3, device=device), torch.randint(9, (5, 3), device=device)
    for _ in range(3):
        with fused.in_backward():
            ops.sparse_decode(values, indices, ours, "reference").square().sum().backward()
        fused.step()
        plain.zero_grad()
        ops.sparse_decode(values, indices, theirs, "reference").square().sum().backward()
        plain.step()
    torch.testing.assert_close(ours, theirs)


# ---- the Trainer ----------------------------------------------------------------------------------------------------


def batches(n: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(n):
        yield torch.randn(4, D_IN, generator=generator)


@pytest.mark.parametrize("adam_in_backward", [False, True])
@pytest.mark.parametrize("make", [topk, joint], ids=lambda m: m.__name__)
def test_the_trainer_does_what_it_does_on_the_reference(make: Make, adam_in_backward: bool, device: str):
    config = {"normalize": "none", "progress": False, "unit_norm_decoder": True, "steps": 2}
    torch.manual_seed(0)
    ours = make(device=device, **({} if make is topk else {"dropout": 0.0}))
    theirs = copy.deepcopy(ours)
    theirs.backend = "reference"
    fastsae.Trainer(ours, fastsae.TrainerConfig(**config, adam_in_backward=adam_in_backward)).fit(batches(2))
    fastsae.Trainer(theirs, fastsae.TrainerConfig(**config)).fit(batches(2))
    for (name, got), want in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_a_run_resumes_with_the_optimizer_in_the_backward(device: str, tmp_path):
    def train(folder: str, drawn: int, resume: bool = False) -> fastsae.TopKSAE:
        torch.manual_seed(0)
        sae = topk(device=device, dtype=torch.bfloat16)
        options = {"steps": 2, "normalize": "none", "adam_in_backward": True, "progress": False}
        config = fastsae.TrainerConfig(run_dir=tmp_path / folder, resume=resume, **options)
        fastsae.Trainer(sae, config).fit(batches(drawn))
        return sae

    whole = train("whole", 2)
    with pytest.warns(UserWarning, match="activations ended after 1 of 2 steps"):
        train("parts", 1)
    resumed = train("parts", 2, resume=True)
    for got, want in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(got, want)


# ---- torch's modes --------------------------------------------------------------------------------------------------


def samples(device: str) -> list[tuple[str, tuple]]:
    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).requires_grad_()

    x, W, b, V, W2 = made(3, 8), made(40, 8), made(40), made(40, 3), made(40, 8)
    values, indices = reference.topk_encode(x.detach(), W.detach(), b.detach(), 2)
    s, q = made(3, 3), made(3, 3)
    mlp = made(3, 3), made(3), made(8, 3), made(8)
    seed = torch.tensor([5], device=device)
    plain, plain_x = [t.detach() for t in (W, W2, V)], x.detach()
    return [
        ("topk_encode", (x, W, b, made(8), 2, None, torch.rand(40, device=device), torch.float32, "cuda")),
        ("topk_encode_backward", (values, values, indices, plain_x, plain[0], plain_x[0], True, True, True, "cuda")),
        ("joint_decode", (values.requires_grad_(), indices, W, W2, V, None, None, 1, "cuda")),
        ("joint_decode", (values, indices, W, W2, None, mlp[3], made(3, 8), 2, "cuda")),
        (
            "joint_decode_backward",  # one entry makes no pairs
            (plain_x, *(t.detach() for t in (s, q, values)), indices, *plain, 1, True, False, True, "cuda"),
        ),
        (
            "joint_decode_backward",
            (
                plain_x,
                *(t.detach() for t in (s, q, values)),
                indices,
                *plain,
                2,
                True,
                False,
                True,
                "cuda",
            ),
        ),
        ("integrate", (made(3, 8), s, q, *mlp, made(3, 8), seed, 0.3, torch.float32, "cuda")),
        (
            "integrate_backward",
            (plain_x, *(t.detach() for t in (s, q, *mlp[:3])), seed, 0.3, torch.float32, True, "cuda"),
        ),
    ]


@pytest.mark.parametrize("number", range(8))
def test_opcheck(number: int, device: str):
    name, arguments = samples(device)[number]
    # What opcheck adds beyond these is torch.compile, which has a test of its own; the interpreter is slow.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.fastsae, name).default, arguments, test_utils=tests)


def test_no_tensor_of_the_size_batch_x_dictionary_is_kept(device: str):
    sae, x = joint(device=device), torch.randn(5, D_IN, device=device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sae(x)
    assert kept
    parameters = {p.data_ptr() for p in sae.parameters()}
    assert all(t.numel() < 5 * D_SAE for t in kept if t.data_ptr() not in parameters)


def test_explain_names_the_plan(device: str):
    text = explain(torch.empty(5, D_IN, device=device), joint(device=device))
    assert "backend: cuda" in text
    for part in ("encode: cublas product, groups selection", "decode: forward gather", "integration: "):
        assert part in text


def test_fp64_is_refused(device: str):
    values, W = (torch.rand(*size, dtype=torch.float64, device=device) for size in ((1, 1), (2, 2)))
    indices = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with pytest.raises(RuntimeError, match="it serves float32, float16, bfloat16, these are float64"):
        ops.sparse_decode(values, indices, W, "cuda")


def test_auto_stays_off_the_interpreter():
    assert "backend: cpu" in explain(torch.empty(5, D_IN), topk(backend="auto"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, always: the interpreter has no streams")
def test_a_step_waits_for_nothing_and_is_captured_in_a_graph():
    sae = joint(device="cuda")
    x = torch.randn(64, D_IN, device="cuda")
    for _ in range(3):  # kernels are compiled and memory is taken
        sae(x).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sae(x).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    sae.eval()(x).loss.backward()  # without dropout they are other kernels, which a graph must find loaded
    sae.zero_grad(set_to_none=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = sae(x).loss
        loss.backward()
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        for p in sae.parameters():
            p.grad.zero_()
        graph.replay()
        captured = [p.grad.clone() for p in sae.parameters()]
        sae.zero_grad(set_to_none=False)
        cuda._kept = None
        eager = sae(x).loss
        eager.backward()
        torch.testing.assert_close(loss, eager)
        for got, p in zip(captured, sae.parameters(), strict=True):
            assert_matches("captured", got, p.grad.double(), p.grad)
