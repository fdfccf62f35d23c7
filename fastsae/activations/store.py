"""Activations on disk: a folder of safetensors shards and an index, written shard by shard, read shard by shard.

index.json          what was harvested; once complete, also rows and checksum of each shard
shard_00000.safetensors    activations (rows, d_in), documents and positions (rows,) int32
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fastsae import files

FORMAT = 1
_AGAIN = "Delete it and run the harvest again: only what is missing is written."


class Rows(NamedTuple):
    """Activation rows and where each comes from."""

    activations: Tensor
    """(rows, d_in)"""
    documents: Tensor
    """(rows,) int32: index of the document"""
    positions: Tensor
    """(rows,) int32: position in the window"""


def _shard(folder: Path, i: int) -> Path:
    return folder / f"shard_{i:05d}.safetensors"


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / "index.json"
    description = files.read_json(path)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else type(description).__name__
        raise ValueError(f"{path} has format {found}, this fastsae reads {FORMAT}; harvest again, into a new folder")
    with files.expected_in(path, "harvest again, into a new folder"):
        numbers = [description["identity"]["d_in"], *(n for s in description["shards"] or () for n in _numbers(s))]
        wrong = [n for n in numbers if type(n) is not int or n < 0]
        wrong += [name for name in description["documents"] if not isinstance(name, str)]
        if wrong:
            raise TypeError(repr(wrong[0]))
    return description


def _numbers(shard: dict[str, int]) -> tuple[int, int]:
    return shard["rows"], shard["crc32"]


class StoreWriter:
    """Writes a store. Opening a folder again goes on where the last writer stopped.

    Raises ValueError, before anything is written, when the folder holds another harvest or shards without an index.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], names: Sequence[str]) -> None:
        self.folder, self._index = folder, folder / "index.json"
        self._description = {"format": FORMAT, "identity": identity, "documents": list(names)}
        # Taken when a shard is written and kept from then on: what is damaged later must not pass for whole.
        self._checksums: dict[int, int] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if self._index.exists():
            description = _read_index(folder)
            self._checksums = {i: shard["crc32"] for i, shard in enumerate(description["shards"] or [])}
            there = description["identity"]
            differing = [f"{k} is {there.get(k)!r} there, {v!r} now" for k, v in identity.items() if there.get(k) != v]
            if differing:
                raise ValueError(
                    f"harvest: {folder} holds another harvest: {'; '.join(differing)}. Choose another folder."
                )
        elif any(folder.glob("shard_*.safetensors")):
            raise ValueError(
                f"harvest: {folder} holds shards of an unknown harvest, without index.json. Delete them or choose "
                "another folder."
            )
        else:
            files.write_json(self._index, {**self._description, "shards": None})

    def has(self, i: int) -> bool:
        return _shard(self.folder, i).exists()

    def write(self, i: int, rows: Rows) -> None:
        files.write_tensors(_shard(self.folder, i), rows._asdict())
        self._checksums[i] = files.crc32(_shard(self.folder, i))

    def finish(self, block_rows: Sequence[int]) -> None:
        """Write the complete index."""
        for i in range(len(block_rows)):
            if i not in self._checksums:  # written by a harvest that was interrupted
                self._checksums[i] = files.crc32(_shard(self.folder, i))
        shards = [{"rows": rows, "crc32": self._checksums[i]} for i, rows in enumerate(block_rows)]
        files.write_json(self._index, {**self._description, "shards": shards})


class ActivationStore:
    """A finished harvest: a source of blocks, one per shard. Never holds more than the block it was asked for."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "index.json").is_file():
            raise FileNotFoundError(f"{self.folder} holds no activation store: there is no index.json in it")
        description = _read_index(self.folder)
        if description["shards"] is None:
            raise ValueError(
                f"the harvest into {self.folder} did not finish; run it again, it goes on where it stopped"
            )
        self.identity: dict[str, Any] = description["identity"]
        self.document_names: tuple[str, ...] = tuple(description["documents"])
        self.d_in: int = self.identity["d_in"]
        self.block_rows: list[int] = [shard["rows"] for shard in description["shards"]]
        self._checksums: list[int] = [shard["crc32"] for shard in description["shards"]]
        self._verified: set[int] = set()
        for i, rows in enumerate(self.block_rows):  # before a buffer of so many rows is made
            path = _shard(self.folder, i)
            if path.exists() and rows * self.d_in > path.stat().st_size:
                raise ValueError(
                    f"activation store: {path} is damaged, or index.json: it is too small for the {rows} rows "
                    f"it is said to hold. {_AGAIN}"
                )

    @property
    def n_rows(self) -> int:
        return sum(self.block_rows)

    def block(self, i: int) -> Tensor:
        """The activation rows of shard i: (block_rows[i], d_in), in the dtype they were stored in."""
        return self.rows(i).activations

    def rows(self, i: int) -> Rows:
        """Rows of shard i, each with document and position. Raises ValueError naming the file if it is damaged."""
        path = _shard(self.folder, i)
        try:
            if i not in self._verified and files.crc32(path) != self._checksums[i]:
                raise ValueError(f"{path} is damaged: its checksum is not the one that was stored")
            rows = Rows(**files.read_tensors(path))
            if rows.activations.shape != (self.block_rows[i], self.d_in):
                found, said = tuple(rows.activations.shape), (self.block_rows[i], self.d_in)
                raise ValueError(f"{path} is damaged, or index.json: it holds {found} activations, not {said}")
        except FileNotFoundError as error:
            missing = f"activation store: {path} is missing. Run the harvest again: only what is missing is written."
            raise ValueError(missing) from error
        except ValueError as error:
            raise ValueError(f"activation store: {error}. {_AGAIN}") from error
        self._verified.add(i)
        return rows
