"""The code on the pages of docs/ runs as it is written there, but for its size and what comes from the network."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastsae
from fastsae import cli, lm
from fastsae.integrations import convert

DOCS = Path(__file__).parents[2] / "docs"
TEXT = [{"text": "def add(first, second):\n    return first + second\n" * 50}] * 100


def block(page: str, language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    return found


def run(page: str, instead: dict[str, str], **given: object) -> dict[str, object]:
    """Run a page's Python with some of it replaced, each of which must be there; returns its variables."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL))
    for written, replacement in instead.items():
        assert written in code, f"{page} does not say {written!r} any more"
        code = code.replace(written, replacement)
    exec(compile(code, page, "exec"), given)
    return given


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_sae_lens():
    pytest.importorskip("sae_lens")
    from datasets import Dataset
    from sae_lens import SAE, TopKSAE

    instead = {
        "d_in=768, d_sae=32768, k=32": "d_in=256, d_sae=512, k=8",
        "blocks.6.": "blocks.2.",
        "training_tokens=2_000_000": "training_tokens=2048, context_size=64, train_batch_size_tokens=256",
        'dataset_path="NeelNanda/pile-10k"': 'dataset_path="", streaming=False, n_batches_in_buffer=8',
        "Runner(config)": "Runner(config, override_model=model, override_dataset=dataset)",
    }
    run("sae_lens.md", instead, model=lm.load(), dataset=Dataset.from_list(TEXT))
    assert type(SAE.load_from_disk("output")) is TopKSAE


def test_dictionary_learning():
    pytest.importorskip("dictionary_learning")
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    instead = {"10_000": "20", "warmup_steps=1000": "warmup_steps=5", "32768": "512"}
    run("dictionary_learning.md", instead, activations=(torch.randn(64, 768) for _ in range(21)))
    assert AutoEncoderTopK.from_pretrained("out/trainer_0/ae.pt").k == 32


def test_sparsify():
    pytest.importorskip("sparsify")
    from datasets import Dataset
    from sparsify import SparseCoder

    instead = {
        '"gpt2"': repr(str(lm.weights_folder())),
        'load_dataset("NeelNanda/pile-10k", split="train")': "Dataset.from_list(TEXT[:20])",
        "layers=[6], batch_size=16": "layers=[2], batch_size=4",
        "k=32": "k=8, expansion_factor=2",
        "))\nconfig": "), max_seq_len=64, num_proc=1)\nconfig",
    }
    run("sparsify.md", instead, Dataset=Dataset, TEXT=TEXT)
    (hookpoint,) = Path("out/unnamed").glob("*/cfg.json")
    assert SparseCoder.load_from_disk(hookpoint.parent).num_latents == 512


def test_readme(capsys):
    fastsae.TopKSAE(256, 512, 8).save_pretrained("runs/topk/sae")
    smaller = {"max_tokens=110_000": "max_tokens=3_000", "d_sae=8192": "d_sae=512", "steps=100)).fit": "steps=3)).fit"}
    found = run("../README.md", smaller, torch=torch, raw=torch.randn(5, 256))
    assert found["losses"].keys() == {"mse", "auxk"}
    assert found["trainer"].steps == 39
    assert isinstance(fastsae.load("my-sae"), fastsae.TopKSAE)
    assert 0 < float(capsys.readouterr().out) < 5


def test_own_activations(capsys):
    np.save("rows.npy", np.random.default_rng(0).normal(size=(4000, 16)).astype(np.float32))
    smaller = {"d_sae=4096, k=32": "d_sae=64, k=4", "steps=5000": "steps=5"}
    found = run("own_activations.md", smaller)
    assert fastsae.load("runs/python").d_in == 16
    assert f"Reconstruction of {found['held_out'].n_rows} rows in" in capsys.readouterr().out


def test_questions(capsys):
    fastsae.JointSAE(256, 8192, 32).save_pretrained("runs/demo/joint/sae")
    fastsae.TopKSAE(256, 8192, 32).save_pretrained("runs/demo/topk/sae")
    run("questions.md", {"20_000": "2_000", "max_new_tokens=10": "max_new_tokens=2"})
    said = capsys.readouterr().out
    for words in ("token", "raised", "of 8,192 features are in both"):
        assert words in said


def test_converting(monkeypatch):
    fastsae.TopKSAE(24, 200, 6).save_pretrained("runs/topk")
    convert.convert("runs/topk", "their/sae", "sparsify")
    commands = block("converting.md", "").splitlines()
    assert len(commands) == 2
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command, comments=True))
        cli.main()
    assert [convert.detect(folder) for folder in ("out", "mine")] == ["sae_lens", "fastsae"]
    assert isinstance(run("converting.md", {})["sae"], fastsae.TopKSAE)
