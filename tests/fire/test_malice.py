"""Files that somebody made to do harm: nothing is unpickled, no path leaves its folder, no claim takes memory."""

import ast
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import victims
from test_damage import seal

import fastsae
from fastsae import checkpoint, files
from fastsae.activations import ActivationStore
from fastsae.integrations import convert


class Harm:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_nothing_is_unpickled(tmp_path):
    """Whatever is read as tensors may be a pickle in truth; in other packages' files: test_convert.py."""
    mark, content = tmp_path / "harmed", pickle.dumps(Harm(tmp_path / "harmed"))
    victims.harvest_all(tmp_path / "store")
    victims.train(tmp_path)
    newest = checkpoint.folders(tmp_path / "run")[0]
    for name in ("weights.safetensors", "optimizer.safetensors", "state.json", "config.json"):
        kept = (newest / name).read_bytes()
        (newest / name).write_bytes(content)
        seal(newest)
        with pytest.raises(ValueError, match=name):
            checkpoint.load(tmp_path / "run") if name != "config.json" else fastsae.load(newest)
        (newest / name).write_bytes(kept)
    for name in ("shard_00001.safetensors", "index.json"):
        (tmp_path / "store" / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            ActivationStore(tmp_path / "store").block(1)
    assert not mark.exists()
    pickle.loads(content)
    assert mark.exists(), "it would have done harm"


def test_no_code_unpickles_or_evaluates():
    """torch.load only with weights_only, and nothing that takes text for code."""
    root, found = Path(fastsae.__file__).parent, []
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                found += [
                    f"{path}:{node.lineno}" for n in names if n.split(".")[0] in ("pickle", "dill", "joblib", "shelve")
                ]
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            if called in ("eval", "exec", "compile", "np.load", "numpy.load") or (called == "torch.load" and not safe):
                found.append(f"{path}:{node.lineno}: {called}")
    assert found == []


@pytest.mark.parametrize("name", ["../../outside", "/etc/hostname", "..", ".", "sub/../weights.safetensors", ""])
def test_no_path_leaves_its_folder(name, tmp_path, monkeypatch):
    victims.harvest_all(tmp_path / "store")
    victims.train(tmp_path)
    (tmp_path / "outside").write_text("mine")
    newest = checkpoint.folders(tmp_path / "run")[0]
    checksums = files.read_json(newest / "checksums.json")
    files.write_json(newest / "checksums.json", checksums | {name: files.crc32(tmp_path / "outside")})
    read, crc32 = [], files.crc32
    monkeypatch.setattr(files, "crc32", lambda path: (read.append(path), crc32(path))[1])
    with pytest.raises(ValueError, match=r"checksums\.json is damaged: it is of other files than there are"):
        checkpoint.load(tmp_path / "run")
    assert all(path.parent == newest and path.name in checksums for path in read)


def test_checksums_that_leave_a_file_out(tmp_path):
    victims.harvest_all(tmp_path / "store")
    victims.train(tmp_path)
    newest = checkpoint.folders(tmp_path / "run")[0]
    checksums = files.read_json(newest / "checksums.json")
    for name in checksums:
        files.write_json(newest / "checksums.json", {n: c for n, c in checksums.items() if n != name})
        with pytest.raises(ValueError, match="it is of other files than there are"):
            checkpoint.load(tmp_path / "run")


def test_what_claims_to_be_huge_takes_no_memory(tmp_path):
    """In a process that has 256 MiB left."""
    huge = tmp_path / "huge"
    for name, claim in {
        "a": {"d_sae": 10**12},
        "b": {"d_in": 10**12},
        "c": {"d_sae": 10**30},
        "d": {"d_embedding": 10**12},
        "e": {"d_embedding": 10**30},
        "f": {"d_sae": 10**12, "k": 10**12},
    }.items():
        path = victims.joint().save_pretrained(huge / name) / "config.json"
        description = json.loads(path.read_text())
        description["config"] |= claim
        del description["config_crc32"]
        path.write_text(json.dumps(description))
    for name, header, length in (
        ("g", {"W_enc": {"dtype": "F32", "shape": [10**12, 12], "data_offsets": [0, 48 * 10**12]}}, None),
        ("h", {"W_enc": {"dtype": "F32", "shape": [10**12, 12], "data_offsets": [0, 48]}}, None),
        ("i", {}, 2**62),
    ):
        folder = victims.joint().save_pretrained(huge / name)
        written = json.dumps(header).encode()
        weights, config = folder / "weights.safetensors", folder / "config.json"
        weights.write_bytes(struct.pack("<Q", length or len(written)) + written + bytes(48))
        description = json.loads(config.read_text()) | {"weights_crc32": files.crc32(weights)}
        config.write_text(json.dumps(description))
    for name, claim in (("j", {"rows": 10**12}), ("k", {"rows": 10**30})):
        victims.harvest_all(huge / name)
        index = files.read_json(huge / name / "index.json")
        index["shards"][1] |= claim
        files.write_json(huge / name / "index.json", index)
    fastsae.TopKSAE(6, 20, 3).save_pretrained(tmp_path / "small")
    convert.convert(tmp_path / "small", huge / "l.pt", "openai")
    state = torch.load(huge / "l.pt", weights_only=True)
    torch.save(state | {"encoder.weight": torch.zeros(1, 6).expand(10**11, 6)}, huge / "l.pt")
    assert (huge / "l.pt").stat().st_size < 10_000
    victims.finish(victims.refuse_what_is_huge, huge)
