"""SAEs that can be saved and loaded again, those refused before they are trained, and what a folder is taken for."""

import typing
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fastsae
from fastsae import distributed

D, M, K = 8, 20, 3


class UnitRows(nn.Module):
    def forward(self, W: Tensor) -> Tensor:
        return W / W.norm(dim=1, keepdim=True)


class Adapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.zeros(M, 1))


class Wrapped(Tensor):
    """A tensor made of others, as DTensor is, or weights of torchao."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapped":
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: object) -> "Wrapped":
        return Wrapped(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Wrapped(args[0].inner)
        raise NotImplementedError(func)


def rows_of_one(sae: fastsae.TopKSAE, first: int, second: int) -> None:
    together = torch.randn(2 * M, D)
    sae.W_enc, sae.W_dec = (nn.Parameter(together[at : at + M]) for at in (first, second))


UNFIT = {
    "a parametrized weight": (
        lambda s: parametrize.register_parametrization(s, "W_dec", UnitRows()),
        r'W_dec is replaced by parametrizations\.W_dec\.original, .*remove_parametrizations\(sae, "W_dec"\)',
    ),
    "two parametrized weights": (
        lambda s: [parametrize.register_parametrization(s, name, UnitRows()) for name in ("W_enc", "W_dec")],
        r"W_enc, W_dec are replaced by",
    ),
    "weight_norm": (lambda s: parametrizations.weight_norm(s, "W_enc"), r'remove_parametrizations\(sae, "W_enc"\)'),
    "the older weight_norm": (
        lambda s: torch.nn.utils.weight_norm(s, "W_dec"),
        r'W_dec is replaced by W_dec_g, W_dec_v.*remove_weight_norm\(sae, "W_dec"\)',
    ),
    "the older spectral_norm": (
        lambda s: torch.nn.utils.spectral_norm(s, "W_dec"),
        r'W_dec_orig, W_dec_u.*remove_spectral_norm\(sae, "W_dec"\)',
    ),
    "pruning": (lambda s: prune.l1_unstructured(s, "W_dec", 0.5), r'prune\.remove\(sae, "W_dec"\)'),
    "parametrized statistics": (
        lambda s: parametrize.register_parametrization(s.normalizer, "mean", nn.Identity()),
        r"normalizer\.mean is replaced by normalizer\.parametrizations",
    ),
    "a buffer more": (lambda s: s.register_buffer("seen", torch.zeros(M)), r"seen is not among .*persistent=False"),
    "an adapter in a weight's place": (
        lambda s: (setattr(s, "W_dec", None), setattr(s, "W_dec_lora_up", torch.nn.Parameter(torch.zeros(3)))),
        r"W_dec is replaced by W_dec_lora_up.*merge adapters",
    ),
    "an adapter": (lambda s: setattr(s, "lora", Adapter()), r"lora\.A is not among the weights of a TopKSAE"),
    "a weight less": (lambda s: setattr(s, "b_dec", None), r"b_dec, which the config .* is missing.*pre_bias=False"),
    "another shape": (
        lambda s: setattr(s, "W_dec", nn.Parameter(torch.zeros(M + 1, D))),
        rf"W_dec is \({M + 1}, {D}\), and \({M}, {D}\) by the config",
    ),
    "tied weights": (lambda s: setattr(s, "W_enc", s.W_dec), "share their memory.*: W_dec and W_enc|W_enc and W_dec"),
    "a view of another weight": (lambda s: setattr(s, "W_enc", nn.Parameter(s.W_dec.detach())), "share their memory"),
    "overlapping weights": (lambda s: rows_of_one(s, 0, M - 1), r"share their memory.*\.clone\(\)"),
    "one row for all": (
        lambda s: setattr(s, "W_dec", nn.Parameter(torch.ones(D).expand(M, D))),
        "share their memory.*entries of W_dec",
    ),
    "no numbers": (lambda s: s.to("meta"), r"W_enc is on the meta device.*reset_parameters"),
    "no plain tensor": (
        lambda s: setattr(s, "W_enc", nn.Parameter(Wrapped(torch.ones(M, D)))),
        "W_enc is a Wrapped; expected a plain tensor",
    ),
}


@pytest.mark.parametrize(("change", "message"), UNFIT.values(), ids=UNFIT)
def test_weights_that_could_not_be_loaded_are_neither_trained_nor_saved(change: Callable, message: str, tmp_path):
    sae = fastsae.TopKSAE(D, M, K)
    trainer = fastsae.Trainer(sae, fastsae.TrainerConfig(steps=1, progress=False, run_dir=tmp_path / "run"))
    change(sae)
    for refused in (
        lambda: fastsae.Trainer(sae, fastsae.TrainerConfig(steps=1)),
        lambda: trainer.fit([torch.randn(9, D)]),
        lambda: sae.save_pretrained(tmp_path / "sae"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    assert not (tmp_path / "sae").exists()
    assert not (tmp_path / "run").exists()


def test_weights_side_by_side_in_one_tensor_are_their_own(tmp_path):
    sae = fastsae.TopKSAE(D, M, K)
    rows_of_one(sae, M, 0)
    loaded = fastsae.load(sae.save_pretrained(tmp_path))
    torch.testing.assert_close(dict(loaded.state_dict()), dict(sae.state_dict()), rtol=0, atol=0)


def test_what_the_message_says_makes_it_fit(tmp_path):
    sae = fastsae.TopKSAE(D, M, K)
    parametrize.register_parametrization(sae, "W_dec", UnitRows())
    sae.W_enc = nn.Parameter(sae.W_enc.detach().clone())
    expected = sae.W_dec.detach().clone()
    parametrize.remove_parametrizations(sae, "W_dec")
    assert torch.equal(fastsae.load(sae.save_pretrained(tmp_path)).W_dec, expected)


def test_a_weight_put_in_place_later_is_not_left_untrained():
    sae = fastsae.TopKSAE(D, M, K)
    trainer = fastsae.Trainer(sae, fastsae.TrainerConfig(steps=1, progress=False))
    sae.W_dec = nn.Parameter(sae.W_dec.detach().clone())
    with pytest.raises(ValueError, match=r"W_dec was put in place of .*; make the Trainer afterwards"):
        trainer.fit([torch.randn(9, D)])


# ---- classes of others ----------------------------------------------------------------------------------------------


class Louder(fastsae.TopKSAE):
    """Computes something else, with weights of the same names."""

    def encode(self, x: Tensor, k: int | None = None) -> fastsae.SparseCode:
        return super().encode(2 * x, k)


class Gated(fastsae.TopKSAE):
    architecture = "gated"

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.gate = nn.Parameter(torch.ones_like(self.b_enc))


def test_a_class_that_has_no_architecture_of_its_own_is_warned_of(tmp_path):
    sae = Louder(D, M, K).eval()
    with pytest.warns(UserWarning, match=r"will make a TopKSAE of it\. Load it by Louder\.from_pretrained"):
        sae.save_pretrained(tmp_path)
    x = torch.randn(5, D)
    assert torch.equal(Louder.from_pretrained(tmp_path)(x).reconstruction, sae(x).reconstruction)
    assert type(fastsae.load(tmp_path)) is fastsae.TopKSAE


def test_a_class_with_an_architecture_of_its_own(tmp_path):
    sae = Gated(D, M, K)
    sae.gate.data.fill_(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sae.save_pretrained(tmp_path)
    assert torch.equal(Gated.from_pretrained(tmp_path).gate, sae.gate)
    with pytest.raises(ValueError, match=r"'gated'; known here: .* loads it by its from_pretrained"):
        fastsae.load(tmp_path)


@pytest.mark.parametrize("name", ["topk", "joint", "gated"])
def test_a_class_that_could_not_be_loaded_by_its_architecture(name: str, tmp_path):
    class Theirs(Gated):
        architecture = name

        def __init__(self, d_in: int, d_sae: int, k: int, extent: int = 0, **options) -> None:
            if name == "gated" and not extent:
                raise TypeError("Theirs needs extent")
            super().__init__(d_in, d_sae, k, **options)

    message = {
        "topk": "gate is not among the weights of a TopKSAE",
        "joint": "architecture 'joint' is that of JointSAE, which a Theirs is not",
        "gated": r"Theirs cannot be made from its config.*Theirs needs extent",
    }[name]
    sae = Theirs(D, M, K, extent=1)
    with pytest.raises(ValueError, match=message):
        sae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        fastsae.Trainer(sae, fastsae.TrainerConfig(steps=1))


# ---- folders --------------------------------------------------------------------------------------------------------


def run(folder: Path, steps: int = 2) -> fastsae.TopKSAE:
    sae = fastsae.TopKSAE(D, M, K)
    config = fastsae.TrainerConfig(steps=steps, progress=False, run_dir=folder, checkpoint_every=1)
    fastsae.Trainer(sae, config).fit([torch.randn(9, D)] * 2)
    return sae


def test_the_folder_of_a_run_is_that_of_its_sae(tmp_path):
    sae = run(tmp_path)
    for loaded in (fastsae.load(str(tmp_path)), fastsae.TopKSAE.from_pretrained(tmp_path)):
        torch.testing.assert_close(dict(loaded.state_dict()), dict(sae.state_dict()), rtol=0, atol=0)


def test_an_sae_beside_a_folder_of_that_name_is_the_one_meant(tmp_path):
    outer = fastsae.TopKSAE(D, M, K)
    outer.save_pretrained(tmp_path)
    fastsae.TopKSAE(D, M, K).save_pretrained(tmp_path / "sae")
    assert torch.equal(fastsae.load(tmp_path).W_dec, outer.W_dec)


def unfinished(folder: Path) -> None:
    run(folder)
    for file in (folder / "sae").iterdir():
        file.unlink()
    (folder / "sae").rmdir()


def of_several_ranks(folder: Path) -> None:
    step = folder / "checkpoints" / "step_00000002"
    step.mkdir(parents=True)
    (step / "state.json").write_text("{}")


FOLDERS = {
    "none": (lambda f: None, "there is no such folder"),
    "empty": (lambda f: f.mkdir(), "there is no config.json in it$"),
    "a file": (lambda f: f.write_bytes(b""), "is a file; give the folder.*fastsae convert"),
    "unfinished": (unfinished, r"a run that has not finished\. Resume it.*fastsae\.load\('.*step_00000002'\)"),
    "ranks": (of_several_ranks, r"a run that has not finished.*distributed\.consolidate\('.*step_00000002', folder\)"),
    "their folder": (
        lambda f: (f.mkdir(), (f / "cfg.json").touch(), save_file({"W": torch.ones(2)}, f / "a.safetensors")),
        r"no config\.json in it.*`fastsae convert SOURCE TARGET --to fastsae`",
    ),
    "a store": (
        lambda f: (f.mkdir(), (f / "index.json").write_text("{}")),
        r"store of activations: fastsae\.activations\.ActivationStore\('",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), FOLDERS.values(), ids=FOLDERS)
@pytest.mark.parametrize("load", [fastsae.load, fastsae.TopKSAE.from_pretrained], ids=["load", "from_pretrained"])
def test_a_folder_without_an_sae_is_told_by_what_it_is(make: Callable, message: str, load: Callable, tmp_path):
    make(tmp_path / "given")
    with pytest.raises(FileNotFoundError, match=f"given holds no saved SAE: .*{message}"):
        load(tmp_path / "given")


def test_the_config_of_another_package(tmp_path):
    (tmp_path / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoderTopK"}}')
    with pytest.raises(ValueError, match=r"config\.json is no fastsae config.*fastsae convert"):
        fastsae.load(tmp_path)


def test_what_is_said_of_a_checkpoint_is_so(tmp_path):
    unfinished(tmp_path)
    step = tmp_path / "checkpoints" / "step_00000002"
    consolidated = fastsae.load(distributed.consolidate(step, tmp_path / "made"))
    assert torch.equal(fastsae.load(step).W_dec, consolidated.W_dec)


# ---- what is loaded is read, until it is trained ----


@pytest.fixture
def loaded(tmp_path) -> fastsae.JointSAE:
    return fastsae.load(fastsae.JointSAE(8, 40, 4).save_pretrained(tmp_path))


def test_results_of_a_loaded_sae_have_no_graph(loaded):
    x = torch.randn(5, 8)
    output, code = loaded(x), loaded.encode_raw(x)
    parts = loaded.components(x)
    for t in (output.loss, output.reconstruction, code.values, loaded.reconstruct(x), loaded.decode(code)):
        assert not t.requires_grad
    assert not any(t.requires_grad for t in (parts.identity, parts.linear, parts.interaction, loaded.hidden(code)))
    assert all(p.requires_grad for p in loaded.parameters())


def test_a_graph_to_activations_is_built(loaded):
    x = torch.randn(5, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(loaded.reconstruct(x).sum(), x)
    assert dx.abs().sum() > 0
    (dx,) = torch.autograd.grad(loaded(x).loss, x)
    assert dx.abs().sum() > 0


@pytest.mark.parametrize("frozen", [False, True])
def test_a_loaded_sae_is_trained(frozen, loaded):
    loaded.W_dec.requires_grad_(not frozen)
    before = {name: p.detach().clone() for name, p in loaded.named_parameters()}
    config = fastsae.TrainerConfig(steps=2, progress=False)
    fastsae.Trainer(loaded, config).fit([torch.randn(16, 8), torch.randn(16, 8)])
    same = {name for name, p in loaded.named_parameters() if torch.equal(p, before[name])}
    assert same == ({"W_dec"} if frozen else set())


def test_in_train_mode_a_loaded_sae_is_as_any_other(loaded):
    with torch.no_grad():
        expected = loaded(torch.ones(2, 8)).loss
    loss = loaded.train().eval()(torch.ones(2, 8)).loss
    assert torch.equal(loss, expected)
    loss.backward()
    assert loaded.W_enc.grad is not None


def test_an_sae_says_what_it_is(loaded):
    sae = fastsae.TopKSAE(8, 40, 4, dtype=torch.bfloat16)
    assert repr(sae) == (
        "TopKSAE(\n  d_in=8, d_sae=40, k=4, pathways: identity\n  bfloat16 on cpu, backend='auto', 688 parameters\n"
        "  (normalizer): Normalizer(not measured: activations stay as they are)\n)"
    )
    loaded.W_dec.requires_grad_(False)
    loaded.normalizer.measure(torch.randn(100, 8) * torch.arange(1, 9), "zscore")
    said = repr(loaded)
    assert "linear (k_integration=2), interaction (k_integration=2, d_embedding=128, dropout=0.15)" in said
    assert "frozen: W_dec" in said
    assert "mean and scale by dimension, scales 1" in said or "scales 0.9" in said
    loaded.normalizer.mean.zero_()
    loaded.normalizer.scale.fill_(2.5)
    assert "Normalizer(one scale, 2.5)" in repr(loaded)
    assert "on meta" in repr(fastsae.TopKSAE(8, 40, 4, device="meta"))


def test_editors_know_what_a_call_returns():
    hints = typing.get_type_hints(fastsae.TopKSAE)
    assert typing.get_args(hints["__call__"])[1].__name__ == "SAEOutput"


def test_what_an_sae_reads_travels_with_it(tmp_path):
    sae = fastsae.TopKSAE(8, 40, 4)
    assert fastsae.load(sae.save_pretrained(tmp_path / "none")).reads is None
    sae.reads = {"model": "gpt2", "hook": "blocks.6.hook_resid_pre", "text": "a.txt", "versions": {"fastsae": "0.1.0"}}
    again = fastsae.load(sae.save_pretrained(tmp_path / "some"))
    assert again.reads == sae.reads
    assert "of blocks.6.hook_resid_pre of model gpt2 on a.txt" in repr(again)
    assert fastsae.SequentialSAE.on(again, k_integration=2).reads == sae.reads
    sae.reads = {"activations": "/data/x.npy"}
    assert "of activations in /data/x.npy" in repr(sae)
    config = tmp_path / "some" / "config.json"
    config.write_text(config.read_text().replace('"reads": {', '"reads": 3, "other": {'))
    with pytest.raises(ValueError, match=r"config\.json is damaged: reads says what the SAE was trained on"):
        fastsae.load(tmp_path / "some")
