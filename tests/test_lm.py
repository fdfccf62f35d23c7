"""The embedded language model, the script that made it, and the trigram it is compared with."""

import hashlib
import json
import math
import shutil
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from fastsae import lm
from fastsae.activations import Document, is_held_out, read_documents, tokenize
from fastsae.lm import train
from fastsae.lm.trigram import Trigram


@pytest.fixture(scope="module")
def model():
    return lm.load()


@pytest.fixture(scope="module")
def metrics():
    return json.loads((lm.weights_folder() / "metrics.json").read_text())


def test_it_is_a_transformer_lens_model(model):
    tokens = torch.tensor([[0, 5, 9, 1, 700]])
    logits, cache = model.run_with_cache(tokens, names_filter=["blocks.2.hook_resid_post"])
    assert logits.shape == (1, 5, 4096)
    assert logits.isfinite().all()
    assert cache["blocks.2.hook_resid_post"].shape == (1, 5, 256)
    assert model.cfg.n_ctx == 256
    assert not model.training
    from transformers import GPT2LMHeadModel

    theirs = GPT2LMHeadModel.from_pretrained(lm.weights_folder(), dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits, theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_text_comes_back_from_its_tokens(model):
    text = "def f(x):\n\treturn {'a': x**2}  # naïve — ok\n"
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert model.tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode())
    assert model.tokenizer.bos_token_id == 0


def test_the_package_stays_small():
    assert sum(p.stat().st_size for p in lm.weights_folder().iterdir()) < 10 * 2**20


def test_the_card_says_what_was_measured(metrics):
    assert (lm.weights_folder() / "README.md").read_text() == train.card(metrics)


def test_it_is_clearly_better_than_a_trigram(model, metrics):
    assert metrics["held_out_loss_nats_per_token"] < metrics["trigram_loss_nats_per_token"] - 0.5
    held_out = tokenize(read_documents(), model.tokenizer, 256, max_tokens=20_000, held_out=True)
    is_text = held_out.is_text()[:, 1:]
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(t)[:, :-1].transpose(1, 2), t[:, 1:], reduction="none")
            for t in held_out.tokens.split(16)
        ]
    # Another sample of the held-out documents than the whole the card speaks of, and perhaps another Python.
    assert torch.cat(losses)[is_text].mean().item() < metrics["trigram_loss_nats_per_token"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_folder_is_named(name, tmp_path):
    folder = shutil.copytree(lm.weights_folder(), tmp_path / "model")
    content = (folder / name).read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"[]"):
        (folder / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{folder} cannot be read as a transformers model"):
            lm.load(str(folder))


def test_what_is_no_fault_of_the_folder(monkeypatch):
    """Its copy would be restored in vain."""
    with pytest.raises(RuntimeError, match="nowhere"):
        lm.load(device="nowhere")
    for kind in (ImportError, MemoryError, torch.OutOfMemoryError):
        monkeypatch.setattr(TransformerBridge, "boot_transformers", MagicMock(side_effect=kind("full")))
        with pytest.raises(kind, match=r"^full$"):
            lm.load()


def test_a_name_that_is_no_model():
    with pytest.raises(OSError, match=r"'no/such-model' is neither 'embedded', nor a folder"):
        lm.load("no/such-model")


def test_what_is_no_model():
    with pytest.raises(TypeError, match=r"expected a folder, a name on .*, or a transformers model; got Linear"):
        lm.load(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="'embedded' has its own tokenizer"):
        lm.load(tokenizer=object())


def test_its_windows_are_those_it_was_trained_on(model):
    """To the bit those of every run there is."""
    document = Document("a", "def f(x):\n    return x\n" * 40)
    windows = tokenize([document], model.tokenizer, 256, held_out=None)
    ids = model.tokenizer(document.text, add_special_tokens=False)["input_ids"]
    assert len(ids) > 255
    want = torch.zeros(2, 256, dtype=torch.int64)  # 0 is BOS, and what pads
    want[0, 1:], want[1, 1 : len(ids) - 254] = torch.tensor(ids[:255]), torch.tensor(ids[255:])
    assert windows.tokens.tolist() == want.tolist()
    fingerprint = hashlib.sha256(b"a")
    for part in (want, torch.tensor([256, len(ids) - 254]), torch.tensor([0, 0])):
        fingerprint.update(part.numpy().tobytes())
    assert windows.digest() == fingerprint.hexdigest()[:16]


# ---- the script ----


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    n = 0
    for i in range(60):
        name = f"{i}.txt"
        n += is_held_out(name)
        (folder / name).write_text("\n".join(f"the {i + j} th line of text number {i}" for j in range(40)))
    assert n > 0
    return folder


def options(out: Path, text: Path, **changes) -> train.Options:
    small = {"steps": 4, "batch_size": 2, "width": 64, "layers": 1, "vocabulary": 300, "save_every": 2}
    return train.Options(out=out, text=str(text), **(small | changes))


def test_the_script_is_reproducible_and_resumes(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train.main(options(tmp_path / "a", text))
    calls = []

    def dies(*args, **kwargs):
        calls.append(None)
        if len(calls) == 6:  # two a step: in the third, after a save
            raise KeyboardInterrupt
        return batches(*args, **kwargs)

    batches = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", dies)
    with pytest.raises(KeyboardInterrupt):
        train.main(options(tmp_path / "b", text))
    monkeypatch.undo()
    unfinished = tmp_path / "b" / "unfinished.pt"
    whole = unfinished.read_bytes()
    unfinished.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"unfinished\.pt is damaged .* delete it to train from the start"):
        train.main(options(tmp_path / "b", text))
    unfinished.write_bytes(whole)
    train.main(options(tmp_path / "b", text))
    train.main(options(tmp_path / "c", text, seed=1))
    weights = {n: (tmp_path / n / "model.safetensors").read_bytes() for n in "abc"}
    assert weights["a"] == weights["b"]
    assert weights["a"] != weights["c"]
    assert not (tmp_path / "a" / "unfinished.pt").exists()
    loaded = lm.load(str(tmp_path / "a"))
    assert loaded(torch.tensor([[0, 1, 2]])).shape == (1, 3, 300)


def test_windows_are_of_one_document_and_lose_nothing():
    documents = [np.arange(1, 1000), np.arange(2000, 2010)]
    for offsets in ([0, 0], [100, 3], [254, 254]):
        windows = train.cut(documents, offsets)
        assert all(w[0] == 0 and len(w) <= train.CONTEXT for w in windows)
        assert np.concatenate([w[1:] for w in windows]).tolist() == [*range(1, 1000), *range(2000, 2010)]
    assert len(train.cut(documents, [100, 0])[0]) == 101


# ---- the trigram ----

WINDOWS = np.array([[0, 1, 2, 3, 1, 2], [0, 1, 2, 4, -1, -1], [0, 2, 3, 1, 2, 3]])


def test_trigram_probabilities_sum_to_one():
    rng = np.random.default_rng(0)
    windows = np.concatenate([np.zeros((200, 1), dtype=np.int64), rng.zipf(1.5, (200, 30)) % 50], axis=1)
    for fitted, vocabulary in ((Trigram(WINDOWS, 6), 6), (Trigram(windows, 50), 50)):
        words = np.arange(vocabulary)
        for u, v in ((0, 1), (1, 2), (5, 5), (3, 0)):
            p = fitted.probability(np.full(vocabulary, u), np.full(vocabulary, v), words)
            assert p.sum() == pytest.approx(1)
            assert (p > 0).all()


def test_trigram_learns_order():
    fitted = Trigram(np.tile(WINDOWS, (20, 1)), 6)
    after_1_2 = fitted.probability(np.full(6, 1), np.full(6, 2), np.arange(6))
    assert after_1_2.argmax() == 3
    assert fitted.loss(WINDOWS) < math.log(6) / 2
    assert fitted.loss(np.array([[0, 5, 5, 4, 0]])) > fitted.loss(WINDOWS)
