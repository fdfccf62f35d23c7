"""Directions of rows of weights in their space, compared with rows drawn at random."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastsae.fp64 import fp64_device, in_fp64

PAIRED = 8192
"""Features whose pairs are all looked at; of more, this many are drawn."""
BLOCK = 1024
"""Rows handled at once."""


@dataclass(frozen=True)
class Directions:
    """The rows of W_dec. Random stands for normal directions with the norms of these rows; rows of zeros are left out.

    The spectrum is that of all rows, uncentred, over all d_in components.
    """

    features_paired: int
    """Features whose pairs were looked at."""
    mean_abs_cosine: float
    """Mean |cosine| over their pairs."""
    mean_abs_cosine_random: float
    """Mean |cosine| for random directions, as a baseline."""
    mean_abs_cosine_expected: float
    """sqrt(2 / (pi d_in)), what random directions give in many dimensions."""
    mean_abs_gram: float
    """Mean |inner product| over their pairs: it grows with the norms."""
    mean_abs_gram_random: float
    """Mean |inner product| for random directions, as a baseline."""
    components_90: int
    """Principal components that hold 90 % of the summed squared norms."""
    components_90_random: int
    """Components that hold 90 % for random directions, as a baseline."""
    components_95: int
    """Principal components that hold 95 %."""
    components_95_random: int
    """Components that hold 95 % for random directions, as a baseline."""


@dataclass(frozen=True)
class Spread:
    """Spread of a number that each row has."""

    min: float
    """Lowest of the rows."""
    mean: float
    """Mean over the rows."""
    max: float
    """Highest of the rows."""


@dataclass(frozen=True)
class Concentration:
    """Concentration of the rows of V on few entries, beside as many normal rows; rows of zeros are left out."""

    gini: Spread
    """Gini coefficient of |V[i]|: 0 if all entries are of one size."""
    gini_random: Spread
    """Gini coefficient for normal rows, as a baseline."""
    effective_rank: Spread
    """exp(entropy of |V[i]| / sum |V[i]|): d_embedding if all entries are of one size."""
    effective_rank_random: Spread
    """Effective rank for normal rows, as a baseline."""


def directions(rows: Tensor, rng: np.random.Generator) -> Directions | None:
    """None if fewer than two rows have a direction."""
    rows = rows[rows.any(dim=1)]
    norms = torch.linalg.vector_norm(rows.float(), dim=1)
    if len(rows) < 2:
        return None

    def random(norms: Tensor) -> Iterator[Tensor]:
        for part in norms.split(BLOCK):
            drawn = _normal(rng, len(part), rows.shape[1]).to(norms)
            yield drawn * (part / drawn.norm(dim=1))[:, None]

    paired = torch.arange(len(rows), device="cpu")
    if len(rows) > PAIRED:
        paired = torch.from_numpy(rng.choice(len(rows), PAIRED, replace=False))
    cosine, gram = pairs(rows[paired.to(rows.device)].float())
    cosine_random, gram_random = pairs(torch.cat(list(random(norms[paired.to(rows.device)]))))
    of_rows, of_random = (components(blocks) for blocks in (rows.split(BLOCK), random(norms)))
    return Directions(
        features_paired=len(paired),
        mean_abs_cosine=cosine,
        mean_abs_cosine_random=cosine_random,
        mean_abs_cosine_expected=math.sqrt(2 / (math.pi * rows.shape[1])),
        mean_abs_gram=gram,
        mean_abs_gram_random=gram_random,
        components_90=of_rows[0],
        components_90_random=of_random[0],
        components_95=of_rows[1],
        components_95_random=of_random[1],
    )


def pairs(rows: Tensor) -> tuple[float, float]:
    """Mean |cosine| and mean |inner product| over all pairs of different rows."""
    norms = rows.norm(dim=1)
    cosine = gram = 0.0
    for start in range(0, len(rows), BLOCK):
        part = slice(start, start + BLOCK)
        products = (rows[part] @ rows.T).abs_()
        products.diagonal(start).zero_()
        products, norms = (t.to(fp64_device(t.device)) for t in (products, norms))
        gram += float(products.sum(dtype=torch.float64))
        cosine += float(products.div_(norms).div_(norms[part, None]).sum(dtype=torch.float64))
    count = len(rows) * (len(rows) - 1)
    return cosine / count, gram / count


def components(blocks: Iterable[Tensor]) -> tuple[int, int]:
    """Count the principal components of the stacked blocks that hold 90 % and 95 % of the squared norms."""
    gram = sum(block.T @ block for block in map(in_fp64, blocks))
    assert isinstance(gram, Tensor)
    energy = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).cumsum(0)
    first, second = (int((energy < share * energy[-1]).sum()) + 1 for share in (0.90, 0.95))
    return first, second


def concentration(rows: Tensor, rng: np.random.Generator) -> Concentration | None:
    """None if all rows are zero."""
    rows = rows[rows.any(dim=1)]
    if len(rows) == 0:
        return None
    normal = _normal(rng, *rows.shape)
    return Concentration(
        gini=_spread(gini(rows)),
        gini_random=_spread(gini(normal)),
        effective_rank=_spread(effective_rank(rows)),
        effective_rank_random=_spread(effective_rank(normal)),
    )


def gini(rows: Tensor) -> Tensor:
    """2 sum_i i x_(i) / (n sum x) - (n + 1) / n of each row, x_(1) <= x_(2) <= ... its absolute entries."""
    x = in_fp64(rows).abs().sort(dim=1).values
    n = x.shape[1]
    ranks = torch.arange(1, n + 1, dtype=torch.float64, device=x.device)
    return 2 * (x @ ranks) / (n * x.sum(dim=1)) - (n + 1) / n


def effective_rank(rows: Tensor) -> Tensor:
    """exp(entropy of |x| / sum |x|) of each row."""
    x = in_fp64(rows).abs()
    return torch.special.entr(x / x.sum(dim=1, keepdim=True)).sum(dim=1).exp()


def _spread(values: Tensor) -> Spread:
    return Spread(float(values.min()), float(values.mean()), float(values.max()))


def _normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
