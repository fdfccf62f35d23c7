"""Pairs of features in the factorization machine: which are at work, and which drive a feature of a SecondarySAE.

A pair (i, j) enters z with a_i a_j (V_i * V_j), entry by entry. V_i . V_j alone says little: features that are never
active together have one too. So pairs are ranked by what they put into z on real text.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsae.activations import ModelActivations, TokenWindows
from fastsae.code import SparseCode
from fastsae.evaluate.examples import Example, strongest
from fastsae.fp64 import fp64_device, in_fp64
from fastsae.modules import JointSAE, SecondarySAE, evaluating

PER_ROW = 32
"""Candidates are looked for among so many of a row's strongest features: 496 pairs a row."""
CAPACITY = 2**18
"""Pairs whose sums are held at a time; beyond, those with the smallest are dropped."""
CANDIDATES = 16
"""Times as many as asked for; these are then measured among all features that the integration sees."""


@dataclass(frozen=True)
class Pair:
    """Two features of the integration pathway, over rows of held-out text, exactly; which pairs are measured at all is
    found among the PER_ROW strongest features of each row."""

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
    """Places in text at which a_i a_j is largest."""


@dataclass(frozen=True)
class Driver:
    """A pair's part in a secondary feature. The hidden layer is linear in z, so the shares of all pairs, of which the
    largest are shown, add up to 1."""

    features: tuple[int, int]
    share: float
    """Share of the feature's pre-activation less constants, on rows with it active. Negative: the pair lowers it."""
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
    """Sums over rows of products a_i a_j and of their squares, by pair of features active together: for nominating.

    Of each row the PER_ROW strongest features are looked at, and the smallest sums are dropped on the way.
    """

    def __init__(self, d_sae: int, device: torch.device | str, capacity: int = CAPACITY) -> None:
        self.d_sae, self.capacity = d_sae, capacity
        device = fp64_device(device)
        self.keys = torch.empty(0, dtype=torch.int64, device=device)
        self.sums = torch.empty(0, 2, dtype=torch.float64, device=device)

    def add(self, code: SparseCode) -> None:
        """The rows of a flat code (rows, n)."""
        products, keys = row_pairs(code)
        both = products > 0
        new = in_fp64(products[both])
        self.keys, place = torch.cat([self.keys, keys[both].to(self.keys.device)]).unique(return_inverse=True)
        sums = torch.cat([self.sums, torch.stack([new, new.square()], dim=1)])
        self.sums = sums.new_zeros(len(self.keys), 2).index_add_(0, place, sums)
        if len(self.keys) > self.capacity:
            kept = self.sums[:, 1].topk(self.capacity).indices.sort().values
            self.keys, self.sums = self.keys[kept], self.sums[kept]

    @property
    def pairs(self) -> Tensor:
        """(pairs, 2) features, the lower first."""
        return torch.stack([self.keys // self.d_sae, self.keys % self.d_sae], dim=1)

    def largest(self, sizes: Tensor, n: int) -> Tensor:
        """The n pairs with the largest sizes (pairs,): (n, 2)."""
        return self.pairs[sizes.sort(descending=True, stable=True).indices[:n]]


def row_pairs(code: SparseCode) -> tuple[Tensor, Tensor]:
    """Compute products a_i a_j of the PER_ROW strongest features in each row of a flat code, and i d_sae + j, i < j."""
    values, indices = code.values[:, :PER_ROW], code.indices[:, :PER_ROW]
    one, other = torch.triu_indices(values.shape[1], values.shape[1], 1, device=values.device)
    low, high = torch.minimum(indices[:, one], indices[:, other]), torch.maximum(indices[:, one], indices[:, other])
    return values[:, one] * values[:, other], low * code.d_sae + high


def embedded(V: Tensor, pairs: Tensor) -> Tensor:
    """V_i * V_j entry by entry, for pairs (n, 2): (n, d_embedding)."""
    return V[pairs[:, 0]] * V[pairs[:, 1]]


def in_parts(pairs: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """`of` so many pairs at a time, since it makes (pairs, d_embedding)."""
    return torch.cat([of(part) for part in pairs.split(2**14)])


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
    """The pairs that put most into z, largest first. The model reads the windows three times.

    Raises ValueError for an SAE without a pairwise pathway.
    """
    V, W1 = sae.V, sae.W1
    if V is None or W1 is None:
        raise ValueError("top_pairs: this SAE has interaction=False, so it has no pairs")
    if model.tokenizer is None:
        raise ValueError("top_pairs: the model has no tokenizer to show text with; attach one (model.tokenizer)")
    source = ModelActivations(model, hook_name, windows)
    blocks, device = range(len(source.block_rows)), sae.W_enc.device
    with evaluating(sae):
        sums = PairSums(sae.d_sae, device)
        seen = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        spread = _Spread(sae.d_in)
        for i in blocks:
            code = sae.encode_raw(source.block(i))
            sums.add(sae.strongest(code))
            seen += sae.strongest(code).firing_counts()
            spread.add(sae.interaction_from(sae.hidden(code)))
        sizes = in_parts(sums.pairs, lambda part: in_fp64(embedded(V, part.to(device))).square().sum(dim=1))
        pairs = sums.largest(sums.sums[:, 1] * sizes, CANDIDATES * n_pairs).to(device)
        # rows, products, squared products
        measured = torch.zeros(3, len(pairs), dtype=torch.float64, device=fp64_device(device))
        for i in blocks:
            products = in_fp64(pair_products(sae.strongest(sae.encode_raw(source.block(i))), pairs))
            measured += torch.stack([(products > 0).double(), products, products.square()]).sum(dim=1)
        contributions = measured[2] * in_fp64(embedded(V, pairs)).square().sum(dim=1)
        order = contributions.sort(descending=True, stable=True).indices[:n_pairs]
        pairs, measured, contributions = pairs[order.to(device)], measured[:, order], contributions[order]
        vectors = embedded(V, pairs)
        dots = vectors.sum(dim=1).tolist()
        changes = torch.zeros(len(pairs), dtype=torch.float64, device=measured.device)

        def shown(i: int) -> Tensor:
            code = sae.encode_raw(source.block(i))
            hidden, found = sae.hidden(code), pair_products(sae.strongest(code), pairs)
            for p in range(len(pairs)):
                rows = found[:, p].nonzero().squeeze(1)
                without = hidden[rows] - found[rows, p, None] * (W1 @ vectors[p])
                change = sae.interaction_from(hidden[rows]) - sae.interaction_from(without)
                changes[p] += in_fp64(change).square().sum()
            return found

        examples = strongest(source, shown, len(pairs), n_examples, context)
    n, rate = source.n_rows, in_fp64(seen) / source.n_rows
    found = []
    for p, (i, j) in enumerate(pairs.tolist()):
        count, total, _ = measured[:, p].tolist()
        found.append(
            Pair(
                features=(i, j),
                contribution=float(contributions[p]) / n,
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
    """Find for each of these secondary features the pairs that drive it on the rows on which it is active.

    pre = w . (W1 z + b1 - mean) / scale + b is linear in z, and z is a sum over pairs: pair (i, j) adds
    a_i a_j (W1^T (w / scale)) . (V_i * V_j).
    """
    W1, b1 = base.W1, base.b1
    if base.V is None or W1 is None or b1 is None:
        raise ValueError("drivers: the base has interaction=False, so it has no pairs")
    V, device = base.V.detach(), base.W_enc.device
    chosen = torch.tensor(list(features), dtype=torch.int64, device=device)
    source = ModelActivations(model, hook_name, windows)
    with evaluating(base), evaluating(secondary):
        weights = (secondary.W_enc[chosen] / secondary.normalizer.scale).to(W1)
        gradients = weights @ W1  # of pre with respect to z: (features, d_embedding)

        def active() -> Iterator[tuple[int, SparseCode, Tensor]]:
            """Yield for each feature and block the code the base sees on rows with it active, and pre there."""
            for i in range(len(source.block_rows)):
                code = base.encode_raw(source.block(i))
                hidden, seen = base.hidden(code), base.strongest(code)
                at = secondary.encode_raw(hidden).columns(chosen) > 0
                pre = (hidden - b1) @ weights.T
                for f in range(len(chosen)):
                    rows = at[:, f]
                    yield f, SparseCode(seen.values[rows], seen.indices[rows], base.d_sae), pre[rows, f]

        sums = [PairSums(base.d_sae, device, CAPACITY // 4) for _ in features]
        totals = torch.zeros(len(features), dtype=torch.float64, device="cpu")
        for f, seen, pre in active():
            sums[f].add(seen)
            totals[f] += in_fp64(pre).sum().cpu()
        parts = [
            in_parts(s.pairs, lambda p, g=g: in_fp64(embedded(V, p.to(device)) @ g))
            for s, g in zip(sums, gradients, strict=True)
        ]
        pairs = [
            one.largest((one.sums[:, 0] * part).abs(), CANDIDATES * n_pairs).to(device)
            for one, part in zip(sums, parts, strict=True)
        ]
        # rows, products
        measured = [torch.zeros(2, len(p), dtype=torch.float64, device=fp64_device(device)) for p in pairs]
        rows = [0] * len(pairs)
        for f, seen, _ in active():
            products = in_fp64(pair_products(seen, pairs[f]))
            measured[f] += torch.stack([(products > 0).double(), products]).sum(dim=1)
            rows[f] += len(products)
        found = []
        for f, feature in enumerate(features):
            shares = measured[f][1] * in_fp64(embedded(V, pairs[f]) @ gradients[f]) / totals[f].to(measured[f].device)
            order = shares.abs().sort(descending=True, stable=True).indices[:n_pairs].tolist()
            kept = (
                Driver((int(pairs[f][p, 0]), int(pairs[f][p, 1])), float(shares[p]), float(measured[f][0, p]) / rows[f])
                for p in order
            )
            found.append(Drivers(int(feature), rows[f], tuple(kept)))
    return found


class _Spread:
    """The summed squared deviation of rows from their mean."""

    def __init__(self, width: int) -> None:
        self.rows, self.squares = 0, 0.0
        self.sums = torch.zeros(width, dtype=torch.float64, device="cpu")

    def add(self, y: Tensor) -> None:
        y = in_fp64(y).cpu()
        self.rows += len(y)
        self.sums += y.sum(dim=0)
        self.squares += float(y.square().sum())

    def squared(self) -> float:
        return max(0.0, self.squares - float(self.sums.square().sum()) / max(1, self.rows))
