"""The features that are largest in the identity pathway, with the text they are active on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

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
    examples: tuple[Example, ...] | tuple["RowExample", ...]
    """Strongest first: stretches of text, or rows where there is no text."""


@dataclass(frozen=True)
class RowExample:
    """A row on which a feature is strong."""

    group: str
    """Name of the group it belongs to."""
    row: int
    """Its number among all rows of the activations; in a store, its position in the window of text."""
    activation: float


class _Blocks(Protocol):
    """Blocks of rows with the group and number of each."""

    block_rows: list[int]

    def block(self, i: int) -> Tensor: ...

    def rows(self, i: int) -> Any: ...


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
        largest = _largest(sae, read, n_features)
        examples = strongest(
            source, lambda i: sae.encode_raw(read.block(i)).columns(largest.chosen), len(largest), n_examples, context
        )
    return largest.with_examples([tuple(found) for found in examples])


def strongest_rows(
    sae: SparseAutoencoder, source: _Blocks, names: Sequence[str], n_features: int = 24, n_examples: int = 6
) -> list[FeatureExamples]:
    """The features that top_features would take, each with the rows it is strongest on, each of another group.

    source: raw rows, read twice; names: of their groups.
    """
    with evaluating(sae):
        largest = _largest(sae, source, n_features)
        found: list[dict[str, RowExample]] = [{} for _ in range(len(largest))]
        for i in progress.over("examples", range(len(source.block_rows)), "block"):
            rows = source.rows(i)
            values, order = sae.encode_raw(rows.activations).columns(largest.chosen).cpu().sort(dim=0, descending=True)
            for f, best in enumerate(found):
                for at, value in zip(order[:, f].tolist(), values[:, f].tolist(), strict=True):
                    least = (
                        min((one.activation for one in best.values()), default=0.0) if len(best) == n_examples else 0.0
                    )
                    if value <= least:
                        break
                    example = RowExample(names[int(rows.documents[at])], int(rows.positions[at]), value)
                    if example.group not in best or best[example.group].activation < value:
                        best[example.group] = example
                    if len(best) > n_examples:
                        del best[min(best, key=lambda group: best[group].activation)]
    in_order = ([*best.values()] for best in found)
    return largest.with_examples([tuple(sorted(best, key=lambda one: -one.activation)) for best in in_order])


class _Largest(NamedTuple):
    """The features with the largest contribution, and what is known of all features (d_sae,)."""

    chosen: Tensor
    contributions: Tensor
    firings: Tensor
    highest: Tensor
    rows: int

    def __len__(self) -> int:
        return len(self.chosen)

    def with_examples(self, examples: Sequence[tuple[Any, ...]]) -> list[FeatureExamples]:
        return [
            FeatureExamples(
                feature=feature,
                contribution=float(self.contributions[feature]) / self.rows,
                firing_rate=int(self.firings[feature]) / self.rows,
                max_activation=float(self.highest[feature]),
                examples=shown,
            )
            for feature, shown in zip(self.chosen.tolist(), examples, strict=True)
        ]


def _largest(sae: SparseAutoencoder, source: _Blocks, n_features: int) -> _Largest:
    """Features that never fire are left out."""
    squares, firings, highest = _statistics(sae, source)
    contributions = squares * in_fp64(sae.W_dec).square().sum(dim=1)
    ranked = contributions.sort(descending=True, stable=True).indices[:n_features]
    chosen = ranked[firings.to(ranked.device)[ranked] > 0].to(firings.device)
    return _Largest(chosen, contributions, firings, highest, sum(source.block_rows))


def _statistics(sae: SparseAutoencoder, source: _Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Collect for each feature over all rows the sum of squared activations, the firings and the largest activation."""
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
