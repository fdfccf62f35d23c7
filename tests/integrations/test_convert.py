"""SAEs in each other's files: what is read and written computes the same, in the other packages too."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
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


# ---- what cannot be ----


def test_nothing_is_written_over(tmp_path):
    made(tmp_path / "source")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").touch()
    for form in convert.FORMATS:
        with pytest.raises(FileExistsError, match="there holds something already"):
            convert.convert(tmp_path / "source", tmp_path / "there", form)


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
