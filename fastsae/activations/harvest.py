"""Activations of a language model at one hook: computed block by block, on the fly or into a store."""

import hashlib
import inspect
import math
import re
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae import progress
from fastsae.activations.reading import PaddingMask, check_hook, check_tokens
from fastsae.activations.store import ActivationStore, Rows, StoreWriter
from fastsae.activations.tokens import TokenWindows, prepends_bos
from fastsae.activations.transformers_model import with_hooks
from fastsae.files import locked

# On the CPU a model reads a block in parts: temporaries of more rows are paged in anew at every operation, which took
# twice the time.
_CPU_TOKENS = 2048

_STORED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ModelActivations:
    """The activations of `model` at `hook_name` over token windows, at tokens of text: a source of blocks.

    model: anything with TransformerLens' run_with_cache and hook_dict (HookedTransformer, TransformerBridge), which is
    put into eval mode, or a transformers model in memory, whose weights a bridge shares. Only the layers up to the hook
    are run. A hook with a head axis gives its heads side by side in one row. A model that reads in both directions gets
    an attention mask. Raises ValueError for an unknown hook, naming the nearest known ones, for a hook that never fires
    or has no row per token, for windows longer than the model reads or with ids it does not know, and for padding that
    it cannot be kept from seeing.
    """

    def __init__(self, model: Any, hook_name: str, windows: TokenWindows, batch_windows: int = 32) -> None:
        model = with_hooks(model)
        self.model, self.hook_name, self.windows, self.batch_windows = model, hook_name, windows, batch_windows
        check_hook(model, hook_name)
        if batch_windows < 1:
            raise ValueError(f"ModelActivations: expected batch_windows of at least 1; got {batch_windows}")
        check_tokens(model, windows, "ModelActivations")
        if windows.has_bos and not prepends_bos(model):
            warnings.warn(
                "windows begin with BOS, and this model was trained without: its activations are others then. "
                "tokenize(documents, model, ...) makes windows as the model knows them",
                stacklevel=2,
            )
        model.eval()  # dropout would make every pass over the same tokens another one
        layer = re.match(r"blocks\.(\d+)\.", hook_name)
        forward = getattr(model, "forward", None)
        stops = layer and (forward is None or "stop_at_layer" in inspect.signature(forward).parameters)
        self._stop = {"stop_at_layer": int(layer[1]) + 1} if layer and stops else {}
        self._batches = [
            slice(lo, min(lo + batch_windows, len(windows))) for lo in range(0, len(windows), batch_windows)
        ]
        self.block_rows = [int(windows.is_text(batch).sum()) for batch in self._batches]
        for length in (1, 2):  # a head axis can pass for the tokens at one length, not at two
            probe = self._forward(windows.tokens[:1, :length])
            self.d_in, self.dtype = probe.shape[-1], probe.dtype
        self._mask = PaddingMask(model, windows, self._forward)

    @property
    def n_rows(self) -> int:
        return sum(self.block_rows)

    def block(self, i: int) -> Tensor:
        """The activation rows of the i-th batch of windows: (block_rows[i], d_in), in the model's dtype."""
        return self.rows(i).activations

    def rows(self, i: int) -> Rows:
        """Rows of block i, with the document and the position of each."""
        batch = self._batches[i]
        on_cpu = torch.device(self.model.cfg.device).type == "cpu"
        at_once = max(1, _CPU_TOKENS // self.windows[batch].context) if on_cpu else self.batch_windows
        parts = [slice(lo, min(lo + at_once, batch.stop)) for lo in range(batch.start, batch.stop, at_once)]
        return Rows(*map(torch.cat, zip(*(self._rows(self.windows[part]) for part in parts), strict=True)))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that the rows and their order depend on: a store, or a position in a stream, must agree in it."""
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

    def _rows(self, windows: TokenWindows) -> Rows:
        """Slice of the windows that are read at once."""
        is_text = windows.is_text()
        activations = self._forward(windows.tokens, **self._mask(windows.is_token()))
        return Rows(
            activations[is_text.to(activations.device)],
            windows.documents.unsqueeze(1).expand_as(is_text)[is_text].to(torch.int32),
            is_text.nonzero()[:, 1].to(torch.int32),
        )

    @torch.no_grad()
    def _forward(self, tokens: Tensor, **mask: Tensor) -> Tensor:
        _, cache = self.model.run_with_cache(
            tokens.to(self.model.cfg.device), names_filter=[self.hook_name], **self._stop, **mask
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


def _weights_digest(model: Any) -> str:
    """A fingerprint of the weights by the first entries of every parameter: names outlive a retrained model."""
    fingerprint = hashlib.sha256()
    for parameter in model.parameters():
        fingerprint.update(parameter.detach().flatten()[:64].cpu().double().numpy())
    return fingerprint.hexdigest()[:16]


def harvest(source: ModelActivations, folder: str | Path, dtype: torch.dtype = torch.float32) -> ActivationStore:
    """Write all blocks of `source` into a store, a shard each, and open it.

    An interrupted harvest goes on at the first missing shard; the store comes out the same to the bit. Raises
    ValueError when `folder` holds another harvest, and at an activation that is not finite or that `dtype` cannot hold;
    RuntimeError when another process is writing into it.
    """
    if not hasattr(source, "block_rows"):
        raise TypeError(f"harvest: expected ModelActivations(model, hook_name, windows); got {type(source).__name__}")
    if dtype not in _STORED:
        trained_on = ", ".join(str(one)[6:] for one in _STORED)
        raise TypeError(f"harvest: expected a float dtype; got {dtype}. Activations are trained on in {trained_on}")
    folder = Path(folder)
    with locked(folder, "harvest"), progress.bar("harvest", source.n_rows, "row") as bar:
        writer = StoreWriter(folder, source.identity | {"dtype": str(dtype)[6:]}, source.windows.names)
        for i, n_rows in enumerate(source.block_rows):
            if not writer.has(i):
                rows = source.rows(i)
                stored = rows._replace(activations=rows.activations.to(dtype))
                if not stored.activations.isfinite().all():
                    raise ValueError(_not_finite(rows, stored.activations, source))
                writer.write(i, stored)
            bar.update(n_rows)
        writer.finish(source.block_rows)
    return ActivationStore(folder)


def _not_finite(rows: Rows, stored: Tensor, source: ModelActivations) -> str:
    """Say where the first activation is that cannot be stored, and what to do."""
    row, dimension = (~stored.isfinite()).nonzero()[0].tolist()
    value = float(rows.activations[row, dimension])
    where = (
        f"harvest: the activation at document {source.windows.names[int(rows.documents[row])]!r}, position "
        f"{int(rows.positions[row])}, dimension {dimension} is {value:g}"
    )
    if not math.isfinite(value):
        return (
            f"{where}: the model itself gives that, in {str(rows.activations.dtype)[6:]}. Load it in float32, or leave "
            "that document out."
        )
    holding = [str(one)[6:] for one in _STORED if abs(value) <= torch.finfo(one).max]
    return f"{where}, more than {str(stored.dtype)[6:]} holds ({torch.finfo(stored.dtype).max:g}). Use {holding[0]}."
