"""Activations of a language model at one hook: computed block by block, on the fly or into a store."""

import difflib
import hashlib
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae import progress
from fastsae.activations.store import ActivationStore, Rows, StoreWriter
from fastsae.activations.tokens import TokenWindows
from fastsae.files import locked

# On the CPU a model reads a block in parts: temporaries of more rows are paged in anew at every operation, which took
# twice the time.
_CPU_TOKENS = 2048


class ModelActivations:
    """The activations of `model` at `hook_name` over token windows, without BOS and padding: a source of blocks.

    model: anything with TransformerLens' run_with_cache and hook_dict (HookedTransformer, TransformerBridge); it is put
    into eval mode. Only the layers up to the hook are run. A hook with a head axis gives its heads side by side in one
    row. Raises ValueError for an unknown hook, naming the nearest known ones, for a hook that never fires or has no row
    per token, and for windows longer than the model reads.
    """

    def __init__(self, model: Any, hook_name: str, windows: TokenWindows, batch_windows: int = 32) -> None:
        self.model, self.hook_name, self.windows, self.batch_windows = model, hook_name, windows, batch_windows
        check_hook(model, hook_name)
        if batch_windows < 1:
            raise ValueError(f"ModelActivations: expected batch_windows of at least 1; got {batch_windows}")
        if windows.context > model.cfg.n_ctx:
            raise ValueError(
                f"ModelActivations: expected windows of at most {model.cfg.n_ctx} tokens, the model's context; got "
                f"{windows.context}. Use a shorter context."
            )
        model.eval()  # dropout would make every pass over the same tokens another one
        layer = re.match(r"blocks\.(\d+)\.", hook_name)
        self._stop_at_layer = int(layer[1]) + 1 if layer else None
        self._batches = [slice(lo, lo + batch_windows) for lo in range(0, len(windows), batch_windows)]
        self.block_rows = [int(windows.is_text(batch).sum()) for batch in self._batches]
        for length in (1, 2):  # a head axis can pass for the tokens at one length, not at two
            probe = self._run(windows.tokens[:1, :length])
            self.d_in, self.dtype = probe.shape[-1], probe.dtype

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

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the rows and their order depend on: a store, or a position in a stream, must agree in it."""
        return {
            "model": str(getattr(self.model.cfg, "model_name", "unnamed")),
            "weights": _weights_digest(self.model),
            "hook_name": self.hook_name,
            "dtype": str(self.dtype)[6:],
            "d_in": self.d_in,
            "context": self.windows.context,
            "n_rows": self.n_rows,
            "tokens": self.windows.digest(),
            "batch_windows": self.batch_windows,
        }

    def _run(self, tokens: Tensor) -> Tensor:
        on_cpu = torch.device(self.model.cfg.device).type == "cpu"
        at_once = max(1, _CPU_TOKENS // tokens.shape[1]) if on_cpu else len(tokens)
        return torch.cat([self._forward(part) for part in tokens.split(at_once)])

    @torch.no_grad()
    def _forward(self, tokens: Tensor) -> Tensor:
        _, cache = self.model.run_with_cache(
            tokens.to(self.model.cfg.device), names_filter=[self.hook_name], stop_at_layer=self._stop_at_layer
        )
        if self.hook_name not in cache:
            raise ValueError(
                f"ModelActivations: {self.hook_name} never fires in this model; hooks such as attn.hook_result need a "
                "switch in its configuration (model.cfg)"
            )
        activations = cache[self.hook_name]
        if activations.dim() < 3 or activations.shape[:2] != tokens.shape:
            raise ValueError(
                f"ModelActivations: expected one row per token, (windows, tokens, ...), at {self.hook_name}; got shape "
                f"{tuple(activations.shape)} for {tuple(tokens.shape)} tokens. Choose a hook of activations, such as "
                "hook_resid_post, hook_mlp_out or attn.hook_z."
            )
        return activations.flatten(2)


def check_hook(model: Any, hook_name: str) -> None:
    """Raise ValueError, naming the nearest known hooks, unless `model` has this one."""
    if hook_name not in model.hook_dict:
        near = difflib.get_close_matches(hook_name, model.hook_dict, n=5, cutoff=0.5)
        hint = f"Near ones: {', '.join(near)}." if near else "See model.hook_dict for all."
        raise ValueError(f"the model has no hook {hook_name!r}. {hint}")


def _weights_digest(model: Any) -> str:
    """A fingerprint of the weights by the first entries of every parameter: names outlive a retrained model."""
    fingerprint = hashlib.sha256()
    for parameter in model.parameters():
        fingerprint.update(parameter.detach().flatten()[:64].double().cpu().numpy())
    return fingerprint.hexdigest()[:16]


def harvest(source: ModelActivations, folder: str | Path, dtype: torch.dtype = torch.float32) -> ActivationStore:
    """Write all blocks of `source` into a store, a shard each, and open it.

    An interrupted harvest goes on at the first missing shard; the store comes out the same to the bit. Raises
    ValueError when `folder` holds another harvest, RuntimeError when another process is writing into it.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"harvest: expected a float dtype; got {dtype}")
    folder = Path(folder)
    shown = {"total": source.n_rows, "desc": "harvest", "unit": "row", "unit_scale": True}
    with locked(folder, "harvest"), progress.bar(**shown) as bar:
        writer = StoreWriter(folder, source.identity | {"dtype": str(dtype)[6:]}, source.windows.names)
        for i, n_rows in enumerate(source.block_rows):
            if not writer.has(i):
                rows = source.rows(i)
                writer.write(i, rows._replace(activations=rows.activations.to(dtype)))
            bar.update(n_rows)
        writer.finish(source.block_rows)
    return ActivationStore(folder)
