"""Shuffled batches from a source of activation blocks, with a position that can be stored."""

import hashlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from fastsae import progress


class Source(Protocol):
    """Blocks of activation rows: an ActivationStore, or ModelActivations computed on the fly.

    A source with an `identity` (a JSON dict of what its rows depend on) has its positions checked against it.
    """

    d_in: int
    block_rows: list[int]

    def block(self, i: int) -> Tensor: ...


class ActivationStream:
    """An endless (or `epochs` long) iterator of (batch_size, d_in) batches, shuffled unless `shuffle` is False.

    Each epoch visits the blocks in a new order; blocks fill a buffer of about `buffer_rows` rows, whose rows are
    permuted. Only the buffer is held in memory. Every row comes once an epoch; batches straddle buffers and epochs, and
    only the last incomplete batch of a finite stream is dropped. state_dict / load_state_dict set the stream to a
    position between two batches, exactly.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        buffer_rows: int = 2**17,
        seed: int = 0,
        epochs: int | None = None,
        shuffle: bool = True,
    ) -> None:
        n_rows = sum(source.block_rows)
        if not 1 <= batch_size <= n_rows:
            raise ValueError(
                f"ActivationStream: batch_size must be between 1 and the source's {n_rows} rows; got {batch_size}"
            )
        if buffer_rows < 1:
            raise ValueError(f"ActivationStream: buffer_rows must be at least 1; got {buffer_rows}")
        if epochs is not None and epochs < 1:
            raise ValueError(f"ActivationStream: epochs must be None or at least 1; got {epochs}")
        self.source, self.batch_size, self.buffer_rows = source, batch_size, buffer_rows
        self.seed, self.epochs, self.shuffle = seed, epochs, shuffle
        self._epoch = self._buffer_number = self._offset = 0
        self._buffer: Tensor | None = None
        self._buffer_key: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        parts: list[Tensor] = []
        missing = self.batch_size
        while missing:
            if self._epoch == self.epochs:
                raise StopIteration
            parts.append(self._take(missing))
            missing -= len(parts[-1])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in: a small dict that JSON can hold."""
        return {"epoch": self._epoch, "buffer": self._buffer_number, "offset": self._offset, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position. Raises ValueError if it is one of another stream, or in another source."""
        differing = [f"{k} was {state.get(k)}, is {v}" for k, v in self._identity().items() if state.get(k) != v]
        if differing:
            raise ValueError(f"ActivationStream: this position belongs to another stream: {'; '.join(differing)}")
        position: list[Any] = [state.get(name) for name in ("epoch", "buffer", "offset")]
        if not all(type(n) is int and n >= 0 for n in position) or not self._is_place(*position):
            raise ValueError(f"ActivationStream: there is no such position: epoch, buffer and offset {position}")
        self._epoch, self._buffer_number, self._offset = position

    def _identity(self) -> dict[str, Any]:
        """All that decides which rows come when."""
        return {
            **getattr(self.source, "identity", {}),
            "d_in": self.source.d_in,
            "n_rows": sum(self.source.block_rows),
            "n_blocks": len(self.source.block_rows),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "buffer_rows": self.buffer_rows,
            **({} if self.shuffle else {"shuffle": False}),  # as positions of old have it
        }

    def _take(self, n: int) -> Tensor:
        """Up to n rows from here on, within one buffer."""
        buffer = self._filled()
        # A copy: a view would keep this buffer in memory while the next one is filled.
        rows = buffer[self._offset : self._offset + n].clone()
        self._offset += len(rows)
        if self._offset == len(buffer):
            self._advance()
        return rows

    def _advance(self) -> None:
        self._offset = 0
        self._buffer_number += 1
        if self._buffer_number == len(self._buffers(self._epoch)):
            self._buffer_number = 0
            self._epoch += 1
            if self._epoch == 1 != self.epochs:
                rows = f"all {sum(self.source.block_rows):,} rows have been given once"
                progress.logger.info(f"activations: {rows}; they come again from here on, in another order")

    def _is_place(self, epoch: int, buffer: int, offset: int) -> bool:
        if epoch == self.epochs:
            return (buffer, offset) == (0, 0)
        buffers = self._buffers(epoch) if self.epochs is None or epoch < self.epochs else []
        return buffer < len(buffers) and offset < sum(self.source.block_rows[i] for i in buffers[buffer])

    def _buffers(self, epoch: int) -> list[list[int]]:
        """The blocks of an epoch in their order, grouped into buffers."""
        order = self._order(len(self.source.block_rows), "blocks", epoch).tolist()
        buffers: list[list[int]] = [[]]
        rows = 0
        for block in order:
            if rows >= self.buffer_rows:
                buffers.append([])
                rows = 0
            buffers[-1].append(block)
            rows += self.source.block_rows[block]
        return buffers

    def _filled(self) -> Tensor:
        key = (self._epoch, self._buffer_number)
        if self._buffer is None or self._buffer_key != key:
            self._buffer = None  # freed before the next one is made
            blocks = self._buffers(self._epoch)[self._buffer_number]
            n_rows = sum(self.source.block_rows[i] for i in blocks)
            places = self._order(n_rows, "rows", *key)
            buffer, lo = None, 0
            with progress.bar(self._what(), n_rows, "row", leave=False) as bar:
                for i in blocks:
                    rows = self.source.block(i)
                    buffer = rows.new_empty(n_rows, self.source.d_in) if buffer is None else buffer
                    buffer[places[lo : lo + len(rows)].to(rows.device)] = rows
                    lo += len(rows)
                    bar.update(len(rows))
                    del rows  # freed before the next block is made
            self._buffer, self._buffer_key = buffer, key
        assert self._buffer is not None
        return self._buffer

    def _what(self) -> str:
        return f"activations, pass {self._epoch + 1}" if self._epoch else "activations"

    def _order(self, n: int, *key: object) -> Tensor:
        if not self.shuffle:
            return torch.arange(n, device="cpu")
        digest = hashlib.sha256("/".join(map(str, (self.seed, *key))).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randperm(n, generator=generator, device="cpu")
