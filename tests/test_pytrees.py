"""Trees that PyTorch looks for tensors in: torch.export, torch.func, hooks and tree_map see into an SAE's results."""

import dataclasses
import warnings

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree

import fastsae
from fastsae.modules import Components, SAEOutput

D, M, K = 6, 30, 4
SAES = [lambda: fastsae.TopKSAE(D, M, K), lambda: fastsae.JointSAE(D, M, K, d_embedding=5)]
BOTH = pytest.mark.parametrize("make", SAES, ids=["topk", "joint"])


def same(got: SAEOutput, expected: SAEOutput, **tolerance: float) -> None:
    torch.testing.assert_close(got.reconstruction, expected.reconstruction, **tolerance)
    torch.testing.assert_close(got.loss, expected.loss, **tolerance)
    torch.testing.assert_close(got.code.values, expected.code.values, **tolerance)
    assert torch.equal(got.code.indices, expected.code.indices)
    assert got.code.d_sae == M


@BOTH
def test_an_exported_sae_is_written_read_and_computes_the_same(make, tmp_path):
    sae, x = make().eval(), torch.randn(7, D)
    rows = torch.export.Dim("rows", min=2, max=100)
    exported = torch.export.export(sae, (x,), dynamic_shapes={"x": {0: rows}})
    torch.export.save(exported, tmp_path / "sae.pt2")
    again = torch.export.load(tmp_path / "sae.pt2").module()
    for other in (x, torch.randn(11, D)):
        same(again(other), sae(other))


@BOTH
def test_vmap_over_the_module(make):
    sae, x = make().eval(), torch.randn(5, 3, D)
    got = torch.func.vmap(sae)(x)
    assert type(got) is SAEOutput
    for i, rows in enumerate(x):
        same(_pytree.tree_map(lambda t, i=i: t[i], got), sae(rows), rtol=1e-5, atol=1e-6)


def test_vmap_over_several_saes():
    saes, x = [fastsae.TopKSAE(D, M, K) for _ in range(3)], torch.randn(9, D)
    weights, buffers = torch.func.stack_module_state(saes)  # type: ignore[arg-type]
    got = torch.func.vmap(lambda w, b: torch.func.functional_call(saes[0], (w, b), (x,)))(weights, buffers)
    for i, sae in enumerate(saes):
        same(_pytree.tree_map(lambda t, i=i: t[i], got), sae(x), rtol=1e-5, atol=1e-6)


@BOTH
def test_full_backward_hooks_see_the_gradients(make):
    sae, seen = make().eval(), []
    sae.register_full_backward_hook(lambda _, grad_input, grad_output: seen.append((grad_input, grad_output)))
    x, weight = torch.randn(7, D, requires_grad=True), torch.randn(7, D)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = sae(x)
        (output.loss + (weight * output.reconstruction).sum()).backward()
    [((for_x,), (for_reconstruction, for_loss, for_code))] = seen
    torch.testing.assert_close(for_x, x.grad)
    torch.testing.assert_close(for_reconstruction, weight)
    assert (for_loss.item(), for_code) == (1.0, None)


def test_full_backward_hooks_while_training():
    """Nobody asks for the gradient of the activations; and what is trained is what was trained without a hook."""
    results = []
    for hook in (False, True):
        torch.manual_seed(0)
        sae, seen = fastsae.TopKSAE(D, M, K), []
        if hook:
            sae.register_full_backward_hook(lambda _, grad_input, grad_output, seen=seen: seen.append(grad_output[1]))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            fastsae.Trainer(sae, fastsae.TrainerConfig(steps=3, progress=False)).fit([torch.randn(9, D)] * 3)
        assert [g.item() for g in seen] == [1.0] * (3 if hook else 0)
        results.append(dict(sae.state_dict()))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_every_result_is_taken_apart_and_put_together():
    sae, x = fastsae.JointSAE(D, M, K, d_embedding=5).eval(), torch.randn(7, D)
    output, parts = sae(x), sae.components(x)
    moved = _pytree.tree_map(lambda t: t.double(), (output, parts))
    assert [type(t) for t in moved] == [SAEOutput, Components]
    leaves: list[Tensor] = _pytree.tree_leaves((output, parts))
    assert [id(t) for t in leaves] == [
        *(id(t) for t in (output.reconstruction, output.loss, output.code.values, output.code.indices)),
        *(id(t) for t in (parts.identity, parts.linear, parts.interaction)),
    ]
    shapes = _pytree.tree_map(lambda t: tuple(t.shape), output)  # leaves need not be tensors
    assert (shapes.code.values, shapes.code.d_sae, shapes.loss) == ((7, K), M, ())


def test_what_is_returned_is_taken_for_a_dataclass_too():
    output = fastsae.TopKSAE(D, M, K)(torch.randn(7, D))
    changed = dataclasses.replace(output, loss=output.loss * 2)
    assert type(changed) is SAEOutput
    assert (changed.loss / output.loss).item() == 2
    assert changed.code is output.code
    assert [f.name for f in dataclasses.fields(output)] == ["reconstruction", "loss", "code"]


def test_paths_name_the_fields():
    output = fastsae.TopKSAE(D, M, K)(torch.randn(7, D))
    paths = [_pytree.keystr(path) for path, _ in _pytree.tree_flatten_with_path(output)[0]]
    assert paths == [".reconstruction", ".loss", ".code.values", ".code.indices"]
