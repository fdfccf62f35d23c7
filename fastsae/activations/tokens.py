"""Documents as windows of tokens, each within one document."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsae.activations.text import Document, is_held_out


@dataclass(frozen=True)
class TokenWindows:
    """Token windows, the model's BOS first if it has one, shorter ones padded on the right."""

    tokens: Tensor
    """(n_windows, context) int64"""
    lengths: Tensor
    """(n_windows,) int64: tokens that are not padding, BOS included"""
    documents: Tensor
    """(n_windows,) int64: index into `names`"""
    names: tuple[str, ...]
    """Names of the documents."""
    has_bos: bool
    """Whether each window begins with BOS."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def context(self) -> int:
        return self.tokens.shape[1]

    @property
    def n_tokens(self) -> int:
        """Tokens of text: neither BOS nor padding."""
        return int(self.lengths.sum()) - len(self) * self.has_bos

    def is_text(self, windows: slice = slice(None)) -> Tensor:
        """Which positions hold text (neither BOS nor padding): (n, context) bool."""
        position = torch.arange(self.context)
        return (position < self.lengths[windows].unsqueeze(1)) & (position >= int(self.has_bos))

    def digest(self) -> str:
        """A fingerprint of the tokens and their order."""
        fingerprint = hashlib.sha256(self.tokens.numpy().tobytes())
        fingerprint.update(self.lengths.numpy().tobytes())
        return fingerprint.hexdigest()[:16]


def tokenize(
    documents: Iterable[Document],
    tokenizer: Any,
    context: int,
    max_tokens: int | None = None,
    held_out: bool | None = None,
) -> TokenWindows:
    """Cut documents into windows of `context` tokens (BOS included, the tail of a document shorter).

    tokenizer: a Hugging Face one, such as hangs on a TransformerLens model. Text is encoded once and never decoded.
    max_tokens: stop after this many tokens of text.
    held_out: True takes only held-out documents, False only the others, None all.
    Raises ValueError when no window comes out.
    """
    if tokenizer is None:
        raise ValueError("tokenize: the model has no tokenizer; attach one (model.tokenizer) or pass token windows")
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = context - len(bos)
    if body < 1:
        raise ValueError(f"tokenize: expected a context of at least {len(bos) + 1}; got {context}")
    windows: list[list[int]] = []
    owners: list[int] = []
    names: list[str] = []
    left = float("inf") if max_tokens is None else max_tokens
    for document in documents:
        if left <= 0:
            break
        if held_out is not None and is_held_out(document.name) != held_out:
            continue
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = ids[: min(left, len(ids))]
        left -= len(ids)
        names.append(document.name)
        for lo in range(0, len(ids), body):
            windows.append(bos + ids[lo : lo + body])
            owners.append(len(names) - 1)
    if not windows:
        which = {True: " held-out", False: " training", None: ""}[held_out]
        raise ValueError(
            f"tokenize: the text holds no{which} documents. About one document in twenty is held out, by a hash of its "
            "name: use more text, or text of several documents."
        )
    tokens = torch.zeros(len(windows), context, dtype=torch.int64)
    for row, window in zip(tokens, windows, strict=True):
        row[: len(window)] = torch.tensor(window)
    lengths = torch.tensor([len(window) for window in windows])
    return TokenWindows(tokens, lengths, torch.tensor(owners), tuple(names), bool(bos))
