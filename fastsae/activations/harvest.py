"""Activations of a language model at one hook: computed block by block, on the fly or into a store."""

import difflib
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from fastsae.activations.store import ActivationStore, StoreWriter
from fastsae.activations.tokens import TokenWindows


class Rows(NamedTuple):
    """Activation rows and where each comes from."""

    activations: Tensor
    """(rows, d_in)"""
    documents: Tensor
    """(rows,) int32: index of the document"""
    positions: Tensor
    """(rows,) int32: position in the window"""


class ModelActivations:
    """The activations of `model` at `hook_name` over token windows, without BOS and padding: a source of blocks.

    model: anything with TransformerLens' run_with_cache and hook_dict (HookedTransformer, TransformerBridge). Only the
    layers up to the hook are run. A hook with a head axis gives its heads side by side in one row.
    Raises ValueError for an unknown hook, naming the nearest known ones.
    """

    def __init__(self, model: Any, hook_name: str, windows: TokenWindows, batch_windows: int = 32) -> None:
        self.model, self.hook_name, self.windows, self.batch_windows = model, hook_name, windows, batch_windows
        check_hook(model, hook_name)
        layer = re.match(r"blocks\.(\d+)\.", hook_name)
        self._stop_at_layer = int(layer[1]) + 1 if layer else None
        self._batches = [slice(lo, lo + batch_windows) for lo in range(0, len(windows), batch_windows)]
        self.block_rows = [int(windows.is_text(batch).sum()) for batch in self._batches]
        self.d_in = self._run(windows.tokens[:1, :2]).shape[-1]

    @property
    def n_rows(self) -> int:
        return sum(self.block_rows)

    def block(self, i: int) -> Tensor:
        """The activation rows of the i-th batch of windows: (block_rows[i], d_in), in the model's dtype."""
        return self.rows(i).activations

    def rows(self, i: int) -> Rows:
        """The same, with the document and the position of each row."""
        batch = self._batches[i]
        is_text = self.windows.is_text(batch)
        activations = self._run(self.windows.tokens[batch])
        document = self.windows.documents[batch].unsqueeze(1).expand_as(is_text)[is_text]
        return Rows(
            activations[is_text.to(activations.device)],
            document.to(torch.int32),
            is_text.nonzero()[:, 1].to(torch.int32),
        )

    def identity(self) -> dict[str, Any]:
        """What a store of these activations must agree in."""
        return {
            "model": str(getattr(self.model.cfg, "model_name", "unnamed")),
            "hook_name": self.hook_name,
            "d_in": self.d_in,
            "context": self.windows.context,
            "n_rows": self.n_rows,
            "tokens": self.windows.digest(),
            "batch_windows": self.batch_windows,
        }

    @torch.no_grad()
    def _run(self, tokens: Tensor) -> Tensor:
        _, cache = self.model.run_with_cache(
            tokens.to(self.model.cfg.device), names_filter=[self.hook_name], stop_at_layer=self._stop_at_layer
        )
        return cache[self.hook_name].flatten(2)


def check_hook(model: Any, hook_name: str) -> None:
    """Raise ValueError, naming the nearest known hooks, unless `model` has this one."""
    if hook_name not in model.hook_dict:
        near = difflib.get_close_matches(hook_name, model.hook_dict, n=5, cutoff=0.5)
        hint = f"Near ones: {', '.join(near)}." if near else "See model.hook_dict for all."
        raise ValueError(f"the model has no hook {hook_name!r}. {hint}")


def harvest(source: ModelActivations, folder: str | Path, dtype: torch.dtype = torch.float32) -> ActivationStore:
    """Write all blocks of `source` into a store, a shard each, and open it.

    An interrupted harvest goes on at the first missing shard; the store comes out the same to the bit. Raises
    ValueError when `folder` holds another harvest.
    """
    writer = StoreWriter(Path(folder), source.identity() | {"dtype": str(dtype)[6:]}, source.windows.names)
    with tqdm(total=source.n_rows, desc="harvest", unit="row", unit_scale=True) as bar:
        for i, n_rows in enumerate(source.block_rows):
            if not writer.has(i):
                rows = source.rows(i)
                writer.write(i, rows.activations.to(dtype), rows.documents, rows.positions)
            bar.update(n_rows)
    writer.finish(source.block_rows)
    return ActivationStore(folder)
