"""The everyday questions about a trained SAE: what fires here, on which text, what it writes, steering, comparing."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsae.activations import Document, ModelActivations, TokenWindows, check_hook, tokenize, with_hooks
from fastsae.evaluate.examples import Example, strongest
from fastsae.modules import SparseAutoencoder, evaluating
from fastsae.report import table

# Held at a time: 256 MB in fp32.
_COSINES = 2**26
# Two features of different SAEs whose decoder rows have this cosine are called the same one.
_SAME = 0.7


@dataclass(frozen=True)
class PromptFeatures:
    """The strongest features at each token of a prompt; prints as a table."""

    tokens: tuple[str, ...]
    values: Tensor
    """(tokens, n): activations, strongest first, 0 where fewer are active"""
    indices: Tensor
    """(tokens, n) int64: numbers of features"""

    def __str__(self) -> str:
        rows = [
            {
                "token": repr(token),
                "features": ", ".join(f"{i} ({v:.2f})" for v, i in zip(at, features, strict=True) if v),
            }
            for token, at, features in zip(self.tokens, self.values.tolist(), self.indices.tolist(), strict=True)
        ]
        return table(rows)


@dataclass(frozen=True)
class Logits:
    """The tokens whose logits a feature raises and lowers most; prints as a table."""

    raised: tuple[tuple[str, float], ...]
    """Token and what is added to its logit per unit of activation, largest first."""
    lowered: tuple[tuple[str, float], ...]
    """Smallest first."""

    def __str__(self) -> str:
        pairs = zip(self.raised, self.lowered, strict=True)
        return table(
            [{"raised": repr(a), "by": f"{x:+.3f}", "lowered": repr(b), "by ": f"{y:+.3f}"} for (a, x), (b, y) in pairs]
        )


@dataclass(frozen=True)
class Comparison:
    """For each feature of one SAE the nearest of another, by the cosine of their decoder rows in raw activations."""

    nearest: Tensor
    """(d_sae,) int64: a feature of the other SAE"""
    cosine: Tensor
    """(d_sae,) float"""

    @property
    def shared(self) -> float:
        """Share of features with a cosine of 0.7 or more."""
        return int((self.cosine >= _SAME).sum()) / len(self.cosine)

    def __str__(self) -> str:
        both = f"{self.shared:.1%} of {len(self.cosine):,} features are in both (cosine of 0.7 or more)"
        return f"{both}; median cosine {self.cosine.median():.3f}"


def features(sae: SparseAutoencoder, model: Any, hook_name: str, prompt: str, n: int = 5) -> PromptFeatures:
    """The n strongest features at each token of `prompt`, of which BOS is none.

    Raises ValueError where the prompt has no token, or more than the model reads.
    """
    n = min(n, sae.k)
    windows = tokenize([Document("prompt", prompt)], model, model.cfg.n_ctx, held_out=None)
    if len(windows) > 1:
        raise ValueError(
            f"features: the prompt has {windows.n_tokens} tokens, the model reads {model.cfg.n_ctx} at once"
        )
    with evaluating(sae):
        code = sae.encode_raw(ModelActivations(model, hook_name, windows).block(0))
    ids = windows.tokens[0][windows.is_text()[0]].tolist()
    tokens = tuple(model.tokenizer.decode([token]) for token in ids)
    return PromptFeatures(tokens, code.values[:, :n], code.indices[:, :n])


def texts(
    sae: SparseAutoencoder,
    model: Any,
    hook_name: str,
    windows: TokenWindows,
    feature: int,
    n: int = 6,
    context: int = 12,
) -> list[Example]:
    """The n stretches of text that `feature` is strongest on, each of another window; none where it never fires.

    context: tokens shown on either side of the peak.
    """
    _check_feature("texts", sae, feature)
    source = ModelActivations(model, hook_name, windows)
    with evaluating(sae):
        (found,) = strongest(source, lambda i: sae.encode_raw(source.block(i)).columns(feature), 1, n, context)
    return found


@torch.no_grad()
def logits(sae: SparseAutoencoder, model: Any, feature: int, n: int = 10) -> Logits:
    """The n tokens whose logits the decoder row of `feature` raises and lowers most, by the model's unembedding.

    The direct path alone: later layers are skipped, and of the last norm only its weight counts, not its scale.
    Numbers are comparable between tokens, not between models. Raises ValueError where the SAE is not of the residual
    stream.
    """
    _check_feature("logits", sae, feature)
    if sae.d_in != len(model.W_U):
        raise ValueError(
            f"logits: the SAE reads activations of width {sae.d_in}, the residual stream has {len(model.W_U)}; only "
            "what is written to the residual stream has logits of its own"
        )
    written = direction(sae, feature).to(model.W_U)
    if str(model.cfg.normalization_type).startswith("LN"):
        written = written - written.mean()
    weight = getattr(getattr(model, "ln_final", None), "w", None)
    by_token = (written if weight is None else written * weight) @ model.W_U
    raised, lowered = by_token.topk(n), by_token.topk(n, largest=False)
    named = [
        tuple(
            (model.tokenizer.decode([i]), v) for v, i in zip(found.values.tolist(), found.indices.tolist(), strict=True)
        )
        for found in (raised, lowered)
    ]
    return Logits(*named)


@contextmanager
def steered(sae: SparseAutoencoder, model: Any, hook_name: str, feature: int, amount: float) -> Iterator[Any]:
    """The model with `amount` times what `feature` writes added to the activations at every token.

        with steered(sae, model, hook, 6574, 8.0):
            print(model.generate("Once upon a time", max_new_tokens=20))

    amount: in units of the feature's activation; negative ones push away. Only the identity pathway is written.
    """
    _check_feature("steered", sae, feature)
    model = with_hooks(model)
    check_hook(model, hook_name)
    added = amount * direction(sae, feature)

    def add(activation: Tensor, hook: Any) -> Tensor:
        flat = activation.flatten(2)
        return (flat + added.to(flat)).view_as(activation)

    with model.hooks(fwd_hooks=[(hook_name, add)]):
        yield model


@torch.no_grad()
def compare(a: SparseAutoencoder, b: SparseAutoencoder) -> Comparison:
    """The nearest feature of `b` for each feature of `a`. Raises ValueError where they read other widths."""
    if a.d_in != b.d_in:
        raise ValueError(f"compare: expected two SAEs of one width; got d_in = {a.d_in} and {b.d_in}")
    ours, theirs = (F.normalize((sae.W_dec * sae.normalizer.scale).float(), dim=1) for sae in (a, b))
    theirs = theirs.to(ours.device)
    found = [(rows @ theirs.T).max(dim=1) for rows in ours.split(max(1, _COSINES // b.d_sae))]
    return Comparison(torch.cat([f.indices for f in found]), torch.cat([f.values for f in found]))


@torch.no_grad()
def direction(sae: SparseAutoencoder, feature: int) -> Tensor:
    """The row that the identity pathway writes per unit of activation of `feature`, in raw activations: (d_in,)."""
    return sae.W_dec[feature] * sae.normalizer.scale


def _check_feature(where: str, sae: SparseAutoencoder, feature: int) -> None:
    if not 0 <= feature < sae.d_sae:
        raise ValueError(f"{where}: expected a feature from 0 to {sae.d_sae - 1}; got {feature}")
