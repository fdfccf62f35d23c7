"""Readout of a language model after prompts: log-probabilities of whole words, with activations changed on the way."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsae.activations import TokenWindows, check_hook, first_token, output_mask, special_tokens
from fastsae.fp64 import fp64_device, in_fp64

_LOGITS = 2**26
"""Held at a time, in numbers: 256 MB in fp32."""


class Spliced:
    """Token sequences of different lengths at one hook, whose activations are known and can be replaced.

    Positions of text are replaced; BOS and the like, on which no SAE was trained, and padding are not.
    """

    def __init__(self, model: Any, hook_name: str, sequences: Sequence[Sequence[int]]) -> None:
        check_hook(model, hook_name)
        self.model, self.hook_name = model.eval(), hook_name
        first = first_token(model)
        bos = [] if first is None else [first]
        longest = len(bos) + max(map(len, sequences))
        if longest > model.cfg.n_ctx:
            raise ValueError(f"a prompt takes {longest} tokens, the model reads {model.cfg.n_ctx}; use shorter prompts")
        rows = [bos + list(s) + [0] * (longest - len(bos) - len(s)) for s in sequences]
        tokens = torch.tensor(rows, device="cpu")
        ends = torch.tensor([len(bos) + len(s) for s in sequences], device="cpu")
        self.bos = len(bos)
        owners, special = torch.zeros_like(ends), special_tokens(model)
        self.windows = TokenWindows(tokens, ends, owners, ("prompts",), first is not None, special)
        self.tokens, self.is_text = tokens.to(model.cfg.device), self.windows.is_text().to(model.cfg.device)

    @property
    def parts(self) -> list[slice]:
        """The sequences, as many at a time as are read at once."""
        at_once = max(1, _LOGITS // (self.tokens.shape[1] * self.model.cfg.d_vocab))
        return [slice(lo, lo + at_once) for lo in range(0, len(self.tokens), at_once)]

    @torch.no_grad()
    def raw(self, part: slice) -> Tensor:
        """The activations at text: (rows, d_in)."""
        seen: list[Tensor] = []

        def keep(activation: Tensor, hook: Any) -> Tensor:
            seen.append(activation.flatten(2))
            return activation

        self.model.run_with_hooks(self.tokens[part], fwd_hooks=[(self.hook_name, keep)], return_type="logits")
        return seen[0][self.is_text[part]]

    @torch.no_grad()
    def logits(self, part: slice, replaced: Tensor | None = None) -> Tensor:
        """(sequences, tokens, vocabulary), with these activations (rows, d_in) at text."""

        def splice(activation: Tensor, hook: Any) -> Tensor:
            flat = activation.flatten(2).clone()
            flat[self.is_text[part]] = replaced.to(flat)  # type: ignore[union-attr]  # no hook without it
            return flat.view_as(activation)

        hooks = [] if replaced is None else [(self.hook_name, splice)]
        return self.model.run_with_hooks(self.tokens[part], fwd_hooks=hooks, return_type="logits")


class WordReadout:
    """The log-probability of each of some words after each of some prompts: (prompts, words).

    A word is all of its tokens, with the space before it: of words of one token, differences are those of their logits.
    Words that begin alike are read from one sequence.
    """

    def __init__(self, model: Any, hook_name: str, prompts: Sequence[str], words: Sequence[str]) -> None:
        self.shape = (len(prompts), len(words))
        sequences: dict[tuple[int, ...], int] = {}
        asked: list[tuple[int, int, int, int]] = []  # sequence, position in it, token, place in the answer
        for p, prompt in enumerate(prompts):
            before = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            if not before:
                raise ValueError(f"prompt {prompt!r} has no tokens in this model's tokenizer; use another one")
            for w, word in enumerate(words):
                whole = model.tokenizer(f"{prompt} {word}", add_special_tokens=False)["input_ids"]
                if whole[: len(before)] != before or len(whole) == len(before):
                    raise ValueError(
                        f"prompt {prompt!r}: this model's tokenizer joins its end with the word {word!r}; use another "
                        "prompt, one that ends in a whole word"
                    )
                sequence = sequences.setdefault(tuple(whole[:-1]), len(sequences))
                for position in range(len(before), len(whole)):
                    asked.append((sequence, position - 1, whole[position], p * len(words) + w))
        self.spliced = Spliced(model, hook_name, list(sequences))
        if output_mask(model, self.spliced.windows).reads_ahead:
            raise ValueError(
                "WordReadout: this model reads in both directions, so it predicts no word after a prompt; leave the "
                "prompts out of the stimuli"
            )
        self._asked = torch.tensor(asked, device=self.spliced.tokens.device)

    def scores(self, replaced: Sequence[Tensor] | None = None) -> Tensor:
        """Log-probabilities (prompts, words) fp64, with the activations of each part replaced."""
        out = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.float64, device=fp64_device(self._asked.device))
        for i, part in enumerate(self.spliced.parts):
            here = self._asked[(self._asked[:, 0] >= part.start) & (self._asked[:, 0] < part.stop)]
            logits = self.spliced.logits(part, None if replaced is None else replaced[i])
            at = logits[here[:, 0] - part.start, here[:, 1] + self.spliced.bos].float().log_softmax(dim=-1)
            out.index_add_(0, here[:, 3].to(out.device), in_fp64(at.gather(1, here[:, 2:3]).squeeze(1)))
        return out.view(self.shape).cpu()
