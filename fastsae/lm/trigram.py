"""An interpolated Kneser-Ney trigram model: what the embedded language model must beat."""

import numpy as np


class Trigram:
    """P(w | u v), discounts estimated from counts of counts, backed by bigram and unigram continuation counts.

    windows: (n, length) int64 token ids, -1 for padding on the right; the first token of a window is given, not
    predicted, and stands for the missing one before it.
    """

    def __init__(self, windows: np.ndarray, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        u, v, w = self._positions(windows)
        self.trigrams = _Level(self._key(u, v), w, vocabulary)
        # Continuation counts: in how many different contexts an n-gram was seen, not how often.
        v, w = self.trigrams.contexts % vocabulary, self.trigrams.words
        self.bigrams = _Level(v, w, vocabulary)
        self.unigrams = _Level(np.zeros_like(self.bigrams.words), self.bigrams.words, vocabulary)

    def loss(self, windows: np.ndarray) -> float:
        """Mean negative log probability, nats per predicted token."""
        return float(-np.log(self.probability(*self._positions(windows))).mean())

    def probability(self, u: np.ndarray, v: np.ndarray, w: np.ndarray) -> np.ndarray:
        """P(w | u v), elementwise over arrays of token ids."""
        p = np.full(len(w), 1 / self.vocabulary)
        levels = ((self.unigrams, np.zeros_like(v)), (self.bigrams, v), (self.trigrams, self._key(u, v)))
        for level, context in levels:
            p = level.interpolate(context, w, p)
        return p

    def _key(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return u * self.vocabulary + v

    @staticmethod
    def _positions(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        before = np.concatenate([windows[:, :1], windows[:, :-2]], axis=1)
        real = windows[:, 1:] >= 0
        return before[real], windows[:, :-1][real], windows[:, 1:][real]


class _Level:
    """Counts of (context, word) pairs, each less a discount D; what that frees goes to the level below."""

    def __init__(self, contexts: np.ndarray, words: np.ndarray, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.pairs, self.counts = np.unique(contexts * vocabulary + words, return_counts=True)
        self.contexts, self.words = self.pairs // vocabulary, self.pairs % vocabulary
        self.known, first = np.unique(self.contexts, return_index=True)
        self.totals = np.add.reduceat(self.counts, first)
        once, twice = (self.counts == 1).sum(), (self.counts == 2).sum()
        # Three discounts, for pairs seen once, twice and more often (Chen and Goodman 1998, modified Kneser-Ney).
        y = once / max(1, once + 2 * twice)
        n = [max(1, int((self.counts == c).sum())) for c in (1, 2, 3, 4)]
        self.discounts = np.array([0.0] + [np.clip(c - (c + 1) * y * n[c] / n[c - 1], 0.0, c) for c in (1, 2, 3)])
        self.freed = np.add.reduceat(self.discounts[np.minimum(self.counts, 3)], first) / self.totals

    def interpolate(self, contexts: np.ndarray, words: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """P(word | context) given the lower level's probabilities; a context never seen passes those on."""
        at = np.minimum(np.searchsorted(self.known, contexts), len(self.known) - 1)
        seen = self.known[at] == contexts
        pairs = contexts * self.vocabulary + words
        place = np.minimum(np.searchsorted(self.pairs, pairs), len(self.pairs) - 1)
        counts = np.where(self.pairs[place] == pairs, self.counts[place], 0)
        own = (counts - self.discounts[np.minimum(counts, 3)]) / self.totals[at]
        return np.where(seen, own + self.freed[at] * lower, lower)
