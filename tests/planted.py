"""A language model whose output is known: it notes two markers, and says words by them and by their product.

At every token x = f u_0 + s u_1 + f s u_2 + (what stands for the token), where f and s say how strong a marker of
either factor was seen up to there. Words of the cell high high read u_0 + u_1 + 3 u_2, of high low u_0, of low high
u_1: without the product, effects are additive.
"""

from typing import Any

import torch
from torch import Tensor

import fastsae
from fastsae.factorial.stimuli import LEVELS, Cell, Factor, Stimuli

D, FILLERS, PAIRED, OFFSET = 16, 12, 3, 50.0
HOOK = "planted"
NAMES = [
    "<bos>",
    "first",
    "second",
    *(f"filler{i}" for i in range(FILLERS)),
    *(f"{c}{i}" for c in "abcd" for i in range(4)),
]


class Hook:
    name = HOOK


class Planted:
    """As much of TransformerLens' interface as is used."""

    def __init__(self, product: float = 1.0) -> None:
        from types import SimpleNamespace

        torch.manual_seed(0)
        self.cfg = SimpleNamespace(n_ctx=24, device="cpu", model_name="planted", d_vocab=len(NAMES))
        self.hook_dict = {HOOK: Hook()}
        self.tokenizer = tokenizer()
        self.product = product
        self.unembedding = torch.zeros(len(NAMES), D)
        for cell, reads in zip("abcd", ((1, 1, 3.0), (1, 0, 0), (0, 1, 0), (0, 0, 0)), strict=True):
            for word in range(4):
                self.unembedding[NAMES.index(f"{cell}{word}"), :3] = torch.tensor(reads) * (1 + word / 10)

    def eval(self) -> "Planted":
        return self

    def parameters(self) -> list[Tensor]:
        return [self.unembedding]

    def activations(self, tokens: Tensor) -> Tensor:
        # How strong a marker is goes by the filler before it: texts of a cell differ.
        strength = 1 + (torch.roll(tokens, 1, dims=1) % 5) / 5
        first, second = (((tokens == marker) * strength).cummax(dim=1).values for marker in (1, 2))
        x = torch.zeros(*tokens.shape, D)
        x[..., 0], x[..., 1], x[..., 2] = first, second, self.product * first * second
        filler = (tokens - 3).clamp(0, FILLERS - 1)
        return x + (tokens >= 3).unsqueeze(-1) * torch.nn.functional.one_hot(filler + 3, D).float()

    def run_with_cache(self, tokens: Tensor, **_: Any) -> tuple[None, dict[str, Tensor]]:
        return None, {HOOK: self.activations(tokens)}

    def run_with_hooks(self, tokens: Tensor, fwd_hooks: Any = (), **_: Any) -> Tensor:
        x = self.activations(tokens)
        for _, hook in fwd_hooks:
            x = hook(x, Hook())
        return x @ self.unembedding.T


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(NAMES)}, unk_token="<bos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>", name_or_path="planted")


def joint(product: float = 1.0) -> fastsae.JointSAE:
    """The SAE that reconstructs the model's activations: features 0 and 1 are the markers, their pair makes u_2."""
    sae = fastsae.JointSAE(D, D - 1, 6, k_integration=5, d_embedding=PAIRED + 5, dropout=0.15)
    with torch.no_grad():
        for p in sae.parameters():
            p.zero_()
        sae.W_enc[0, 0] = sae.W_enc[1, 1] = 1.0
        for filler in range(FILLERS):
            sae.W_enc[2 + filler, 3 + filler] = 1.0
        sae.W_dec.copy_(sae.W_enc)
        sae.W_lin.copy_(0.1 * sae.W_enc)
        sae.V[:2, 0] = 1.0  # z_0 = a_0 a_1; elsewhere a marker and a filler make pairs, which are of little consequence
        sae.V[0, 1:3] = sae.V[1, 3:5] = 0.5
        sae.V[2:, 1:] = torch.rand(D - 3, PAIRED + 4, generator=torch.Generator().manual_seed(1))
        sae.W1.copy_(torch.eye(PAIRED + 5))
        sae.b1[0], sae.b2[2] = OFFSET, -OFFSET * product  # the ReLU lets pass what a clamp makes negative
        sae.W2[2, 0] = product
        sae.W2[3:, 1:] = 0.01
    return sae.eval()


def stimuli(per_cell: int = 12, seed: int = 0, length: int = 10) -> Stimuli:
    """Texts of fillers with markers at random places; prompts with both markers."""
    generator = torch.Generator().manual_seed(seed)

    def text(markers: tuple[str, ...], length: int = length) -> str:
        words = [f"filler{i}" for i in torch.randint(0, FILLERS, (length,), generator=generator).tolist()]
        places = torch.randperm(length - 2, generator=generator)[: len(markers)].tolist()
        for place, marker in zip(places, markers, strict=True):
            words[place] = marker
        return " ".join(words)

    markers = (("first", "second"), ("first",), ("second",), ())
    cells = {}
    for level, cell, there in zip(LEVELS, "abcd", markers, strict=True):
        texts: set[str] = set()
        while len(texts) < per_cell:
            texts.add(text(there))
        cells[level] = Cell(tuple(sorted(texts)), tuple(f"{cell}{i}" for i in range(4)))
    factors = (Factor("one", "first", "none"), Factor("other", "second", "none"))
    return Stimuli("planted", "markers", factors, cells, tuple(text(("first", "second"), 6) for _ in range(8)))
