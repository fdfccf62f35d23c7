"""Files that hold no SAE to convert: the error says what they are, and does not call them damaged."""

import gzip
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_convert import assert_equal, made, openai_file, raw, target, weights_file

from fastsae.integrations import convert


def gemma_scope(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: np.ones(3) for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")})


def after_a_line(path: Path) -> None:
    file = io.BytesIO()
    torch.save({"W_enc": torch.zeros(3)}, file)
    path.write_bytes(b'{"schema": 1}\n' + file.getvalue())


def torch_saved(*names: str) -> Callable[[Path], None]:
    return lambda path: torch.save({name: torch.zeros(3) for name in names}, path)


def written_as(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("params.npz", gemma_scope, r"is an \.npz archive.*\(W_dec, W_enc.*: a JumpReLU SAE.*Gemma Scope"),
        ("other.npz", lambda path: np.savez(path, a=np.ones(3)), r"is an \.npz archive of NumPy arrays \(a\)"),
        ("a.npy", lambda path: np.save(path, np.ones(3)), "is a single array of NumPy"),
        ("a.pkl", written_as(pickle.dumps({"W_enc": [1.0]})), "is a pickle, which holds code, which is not run"),
        ("b.pkl", written_as(pickle.dumps({"W_enc": [1.0]}, protocol=0)), "is a pickle, which holds code"),
        ("a.ckpt", torch_saved("state_dict", "epoch"), "is a checkpoint of a trainer"),
        ("a.pth", torch_saved("encoder_linear.weight", "decoder_linear.weight"), "ReLU SAE in the layout of Goodfire"),
        ("evo.pt", torch_saved("_orig_mod.W", "_orig_mod.b_enc", "_orig_mod.b_dec"), "is an SAE of tied weights"),
        ("layer3.sae.pt", torch_saved("W_enc", "W_dec", "b_enc", "b_dec"), "neither the activation nor k"),
        ("module.pt", lambda path: torch.save(torch.nn.Linear(2, 2), path), "it holds code, which is not run"),
        ("script.pt", lambda path: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path), "is a TorchScript"),
        ("sae.pt", after_a_line, "is an SAE of saev"),
        ("params.safetensors", lambda path: save_file({"w_enc": torch.zeros(3)}, path), "is weights alone"),
        ("cfg.json", written_as(b"{}"), "is JSON, not weights. Give the folder"),
        (
            "lfs.pt",
            written_as(b"version https://git-lfs.github.com/spec/v1\noid sha256:a\n"),
            "is a pointer of Git LFS",
        ),
        ("page.pt", written_as(b"<!DOCTYPE html><html>"), "is a web page"),
        ("sae.tar.gz", written_as(gzip.compress(b"x")), "is an archive: unpack it"),
        ("empty.pt", written_as(b""), "is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_files_that_are_no_tensors_of_torch_are_known_by_sight(name, write, message, tmp_path):
    write(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / "blob").write_bytes(content)  # as the cache of the hub names them
    for path in (tmp_path / name, tmp_path / "blob"):
        if path.name == "blob" and name == "b.pkl":
            continue  # text without a name
        with pytest.raises(ValueError, match=f"{path.name} .*{message}") as caught:
            convert.read(path)
        assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("form", convert.FORMATS)
def test_a_pointer_of_git_lfs_in_the_place_of_weights(form, tmp_path):
    made(tmp_path / "source")
    convert.convert(tmp_path / "source", out := target(tmp_path, form), form)
    file = weights_file(out)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 12\n")
    with pytest.raises(ValueError, match=rf"{file.name} is a pointer of Git LFS, not the file itself"):
        convert.read(out)


def test_folders_that_hold_other_things_are_known_by_sight(tmp_path):
    def refused(folder: Path) -> str:
        with pytest.raises(ValueError, match="holds no SAE in a known form") as caught:
            convert.read(folder)
        assert "damaged" not in str(caught.value)
        return str(caught.value)

    gemma_scope(tmp_path / "scope" / "layer_20" / "width_16k" / "params.npz")
    assert "It looks like a JumpReLU SAE of Gemma Scope" in refused(tmp_path / "scope" / "layer_20" / "width_16k")
    assert "Its layer_20/width_16k looks like a JumpReLU SAE of Gemma Scope" in refused(tmp_path / "scope")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "cfg.json").touch()
    assert "It holds cfg.json, and lacks sae_weights.safetensors" in refused(tmp_path / "half")
    (tmp_path / "openai").mkdir()
    openai_file(tmp_path / "openai" / "6.pt")
    assert f"Give a file itself, such as {tmp_path}/openai/6.pt" in refused(tmp_path / "openai")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "cfg.json").symlink_to("nowhere")
    assert "cfg.json: a link to what is not there" in refused(tmp_path / "link")
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match="gone is a link to nowhere, which does not exist"):
        convert.read(tmp_path / "gone")


def test_saes_below_a_folder_are_listed(tmp_path):
    """As in the hub's cache: folders by commit, whose files are links."""
    sae = made(tmp_path / "source")
    snapshot = tmp_path / "models--o--r" / "snapshots" / ("a" * 40)
    for layer in range(10):
        convert.convert(tmp_path / "source", tmp_path / "blobs" / f"{layer}", "sparsify")
        (snapshot / f"layers.{layer}").mkdir(parents=True)
        for file in (tmp_path / "blobs" / f"{layer}").iterdir():
            (snapshot / f"layers.{layer}" / file.name).symlink_to(file)
    (snapshot / "round").symlink_to(snapshot)
    with pytest.raises(ValueError, match=r"Below it there are SAEs.*: snapshots/a+/layers\.0, .*, and 2 more\."):
        convert.read(tmp_path / "models--o--r")
    (tmp_path / "linked").symlink_to(snapshot / "layers.3")
    assert_equal(convert.read(tmp_path / "linked").reconstruct(raw()), sae.reconstruct(raw()))
