"""SAEs in each other's files: what is read and written computes the same, in the other packages too."""

import json
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastsae
from fastsae import cli
from fastsae.integrations import convert
from fastsae.integrations.convert.form import read_pickled

D, M, K = 24, 200, 6


def raw(rows: int = 300) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 3 * torch.randn(rows, D, generator=generator) + 2 * torch.randn(D, generator=generator)


def made(folder: Path, joint: bool = False, kind: str = "zscore", **options) -> fastsae.TopKSAE:
    """An SAE with statistics of its own and weights far from their initialisation, saved to `folder`."""
    torch.manual_seed(0)
    sae = (fastsae.JointSAE if joint else fastsae.TopKSAE)(D, M, K, **options)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    sae.normalizer.measure(raw(), kind)
    sae.eval().save_pretrained(folder)
    return sae


def target(tmp_path: Path, form: str) -> Path:
    return tmp_path / f"{form}.pt" if form == "openai" else tmp_path / form


def theirs(form: str, path: Path, x: Tensor) -> Tensor:
    """The reconstruction by the package itself; of OpenAI's, which cannot be installed, by its equations."""
    if form == "sae_lens":
        from fastsae.integrations import sae_lens

        sae_lens.register()
        return pytest.importorskip("sae_lens").SAE.load_from_disk(path)(x)
    if form == "dictionary_learning":
        pytest.importorskip("dictionary_learning")
        from dictionary_learning.trainers.top_k import AutoEncoderTopK

        return AutoEncoderTopK.from_pretrained(path / "ae.pt")(x)
    if form == "sparsify":
        return pytest.importorskip("sparsify").SparseCoder.load_from_disk(path)(x).sae_out
    state = torch.load(path, weights_only=True)
    assert (state["activation"], state["activation_state_dict"]["postact_fn"]) == ("TopK", "ReLU")
    pre = F.linear(x - state["pre_bias"], state["encoder.weight"], state["latent_bias"])
    values, indices = pre.topk(state["activation_state_dict"]["k"])
    return (
        F.linear(torch.zeros_like(pre).scatter(1, indices, values.relu()), state["decoder.weight"]) + state["pre_bias"]
    )


def assert_equal(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


OTHERS = [name for name in convert.FORMATS if name != "fastsae"]
DL = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "b_dec"}
THEIR_NAMES = {
    "sae_lens": {name: name for name in DL},
    "dictionary_learning": DL,
    "sparsify": DL | {"W_dec": "W_dec"},
    "openai": DL | {"b_enc": "latent_bias", "b_dec": "pre_bias"},
}
TURNED = {("sae_lens", "W_enc"), ("dictionary_learning", "W_dec"), ("openai", "W_dec")}


def weights_file(out: Path) -> Path:
    return out if out.is_file() else next(p for p in out.iterdir() if p.suffix in (".safetensors", ".pt"))


def tensors_of(out: Path) -> dict[str, Tensor]:
    file = weights_file(out)
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)


def change_tensors(out: Path, change: Callable[[dict], dict]) -> None:
    changed, file = change(tensors_of(out)), weights_file(out)
    save_file({n: t.clone() for n, t in changed.items()}, file) if file.suffix != ".pt" else torch.save(changed, file)


def change_config(out: Path, change: dict) -> None:
    """None takes a value out."""
    file = next(path for path in (out / "cfg.json", out / "config.json") if path.is_file())
    config = json.loads(file.read_text())
    options = config.get("trainer", config)
    options |= change
    for name in [name for name, value in change.items() if value is None]:
        del options[name]
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["zscore", "scale", "none"])
@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize("form", OTHERS)
def test_a_topk_sae_in_every_form(form, pre_bias, kind, tmp_path):
    sae, out = made(tmp_path / "source", kind=kind, pre_bias=pre_bias), target(tmp_path, form)
    notes = convert.convert(tmp_path / "source", out, form)
    assert convert.detect(out) == form
    expected = sae.reconstruct(raw())
    assert_equal(convert.read(out).reconstruct(raw()), expected)
    assert_equal(theirs(form, out, raw()), expected)
    assert bool(notes) == (form == "openai")


@pytest.mark.parametrize("options", [{}, {"pre_bias": True}, {"linear": False}, {"interaction": False}], ids=str)
def test_a_joint_sae_in_saelens(options, tmp_path):
    sae = made(tmp_path / "source", joint=True, k_integration=4, d_embedding=7, **options)
    (note,) = convert.convert(tmp_path / "source", tmp_path / "out", "sae_lens")
    assert "register()" in note
    expected, back = sae.reconstruct(raw()), convert.read(tmp_path / "out")
    assert type(back) is fastsae.JointSAE
    assert back.k_integration == 4
    assert_equal(back.reconstruct(raw()), expected)
    assert_equal(theirs("sae_lens", tmp_path / "out", raw()), expected)


def test_a_sequential_sae_is_a_joint_one_elsewhere(tmp_path):
    sae = fastsae.SequentialSAE.on(made(tmp_path / "base"), d_embedding=5)
    with torch.no_grad():
        sae.V += 0.1
    sae.eval().save_pretrained(tmp_path / "source")
    convert.convert(tmp_path / "source", tmp_path / "out", "sae_lens")
    assert_equal(convert.read(tmp_path / "out").reconstruct(raw()), sae.reconstruct(raw()))


@pytest.mark.parametrize("form", [name for name in OTHERS if name != "sae_lens"])
def test_forms_that_cannot_hold_a_joint_sae_say_so(form, tmp_path):
    made(tmp_path / "source", joint=True)
    with pytest.raises(ValueError, match=f"{form} has no place for the integration of a JointSAE.*fastsae, sae_lens"):
        convert.convert(tmp_path / "source", target(tmp_path, form), form)
    assert not target(tmp_path, form).exists()


@pytest.mark.parametrize("first", OTHERS)
@pytest.mark.parametrize("second", list(convert.FORMATS))
def test_from_every_form_to_every_other(first, second, tmp_path):
    sae, between = made(tmp_path / "source"), target(tmp_path, first)
    convert.convert(tmp_path / "source", between, first)
    (tmp_path / "last").mkdir()
    out = target(tmp_path / "last", second)
    convert.convert(between, out, second)
    assert_equal(convert.read(out).reconstruct(raw()), sae.reconstruct(raw()))


@pytest.mark.parametrize("options", [{}, {"rescale_acts_by_decoder_norm": False}, {"apply_b_dec_to_input": False}])
def test_training_checkpoints_of_saelens(options, tmp_path):
    """Decoder norms are folded, and a b_dec that is not subtracted becomes part of b_enc."""
    lens = pytest.importorskip("sae_lens")
    torch.manual_seed(0)
    sae = lens.TopKTrainingSAE(lens.TopKTrainingSAEConfig(d_in=D, d_sae=M, k=K, **options))
    with torch.no_grad():
        sae.W_dec *= 10 * torch.rand(M, 1)
        sae.b_dec.normal_()
        sae.b_enc.normal_()
    sae.save_model(tmp_path / "training")
    assert_equal(convert.read(tmp_path / "training").reconstruct(raw()), sae(raw()))


def test_bf16_weights_stay_bf16_where_nothing_is_folded(tmp_path):
    sae = made(tmp_path / "a", kind="none").bfloat16()
    sae.save_pretrained(tmp_path / "b")
    assert convert.convert(tmp_path / "b", tmp_path / "c", "sae_lens") == []
    back = convert.read(tmp_path / "c")
    assert back.W_enc.dtype == torch.bfloat16
    assert torch.equal(back.reconstruct(raw()), sae.reconstruct(raw()))


def test_statistics_are_not_rounded_away_beside_bf16_weights(tmp_path):
    """A dimension of mean 60 and standard deviation 0.5, as residual streams have them."""
    sae, x = fastsae.TopKSAE(D, M, K), raw()
    x[:, 3] = 60 + 0.5 * torch.randn(len(x))
    sae.normalizer.measure(x, "zscore")
    sae = sae.bfloat16().eval()
    sae.save_pretrained(tmp_path / "a")
    (note,) = convert.convert(tmp_path / "a", tmp_path / "b", "sae_lens")
    assert "written in fp32" in note
    expected = sae.float().reconstruct(x)  # the same weights, computed in fp32
    assert_equal(convert.read(tmp_path / "b").reconstruct(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_folds_are_rounded_once_and_know_rows_of_zeros(dtype, tmp_path):
    lens = pytest.importorskip("sae_lens")
    torch.manual_seed(0)
    sae = lens.TopKTrainingSAE(lens.TopKTrainingSAEConfig(d_in=D, d_sae=M, k=K)).to(dtype=dtype)
    with torch.no_grad():
        sae.W_dec *= 10 * torch.rand(M, 1).to(dtype)
        sae.W_dec[5] = 0
    sae.save_model(tmp_path)
    found = convert.read(tmp_path)
    norms = sae.W_dec.double().norm(dim=1)
    assert found.W_enc.dtype == dtype
    assert torch.equal(found.W_enc, (sae.W_enc.T.double() * norms.clamp(min=1e-8).unsqueeze(1)).to(dtype))
    assert found.W_dec.isfinite().all()


def test_what_is_known_of_the_activations_goes_along(tmp_path):
    made(tmp_path / "run" / "sae")
    data = {"model": "gpt2", "hook": "blocks.6.hook_resid_pre", "context": 128, "text": "stdlib"}
    (tmp_path / "run" / "data.json").write_text(json.dumps(data))
    convert.convert(tmp_path / "run", tmp_path / "lens", "sae_lens")
    metadata = json.loads((tmp_path / "lens" / "cfg.json").read_text())["metadata"]
    expected = {"model_name": "gpt2", "hook_name": "blocks.6.hook_resid_pre", "context_size": 128}
    assert expected.items() <= metadata.items()
    assert "prepend_bos" not in metadata, "nobody recorded it"
    convert.convert(tmp_path / "lens", tmp_path / "dl", "dictionary_learning")
    trainer = json.loads((tmp_path / "dl" / "config.json").read_text())["trainer"]
    assert (trainer["lm_name"], trainer["submodule_name"]) == ("gpt2", "blocks.6.hook_resid_pre")


def test_openai_saes_go_on_to_see_normalised_tokens(tmp_path):
    made(tmp_path / "source")
    convert.convert(tmp_path / "source", tmp_path / "a.pt", "openai")
    with pytest.warns(UserWarning, match="see each token less its mean"):
        convert.read(tmp_path / "a.pt")
    (note,) = convert.convert(tmp_path / "a.pt", tmp_path / "b.pt", "openai")
    assert "see each token less its mean" in note, "its loader is right to normalise"


def test_what_is_left_behind_is_said(tmp_path):
    made(tmp_path / "source")
    convert.convert(tmp_path / "source", tmp_path / "dl", "dictionary_learning")
    state = torch.load(tmp_path / "dl" / "ae.pt", weights_only=True)
    torch.save(state | {"threshold": torch.tensor(0.7)}, tmp_path / "dl" / "ae.pt")
    (tmp_path / "dl" / "config.json").unlink()
    notes = convert.convert(tmp_path / "dl", tmp_path / "out", "sparsify")
    assert ["threshold of 0.7 is left behind" in note for note in notes] == [True, False]
    assert "config.json is missing" in notes[1]


def test_what_an_sae_reads_is_told_in_every_form_that_has_a_place(tmp_path):
    sae = made(tmp_path / "plain")
    sae.reads = {"model": "gpt2", "hook": "blocks.6.hook_resid_pre", "text": "a.txt", "context": 128}
    sae.save_pretrained(tmp_path / "source")
    for form in ("sae_lens", "dictionary_learning", "fastsae"):
        convert.convert(tmp_path / "source", tmp_path / form, form)
        convert.convert(tmp_path / form, tmp_path / f"{form} again", "fastsae")
        reads = fastsae.load(tmp_path / f"{form} again").reads
        assert (reads["model"], reads["hook"]) == ("gpt2", "blocks.6.hook_resid_pre"), form
    assert reads == sae.reads
    metadata = json.loads((tmp_path / "sae_lens" / "cfg.json").read_text())["metadata"]
    assert (metadata["model_name"], metadata["context_size"]) == ("gpt2", 128)


# ---- what cannot be ----


def test_nothing_is_written_over(tmp_path):
    made(tmp_path / "source")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").touch()
    for form in convert.FORMATS:
        with pytest.raises(FileExistsError, match="there holds something already"):
            convert.convert(tmp_path / "source", tmp_path / "there", form)


@pytest.mark.parametrize("to", convert.FORMATS)
@pytest.mark.parametrize("before", convert.FORMATS)
def test_an_sae_is_overwritten_when_asked_for(before: str, to: str, tmp_path):
    made(tmp_path / "source")
    source, target = tmp_path / "source", tmp_path / "there"
    convert.convert(source, target, before)
    if to == "openai" and before != to:
        with pytest.raises(IsADirectoryError, match="openai's form is one file"):
            convert.convert(source, target, to, overwrite=True)
        assert convert.detect(target) == before
        return
    convert.convert(source, target, to, overwrite=True)
    assert convert.detect(target) == to
    assert_equal(convert.read(target).reconstruct(raw()), convert.read(source).reconstruct(raw()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "there"]


def test_what_is_no_sae_is_not_overwritten(tmp_path, monkeypatch):
    made(tmp_path / "source")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("dear")
    run = tmp_path / "run"
    made(run / "sae")
    for target, message in (
        (tmp_path / "there", "holds something that is no SAE"),
        (run, r"holds folders beside an SAE \(sae\)"),
        (tmp_path / "source", "lie in one another"),
        (tmp_path, "lie in one another"),
    ):
        with pytest.raises(FileExistsError, match=message):
            convert.convert(tmp_path / "source", target, "sae_lens", overwrite=True)
    assert (tmp_path / "there" / "mine").read_text() == "dear"
    convert.convert(tmp_path / "source", tmp_path / "kept", "sparsify")
    with monkeypatch.context() as broken:
        broken.setattr(convert.FORMATS["sae_lens"], "write", lambda *_: pytest.fail("a full disk"))
        with pytest.raises(BaseException, match="a full disk"):
            convert.convert(tmp_path / "source", tmp_path / "kept", "sae_lens", overwrite=True)
    assert convert.detect(tmp_path / "kept") == "sparsify"


def test_nothing_is_unpickled(tmp_path):
    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harmed",)

    (tmp_path / "dl").mkdir()
    for file in (tmp_path / "dl" / "ae.pt", tmp_path / "openai.pt"):
        file.write_bytes(pickle.dumps(Harm()))
        torch.save({"encoder.weight": Harm()}, file.with_suffix(".zip"))
        file.with_suffix(".zip").replace(file)
        with pytest.raises(ValueError, match=r"cannot be read as tensors.*holds code, which is not run"):
            convert.read(file.parent if file.name == "ae.pt" else file)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("form", "file", "change", "message"),
    [
        ("sae_lens", "cfg.json", {"architecture": "jumprelu"}, "is of architecture 'jumprelu'; expected topk"),
        (
            "sae_lens",
            "cfg.json",
            {"normalize_activations": "constant_norm_rescale"},
            "= 'constant_norm_rescale', which happens",
        ),
        ("sae_lens", "cfg.json", {"k": None}, "lacks k"),
        ("sparsify", "cfg.json", {"activation": "groupmax"}, "has activation = 'groupmax'"),
        ("sparsify", "cfg.json", {"transcode": True}, "has transcode = True"),
        ("sparsify", "cfg.json", {"k": 5000}, "TopKSAEConfig.k: expected between 1 and d_sae = 200; got 5000"),
        ("sparsify", "cfg.json", {"signed": True}, "has signed = True"),
        ("sparsify", "cfg.json", {"k": 6.5}, r"cfg\.json: expected a whole number for k; got 6\.5"),
        ("sae_lens", "cfg.json", {"k": [6]}, r"cfg\.json: expected a whole number for k; got \[6\]"),
        ("sae_lens", "cfg.json", {"metadata": "gpt2"}, r"cfg\.json, metadata: expected values by name; got str"),
        ("dictionary_learning", "config.json", {"trainer": {"dict_class": "BatchTopKSAE"}}, "is of a BatchTopKSAE"),
    ],
)
def test_what_is_not_a_topk_sae_is_refused(form, file, change, message, tmp_path):
    made(tmp_path / "source")
    convert.convert(tmp_path / "source", tmp_path / "out", form)
    path = tmp_path / "out" / file
    changed = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))
    with pytest.raises(ValueError, match=message):
        convert.read(tmp_path / "out")


def test_openai_activations_other_than_topk_are_refused(tmp_path):
    made(tmp_path / "source")
    convert.convert(tmp_path / "source", tmp_path / "a.pt", "openai")
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save(state | {"activation": "ReLU", "activation_state_dict": {}}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="has the activation ReLU; expected TopK followed by ReLU"):
        convert.read(tmp_path / "b.pt")
    del state["pre_bias"]
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="lacks pre_bias; it holds"):
        convert.read(tmp_path / "c.pt")


def test_weights_of_another_shape_are_named(tmp_path):
    made(tmp_path / "source")
    convert.convert(tmp_path / "source", tmp_path / "a.pt", "openai")
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save(state | {"latent_bias": torch.zeros(3)}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"the weights do not fit one another.*b_enc"):
        convert.read(tmp_path / "b.pt")


@pytest.mark.parametrize(
    ("form", "file"), [("sae_lens", "cfg.json"), ("sparsify", "cfg.json"), ("dictionary_learning", "config.json")]
)
@pytest.mark.parametrize("text", ["null", "[]", "3"])
def test_a_config_that_is_no_object_is_named(form, file, text, tmp_path):
    made(tmp_path / "source")
    convert.convert(tmp_path / "source", tmp_path / "out", form)
    (tmp_path / "out" / file).write_text(text)
    with pytest.raises(ValueError, match=f"{file}: expected values by name; got "):
        convert.read(tmp_path / "out")


@pytest.mark.parametrize(
    "value", [torch.zeros(3), torch.zeros(M, D, dtype=torch.int64), torch.zeros(M, D).to(torch.float8_e4m3fn), None]
)
def test_weights_that_are_none_are_named(value, tmp_path):
    made(tmp_path / "source")
    convert.convert(tmp_path / "source", tmp_path / "a.pt", "openai")
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save(state | {"encoder.weight": value}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b\.pt: expected encoder\.weight to be a float tensor of 2 dimensions; got"):
        convert.read(tmp_path / "b.pt")


def test_a_file_for_a_folder_and_a_folder_for_a_file(tmp_path):
    made(tmp_path / "source")
    (tmp_path / "empty").mkdir()
    with pytest.raises(IsADirectoryError, match="openai's form is one file, such as"):
        convert.convert(tmp_path / "source", tmp_path / "empty", "openai")
    convert.convert(tmp_path / "source", tmp_path / "dl", "dictionary_learning")
    torch.save({"sae.W_enc": torch.zeros(M, D)}, tmp_path / "ae_10.pt")  # of JointTrainer
    for file in (tmp_path / "dl" / "ae.pt", tmp_path / "ae_10.pt"):
        with pytest.raises(
            ValueError, match=r"is a file of dictionary_learning; give a folder in which it is named ae\.pt"
        ):
            convert.read(file)


@pytest.mark.parametrize("package", ["sae_lens", "dictionary_learning", "sparsify"])
def test_a_package_that_is_not_installed_is_named(package):
    script = f"import sys; sys.modules[{package!r}] = None; import fastsae.integrations.{package}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: fastsae.integrations.{package} needs ")
    assert "pip install " in last


def test_what_cannot_be_opened_is_not_called_damaged(tmp_path):
    with pytest.raises(IsADirectoryError):
        read_pickled(tmp_path)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="root may write anywhere but there")
def test_a_target_that_cannot_be_written_is_named(tmp_path):
    made(tmp_path / "source")
    for form in OTHERS:
        with pytest.raises(OSError, match="/proc"):
            convert.convert(tmp_path / "source", target(Path("/proc"), form), form)


def test_what_is_no_sae_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        convert.read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no SAE in a known form\. Expected one of fastsae: config\.json"):
        convert.read(tmp_path)
    made(tmp_path / "source")
    with pytest.raises(ValueError, match="there is no form 'saelens'; expected one of fastsae, sae_lens"):
        convert.convert(tmp_path / "source", tmp_path / "out", "saelens")


def test_the_command(tmp_path, monkeypatch, capsys):
    made(tmp_path / "source")
    monkeypatch.setattr(sys, "argv", ["fastsae", "convert", f"{tmp_path}/source", f"{tmp_path}/a.pt", "--to", "openai"])
    cli.main()
    out = capsys.readouterr().out
    assert "source (fastsae) -> " in out
    assert "autoencoder.normalize = False" in out


# ---- precision and sizes ----


@pytest.mark.parametrize("wide", ["W_enc", "b_enc", "W_dec", "b_dec"])
@pytest.mark.parametrize("form", OTHERS)
def test_no_weight_is_rounded_to_the_dtype_of_another(form, wide, tmp_path):
    """Three in bf16 and one in fp32, which bf16 would round: 100.3 to 100.5."""
    made(tmp_path / "source", kind="none").bfloat16().save_pretrained(tmp_path / "source")
    out = target(tmp_path, form)
    convert.convert(tmp_path / "source", out, form)
    name = THEIR_NAMES[form][wide]
    change_tensors(out, lambda tensors: tensors | {name: tensors[name].float() + 100.3})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = convert.read(out)
    expected = tensors_of(out)[name]
    turned = expected.T if (form, wide) in TURNED else expected
    assert torch.equal(getattr(found, wide), turned)
    assert {p.dtype for p in found.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("form", "change"),
    [
        ("sae_lens", {"d_in": 7}),
        ("sae_lens", {"d_sae": 7}),
        ("sae_lens", {"d_sae": None, "expansion_factor": 7}),
        ("sae_lens", {"activation_fn_kwargs": {"k": 7}}),
        ("sparsify", {"d_in": 7}),
        ("sparsify", {"num_latents": 7}),
        ("sparsify", {"num_latents": 0, "expansion_factor": 7}),
        ("dictionary_learning", {"activation_dim": 7}),
        ("dictionary_learning", {"dict_size": 7}),
        ("dictionary_learning", {"k": 7}),
    ],
    ids=str,
)
def test_sizes_that_contradict_are_named(form, change, tmp_path):
    made(tmp_path / "source")
    convert.convert(tmp_path / "source", tmp_path / "out", form)
    change_config(tmp_path / "out", change)
    ((name, value),) = [item for item in change.items() if item[1]]
    if isinstance(value, dict):  # the k of the activation, and then the other one is named
        ((name, value),) = value.items()
    right = {"d_in": D, "activation_dim": D, "k": K, "expansion_factor": M / D}.get(name, M)
    with pytest.raises(ValueError, match=rf"\.json: {name} is .*one of them is of another SAE") as caught:
        convert.read(tmp_path / "out")
    assert {str(value), str(right)} <= set(re.findall(r"[\d.]*\d", str(caught.value)))


def test_a_factor_beside_the_size_says_nothing(tmp_path):
    """sparsify leaves its default of 32 there."""
    sae = made(tmp_path / "source")
    convert.convert(tmp_path / "source", tmp_path / "out", "sparsify")
    change_config(tmp_path / "out", {"expansion_factor": 32, "k": float(K)})
    assert_equal(convert.read(tmp_path / "out").reconstruct(raw()), sae.reconstruct(raw()))


def test_joint_dictionaries_that_contradict_their_trainer(tmp_path):
    sae = fastsae.JointSAE(D, M, K)
    options = {"d_in": D, "d_sae": M, "k": K}
    tmp_path.joinpath("config.json").write_text(
        json.dumps({"trainer": {"dict_class": "fastsae.JointSAE", "sae": options, "k": 7}})
    )
    torch.save({f"sae.{name}": t for name, t in sae.state_dict().items()}, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match=r"config\.json: k is 7, but 6 in .*config\.json, sae"):
        convert.read(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", list(convert.FORMATS))
def test_weights_that_are_not_finite_are_named(form, value, tmp_path):
    sae = made(tmp_path / "source", kind="none")
    with torch.no_grad():
        sae.W_dec[3, 5] = value
    if form == "fastsae":
        sae.save_pretrained(out := tmp_path / "bad")
    else:
        convert.convert(tmp_path / "source", out := target(tmp_path, form), form)
        theirs, W_dec = THEIR_NAMES[form]["W_dec"], sae.W_dec.detach()
        stored = W_dec.T.contiguous() if (form, "W_dec") in TURNED else W_dec
        change_tensors(out, lambda tensors: tensors | {theirs: stored})
    with pytest.raises(
        ValueError,
        match=rf"{weights_file(out).name}: W_dec .*holds NaN or infinity in 1 of 4800 places, first at \[3, 5\]",
    ):
        convert.convert(out, tmp_path / "never", "fastsae")


def test_a_fold_that_leaves_the_dtype_is_not_written(tmp_path):
    lens = pytest.importorskip("sae_lens")
    sae = lens.TopKTrainingSAE(lens.TopKTrainingSAEConfig(d_in=D, d_sae=M, k=K)).half()
    with torch.no_grad():
        sae.W_dec *= 60000
        sae.b_enc += 60000
    sae.save_model(tmp_path)
    with pytest.raises(ValueError, match=r"sae_weights\.safetensors: \w+ \(in torch\.float16\) holds NaN or infinity"):
        convert.read(tmp_path)


@pytest.mark.parametrize("form", OTHERS)
def test_weights_that_do_not_fit_are_named_with_their_file(form, tmp_path):
    made(tmp_path / "source")
    convert.convert(tmp_path / "source", out := target(tmp_path, form), form)
    change_tensors(out, lambda tensors: tensors | {THEIR_NAMES[form]["b_enc"]: torch.zeros(3)})
    with pytest.raises(ValueError, match=rf"{weights_file(out).name}: the weights do not fit one another.*b_enc"):
        convert.read(out)


@pytest.mark.parametrize("form", OTHERS)
def test_tensors_that_no_topk_sae_has_are_refused(form, tmp_path):
    """As a skip connection whose flag is missing: each package refuses them too."""
    made(tmp_path / "source")
    convert.convert(tmp_path / "source", out := target(tmp_path, form), form)
    change_tensors(out, lambda tensors: tensors | {"W_skip": torch.zeros(D, D)})
    with pytest.raises(ValueError, match="holds W_skip too, which a TopK SAE has no place for"):
        convert.read(out)


# ---- tokens that are normalised ----


def openai_file(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A file with OpenAI's own keys."""
    g = torch.Generator().manual_seed(2)
    state = {
        "pre_bias": torch.randn(D, generator=g).to(dtype),
        "latent_bias": torch.randn(M, generator=g).to(dtype),
        "stats_last_nonzero": torch.zeros(M, dtype=torch.long),
        "encoder.weight": torch.randn(M, D, generator=g).to(dtype),
        "decoder.weight": torch.randn(D, M, generator=g).to(dtype),
    }
    torch.save(state | {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}, path)
    return state


def by_openai(state: dict[str, Tensor], x: Tensor) -> np.ndarray:
    """sparse_autoencoder/model.py, in fp64: LN, then the encoder, TopK, the decoder, and LN undone."""
    w = {name: t.double().numpy() for name, t in state.items()}
    x64 = x.double().numpy()
    mean = x64.mean(1, keepdims=True)
    std = x64.std(1, ddof=1, keepdims=True)
    seen = (x64 - mean) / (std + 1e-5)
    pre = (seen - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"]
    code = np.zeros_like(pre)
    best = np.argsort(-pre, axis=1)[:, :K]
    np.put_along_axis(code, best, np.maximum(np.take_along_axis(pre, best, 1), 0), 1)
    return (code @ w["decoder.weight"].T + w["pre_bias"]) * std + mean


@pytest.mark.parametrize("through", [[], ["fastsae"], ["openai"], ["sae_lens"], ["fastsae", "openai", "fastsae"]])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_saelens_computes_what_openai_does_of_raw_activations(scale, through, tmp_path):
    """By SAELens itself; at a scale at which the 1e-5 matters too."""
    state, source = openai_file(tmp_path / "6.pt"), tmp_path / "6.pt"
    for number, form in enumerate([*through, "sae_lens"]):
        out = target(tmp_path, f"{number}") if form != "openai" else tmp_path / f"{number}.pt"
        notes = convert.convert(source, out, form)
        source = out
    assert notes == [
        "SAELens normalises each token itself (layer_norm), as OpenAI's loader does: give it raw activations."
    ]
    x = scale * raw()
    got = pytest.importorskip("sae_lens").SAE.load_from_disk(source)(x)
    assert_equal(got.double(), torch.from_numpy(by_openai(state, x)))


@pytest.mark.parametrize("form", ["fastsae", "dictionary_learning", "sparsify"])
def test_forms_that_normalise_no_token_say_so(form, tmp_path):
    openai_file(tmp_path / "6.pt")
    (note,) = convert.convert(tmp_path / "6.pt", tmp_path / form, form)
    assert "see each token less its mean" in note


def test_an_sae_that_sees_raw_tokens_goes_on_to_through_openai(tmp_path):
    sae = made(tmp_path / "source")
    convert.convert(tmp_path / "source", tmp_path / "a.pt", "openai")
    with pytest.warns(UserWarning, match="not trained so, and takes activations as they are"):
        convert.read(tmp_path / "a.pt")
    convert.convert(tmp_path / "a.pt", tmp_path / "lens", "sae_lens")
    assert_equal(theirs("sae_lens", tmp_path / "lens", raw()), sae.reconstruct(raw()))


def test_a_joint_sae_with_layer_norm(tmp_path):
    made(tmp_path / "source", joint=True, kind="none")
    convert.convert(tmp_path / "source", tmp_path / "a", "sae_lens")
    change_config(tmp_path / "a", {"normalize_activations": "layer_norm"})
    convert.convert(tmp_path / "a", tmp_path / "b", "fastsae")
    convert.convert(tmp_path / "b", tmp_path / "c", "sae_lens")
    assert_equal(theirs("sae_lens", tmp_path / "c", raw()), theirs("sae_lens", tmp_path / "a", raw()))


# ---- SAELens before 6 ----

OLD = {
    "d_in": D,
    "d_sae": M,
    "dtype": "torch.float32",
    "model_name": "gpt2-small",
    "hook_name": "blocks.8.hook_resid_pre",
    "hook_layer": 8,
    "prepend_bos": True,
    "context_size": 128,
    "normalize_activations": "none",
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "sae_lens_training_version": "3.2.3",
}
TOPK = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}


def old_files(folder: Path, cfg: dict, **tensors: Tensor) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    weights = {
        "W_enc": torch.randn(D, M, generator=g),
        "b_enc": torch.randn(M, generator=g),
        "W_dec": torch.randn(M, D, generator=g),
        "b_dec": torch.randn(D, generator=g),
    }
    folder.mkdir(exist_ok=True)
    folder.joinpath("cfg.json").write_text(json.dumps(cfg))
    save_file(weights | tensors, folder / "sae_weights.safetensors")
    return weights


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "standard"} | TOPK,
        TOPK,
        {"architecture": "topk"} | TOPK,
        {"architecture": "topk", "activation_fn": "topk", "activation_fn_kwargs": {"k": K}},
        {"architecture": "topk", "apply_b_dec_to_input": False} | TOPK,
        {"architecture": "standard", "normalize_activations": False} | TOPK,
        {"architecture": "standard", "normalize_activations": None, "expansion_factor": 4} | TOPK,
        {"architecture": "standard", "normalize_activations": "layer_norm"} | TOPK,
    ],
    ids=str,
)
def test_what_saelens_wrote_before_version_6(change, tmp_path):
    """By numpy, and by SAELens 6, which reads such files too."""
    w = old_files(tmp_path / "old", OLD | change, scaling_factor=torch.ones(M))
    state = {
        "pre_bias": w["b_dec"],
        "latent_bias": w["b_enc"],
        "encoder.weight": w["W_enc"].T,
        "decoder.weight": w["W_dec"].T,
    }
    if change.get("apply_b_dec_to_input") is False:
        state["latent_bias"] = w["b_enc"] + w["b_dec"] @ w["W_enc"]
    x = raw()
    normalised = change.get("normalize_activations") == "layer_norm"
    mean = x.mean(1, keepdim=True) if normalised else torch.zeros(1)
    std = x.std(1, keepdim=True) if normalised else torch.ones(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if normalised else "error")
        found = convert.read(tmp_path / "old")
    got = found.reconstruct((x - mean) / (std + 1e-5 * normalised)) * std + mean
    assert_equal(got, pytest.importorskip("sae_lens").SAE.load_from_disk(tmp_path / "old")(x))
    if normalised:
        assert_equal(got.double(), torch.from_numpy(by_openai(state, x)))
    convert.convert(tmp_path / "old", tmp_path / "new", "sae_lens")
    cfg = json.loads((tmp_path / "new" / "cfg.json").read_text())
    assert cfg["normalize_activations"] == ("layer_norm" if normalised else "none")
    expected = {"model_name": "gpt2-small", "hook_name": "blocks.8.hook_resid_pre", "context_size": 128}
    assert expected.items() <= cfg["metadata"].items()


def test_hooks_under_their_oldest_name(tmp_path):
    cfg = {name: value for name, value in OLD.items() if name not in ("hook_name", "prepend_bos")}
    old_files(tmp_path / "old", cfg | TOPK | {"hook_point": "blocks.1.hook_mlp_out"})
    convert.convert(tmp_path / "old", tmp_path / "new", "sae_lens")
    metadata = json.loads((tmp_path / "new" / "cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == "blocks.1.hook_mlp_out"
    assert metadata["prepend_bos"] is True, "as SAELens takes it"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "standard", "activation_fn_str": "relu"}, "a ReLU SAE without k; expected topk"),
        ({}, "a ReLU SAE without k; expected topk"),
        ({"activation_fn_str": "tanh-relu"}, "with the activation 'tanh-relu'; expected topk"),
        ({"architecture": "gated"} | TOPK, "is of architecture 'gated' with the activation 'topk'; expected topk"),
        ({"architecture": "topk", "activation_fn_str": "relu"}, "is of architecture 'topk' with the activation 'relu'"),
        ({"activation_fn_str": "topk"}, "lacks k"),
        (TOPK | {"activation_fn_kwargs": {"k": K, "postact_fn": "Identity"}}, "topk followed by 'Identity'"),
        (TOPK | {"normalize_activations": True}, "normalize_activations = 'expected_average_only_in'"),
        (TOPK | {"hook_name": "blocks.1.attn.hook_z"}, "reshape_activations = 'hook_z'"),
        (TOPK | {"activation_fn_kwargs": {"k": 5000}}, "expected between 1 and d_sae = 200; got 5000"),
    ],
    ids=str,
)
def test_what_of_before_version_6_is_refused(change, message, tmp_path):
    old_files(tmp_path, OLD | change)
    with pytest.raises(ValueError, match=rf"cfg\.json.*{message}"):
        convert.read(tmp_path)


def test_factors_of_finetuning_are_refused(tmp_path):
    old_files(tmp_path, OLD | TOPK, scaling_factor=torch.full((M,), 1.5))
    with pytest.raises(ValueError, match=r"sae_weights\.safetensors has a scaling_factor that is not 1"):
        convert.read(tmp_path)
