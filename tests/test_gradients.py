"""Gradient buffers under odd use, and a look inside the operations for tensors of the size batch x dictionary."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from helpers import assert_matches
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fastsae
from fastsae import gradients, ops
from fastsae.backends import cpu
from fastsae.backends.cpu import blocks, decode, encode, memory, screen
from fastsae.gradients import GradientBuffers

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
CODE = torch.rand(6, 4), torch.randint(30, (6, 4))


def weight(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


def gradients_of(sae: fastsae.JointSAE, x: Tensor) -> dict[str, Tensor | None]:
    sae.zero_grad()
    sae(x).loss.backward()
    return {name: p.grad for name, p in sae.named_parameters()}


def assert_same(got: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, msg=lambda m, name=name: f"{name}: {m}")


def test_a_detached_weight_gets_no_gradient():
    W_dec, W_lin, V = weight(30, 5), weight(30, 5), weight(30, 3)
    values = CODE[0].clone().requires_grad_()
    with GradientBuffers([W_dec, W_lin, V]):
        out, z = ops.joint_decode(values, CODE[1], W_dec.detach(), W_lin, V.detach(), 2, "cpu")
        z = z + ops.pairwise_interaction(values, CODE[1], V.detach(), "cpu")
        (out.sum() + z.sum() + ops.sparse_decode(values, CODE[1], W_dec.detach(), "cpu").sum()).backward()
        ops.topk_encode(weight(6, 5), W_dec.detach(), weight(30), 2, backend="cpu")[0].sum().backward()
    assert W_dec.grad is None
    assert V.grad is None
    assert W_lin.grad is not None


def test_a_transposed_view_of_a_square_weight_is_another_layout():
    W, indices = weight(8, 8), torch.randint(8, (6, 4))
    coefficient = torch.randn(6, 8)
    (expected,) = torch.autograd.grad((ops.sparse_decode(CODE[0], indices, W.T, "reference") * coefficient).sum(), W)
    with GradientBuffers([W]):
        (ops.sparse_decode(CODE[0], indices, W.T, "cpu") * coefficient).sum().backward()
    torch.testing.assert_close(W.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_gradient_buffers_hold_the_ordinary_gradients(dtype: torch.dtype):
    sae = fastsae.JointSAE(16, 700, 6, pre_bias=True, dtype=dtype).eval()
    x = torch.randn(33, 16, dtype=dtype)
    sae(x).loss.backward()
    ordinary = {name: p.grad for name, p in sae.named_parameters()}
    buffers = GradientBuffers(sae.parameters())
    places = []
    for _ in range(2):
        with buffers:
            sae(x).loss.backward()
        for name, p in sae.named_parameters():
            torch.testing.assert_close(p.grad, ordinary[name], msg=lambda m, name=name: f"{name}: {m}")
        large = [p.grad for n, p in sae.named_parameters() if n in ("W_enc", "W_dec", "W_lin", "V")]
        places.append([g.data_ptr() for g in large])
        for g in large:
            g.fill_(torch.nan)  # what a buffer held before must not matter
    assert places[0] == places[1]


def test_gradients_of_a_weight_used_twice_add_up_in_its_buffer():
    W = torch.randn(50, 8).requires_grad_()
    values, indices = torch.rand(4, 3), torch.randint(50, (4, 3))

    def loss() -> Tensor:
        twice = ops.sparse_decode(values, indices, W) + ops.sparse_decode(2 * values, indices.flip(0), W)
        return twice.square().sum() + W.square().sum()

    loss().backward()
    expected, W.grad = W.grad, None
    with GradientBuffers([W]):
        loss().backward()
    torch.testing.assert_close(W.grad, expected)


def test_gradient_buffers_are_one_at_a_time():
    buffers = GradientBuffers([])
    with buffers, pytest.raises(RuntimeError, match="already active"), GradientBuffers([]):
        pass


LARGE = ("W_enc", "W_dec", "W_lin", "V")
Hook = Callable[[Tensor, list[Tensor]], object]  # registers one, which notes what it is given


def _on_the_tensor(W: Tensor, seen: list[Tensor]) -> object:
    return W.register_hook(lambda grad: (seen.append(grad.clone()), -2 * grad)[1])


def _after_it_is_added(W: Tensor, seen: list[Tensor]) -> object:
    return W.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))


def _after_its_node(W: Tensor, seen: list[Tensor]) -> object:
    node = get_gradient_edge(W).node
    node.register_hook(lambda _, grads: seen.append(grads[0].clone()))
    return node  # on which the hook lives


def _before_its_node(W: Tensor, seen: list[Tensor]) -> object:
    node = get_gradient_edge(W).node
    node.register_prehook(lambda grads: (seen.append(grads[0].clone()), (-2 * grads[0],))[1])
    return node


@pytest.mark.parametrize("hook", [_on_the_tensor, _after_it_is_added, _after_its_node, _before_its_node])
@pytest.mark.parametrize("name", LARGE)
def test_a_hook_on_a_weight_is_given_the_gradient_and_may_change_it(name: str, hook: Hook):
    torch.manual_seed(0)
    sae, x = fastsae.JointSAE(8, 50, 4, d_embedding=3).eval(), torch.randn(5, 8)
    seen: list[Tensor] = []
    kept = hook(getattr(sae, name), seen)
    sae.backend = "reference"
    expected = gradients_of(sae, x)
    sae.backend = "cpu"
    with GradientBuffers(sae.parameters()):
        (sae(x).loss / 2).backward()
        (sae(x).loss / 2).backward()
    assert_same({n: p.grad for n, p in sae.named_parameters()}, expected)
    halves = [s / 2 for s in seen[:1]] * 2 if hook is not _after_it_is_added else [seen[0] / 2, seen[0]]
    assert_same(dict(enumerate(seen[1:])), dict(enumerate(halves)))
    assert seen[0].any()
    del kept


def test_a_mask_on_a_weight_holds_it_in_the_trainer():
    for auxk in (0, 4):
        sae = fastsae.JointSAE(8, 50, 4, d_embedding=3)
        before = {name: getattr(sae, name).detach().clone() for name in LARGE}
        for name in LARGE:
            mask = (torch.arange(50) % 2).view(-1, 1)
            getattr(sae, name).register_hook(lambda grad, mask=mask: grad * mask)
        config = fastsae.TrainerConfig(steps=3, lr=0.1, auxk=auxk, dead_after_tokens=1, progress=False)
        fastsae.Trainer(sae, config).fit(torch.randn(3, 16, 8).unbind())
        for name, W in before.items():
            moved = (getattr(sae, name) != W).any(dim=1)
            assert moved[1::2].any(), name
            assert not moved[::2].any(), name


def _in_another_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor() as another:
        return another.submit(call).result()


@pytest.mark.parametrize("where", [lambda call: call(), _in_another_thread], ids=["same thread", "other thread"])
def test_what_torch_autograd_grad_is_asked_for_is_returned_and_changes_nothing(where: Callable[..., Any]):
    sae, x, y = fastsae.JointSAE(8, 50, 4, d_embedding=3).eval(), torch.randn(5, 8), torch.randn(6, 8)
    expected, of_y = gradients_of(sae, x), gradients_of(sae, y)
    names, weights = zip(*sae.named_parameters(), strict=True)
    with GradientBuffers(weights):
        output = sae(x)
        got = where(lambda: torch.autograd.grad(sae(y).loss, weights))
        assert all(w.grad is None for w in weights)
        output.loss.backward()
        once_more = where(lambda: torch.autograd.grad(sae(y).loss, weights[:2]))
    assert_same(dict(zip(names, got, strict=True)), of_y)
    assert_same(dict(zip(names[:2], once_more, strict=True)), {name: of_y[name] for name in names[:2]})
    assert_same({name: p.grad for name, p in sae.named_parameters()}, expected)


def test_a_claim_is_for_graphs_built_in_its_step_and_its_thread():
    W, other = weight(30, 5), weight(30, 5)

    def graph() -> Tensor:
        return ops.sparse_decode(CODE[0], CODE[1], W, "cpu").sum()

    expected = torch.autograd.grad(graph(), W)[0]
    buffers = GradientBuffers([W])
    with buffers:
        inside, place = graph(), None
        inside.backward(retain_graph=True)
        assert W.grad is buffers._buffers[W]
        place = W.grad.data_ptr()
    before = graph()
    for foreign in (before, _in_another_thread(graph), inside):  # `inside` is of a step that is over
        with buffers:
            foreign.backward()
        torch.testing.assert_close(W.grad, expected)
        assert W.grad.data_ptr() != place
    with buffers:
        inside = graph()
        _in_another_thread(inside.backward)  # autograd has threads of its own on a GPU
    assert W.grad is not None
    assert W.grad.data_ptr() == place
    torch.testing.assert_close(W.grad, expected)
    with buffers:
        inputs = graph() + ops.sparse_decode(CODE[0], CODE[1], other, "cpu").sum()
        inputs.backward(inputs=[other])
    assert W.grad is None
    torch.testing.assert_close(other.grad, expected)


def test_two_trainers_step_in_two_threads():
    x, both_in_a_step = torch.randn(4, 16, 8), Barrier(2, timeout=60)
    saes = [fastsae.TopKSAE(8, 50, 4) for _ in range(2)]
    alone = copy.deepcopy(saes)

    def train(sae: fastsae.TopKSAE) -> dict[str, Tensor]:
        config = fastsae.TrainerConfig(steps=4, lr=0.1, progress=False)
        fastsae.Trainer(sae, config).fit(x.unbind())
        return dict(sae.named_parameters())

    expected = [train(sae) for sae in alone]
    for sae in saes:
        sae.register_forward_hook(lambda *_: (both_in_a_step.wait(), None)[1])
    with ThreadPoolExecutor() as threads:
        for got, want in zip(threads.map(train, saes), expected, strict=True):
            assert_same(got, want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_forward_writes_into_the_buffers(reentrant: bool):
    sae, x = fastsae.TopKSAE(8, 50, 4), torch.randn(5, 8, requires_grad=True)
    expected = gradients_of(sae, x)
    buffers, places = GradientBuffers(sae.parameters()), set()
    for _ in range(2):
        with buffers:
            checkpoint(lambda x: sae(x).loss, x, use_reentrant=reentrant).backward()
        assert_same({name: p.grad for name, p in sae.named_parameters()}, expected)
        places.add((sae.W_enc.grad.data_ptr(), sae.W_dec.grad.data_ptr()))
        assert sae.W_dec.grad is buffers._buffers[sae.W_dec]
    assert len(places) == 1


def test_gradients_that_nobody_asked_for_are_not_made(monkeypatch: pytest.MonkeyPatch):
    sae, x = fastsae.JointSAE(8, 50, 4, d_embedding=3).eval(), torch.randn(5, 8, requires_grad=True)
    sae(x).loss.backward()
    expected, made = x.grad, []
    for module in (decode, encode):
        make = module.weight_gradient
        monkeypatch.setattr(module, "weight_gradient", lambda *a, make=make: (made.append(a), make(*a))[1])
    torch.testing.assert_close(torch.autograd.grad(sae(x).loss, x)[0], expected)
    assert not made
    torch.autograd.grad(sae(x).loss, sae.W_dec)
    assert len(made) == 1


@pytest.mark.parametrize("size", range(4096, 4096 + 640, 64))
def test_parameters_may_move_after_the_buffers_were_made(size: int):
    """A cast frees the old memory, and another parameter may come to lie there."""
    sae = fastsae.TopKSAE(64, size, 4)
    buffers, x = GradientBuffers(sae.parameters()), torch.randn(8, 64)
    with buffers:
        sae(x).loss.backward()
    sae.double().float()
    expected = gradients_of(sae, x)
    with buffers:
        sae(x).loss.backward()
    assert_same({name: p.grad for name, p in sae.named_parameters()}, expected)
    sae.bfloat16()
    with buffers:
        sae(x.bfloat16()).loss.backward()
    assert {p.grad.dtype for p in sae.parameters() if p.grad is not None} == {torch.bfloat16}


def test_a_frozen_parameter_gets_none_and_the_next_step_starts_anew():
    sae = fastsae.JointSAE(8, 50, 4, d_embedding=3).eval()
    buffers, x = GradientBuffers(sae.parameters()), torch.randn(5, 8)
    with buffers:
        sae(x).loss.backward()
    sae.W_lin.requires_grad_(False)
    expected = gradients_of(sae, x)
    with buffers:
        sae(x).loss.backward()
    assert sae.W_lin.grad is None
    assert_same({name: p.grad for name, p in sae.named_parameters()}, expected)


@every_dtype
def test_two_backwards_in_one_step_add_up_and_outside_gradients_are_ordinary(dtype: torch.dtype):
    sae = fastsae.JointSAE(8, 50, 4, d_embedding=3, dtype=dtype).eval()
    x, y = torch.randn(5, 8, dtype=dtype), torch.randn(7, 8, dtype=dtype)
    expected = {
        name: a + b for (name, a), b in zip(gradients_of(sae, x).items(), gradients_of(sae, y).values(), strict=True)
    }
    buffers = GradientBuffers(sae.parameters())
    with buffers:
        sae(x).loss.backward()
        sae(y).loss.backward()
    assert_same({name: p.grad for name, p in sae.named_parameters()}, expected)
    kept = {name: p.grad.data_ptr() for name, p in sae.named_parameters()}
    outside = gradients_of(sae, x)
    assert all(outside[name].data_ptr() != kept[name] for name in ("W_enc", "W_dec", "W_lin", "V"))


def test_an_error_in_the_step_lets_the_buffers_go():
    with pytest.raises(ZeroDivisionError), GradientBuffers([weight(3, 3)]):
        raise ZeroDivisionError
    assert gradients.active() is None


def test_a_compiled_sae_inside_the_buffers():
    torch.compiler.reset()
    sae = fastsae.JointSAE(8, 50, 4, d_embedding=3).eval()
    x = torch.randn(5, 8)
    expected = gradients_of(sae, x)
    sae.compile(fullgraph=True, backend="aot_eager")
    for _ in range(2):
        with GradientBuffers(sae.parameters()):
            sae(x).loss.backward()
        assert_same({name: p.grad for name, p in sae.named_parameters()}, expected)


@every_dtype
def test_rows_of_no_token_hold_zeros_whatever_the_buffer_held(dtype: torch.dtype):
    W = torch.randn(500, 4).to(dtype).requires_grad_()
    values, indices = torch.rand(3, 2).to(dtype), torch.tensor([[7, 8], [8, 400], [7, 9]])
    buffers = GradientBuffers([W])
    for rows in (3, 0, 3):
        with buffers:
            ops.sparse_decode(values[:rows], indices[:rows], W, "cpu").sum().backward()
        assert W.grad is not None
        used = {7, 8, 400, 9} if rows else set()
        assert set(W.grad.ne(0).any(dim=1).nonzero().flatten().tolist()) == used
        W.grad.fill_(torch.nan)


class Inside(TorchDispatchMode):
    """The bytes of the largest tensor made, inside fastsae's operations too."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.operations = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastsae":
            name = func.__name__.split(".")[0]
            self.operations.add(name)
            with self:  # a mode is off while it handles a call; the work of ours is to be seen
                return {"topk_encode": ops._topk_encode, "topk_encode_backward": ops._topk_encode_backward}.get(
                    name, lambda *arguments: getattr(cpu, name)(*arguments[:-1])
                )(*args)
        result = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.layout == torch.strided]
        self.bytes = max([self.bytes, *(t.nbytes for t in made)])
        return result


@pytest.mark.parametrize("screened", [True, False], ids=["screened", "plain"])
@pytest.mark.parametrize("plain", [True, False], ids=["autograd", "trainer"])
@pytest.mark.parametrize("architecture", ["topk", "joint"])
def test_nothing_of_batch_times_dictionary_is_made(
    architecture: str, plain: bool, screened: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(screen, "_saves_time", lambda *_: screened)
    B, D, M, k = 512, 16, 8192, 4
    monkeypatch.setattr(blocks, "PRE_ACTIVATION_BYTES", 4 * M * 16)
    monkeypatch.setattr(memory._thread, "pool", {}, raising=False)
    make = {"topk": fastsae.TopKSAE, "joint": lambda *a: fastsae.JointSAE(*a, d_embedding=8)}[architecture]
    sae, x = make(D, M, k), torch.randn(B, D)
    trainer = fastsae.Trainer(
        sae, fastsae.TrainerConfig(steps=1, auxk=8, clip_grad_norm=1.0, unit_norm_decoder=True, dead_after_tokens=5)
    )
    trainer._rows_since_fired[: M // 2] = 10
    with Inside() as inside:
        if plain:
            sae(x).loss.backward()
        else:
            output = trainer._train_step(x).output
            trainer._metrics(x, output, None, 1.0)
    assert "topk_encode" in inside.operations
    assert 4 * M * D <= inside.bytes <= 4 * B * M // 16, f"a tensor of {inside.bytes} bytes was made"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_many_small_terms_are_not_lost(dtype: torch.dtype):
    """A feature active on 20 000 tokens: a bf16 running sum would stop growing at 256."""
    B = 20_000
    x, W, b = torch.ones(B, 1), torch.full((1, 1), 0.5), torch.zeros(1)
    exact, eager, ours = (
        [t.to(kind).detach().requires_grad_() for t in (x, W, b)] for kind in (torch.float64, dtype, dtype)
    )
    for backend, leaves in (("reference", exact), ("reference", eager), ("cpu", ours)):
        ops.topk_encode(*leaves, 1, backend=backend)[0].sum().backward()
    for name, got, want, theirs in zip(("x", "W_enc", "b_enc"), ours, exact, eager, strict=True):
        assert_matches(f"d_{name}", got.grad, want.grad, theirs.grad)


@pytest.mark.parametrize("frozen", ["W_dec", "W_lin", "V"])
def test_no_gradient_of_a_frozen_weight_is_made(frozen: str):
    sae, x = fastsae.JointSAE(64, 3000, 4, d_embedding=64).eval(), torch.randn(5, 64)
    expected = gradients_of(sae, x)
    getattr(sae, frozen).requires_grad_(False)
    seen = []
    weight_gradient = decode.weight_gradient
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "weight_gradient", lambda *a: (seen.append(a), weight_gradient(*a))[1])
        got = gradients_of(sae, x)
    # W_dec and W_lin take one product each, V two.
    assert len(seen) == {"W_dec": 3, "W_lin": 3, "V": 2}[frozen]
    assert_same(got, expected | {frozen: None})


@pytest.fixture
def recycled_from_the_first_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "RECYCLED", 0)
    memory.release()


@pytest.mark.usefixtures("recycled_from_the_first_byte")
def test_a_freed_gradient_is_written_over_and_no_other():
    """Under plain autograd, where gradients belong to whoever holds them."""
    W = weight(30, 5)

    def backward(scale: float) -> Tensor:
        W.grad = None
        (scale * ops.sparse_decode(CODE[0], CODE[1], W, "cpu").sum()).backward()
        assert W.grad is not None
        return W.grad

    place = backward(1.0).data_ptr()
    assert backward(1.0).data_ptr() == place
    kept = backward(1.0)
    assert kept.data_ptr() == place
    before = kept.clone()
    row = backward(2.0)[3]  # a view holds the memory as well
    assert row.data_ptr() != place
    expected = 2 * before[3]
    del kept
    assert backward(3.0).data_ptr() == place
    torch.testing.assert_close(row, expected)
    torch.testing.assert_close(W.grad, 3 * before)


@pytest.mark.usefixtures("recycled_from_the_first_byte")
def test_gradients_accumulate_in_recycled_memory():
    W = weight(30, 5)
    for _ in range(3):
        ops.sparse_decode(CODE[0], CODE[1], W, "cpu").sum().backward()
    (expected,) = torch.autograd.grad(ops.sparse_decode(CODE[0], CODE[1], W, "reference").sum(), W)
    torch.testing.assert_close(W.grad, 3 * expected)


@pytest.mark.usefixtures("recycled_from_the_first_byte")
def test_another_model_gives_free_memory_back():
    for shape in ((30, 5), (30, 5), (40, 5)):
        ops.sparse_decode(CODE[0], CODE[1], weight(*shape), "cpu").sum().backward()
    assert set(memory._free) == {40 * 5 * 4}
    memory.release()
    assert not memory._free
