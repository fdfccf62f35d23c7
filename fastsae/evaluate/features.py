"""The features that are largest in the identity pathway, with the text they are active on."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsae.activations import ModelActivations, TokenWindows
from fastsae.modules import SparseAutoencoder, evaluating


@dataclass(frozen=True)
class Example:
    """A stretch of text around the place where a feature is most active in its window."""

    document: str
    tokens: tuple[str, ...]
    """Each decoded by itself, for reading: pieces of a character show as replacement characters."""
    activations: tuple[float, ...]
    """Of the feature, at each token."""
    peak: int
    """Index into `tokens`."""


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
) -> list[FeatureExamples]:
    """The features with the largest summed squared contribution a^2 |W_dec|^2, largest first.

    context: tokens shown on either side of a peak. Features that never fire are left out, so fewer may come.
    The model reads the windows twice; what is held in memory is one batch and the examples.
    """
    for name, value, least in (("n_features", n_features, 1), ("n_examples", n_examples, 1), ("context", context, 0)):
        if value < least:
            raise ValueError(f"top_features: expected {name} of at least {least}; got {value}")
    if model.tokenizer is None:
        raise ValueError("top_features: the model has no tokenizer to show text with; attach one (model.tokenizer)")
    source = ModelActivations(model, hook_name, windows)
    with evaluating(sae):
        squares, firings, highest = _statistics(sae, source)
        contributions = squares * sae.W_dec.double().square().sum(dim=1)
        ranked = contributions.sort(descending=True, stable=True).indices[:n_features]
        chosen = ranked[firings[ranked] > 0]
        examples = _examples(sae, source, chosen, n_examples, context)
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


def _encode(sae: SparseAutoencoder, raw: Tensor) -> tuple[Tensor, Tensor]:
    code = sae.encode(sae.normalizer(raw.to(sae.W_enc.device)))
    return code.values, code.indices


def _statistics(sae: SparseAutoencoder, source: ModelActivations) -> tuple[Tensor, Tensor, Tensor]:
    """Of each feature over all rows: the sum of squared activations, how often it fires, its largest activation."""
    device = sae.W_enc.device
    squares = torch.zeros(sae.d_sae, dtype=torch.float64, device=device)
    firings = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
    highest = torch.zeros(sae.d_sae, dtype=sae.W_enc.dtype, device=device)
    for i in range(len(source.block_rows)):
        values, indices = (part.flatten() for part in _encode(sae, source.block(i)))
        squares.index_add_(0, indices, values.double().square())
        firings.index_add_(0, indices, (values > 0).long())
        highest.scatter_reduce_(0, indices, values.to(highest.dtype), "amax")
    return squares, firings, highest


def _examples(
    sae: SparseAutoencoder, source: ModelActivations, chosen: Tensor, n_examples: int, context: int
) -> list[list[Example]]:
    """Of each of the chosen features the strongest windows."""
    windows = source.windows
    column = torch.full((sae.d_sae,), -1, device=chosen.device)
    column[chosen] = torch.arange(len(chosen), device=chosen.device)
    found: list[list[tuple[float, Example]]] = [[] for _ in chosen]
    for i in range(len(source.block_rows)):
        first = i * source.batch_windows
        is_text = windows.is_text(slice(first, first + source.batch_windows))
        values, indices = _encode(sae, source.block(i))
        columns = column[indices]
        row, entry = ((columns >= 0) & (values > 0)).nonzero(as_tuple=True)
        dense = values.new_zeros(len(values), len(chosen))
        dense[row, columns[row, entry]] = values[row, entry]
        activations = dense.new_zeros(*is_text.shape, len(chosen), device="cpu")
        activations[is_text] = dense.cpu()
        peaks, positions = activations.max(dim=1)
        strongest = peaks.sort(dim=0, descending=True, stable=True).indices[:n_examples]
        for f, best in enumerate(found):
            weakest = best[-1][0] if len(best) == n_examples else 0.0
            for window in strongest[:, f].tolist():
                if (peak := float(peaks[window, f])) > weakest:
                    position = int(positions[window, f])
                    example = _example(source, first + window, position, activations[window, :, f], context)
                    best.append((peak, example))
            best.sort(key=lambda scored: -scored[0])
            del best[n_examples:]
    return [[example for _, example in best] for best in found]


def _example(source: ModelActivations, window: int, position: int, activations: Tensor, context: int) -> Example:
    windows = source.windows
    lo = max(int(windows.has_bos), position - context)
    hi = min(int(windows.lengths[window]), position + context + 1)
    return Example(
        document=windows.names[int(windows.documents[window])],
        tokens=tuple(source.model.tokenizer.decode([token]) for token in windows.tokens[window, lo:hi].tolist()),
        activations=tuple(activations[lo:hi].tolist()),
        peak=position - lo,
    )
