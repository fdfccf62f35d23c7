"""Activations of one's own: arrays in memory and in files, as batches and as a source of blocks."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fastsae
from fastsae.activations import ActivationStream, ArrayActivations, arrays, is_held_out, open_activations

X = torch.arange(1000 * 3, dtype=torch.float32).view(1000, 3)


def rows_of(source) -> torch.Tensor:
    return torch.cat([source.block(i) for i in range(len(source.block_rows))])


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(arrays, "_BLOCK", 100)


@pytest.mark.parametrize("x", [X, X.numpy(), X.view(10, 100, 3), X.double(), X.half().numpy(), X.t().contiguous().t()])
def test_batches_are_all_rows_once_an_epoch(x, small_blocks):
    for shuffle in (True, False):
        epochs = list(fastsae.batches(x, 100, shuffle=shuffle, epochs=2))
        assert [tuple(batch.shape) for batch in epochs] == [(100, 3)] * 20
        for epoch in (torch.cat(epochs[:10]), torch.cat(epochs[10:])):
            assert epoch.dtype == torch.as_tensor(x).dtype
            expected = torch.as_tensor(x).reshape(-1, 3)
            assert (torch.equal(epoch, expected)) != shuffle
            assert torch.equal(epoch[epoch[:, 0].argsort(stable=True)], expected)


def test_batches_go_on_from_a_position():
    stream = fastsae.batches(X, 64, seed=3)
    for _ in range(20):
        next(stream)
    again = fastsae.batches(X, 64, seed=3)
    again.load_state_dict(stream.state_dict())
    assert torch.equal(next(stream), next(again))
    for other in (fastsae.batches(X + 1, 64, seed=3), fastsae.batches(X, 64, seed=3, shuffle=False)):
        with pytest.raises(ValueError, match="belongs to another stream"):
            other.load_state_dict(stream.state_dict())


def test_a_trainer_takes_an_array():
    x = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32)
    config = fastsae.TrainerConfig(steps=30, progress=False)
    assert fastsae.Trainer(fastsae.TopKSAE(8, 40, 4), config).fit(fastsae.batches(x, 64)).steps == 30


def test_groups_are_held_out_whole_and_all_rows_are_in_one_split(small_blocks):
    groups = torch.arange(1000) // 7
    seen = {}
    for held_out in (True, False):
        source = ArrayActivations([X[:300].numpy(), X[300:].numpy()], groups, held_out)
        found = [source.rows(i) for i in range(len(source.block_rows))]
        assert [len(rows.activations) for rows in found] == source.block_rows
        for rows in found:
            assert torch.equal(rows.activations, X[rows.positions])
            names = [source.names[i] for i in rows.documents.tolist()]
            assert names == [str(position // 7) for position in rows.positions.tolist()]
            assert all(is_held_out(name) == held_out for name in names)
        seen[held_out] = torch.cat([rows.positions for rows in found]).tolist()
    assert sorted(seen[True] + seen[False]) == list(range(1000))
    assert 0 < len(seen[True]) < 200


def test_rows_of_a_document_are_a_group():
    assert len(ArrayActivations([X.view(10, 100, 3)]).names) == 10
    assert len(ArrayActivations([X]).names) == 500  # neighbours, two by two
    assert len(ArrayActivations([X[:5]]).names) == 5


def test_files_one_and_many(tmp_path):
    np.save(tmp_path / "a.npy", X.numpy())
    source = open_activations(tmp_path / "a.npy")
    assert isinstance(source._arrays[0], np.memmap)  # the whole of it is never read
    assert torch.equal(rows_of(source), X)
    torch.save(X.bfloat16(), tmp_path / "b.pt")
    assert torch.equal(rows_of(open_activations(tmp_path / "b.pt")), X.bfloat16())
    save_file({"activations": X.half(), "documents": torch.arange(1000) // 5}, tmp_path / "c.safetensors")
    source = open_activations(tmp_path / "c.safetensors")
    assert torch.equal(rows_of(source), X.half())
    assert len(source.names) == 200
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "notes.txt").write_text("no activations")
    for number in (10, 9, 1):
        np.save(folder / f"part{number}.npy", X.numpy() + number)
    assert torch.equal(rows_of(open_activations(folder)), torch.cat([X + 1, X + 9, X + 10]))


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.npy", lambda p: p.write_bytes(b"damaged"), "a.npy cannot be read as activations"),
        ("a.pt", lambda p: torch.save(print, p), "a.pt cannot be read as activations"),
        ("a.npy", lambda p: np.save(p, np.array([object()]), allow_pickle=True), "a.npy cannot be read as activations"),
        ("a.npy", lambda p: np.save(p, np.zeros((5, 2), int)), "a.npy: expected floats; got int64"),
        ("a.npy", lambda p: np.save(p, np.zeros(5)), r"a.npy: expected \(rows, d_in\).* got shape \(5,\)"),
        (
            "a.pt",
            lambda p: torch.save({"x": X, "y": X}, p),
            "a.pt: expected one tensor, or one named 'activations'; it",
        ),
        ("a.txt", lambda p: p.write_text("1 2"), "a.txt cannot be read as activations: expected one of .npy, .pt"),
    ],
)
def test_what_is_no_activations_is_named(name, write, message, tmp_path):
    write(tmp_path / name)
    with pytest.raises((ValueError, TypeError), match=message):
        open_activations(tmp_path / name)


def test_what_does_not_fit_together_is_named(tmp_path):
    for folder in (tmp_path / "missing", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"holds no activations: expected a file, or a folder, of \.npy"):
            open_activations(folder)
    np.save(tmp_path / "1.npy", X.numpy())
    np.save(tmp_path / "2.npy", X.double().numpy())
    with pytest.raises(ValueError, match=r"2\.npy is of width 3 and float64, the first one of 3 and float32"):
        open_activations(tmp_path)
    with pytest.raises(ValueError, match="expected a group for each of 1000 rows; got 7"):
        ArrayActivations([X], torch.arange(7))
    with pytest.raises(ValueError, match="there are no held-out rows among 1 groups of 5 rows"):
        ArrayActivations([X[:5]], torch.zeros(5), held_out=True)
    with pytest.raises(ValueError, match=r"array 1: expected \(rows, d_in\).* got shape \(0, 3\)"):
        ArrayActivations([X, X[:0]])
    with pytest.raises(TypeError, match="array 0: expected a tensor or a NumPy array; got list"):
        ArrayActivations([[1.0]])


def test_a_store_has_no_split_of_its_own(tmp_path):
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="is a store, whose rows were chosen when it was harvested"):
        open_activations(tmp_path, held_out=True)


def test_in_order_means_in_order(small_blocks):
    stream = ActivationStream(ArrayActivations([X]), 250, buffer_rows=300, epochs=1, shuffle=False)
    assert torch.equal(torch.cat(list(stream)), X)
