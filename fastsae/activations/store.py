"""Activations on disk: a folder of safetensors shards and an index, written shard by shard, read shard by shard.

index.json          what was harvested; once complete, also rows and checksum of each shard
shard_00000.safetensors    activations (rows, d_in), documents and positions (rows,) int32
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsae import files

FORMAT = 1


def _shard(folder: Path, i: int) -> Path:
    return folder / f"shard_{i:05d}.safetensors"


class StoreWriter:
    """Writes a store. Opening a folder again goes on where the last writer stopped."""

    def __init__(self, folder: Path, identity: dict[str, Any], names: Sequence[str]) -> None:
        self.folder, self._index = folder, folder / "index.json"
        self._description = {"format": FORMAT, "identity": identity, "documents": list(names)}
        folder.mkdir(parents=True, exist_ok=True)
        if self._index.exists():
            there = files.read_json(self._index)["identity"]
            differing = [f"{k} is {there.get(k)!r} there, {v!r} now" for k, v in identity.items() if there.get(k) != v]
            if differing:
                raise ValueError(
                    f"harvest: {folder} holds another harvest: {'; '.join(differing)}. Choose another folder."
                )
        else:
            files.write_json(self._index, {**self._description, "shards": None})

    def has(self, i: int) -> bool:
        return _shard(self.folder, i).exists()

    def write(self, i: int, activations: Tensor, documents: Tensor, positions: Tensor) -> None:
        tensors = {"activations": activations, "documents": documents, "positions": positions}
        files.write_tensors(_shard(self.folder, i), tensors)

    def finish(self, block_rows: Sequence[int]) -> None:
        """Write the complete index."""
        shards = [{"rows": rows, "crc32": files.crc32(_shard(self.folder, i))} for i, rows in enumerate(block_rows)]
        files.write_json(self._index, {**self._description, "shards": shards})


class ActivationStore:
    """A finished harvest: a source of blocks, one per shard. Never holds more than the block it was asked for."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self.folder / "index.json"
        if not index.is_file():
            raise FileNotFoundError(f"{self.folder} holds no activation store: there is no index.json in it")
        description = files.read_json(index)
        if description.get("format") != FORMAT:
            raise ValueError(
                f"{index} has format {description.get('format')}, this fastsae reads {FORMAT}; harvest again"
            )
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

    @property
    def n_rows(self) -> int:
        return sum(self.block_rows)

    def block(self, i: int) -> Tensor:
        """The activation rows of shard i: (block_rows[i], d_in), in the dtype they were stored in."""
        return self.rows(i)["activations"]

    def rows(self, i: int) -> dict[str, Tensor]:
        """Activations, documents and positions of shard i. Raises ValueError naming the file if it is damaged."""
        path = _shard(self.folder, i)
        advice = "Delete it and run the harvest again: only what is missing is written."
        try:
            if i not in self._verified and files.crc32(path) != self._checksums[i]:
                raise ValueError(f"{path} is damaged: its checksum is not the one that was stored")
            tensors = files.read_tensors(path)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"activation store: {error}. {advice}") from error
        self._verified.add(i)
        return tensors
