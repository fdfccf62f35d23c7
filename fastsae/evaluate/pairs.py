"""Pairs of features in the factorization machine: which are at work, and which drive a feature of a SecondarySAE.

A pair (i, j) enters z with a_i a_j (V_i * V_j), entry by entry. V_i . V_j alone says little: features that are never
active together have one too. So pairs are ranked by what they put into z on real text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsae.activations import ModelActivations, TokenWindows
from fastsae.code import SparseCode
from fastsae.evaluate.examples import Example, strongest
from fastsae.modules import JointSAE, SecondarySAE, evaluating

PER_ROW = 32
"""Pairs are looked for among so many of a row's strongest features: 496 pairs a row."""
CAPACITY = 2**18
"""Pairs whose sums are held at a time; beyond, those with the smallest are dropped."""


@dataclass(frozen=True)
class Pair:
    """Two features of the integration pathway, over rows of held-out text."""

    features: tuple[int, int]
    contribution: float
    """Mean over rows of |a_i a_j V_i * V_j|^2: what ranks the pairs."""
    dot: float
    """V_i . V_j"""
    together: float
    """Share of rows on which the integration sees both."""
    together_if_independent: float
    """The product of the shares on which it sees either."""
    mean_product: float
    """Mean of a_i a_j on rows with both."""
    output_change: float
    """Squared change of the interaction output when the pair's product is left out, over that output's variance."""
    examples: tuple[Example, ...]
    """Where a_i a_j is largest."""


@dataclass(frozen=True)
class Driver:
    """A pair's part in a secondary feature. The hidden layer is linear in z, so parts of all pairs add up to 1."""

    features: tuple[int, int]
    share: float
    """Of the feature's pre-activation less its constants, on rows on which it is active. Negative: it holds it down."""
    together: float
    """Share of these rows with both."""


@dataclass(frozen=True)
class Drivers:
    """The pairs that drive one secondary feature."""

    feature: int
    rows: int
    """On which it is active."""
    pairs: tuple[Driver, ...]
    """Largest share first, by size."""


class PairSums:
    """Sums over rows by pair of features that are active together: rows, products a_i a_j, squared products."""

    def __init__(self, d_sae: int, device: torch.device | str, capacity: int = CAPACITY) -> None:
        self.d_sae, self.capacity = d_sae, capacity
        self.keys = torch.empty(0, dtype=torch.int64, device=device)
        self.sums = torch.empty(0, 3, dtype=torch.float64, device=device)

    def add(self, code: SparseCode) -> None:
        """The rows of a flat code (rows, n); pairs among each row's PER_ROW strongest features."""
        values, indices = code.values[:, :PER_ROW], code.indices[:, :PER_ROW]
        one, other = torch.triu_indices(values.shape[1], values.shape[1], 1, device=values.device)
        products = (values[:, one] * values[:, other]).double()
        low = torch.minimum(indices[:, one], indices[:, other])
        keys = low * self.d_sae + torch.maximum(indices[:, one], indices[:, other])
        both = products > 0
        new = products[both]
        self._merge(keys[both], torch.stack([torch.ones_like(new), new, new.square()], dim=1))

    def _merge(self, keys: Tensor, sums: Tensor) -> None:
        self.keys, place = torch.cat([self.keys, keys]).unique(return_inverse=True)
        merged = sums.new_zeros(len(self.keys), 3)
        self.sums = merged.index_add_(0, place, torch.cat([self.sums, sums]))
        if len(self.keys) > self.capacity:
            kept = self.sums[:, 2].topk(self.capacity).indices.sort().values
            self.keys, self.sums = self.keys[kept], self.sums[kept]

    @property
    def pairs(self) -> Tensor:
        """(pairs, 2) features, the lower first."""
        return torch.stack([self.keys // self.d_sae, self.keys % self.d_sae], dim=1)


def embedded(V: Tensor, pairs: Tensor) -> Tensor:
    """V_i * V_j entry by entry, for pairs (n, 2): (n, d_embedding)."""
    return V[pairs[:, 0]] * V[pairs[:, 1]]


def pair_products(code: SparseCode, pairs: Tensor) -> Tensor:
    """a_i a_j of pairs (n, 2) on the rows of a flat code, 0 unless both are active: (rows, n)."""
    features, column = pairs.unique(return_inverse=True)
    active = code.columns(features)
    return active[:, column[:, 0]] * active[:, column[:, 1]]


def top_pairs(
    sae: JointSAE,
    model: Any,
    hook_name: str,
    windows: TokenWindows,
    n_pairs: int = 24,
    n_examples: int = 4,
    context: int = 12,
) -> list[Pair]:
    """The pairs that put most into z, largest first. The model reads the windows twice.

    Raises ValueError for an SAE without a pairwise pathway.
    """
    V, W1 = sae.V, sae.W1
    if V is None or W1 is None:
        raise ValueError("top_pairs: this SAE has interaction=False, so it has no pairs")
    if model.tokenizer is None:
        raise ValueError("top_pairs: the model has no tokenizer to show text with; attach one (model.tokenizer)")
    source = ModelActivations(model, hook_name, windows)
    with evaluating(sae):
        sums = PairSums(sae.d_sae, sae.W_enc.device)
        seen = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.W_enc.device)
        spread = _Spread(sae.d_in)
        for i in range(len(source.block_rows)):
            code = _code(sae, source, i)
            sums.add(sae.strongest(code))
            seen += sae.strongest(code).firing_counts()
            spread.add(sae.interaction_from(sae.hidden(code)))
        sizes = torch.cat([embedded(V, part).double().square().sum(dim=1) for part in sums.pairs.split(2**14)])
        contributions = sums.sums[:, 2] * sizes
        order = contributions.sort(descending=True, stable=True).indices[:n_pairs]
        pairs, vectors = sums.pairs[order], embedded(V, sums.pairs[order])
        dots = vectors.sum(dim=1).tolist()
        changes = torch.zeros(len(pairs), dtype=torch.float64, device=vectors.device)

        def products(i: int) -> Tensor:
            code = _code(sae, source, i)
            hidden, found = sae.hidden(code), pair_products(sae.strongest(code), pairs)
            for p in range(len(pairs)):
                rows = found[:, p].nonzero().squeeze(1)
                without = hidden[rows] - found[rows, p, None] * (W1 @ vectors[p])
                change = sae.interaction_from(hidden[rows]) - sae.interaction_from(without)
                changes[p] += change.double().square().sum()
            return found

        examples = strongest(source, products, len(pairs), n_examples, context)
    n, rate = source.n_rows, seen.double() / source.n_rows
    found = []
    for p, (i, j) in enumerate(pairs.tolist()):
        count, total, _ = sums.sums[order[p]].tolist()
        found.append(
            Pair(
                features=(i, j),
                contribution=float(contributions[order[p]]) / n,
                dot=dots[p],
                together=count / n,
                together_if_independent=float(rate[i] * rate[j]),
                mean_product=total / count,
                output_change=float(changes[p]) / spread.squared() if spread.squared() else 0.0,
                examples=tuple(examples[p]),
            )
        )
    return found


def drivers(
    secondary: SecondarySAE,
    base: JointSAE,
    model: Any,
    hook_name: str,
    windows: TokenWindows,
    features: Sequence[int],
    n_pairs: int = 8,
) -> list[Drivers]:
    """Of each of these secondary features the pairs that drive it on the rows on which it is active.

    pre = w . (W1 z + b1 - mean) / scale + b is linear in z, and z is a sum over pairs: pair (i, j) adds
    a_i a_j (W1^T (w / scale)) . (V_i * V_j).
    """
    V, W1, b1 = base.V, base.W1, base.b1
    if V is None or W1 is None or b1 is None:
        raise ValueError("drivers: the base has interaction=False, so it has no pairs")
    chosen = torch.tensor(list(features), dtype=torch.int64, device=base.W_enc.device)
    source = ModelActivations(model, hook_name, windows)
    with evaluating(base), evaluating(secondary):
        weights = (secondary.W_enc[chosen] / secondary.normalizer.scale).to(W1)
        gradients = weights @ W1  # of pre with respect to z: (features, d_embedding)
        sums = [PairSums(base.d_sae, base.W_enc.device, CAPACITY // 4) for _ in features]
        rows = [0] * len(sums)
        totals = torch.zeros(len(sums), dtype=torch.float64)
        for i in range(len(source.block_rows)):
            code = _code(base, source, i)
            hidden = base.hidden(code)
            active = secondary.encode(secondary.normalizer(hidden)).columns(chosen) > 0
            seen = base.strongest(code)
            pushed = (hidden - b1) @ weights.T
            for f, one in enumerate(sums):
                at = active[:, f]
                one.add(SparseCode(seen.values[at], seen.indices[at], base.d_sae))
                rows[f] += int(at.sum())
                totals[f] += pushed[at, f].double().sum().cpu()
        found = []
        for f, (feature, one) in enumerate(zip(features, sums, strict=True)):
            parts = [embedded(V, pairs) @ gradients[f] for pairs in one.pairs.split(2**14)]
            shares = torch.cat(parts).double() * one.sums[:, 1] / totals[f] if parts else torch.empty(0)
            order = shares.abs().sort(descending=True, stable=True).indices[:n_pairs].tolist()
            pairs = one.pairs[order].tolist()
            kept = (
                Driver((i, j), float(shares[p]), float(one.sums[p, 0]) / rows[f])
                for p, (i, j) in zip(order, pairs, strict=True)
            )
            found.append(Drivers(int(feature), rows[f], tuple(kept)))
    return found


def _code(sae: JointSAE, source: ModelActivations, i: int) -> SparseCode:
    return sae.encode(sae.normalizer(source.block(i).to(sae.W_enc.device)))


class _Spread:
    """The summed squared deviation of rows from their mean."""

    def __init__(self, width: int) -> None:
        self.rows, self.squares = 0, 0.0
        self.sums = torch.zeros(width, dtype=torch.float64)

    def add(self, y: Tensor) -> None:
        y = y.double().cpu()
        self.rows += len(y)
        self.sums += y.sum(dim=0)
        self.squares += float(y.square().sum())

    def squared(self) -> float:
        return max(0.0, self.squares - float(self.sums.square().sum()) / max(1, self.rows))
