"""Activations of one's own as a source of blocks: arrays and tensors, in memory or in files, with or without groups."""

import re
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsae import files
from fastsae.activations.store import ActivationStore, Rows
from fastsae.activations.stream import ActivationStream
from fastsae.activations.text import is_held_out
from fastsae.fp64 import in_fp64

SUFFIXES = (".npy", ".pt", ".safetensors")
# Rows read at once. Without groups, neighbours are held out and counted together, so many at most.
_BLOCK, _NEIGHBOURS = 4096, 64
_GROUPS = "documents"  # as a store's shards call them
_ARRAY = np.ndarray | Tensor


class ArrayActivations:
    """Rows of (rows, d_in) arrays, one array after another: a source of blocks. Memory-mapped ones stay on the disk.

    arrays: tensors or NumPy arrays of floats, all of one width and dtype; one of (documents, tokens, d_in) is read as
    its rows, and each document is a group.
    groups: (rows,) whole numbers, over all arrays: rows of one number belong together. Intervals are over groups, and
    whole groups are held out. None: neighbouring rows, up to 64 of them, are a group.
    held_out: False takes the groups to train on, True only those held out to measure on, None all.
    Raises TypeError or ValueError naming the array that is not as it should be.
    """

    def __init__(self, arrays: Sequence[_ARRAY], groups: _ARRAY | None = None, held_out: bool | None = None) -> None:
        if not arrays:
            raise ValueError("ArrayActivations: expected at least one array; got none")
        for number, array in enumerate(arrays):
            _check(f"ArrayActivations: array {number}", array, arrays[0])
        self._arrays = [array.reshape(-1, array.shape[-1]) for array in arrays]
        self.d_in: int = self._arrays[0].shape[1]
        groups = _by_document(arrays) if groups is None else torch.as_tensor(groups, device="cpu").reshape(-1)
        rows = sum(map(len, self._arrays))
        self._has_groups = groups is not None
        groups = _neighbours(rows) if groups is None else groups
        if len(groups) != rows:
            raise ValueError(f"ArrayActivations: expected a group for each of {rows} rows; got {len(groups)}")
        numbers, group_of_row = groups.unique(return_inverse=True)
        self._group_of_row = group_of_row.to(torch.int32)
        self.names: tuple[str, ...] = tuple(map(str, numbers.tolist()))
        held = torch.tensor([held_out is None or is_held_out(name) == held_out for name in self.names], device="cpu")
        self._kept = held[group_of_row]
        starts = np.cumsum([0, *map(len, self._arrays)])
        cuts = [
            (number, lo, min(lo + _BLOCK, len(array)))
            for number, array in enumerate(self._arrays)
            for lo in range(0, len(array), _BLOCK)
        ]
        kept = [self._kept[starts[number] + lo : starts[number] + hi] for number, lo, hi in cuts]
        used = [i for i, rows in enumerate(kept) if rows.any()]
        self._blocks = [(*cuts[i], int(starts[cuts[i][0]])) for i in used]
        self.block_rows: list[int] = [int(kept[i].sum()) for i in used]
        if not used:
            which = {True: " held-out", False: " training", None: ""}[held_out]
            raise ValueError(
                f"ArrayActivations: there are no{which} rows among {len(self.names)} groups of {rows} rows. One group "
                "in twenty is held out, by a hash of its number: use more rows, or more groups."
            )

    @property
    def n_rows(self) -> int:
        return sum(self.block_rows)

    def block(self, i: int) -> Tensor:
        """The rows of block i: (block_rows[i], d_in), in the dtype of the arrays."""
        return self.rows(i).activations

    def rows(self, i: int) -> Rows:
        """The rows of block i with the group of each, an index into `names`, and its number among all rows."""
        number, lo, hi, start = self._blocks[i]
        array = self._arrays[number][lo:hi]
        # A copy: torch cannot hold an array that must not be written to.
        rows = array.detach() if isinstance(array, Tensor) else torch.from_numpy(np.array(array))
        kept = self._kept[start + lo : start + hi]
        positions = kept.nonzero().squeeze(1) + start + lo
        return Rows(rows[kept.to(rows.device)], self._group_of_row[positions], positions)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """A dict for JSON of all that the rows and their order depend on, and some rows of each array."""
        checksum = zlib.crc32(self._kept.numpy().tobytes())
        if self._has_groups:  # others follow from the number of rows
            checksum = zlib.crc32(self._group_of_row.numpy().tobytes(), checksum)
            checksum = zlib.crc32("\n".join(self.names).encode(), checksum)
        for array in self._arrays:
            some = np.unique(np.linspace(0, len(array) - 1, 64).astype(int)).tolist()
            rows = array[some] if isinstance(array, Tensor) else torch.from_numpy(np.array(array[some]))
            checksum = zlib.crc32(in_fp64(rows.detach()).cpu().numpy().tobytes(), checksum)
        return {"arrays": [len(array) for array in self._arrays], "dtype": str(self._arrays[0].dtype), "rows": checksum}


def batches(
    x: _ARRAY, batch_size: int, *, shuffle: bool = True, epochs: int | None = None, seed: int = 0
) -> ActivationStream:
    """Batches of the rows of one array, for Trainer.fit: an iterator of (batch_size, d_in) tensors that can be resumed.

        fastsae.Trainer(sae, config).fit(fastsae.batches(x, 2048))

    x: a tensor or NumPy array of floats (rows, d_in), or (documents, tokens, d_in); a memory-mapped one stays on disk.
    shuffle: another order in each epoch, of blocks and within a buffer of 131,072 rows; otherwise rows come in order.
    epochs: times each row comes; None goes on until the training ends. The last incomplete batch is dropped.
    """
    return ActivationStream(ArrayActivations([x]), batch_size, seed=seed, epochs=epochs, shuffle=shuffle)


def open_activations(path: str | Path, held_out: bool | None = None) -> "ArrayActivations | ActivationStore":
    """The activations in a .npy, .pt or .safetensors file, in all such files of a folder, or in a store of ours.

    A .pt or .safetensors file holds one tensor (rows, d_in), or names one "activations"; "documents" (rows,) beside it
    are its groups. Files are read in the order of their names, numbers counted as numbers. Nothing is unpickled.
    Raises FileNotFoundError, TypeError or ValueError naming the file.
    """
    path = Path(path)
    if (path / "index.json").is_file():
        if held_out is not None:
            raise ValueError(
                f"{path} is a store, whose rows were chosen when it was harvested; leave held_out at None, or train "
                "on it with the model, hook and text that it is of (--store)"
            )
        return ActivationStore(path)
    found = sorted((p for p in path.iterdir() if p.suffix in SUFFIXES), key=_in_order) if path.is_dir() else [path]
    if not path.exists() or not found:
        raise FileNotFoundError(f"{path} holds no activations: expected a file, or a folder, of {', '.join(SUFFIXES)}")
    opened = [_open(file) for file in found]
    for file, (array, _) in zip(found, opened, strict=True):
        _check(str(file), array, opened[0][0])
    grouped = [groups for _, groups in opened if groups is not None]
    if grouped and len(grouped) < len(opened):
        raise ValueError(f"{path}: some files name {_GROUPS!r} beside their activations and some do not")
    return ArrayActivations([array for array, _ in opened], torch.cat(grouped) if grouped else None, held_out)


def _open(file: Path) -> tuple[_ARRAY, Tensor | None]:
    """The array in a file, and its groups if it names them."""
    try:
        if file.suffix == ".npy":
            return np.lib.format.open_memmap(file, mode="r"), None
        if file.suffix == ".safetensors":
            found: Any = files.read_tensors(file)
        elif file.suffix == ".pt":
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        else:
            raise ValueError(f"expected one of {', '.join(SUFFIXES)}")
    except FileNotFoundError:
        raise
    except Exception as error:  # NumPy and torch raise as many kinds as there are damages
        raise ValueError(f"{file} cannot be read as activations: {error}") from error
    if isinstance(found, Tensor):
        return found, None
    tensors = {name: t for name, t in found.items() if isinstance(t, Tensor)} if isinstance(found, dict) else {}
    name = next(iter(tensors)) if len(tensors) == 1 else "activations"
    if name not in tensors:
        there = ", ".join(map(str, tensors)) or "none"
        raise ValueError(f"{file}: expected one tensor, or one named 'activations'; it holds {there}")
    return tensors[name], tensors.get(_GROUPS)


def _in_order(path: Path) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _check(where: str, array: Any, first: Any) -> None:
    if not isinstance(array, _ARRAY):
        raise TypeError(f"{where}: expected a tensor or a NumPy array; got {type(array).__name__}")
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(
            f"{where}: expected (rows, d_in), or (documents, tokens, d_in); got shape {tuple(array.shape)}"
        )
    floats = array.is_floating_point() if isinstance(array, Tensor) else np.issubdtype(array.dtype, np.floating)
    if not floats or array.dtype in (np.longdouble,):
        raise TypeError(
            f"{where}: expected floats; got {array.dtype}. NumPy has no bfloat16: save such tensors with torch"
        )
    if (array.shape[-1], array.dtype) != (first.shape[-1], first.dtype):
        raise ValueError(
            f"{where} is of width {array.shape[-1]} and {array.dtype}, the first one of {first.shape[-1]} and "
            f"{first.dtype}; expected the same"
        )


def _by_document(arrays: Sequence[_ARRAY]) -> Tensor | None:
    """A number for each document of (documents, tokens, d_in) arrays; None if there are others."""
    if any(array.ndim != 3 for array in arrays):
        return None
    tokens = [array.shape[1] for array in arrays for _ in range(array.shape[0])]
    return torch.repeat_interleave(torch.tensor(tokens, dtype=torch.int64, device="cpu"))


def _neighbours(rows: int) -> Tensor:
    """A number for as many neighbours that there are some hundreds of groups, if there are as many rows."""
    together = min(max(rows // 400, 1), _NEIGHBOURS)
    return torch.arange(rows, device="cpu") // together
