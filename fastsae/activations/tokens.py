"""Documents as windows of tokens, each within one document."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastsae import progress
from fastsae.activations.text import Document, is_held_out

# Windows looked at together: a mask of all of them would take a byte for every token.
_TOGETHER = 4096


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
    special: tuple[int, ...] = ()
    """Ids that are no text wherever they stand, such as BOS or a separator: the model sees them, nothing else does."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, windows: slice) -> "TokenWindows":
        """Some of the windows; of short documents no wider than the longest of them."""
        lengths = self.lengths[windows]
        width = int(lengths.max()) if self._mostly_padding else self.context
        tokens = self.tokens[windows, :width].contiguous()
        return TokenWindows(tokens, lengths, self.documents[windows], self.names, self.has_bos, self.special)

    @property
    def context(self) -> int:
        """Tokens that a window has room for."""
        return self.tokens.shape[1]

    @property
    def n_tokens(self) -> int:
        """Tokens of text: neither special nor padding."""
        return sum(int(self.is_text(part).sum()) for part in self._parts())

    @property
    def n_predictions(self) -> int:
        """Tokens of text that another token of text comes before."""
        return sum(int((text[:, :-1] & text[:, 1:]).sum()) for text in map(self.is_text, self._parts()))

    def is_token(self, windows: slice = slice(None)) -> Tensor:
        """Mask of positions that are not padding: (n, context) bool."""
        return torch.arange(self.context, device="cpu") < self.lengths[windows].unsqueeze(1)

    def is_text(self, windows: slice = slice(None)) -> Tensor:
        """Mask of positions that hold text, neither special nor padding: (n, context) bool."""
        text, tokens = self.is_token(windows), self.tokens[windows]
        text[:, : int(self.has_bos)] = False
        for token in self.special:
            text &= tokens != token
        return text

    def digest(self) -> str:
        """A fingerprint of the tokens, their order, the documents they are from, and of what is no text in them."""
        fingerprint = hashlib.sha256("\0".join(self.names).encode(errors="surrogateescape"))
        for part in (self.tokens, self.lengths, self.documents):
            fingerprint.update(part.numpy().tobytes())
        for part in self._parts():
            special = (self.is_token(part) & ~self.is_text(part))[:, int(self.has_bos) :]
            if special.any():
                fingerprint.update(special.numpy().tobytes())
        return fingerprint.hexdigest()[:16]

    @cached_property
    def _mostly_padding(self) -> bool:
        return _mostly_padding(self.lengths, self.context)

    def _parts(self) -> Iterator[slice]:
        return (slice(lo, lo + _TOGETHER) for lo in range(0, len(self), _TOGETHER))


def tokenize(
    documents: Iterable[Document],
    tokenizer: Any,
    context: int,
    max_tokens: int | None = None,
    held_out: bool | None = False,
    max_windows_per_document: int | None = None,
    prepend_bos: bool | None = None,
) -> TokenWindows:
    """Cut documents into windows of `context` tokens (BOS included, the tail of a document shorter).

    tokenizer: the model, or its Hugging Face tokenizer. Text is encoded once and never decoded.
    max_tokens: stop after this many tokens of text.
    held_out: False takes the documents to train on, True only those held out to measure on, None all.
    max_windows_per_document: of a longer document only so many windows, evenly spaced: more documents for the same
    tokens, and it is documents that are independent of one another.
    prepend_bos: whether windows begin with BOS, if there is one; None is as the model was trained (see `first_token`).
    No window gets a second one in front of a BOS that the text holds. BOS and separators inside a document are seen by
    the model and are no text.
    Raises ValueError when no window comes out.
    """
    bos = first_token(tokenizer, prepend_bos)
    special = special_tokens(tokenizer)
    tokenizer = _tokenizer(tokenizer)
    body = context - (bos is not None)
    if body < 1:
        raise ValueError(f"tokenize: expected a context of at least {context - body + 1}; got {context}")
    for name, limit in (("max_tokens", max_tokens), ("max_windows_per_document", max_windows_per_document)):
        if limit is not None and limit < 1:
            raise ValueError(f"tokenize: expected {name} of at least 1; got {limit}")
    tokens: list[Tensor] = []
    lengths: list[Tensor] = []
    names: list[str] = []
    left = max_tokens
    with progress.bar("tokens", max_tokens, "token", leave=False) as bar:
        for document in documents:
            if left == 0:
                break
            if held_out is not None and is_held_out(document.name) != held_out:
                continue
            ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
            # A tensor at once: as Python integers a hundred million tokens would take gigabytes.
            ids = torch.tensor(ids, dtype=torch.int64, device="cpu")
            windows = _cut(ids, body, bos, special)
            if max_windows_per_document is not None:
                windows = _spread(windows, max_windows_per_document)
            if left is not None:
                windows, left = _first(windows, left, special)
            names.append(document.name)
            tokens += [torch.cat(windows)] if windows else []
            lengths.append(torch.tensor([len(window) for window in windows], dtype=torch.int64, device="cpu"))
            bar.update(int(lengths[-1].sum()))
    if not tokens:
        which = {True: " held-out", False: " training", None: ""}[held_out]
        raise ValueError(
            f"tokenize: the text holds no{which} documents. About one document in twenty is held out, by a hash of its "
            "name: use more text, or text of several documents."
        )
    owners = torch.repeat_interleave(torch.tensor([len(windows) for windows in lengths], device="cpu"))
    bodies = torch.cat(lengths)
    rows = _padded(torch.cat(tokens), bodies, context, bos)
    return TokenWindows(rows, bodies + (context - body), owners, tuple(names), bos is not None, special)


def first_token(model: Any, prepend_bos: bool | None = None) -> int | None:
    """The id that a model's windows begin with: its BOS, or [CLS] where a tokenizer puts that first. None for none.

    model: a TransformerLens model, or a tokenizer; that of `lm.load` knows its model.
    prepend_bos: None is as the model was trained, `cfg.default_prepend_bos` in TransformerLens; without a model, True.
    """
    tokenizer, cfg = _tokenizer(model), _cfg(model)
    if not (prepends_bos(model) if prepend_bos is None else prepend_bos):
        return None
    bos, cls = (_id(tokenizer, cfg, name) for name in ("bos", "cls"))
    put_first = tokenizer("a", verbose=False)["input_ids"][:1]  # such as [CLS], where there is no BOS
    return put_first[0] if put_first and put_first[0] in (bos, cls) else bos


def prepends_bos(model: Any) -> bool:
    """Whether a TransformerLens model was trained with BOS at the beginning; True where that is not known."""
    return bool(getattr(_cfg(model), "default_prepend_bos", True))


def special_tokens(model: Any) -> tuple[int, ...]:
    """Ids that mark where a text begins or ends: BOS, EOS, [SEP], [CLS], and padding. Activations at them are unlike
    those of text. Tokens of chat roles, [MASK] and the unknown token stand for text, and are not among them.

    model: a TransformerLens model, or a tokenizer.
    """
    tokenizer, cfg = _tokenizer(model), _cfg(model)
    ids = {_id(tokenizer, cfg, name) for name in ("bos", "eos", "sep", "cls")}
    padding = _id(tokenizer, cfg, "pad")
    is_unknown = padding == _id(tokenizer, cfg, "unk") and "unk" in str(tokenizer.unk_token).lower()
    # Some pad with a token of text, which is then none of those that were added to the vocabulary.
    is_text = padding not in getattr(tokenizer, "added_tokens_decoder", [padding])
    if not (is_unknown or is_text):  # some pad with the unknown token, and some call what stands between texts so
        ids.add(padding)
    return tuple(sorted(token for token in ids if token is not None))


def _tokenizer(model: Any) -> Any:
    tokenizer = getattr(model, "tokenizer", model)
    if tokenizer is None or isinstance(tokenizer, torch.nn.Module):
        raise ValueError(
            f"tokenize: {'the model' if model is None else type(model).__name__} has no tokenizer; pass it, or "
            "fastsae.lm.load(model, tokenizer=tokenizer)"
        )
    return tokenizer


def _cfg(model: Any) -> Any:
    """The configuration of a model, or of that whose tokenizer this is, where it is known."""
    return getattr(model, "cfg", None) or getattr(model, "model_cfg", None)


def _id(tokenizer: Any, cfg: Any, name: str) -> int | None:
    """The id of a special token. None where there is none: TransformerLens names one for every tokenizer, which may
    then be read as the unknown token, or have an id that the model does not know."""
    token, number = getattr(tokenizer, f"{name}_token", None), getattr(tokenizer, f"{name}_token_id", None)
    if number is None or number >= getattr(cfg, "d_vocab", number + 1):
        return None
    return number if tokenizer.convert_ids_to_tokens(number) == token else None


def _cut(ids: Tensor, body: int, bos: int | None, special: tuple[int, ...]) -> list[Tensor]:
    """The windows of a document without their BOS. One that the text itself has there is the window's own, and what
    holds no text is left out."""
    is_text = _text(ids, special)
    if is_text.all():
        return list(ids.split(body)) if len(ids) else []
    windows, lo = [], 0
    while lo < len(ids):
        if bos is not None and ids[lo] == bos:
            lo += 1
            continue
        if is_text[lo : lo + body].any():
            windows.append(ids[lo : lo + body])
        lo += body
    return windows


def _spread(windows: list[Tensor], most: int) -> list[Tensor]:
    """At most so many windows of a document: the middle ones of as many equal parts, so that heads of files,
    which are licences and imports, come as seldom as they are."""
    n = len(windows)
    return windows if n <= most else [windows[(2 * i + 1) * n // (2 * most)] for i in range(most)]


def _first(windows: list[Tensor], left: int, special: tuple[int, ...]) -> tuple[list[Tensor], int]:
    """The windows up to so many tokens of text, and how many are left after them."""
    text = _text(torch.cat(windows), special) if windows else torch.empty(0, device="cpu")
    n = int(text.sum())
    if n <= left:
        return windows, left - n
    end, kept = int((text.cumsum(0) < left).sum()) + 1, []
    for window in windows:
        kept.append(window[: max(0, end)])
        end -= len(window)
    return [window for window in kept if len(window)], 0


def _text(ids: Tensor, special: tuple[int, ...]) -> Tensor:
    return ~torch.isin(ids, torch.tensor(special, dtype=torch.int64, device="cpu"))


def _padded(tokens: Tensor, lengths: Tensor, context: int, bos: int | None) -> Tensor:
    """Tokens one after the other as windows of these lengths, with BOS in front of each: (windows, context), of short
    documents no wider than the longest."""
    first = int(bos is not None)
    width = first + int(lengths.max()) if _mostly_padding(lengths + first, context) else context
    rows = torch.zeros(len(lengths), width, dtype=torch.int64, device="cpu")
    rows[:, :first] = bos or 0
    rows[:, first:].masked_scatter_(torch.arange(width - first, device="cpu") < lengths.unsqueeze(1), tokens)
    return rows


def _mostly_padding(lengths: Tensor, context: int) -> bool:
    """Whether padding is worth leaving away. In ordinary text it is little, and rows would be rounded in another way
    wherever a few short windows stand together."""
    return 2 * int(lengths.sum()) <= len(lengths) * context
