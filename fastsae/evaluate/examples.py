"""The places in text where something is largest: shown around each peak, each from another window."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fastsae import progress
from fastsae.activations import ModelActivations


@dataclass(frozen=True)
class Example:
    """A stretch of text around the place where something is largest in its window."""

    document: str
    tokens: tuple[str, ...]
    """Each decoded by itself, for reading: pieces of a character show as replacement characters."""
    activations: tuple[float, ...]
    """At each token."""
    peak: int
    """Index into `tokens`."""


def strongest(
    source: ModelActivations, activations: Callable[[int], Tensor], n: int, n_examples: int, context: int
) -> list[list[Example]]:
    """Find for each of n quantities the windows in which it is largest, strongest first; none where it is not above 0.

    activations: the quantities at the rows of block i of `source`, (rows, n).
    context: tokens shown on either side of a peak.
    """
    windows = source.windows
    found: list[list[tuple[float, Example]]] = [[] for _ in range(n)]
    for i in progress.over("examples", range(len(source.block_rows)), "block"):
        first = i * source.batch_windows
        is_text = windows.is_text(slice(first, first + source.batch_windows))
        rows = activations(i).cpu()
        placed = rows.new_zeros(*is_text.shape, n)
        placed[is_text] = rows
        peaks, positions = placed.max(dim=1)
        order = peaks.sort(dim=0, descending=True, stable=True).indices[:n_examples]
        for f, best in enumerate(found):
            weakest = best[-1][0] if len(best) == n_examples else 0.0
            for window in order[:, f].tolist():
                if (peak := float(peaks[window, f])) > weakest:
                    position = int(positions[window, f])
                    best.append((peak, _example(source, first + window, position, placed[window, :, f], context)))
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
