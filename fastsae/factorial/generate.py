"""Text that a language model writes while a feature is clamped, beside what it writes untouched."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastsae.factorial.readout import Spliced

Edit = Callable[[Tensor], Tensor]
"""Raw activations (rows, d_in) to those that take their place."""


def generate(
    model: Any, hook_name: str, prompts: Sequence[str], edits: dict[str, Edit | None], n_tokens: int = 30
) -> dict[str, list[str]]:
    """The most probable continuation of every prompt, token by token: by the name of the edit, one a prompt.

    Every position of the text so far is edited anew at each token. None edits nothing.
    """
    begun = begin(model, prompts, n_tokens)
    found: dict[str, list[str]] = {}
    for name, edit in edits.items():
        texts = [list(tokens) for tokens in begun]
        for _ in range(n_tokens):
            spliced = Spliced(model, hook_name, texts)
            for part in spliced.parts:
                replaced = None if edit is None else edit(spliced.raw(part))
                logits = spliced.logits(part, replaced)
                for row, text in zip(logits, texts[part], strict=True):
                    text.append(int(row[spliced.bos + len(text) - 1].argmax()))
        found[name] = [model.tokenizer.decode(text[len(before) :]) for text, before in zip(texts, begun, strict=True)]
    return found


def begin(model: Any, prompts: Sequence[str], n_tokens: int) -> list[list[int]]:
    """The tokens of every prompt. Raises ValueError unless so many more fit."""
    begun = [model.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    room = model.cfg.n_ctx - max(map(len, begun)) - 1
    if room < n_tokens:
        raise ValueError(f"generate: {n_tokens} tokens after these prompts are more than the model reads; {room} fit")
    return begun


def side_by_side(prompts: Sequence[str], found: dict[str, list[str]]) -> str:
    """Continuations as a text to read: a block a prompt, a line an edit."""
    longest = max(map(len, found))
    blocks = []
    for p, prompt in enumerate(prompts):
        lines = [f"{name.ljust(longest)}  |{_one_line(texts[p])}" for name, texts in found.items()]
        blocks.append("\n".join([repr(prompt), *lines]))
    return "\n\n".join(blocks) + "\n"


def _one_line(text: str) -> str:
    return text.replace("\n", "\u21b5")
