"""From text to shuffled activations."""

import errno
import json
import os
import sys

import pytest
import torch
from tiny_lm import bridge, hooked, tokenizer
from torch import Tensor

from fastsae import files
from fastsae.activations import (
    ActivationStore,
    ActivationStream,
    Document,
    ModelActivations,
    harvest,
    is_held_out,
    read_documents,
    tokenize,
)

HOOK = "blocks.1.hook_resid_post"
BOTH_MODELS = pytest.mark.parametrize("model", [hooked, bridge], ids=["HookedTransformer", "TransformerBridge"])


def documents(n: int = 12) -> list[Document]:
    words = ["the cat sat on the mat .", "a dog ran quickly under the tree and then sat", "then , slowly the dog sat ."]
    return [Document(f"doc{i}", " ".join(words[j % 3] for j in range(i, i + 1 + i % 5))) for i in range(n)]


def windows(n: int = 12, context: int = 12):
    return tokenize(documents(n), tokenizer(), context)


# ---- text and tokens ----


def test_the_standard_library_is_read_without_its_tests():
    names = [d.name for d, _ in zip(read_documents(), range(400), strict=False)]
    assert "argparse.py" in {d.name for d in read_documents()}
    assert not [n for n in names if {"test", "tests", "site-packages"}.intersection(n.split("/"))]
    assert len(set(names)) == len(names)


def test_a_folder_gives_a_document_per_file_always_in_the_same_order(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.py", "ignored.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    first = list(read_documents(tmp_path))
    assert {d.name: d.text for d in first} == {n: f"text of {n}" for n in ("b.txt", "a.md", "sub/c.py")}
    assert first == list(read_documents(str(tmp_path)))


def test_a_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    text = "".join(f"paragraph {i} " * 40 + "\n\n" for i in range(50))
    (tmp_path / "book.txt").write_text(text)
    parts = list(read_documents(tmp_path / "book.txt"))
    assert len(parts) > 3
    assert "".join(d.text for d in parts) == text
    assert all(d.text.endswith("\n\n") for d in parts)
    assert [d.name for d in parts] == [f"book.txt#{i}" for i in range(len(parts))]


def test_datasets_by_name(monkeypatch):
    class Datasets:
        @staticmethod
        def load_dataset(name, configuration, split, streaming):
            assert (split, streaming) == ("train", True)
            return [{"text": f"{name} {configuration}"}, {"text": "  "}] if name == "some/corpus" else [{"body": ""}]

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    assert [d.text for d in read_documents("some/corpus:small")] == ["some/corpus small"]
    with pytest.raises(ValueError, match=r"has columns \['body'\], expected one named 'text'"):
        list(read_documents("other"))


def test_text_that_is_nowhere(monkeypatch, tmp_path):
    class Datasets:
        @staticmethod
        def load_dataset(*args, **kwargs):
            raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    with pytest.raises(FileNotFoundError, match=r"neither 'stdlib', nor a file.*no network"):
        list(read_documents("no/where"))
    with pytest.raises(FileNotFoundError, match=r"no .* files below"):
        list(read_documents(tmp_path))


def test_held_out_is_a_fixed_share_of_names():
    names = [f"file{i}" for i in range(20_000)]
    share = sum(map(is_held_out, names)) / len(names)
    assert share == pytest.approx(0.05, abs=0.006)
    assert [is_held_out(n) for n in ("argparse.py", "inspect.py", "typing.py")] == [False, False, False]


def test_windows_hold_every_token_once():
    w = windows(context=7)
    assert w.has_bos
    for number, document in enumerate(documents()):
        mine = (w.documents == number).nonzero().squeeze(1).tolist()
        tokens = [t for i in mine for t in w.tokens[i, 1 : w.lengths[i]].tolist()]
        assert tokens == tokenizer()(document.text, add_special_tokens=False)["input_ids"]
        assert (w.lengths[mine[:-1]] == 7).all()
    assert (w.tokens[:, 0] == tokenizer().bos_token_id).all()
    assert w.n_tokens == int(w.is_text().sum()) == sum(len(d.text.split()) for d in documents())


def test_max_tokens_counts_text():
    assert tokenize(documents(), tokenizer(), 7, max_tokens=33).n_tokens == 33


def test_held_out_documents_and_the_others_share_none():
    many = documents(200)
    held, rest = (tokenize(many, tokenizer(), 12, held_out=h) for h in (True, False))
    assert set(held.names).isdisjoint(rest.names)
    assert len(held.names) + len(rest.names) == 200
    assert all(map(is_held_out, held.names))


def test_tokenize_says_what_is_wrong():
    with pytest.raises(ValueError, match="no held-out documents"):
        tokenize([d for d in documents() if not is_held_out(d.name)], tokenizer(), 12, held_out=True)
    with pytest.raises(ValueError, match="expected a context of at least 2; got 1"):
        tokenize(documents(), tokenizer(), 1)
    with pytest.raises(ValueError, match="the model has no tokenizer"):
        tokenize(documents(), None, 12)


# ---- the model's activations ----


def by_hand(model, hook: str, tokens: Tensor) -> Tensor:
    seen = []
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda activation, hook: seen.append(activation.clone()))])
    return seen[0].flatten(2)


@BOTH_MODELS
@pytest.mark.parametrize("hook", [HOOK, "blocks.0.hook_mlp_out", "blocks.2.attn.hook_z", "blocks.1.mlp.hook_post"])
def test_rows_are_what_a_forward_hook_sees_without_bos_and_padding(model, hook):
    w = windows()
    source = ModelActivations(model(), hook, w, batch_windows=5)
    rows = [source.rows(i) for i in range(len(source.block_rows))]
    assert [len(r.activations) for r in rows] == source.block_rows
    assert source.n_rows == w.n_tokens
    got = torch.cat([r.activations for r in rows])
    # One window at a time and without padding: whatever leaked from padding would differ.
    expected = [by_hand(model(), hook, w.tokens[i : i + 1, : w.lengths[i]])[0, 1:] for i in range(len(w))]
    torch.testing.assert_close(got, torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert source.d_in == got.shape[1]
    places = [(int(w.documents[i]), p) for i in range(len(w)) for p in range(1, int(w.lengths[i]))]
    documents_, positions = (torch.cat([r[k] for r in rows]).tolist() for k in (1, 2))
    assert list(zip(documents_, positions, strict=True)) == places


@BOTH_MODELS
def test_only_the_layers_up_to_the_hook_are_run(model):
    m, ran = model(), []
    handles = [m.blocks[i].register_forward_hook(lambda *_, i=i: ran.append(i)) for i in range(3)]
    ModelActivations(m, "blocks.1.hook_resid_post", windows()).block(0)
    for handle in handles:
        handle.remove()
    assert set(ran) == {0, 1}


@BOTH_MODELS
def test_an_unknown_hook_names_near_ones(model):
    with pytest.raises(ValueError, match=r"no hook .blocks.1.hook_resid_pots.*Near ones: blocks.1.hook_resid_post"):
        ModelActivations(model(), "blocks.1.hook_resid_pots", windows())
    with pytest.raises(ValueError, match=r"no hook .blocks\.7"):
        ModelActivations(model(), "blocks.7.hook_resid_post", windows())


# ---- the store ----


def source(**changes) -> ModelActivations:
    return ModelActivations(hooked(), **({"hook_name": HOOK, "windows": windows(), "batch_windows": 5} | changes))


def content(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_store_gives_back_what_was_harvested(dtype, tmp_path):
    store = harvest(source(), tmp_path / "store", dtype)
    assert store.block_rows == source().block_rows
    assert store.n_rows == source().n_rows
    assert store.d_in == 16
    for i in range(len(store.block_rows)):
        assert torch.equal(store.block(i), source().block(i).to(dtype))
        assert torch.equal(store.rows(i)["documents"], source().rows(i).documents)
        assert torch.equal(store.rows(i)["positions"], source().rows(i).positions)
    assert store.document_names == windows().names


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_harvest_goes_on_and_comes_out_the_same(after, tmp_path, monkeypatch):
    harvest(source(), tmp_path / "whole")
    calls = []

    def dies(self, i):
        if i == after:
            raise KeyboardInterrupt
        calls.append(i)
        return rows(self, i)

    rows = ModelActivations.rows
    monkeypatch.setattr(ModelActivations, "rows", dies)
    with pytest.raises(KeyboardInterrupt):
        harvest(source(), tmp_path / "cut")
    with pytest.raises(ValueError, match="did not finish; run it again"):
        ActivationStore(tmp_path / "cut")
    monkeypatch.setattr(ModelActivations, "rows", lambda self, i: calls.append(i) or rows(self, i))
    harvest(source(), tmp_path / "cut")
    assert calls == list(range(len(source().block_rows))), "a block was computed twice, or not at all"
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_a_full_disk_loses_nothing_that_was_written(tmp_path, monkeypatch):
    def full(path, tensors):
        if path.name == "shard_00002.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, tensors)

    write = files.write_tensors
    monkeypatch.setattr(files, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        harvest(source(), tmp_path / "store")
    monkeypatch.undo()
    assert sorted(p.name for p in (tmp_path / "store").glob("shard*")) == [f"shard_0000{i}.safetensors" for i in (0, 1)]
    assert harvest(source(), tmp_path / "store").n_rows == source().n_rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hook_name": "blocks.0.hook_resid_post"}, "hook_name is 'blocks.1.hook_resid_post' there, 'blocks.0"),
        ({"windows": windows(11)}, "n_rows is .* tokens is"),
    ],
)
def test_a_folder_of_another_harvest_says_what_differs(changes, message, tmp_path):
    harvest(source(), tmp_path)
    with pytest.raises(ValueError, match=rf"holds another harvest: .*{message}"):
        harvest(source(**changes), tmp_path)


@pytest.mark.parametrize("how", ["truncated", "one byte flipped", "missing"])
def test_a_damaged_shard_is_named_with_what_to_do(how, tmp_path):
    harvest(source(), tmp_path)
    shard = tmp_path / "shard_00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.unlink() if how == "missing" else shard.write_bytes(data[:-9] if how == "truncated" else data)
    with pytest.raises(ValueError, match=r"shard_00001.safetensors.*Delete it and run the harvest again"):
        ActivationStore(tmp_path).block(1)
    shard.unlink(missing_ok=True)
    assert torch.equal(harvest(source(), tmp_path).block(1), source().block(1))


def test_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no activation store"):
        ActivationStore(tmp_path)
    harvest(source(), tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | {"format": 9}))
    with pytest.raises(ValueError, match="has format 9"):
        ActivationStore(tmp_path)


# ---- the stream ----


class Numbers:
    """A source whose rows are their own numbers; counts what is alive."""

    d_in = 2

    def __init__(self, *block_rows: int) -> None:
        self.block_rows = list(block_rows)
        self.read: list[int] = []

    def block(self, i: int) -> Tensor:
        self.read.append(i)
        start = sum(self.block_rows[:i])
        return torch.arange(start, start + self.block_rows[i]).float().unsqueeze(1).expand(-1, 2)


SIZES = (10, 3, 17, 1, 8, 20, 6)


@pytest.mark.parametrize("buffer_rows", [1, 15, 30, 1000])
@pytest.mark.parametrize("batch_size", [1, 4, 13])
def test_every_row_once_an_epoch(batch_size, buffer_rows):
    stream = ActivationStream(Numbers(*SIZES), batch_size, buffer_rows, epochs=3)
    rows = torch.cat(list(stream))[:, 0].int().tolist()
    n = sum(SIZES)
    assert len(rows) == 3 * n // batch_size * batch_size
    assert sorted(rows[:n]) == list(range(n))
    assert sorted(rows[n : 2 * n]) == list(range(n))
    assert rows[:n] != rows[n : 2 * n]
    assert rows[:n] != list(range(n))


def test_rows_of_different_blocks_are_mixed():
    stream = ActivationStream(Numbers(*[100] * 10), 100, 1000)
    blocks = next(stream)[:, 0].int() // 100
    assert len(blocks.unique()) == 10


def test_seeds_of_the_stream():
    a, b, c = (torch.cat(list(ActivationStream(Numbers(*SIZES), 4, 30, seed=s, epochs=1))) for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("after", [0, 1, 4, 5, 9, 16, 17, 30])
def test_the_stream_continues_exactly(after):
    def stream() -> ActivationStream:
        return ActivationStream(Numbers(*SIZES), 4, 25, epochs=3)

    whole = list(stream())
    first = stream()
    for _ in range(after):
        next(first)
    state = json.loads(json.dumps(first.state_dict()))
    second = stream()
    second.load_state_dict(state)
    rest = list(second)
    assert len(rest) == len(whole) - after
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[after:], strict=True))
    first.load_state_dict(stream().state_dict())
    assert torch.equal(next(first), whole[0]), "a stream that is set back starts over"


def test_only_the_buffer_is_read():
    numbers = Numbers(*[10] * 20)
    stream = ActivationStream(numbers, 5, 30)
    next(stream)
    assert len(numbers.read) == 3
    for _ in range(5):
        next(stream)
    assert len(numbers.read) == 3
    next(stream)
    assert len(numbers.read) == 6


def test_batches_stay_what_they_were():
    stream = ActivationStream(Numbers(*SIZES), 4, 10, epochs=2)
    batch = next(stream)
    copy = batch.clone()
    list(stream)
    assert torch.equal(batch, copy)


def test_a_position_of_another_stream():
    state = ActivationStream(Numbers(*SIZES), 4, 25).state_dict()
    with pytest.raises(ValueError, match="another stream: batch_size was 4, is 5"):
        ActivationStream(Numbers(*SIZES), 5, 25).load_state_dict(state)
    with pytest.raises(ValueError, match=r"n_rows was 65, is 60"):
        ActivationStream(Numbers(*[10] * 6), 4, 25).load_state_dict(state)


def test_too_few_rows_for_a_batch():
    with pytest.raises(ValueError, match="between 1 and the source's 65 rows; got 66"):
        ActivationStream(Numbers(*SIZES), 66)


def test_on_the_fly_and_through_the_store_are_the_same_stream(tmp_path):
    live = ActivationStream(source(), 8, 40, seed=3, epochs=2)
    stored = ActivationStream(harvest(source(), tmp_path), 8, 40, seed=3, epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(live, stored, strict=True))
