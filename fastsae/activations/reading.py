"""A language model and the windows it is to read: whether they fit together, and which tokens it must not see."""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsae.activations.tokens import TokenWindows
from fastsae.fp64 import in_fp64

Read = Callable[..., Tensor]
"""Tokens (windows, tokens), and a mask by the name the model has for it, to (windows, tokens, width)."""


def check_hook(model: Any, hook_name: str) -> None:
    """Raise ValueError, naming the nearest known hooks, unless `model` has this one; TypeError if it has no hooks."""
    if not hasattr(model, "hook_dict"):
        raise TypeError(
            f"expected a TransformerLens model, which has named hooks; got {type(model).__name__}. "
            "fastsae.lm.load(NAME) makes one of a folder or of a name on the Hugging Face hub, and "
            "TransformerBridge.boot_transformers(NAME, hf_model=model, tokenizer=tokenizer) of a transformers model"
        )
    if hook_name not in model.hook_dict:
        near = difflib.get_close_matches(hook_name, model.hook_dict, n=5, cutoff=0.5)
        hint = f"Near ones: {', '.join(near)}." if near else "See model.hook_dict for all."
        raise ValueError(f"the model has no hook {hook_name!r}. {hint}")


def check_tokens(model: Any, windows: TokenWindows, where: str) -> None:
    """Raise ValueError if the model does not read windows as long as these, or does not know one of their ids."""
    if windows.context > model.cfg.n_ctx:
        raise ValueError(
            f"{where}: expected windows of at most {model.cfg.n_ctx} tokens, the model's context; got "
            f"{windows.context}. Use a shorter context."
        )
    known, (least, most) = getattr(model.cfg, "d_vocab", None), windows.tokens.aminmax()
    unknown = int(least) if int(least) < 0 else int(most)
    if known is not None and not 0 <= unknown < known:
        window = int((windows.tokens == unknown).any(dim=1).nonzero()[0])
        raise ValueError(
            f"{where}: token id {unknown} in {windows.names[int(windows.documents[window])]!r} is outside the model's "
            f"vocabulary of {known} ids. The tokenizer is another model's, or has tokens that were not added to the "
            "model (model.resize_token_embeddings)"
        )


class PaddingMask:
    """Arguments of a model's forward that keep it from seeing padding.

    Where a token sees only those before it, as in GPT-2, that is nothing, and the model runs as it does on windows of
    equal lengths. Found out by reading two tokens: if the first changes with the second, padding would change text.
    Raises ValueError if it still does when the model is given an attention mask, and windows are padded.
    """

    def __init__(self, model: Any, windows: TokenWindows, read: Read) -> None:
        self._device, self._name = model.cfg.device, None
        change = _change(read, windows, {}) if windows.context > 1 else 0.0
        self.reads_ahead = change > 1
        """Whether a token sees those after it."""
        if change == 0 or int(windows.lengths.min()) == windows.context:
            return
        arguments = inspect.signature(model.forward).parameters if hasattr(model, "forward") else {}
        self._name = next((name for name in ("attention_mask", "one_zero_attention_mask") if name in arguments), None)
        if self._name is not None:
            change = _change(read, windows, self(torch.tensor([[True, False]], device="cpu")))
        if change > 1:
            raise ValueError(
                "this model reads in both directions, and takes no attention mask that keeps it from seeing padding: "
                "use documents that fill their windows, or a context so short that no window is padded"
            )

    def __call__(self, is_token: Tensor) -> dict[str, Tensor]:
        return {} if self._name is None or bool(is_token.all()) else {self._name: is_token.long().to(self._device)}


def output_mask(model: Any, windows: TokenWindows) -> PaddingMask:
    """The mask that keeps the output of a model, rather than one of its layers, from seeing padding."""

    @torch.no_grad()
    def logits(tokens: Tensor, **mask: Tensor) -> Tensor:
        if not hasattr(model, "forward"):  # has hooks to run with, and nothing to give a mask to
            return tokens[..., None]
        return model.forward(tokens.to(model.cfg.device), return_type="logits", **mask)

    return PaddingMask(model, windows, logits)


def _change(read: Read, windows: TokenWindows, mask: dict[str, Tensor]) -> float:
    """Distance that the first of two tokens moves when the second is another one; up to 1 it may be rounding."""
    first = int(windows.tokens[0, 0])
    a, b = (read(torch.tensor([[first, second]], device="cpu"), **mask)[0, 0] for second in (0, 1))
    if torch.equal(a, b):
        return 0.0
    moved, size = (in_fp64(a) - in_fp64(b)).abs().max(), in_fp64(a).abs().max().clamp_min(1e-30)
    return float(moved / size) / torch.finfo(a.dtype).eps ** 0.5
