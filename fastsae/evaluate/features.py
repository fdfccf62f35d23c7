"""The features that are largest in the identity pathway, with the text they are active on."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsae import progress
from fastsae.activations import ModelActivations, TokenWindows
from fastsae.evaluate.examples import Example, strongest
from fastsae.fp64 import fp64_device, in_fp64
from fastsae.modules import HiddenActivations, JointSAE, SparseAutoencoder, evaluating


@dataclass(frozen=True)
class FeatureExamples:
    """One feature over all rows of held-out text, and its most activating contexts, each from another window."""

    feature: int
    contribution: float
    """Mean over rows of a^2 |W_dec|^2, in the normalised space."""
    firing_rate: float
    max_activation: float
    examples: tuple[Example, ...]
    """Strongest first."""


def top_features(
    sae: SparseAutoencoder,
    model: Any,
    hook_name: str,
    windows: TokenWindows,
    n_features: int = 24,
    n_examples: int = 6,
    context: int = 12,
    base: JointSAE | None = None,
) -> list[FeatureExamples]:
    """The features with the largest summed squared contribution a^2 |W_dec|^2, largest first.

    context: tokens shown on either side of a peak. Features that never fire are left out, so fewer may come.
    base: of a SecondarySAE, the SAE whose hidden layer it reads.
    The model reads the windows twice; what is held in memory is one batch and the examples.
    """
    for name, value, least in (("n_features", n_features, 1), ("n_examples", n_examples, 1), ("context", context, 0)):
        if value < least:
            raise ValueError(f"top_features: expected {name} of at least {least}; got {value}")
    if model.tokenizer is None:
        raise ValueError("top_features: the model has no tokenizer to show text with; attach one (model.tokenizer)")
    source = ModelActivations(model, hook_name, windows)
    read = source if base is None else HiddenActivations(source, base)
    with evaluating(sae):
        squares, firings, highest = _statistics(sae, read)
        contributions = squares * in_fp64(sae.W_dec).square().sum(dim=1)
        ranked = contributions.sort(descending=True, stable=True).indices[:n_features]
        chosen = ranked[firings.to(ranked.device)[ranked] > 0].to(firings.device)
        examples = strongest(
            source, lambda i: sae.encode_raw(read.block(i)).columns(chosen), len(chosen), n_examples, context
        )
    return [
        FeatureExamples(
            feature=feature,
            contribution=float(contributions[feature]) / source.n_rows,
            firing_rate=int(firings[feature]) / source.n_rows,
            max_activation=float(highest[feature]),
            examples=tuple(examples[i]),
        )
        for i, feature in enumerate(chosen.tolist())
    ]


def _statistics(sae: SparseAutoencoder, source: ModelActivations | HiddenActivations) -> tuple[Tensor, Tensor, Tensor]:
    """Of each feature over all rows: the sum of squared activations, how often it fires, its largest activation."""
    device = sae.W_enc.device
    squares = torch.zeros(sae.d_sae, dtype=torch.float64, device=fp64_device(device))
    firings = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
    highest = torch.zeros(sae.d_sae, dtype=sae.W_enc.dtype, device=device)
    for i in progress.over("features", range(len(source.block_rows)), "block"):
        code = sae.encode_raw(source.block(i))
        values, indices = code.values.flatten(), code.indices.flatten()
        squares.index_add_(0, indices.to(squares.device), in_fp64(values).square())
        firings.index_add_(0, indices, (values > 0).long())
        highest.scatter_reduce_(0, indices, values.to(highest.dtype), "amax")
    return squares, firings, highest
