"""Documents as windows of tokens, each within one document."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
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

    @property
    def n_predictions(self) -> int:
        """Tokens of text that another token of text comes before."""
        return int((self.lengths - int(self.has_bos) - 1).clamp(min=0).sum())

    def is_text(self, windows: slice = slice(None)) -> Tensor:
        """Which positions hold text (neither BOS nor padding): (n, context) bool."""
        position = torch.arange(self.context, device="cpu")
        return (position < self.lengths[windows].unsqueeze(1)) & (position >= int(self.has_bos))

    def digest(self) -> str:
        """A fingerprint of the tokens, their order, and the documents they are from."""
        fingerprint = hashlib.sha256("\0".join(self.names).encode(errors="surrogateescape"))
        for part in (self.tokens, self.lengths, self.documents):
            fingerprint.update(part.numpy().tobytes())
        return fingerprint.hexdigest()[:16]


def tokenize(
    documents: Iterable[Document],
    tokenizer: Any,
    context: int,
    max_tokens: int | None = None,
    held_out: bool | None = False,
    max_windows_per_document: int | None = None,
) -> TokenWindows:
    """Cut documents into windows of `context` tokens (BOS included, the tail of a document shorter).

    tokenizer: a Hugging Face one, such as hangs on a TransformerLens model. Text is encoded once and never decoded.
    max_tokens: stop after this many tokens of text.
    held_out: False takes the documents to train on, True only those held out to measure on, None all.
    max_windows_per_document: of a longer document only so many windows, evenly spaced: more documents for the same
    tokens, and it is documents that are independent of one another.
    Raises ValueError when no window comes out.
    """
    if tokenizer is None:
        raise ValueError("tokenize: the model has no tokenizer; attach one (model.tokenizer) or pass token windows")
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = context - len(bos)
    if body < 1:
        raise ValueError(f"tokenize: expected a context of at least {len(bos) + 1}; got {context}")
    for name, limit in (("max_tokens", max_tokens), ("max_windows_per_document", max_windows_per_document)):
        if limit is not None and limit < 1:
            raise ValueError(f"tokenize: expected {name} of at least 1; got {limit}")
    windows: list[Tensor] = []
    lengths: list[Tensor] = []
    names: list[str] = []
    left = float("inf") if max_tokens is None else max_tokens
    for document in documents:
        if left <= 0:
            break
        if held_out is not None and is_held_out(document.name) != held_out:
            continue
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        # A tensor at once: as Python integers a hundred million tokens would take gigabytes.
        ids = torch.tensor(ids, dtype=torch.int64, device="cpu")
        if max_windows_per_document is not None:
            ids = _spread(ids, body, max_windows_per_document)
        ids = ids[: min(left, len(ids))]
        left -= len(ids)
        names.append(document.name)
        starts = torch.arange(0, len(ids), body, device="cpu")
        windows.append(F.pad(ids, (0, len(starts) * body - len(ids))).view(-1, body))
        lengths.append((len(ids) - starts).clamp(max=body) + len(bos))
    tokens = torch.cat(windows) if windows else torch.empty(0, body, device="cpu")
    if len(tokens) == 0:
        which = {True: " held-out", False: " training", None: ""}[held_out]
        raise ValueError(
            f"tokenize: the text holds no{which} documents. About one document in twenty is held out, by a hash of its "
            "name: use more text, or text of several documents."
        )
    tokens = torch.cat(
        [torch.tensor(bos, dtype=torch.int64, device="cpu").expand(len(tokens), len(bos)), tokens], dim=1
    )
    owners = torch.repeat_interleave(torch.tensor([len(rows) for rows in windows], device="cpu"))
    return TokenWindows(tokens, torch.cat(lengths), owners, tuple(names), bool(bos))


def _spread(ids: Tensor, body: int, windows: int) -> Tensor:
    """Of the tokens of a document those of at most `windows` of its windows: the middle ones of as many equal parts, so
    that heads of files, which are licences and imports, come as seldom as they are."""
    parts = ids.split(body)
    if len(parts) <= windows:
        return ids
    return torch.cat([parts[(2 * i + 1) * len(parts) // (2 * windows)] for i in range(windows)])
