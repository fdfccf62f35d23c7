"""The interaction of two factors, feature by feature: F, effect sizes, a permutation null, false discoveries, power.

Everything is in terms of cell means m and the spread within cells: contrast = m_HH - m_HL - m_LH + m_LL.
"""

import importlib
from collections.abc import Sequence
from math import inf
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsae.extras import LAB

LEVEL = 0.05
"""Level of significance, and share of false discoveries among all."""
_BLOCK, _AT_ONCE = 500, 1024
_ENOUGH = 10
"""Exceedances after which a feature's p is known well enough."""

INTERACTION = (1.0, -1.0, -1.0, 1.0)
MAIN = ((0.5, 0.5, -0.5, -0.5), (0.5, -0.5, 0.5, -0.5))
"""Contrasts over the cells HH, HL, LH, LL."""


class Fit(NamedTuple):
    """The saturated 2x2 model of every column, (features,) each but `means`."""

    means: Tensor
    """(4, features): cell means"""
    contrast: Tensor
    """m_HH - m_HL - m_LH + m_LL"""
    error: Tensor
    """Standard error of the contrast."""
    sigma: Tensor
    """Standard deviation within cells."""
    F: Tensor
    """F of the interaction, with 1 and texts - 4 degrees of freedom: type III, so cells may differ in size."""
    df: int

    @property
    def d(self) -> Tensor:
        """The contrast in standard deviations within cells: infinite where there is no spread in them."""
        return torch.where(self.F > 0, self.contrast / self.sigma, 0.0)

    @property
    def partial_eta_squared(self) -> Tensor:
        return 1 / (1 + self.df / self.F)


def fit(values: Tensor, cells: Tensor) -> Fit:
    """values (texts, features) fp64; cells (texts,): which of the four each text is in."""
    members, sizes, spread, df = _design(cells)
    means = (members @ values) / sizes  # divided once: whole numbers are summed exactly, in whatever order
    within = values - means[cells]
    sigma = (within.square().sum(dim=0) / df).sqrt()
    contrast = torch.tensor(INTERACTION, dtype=torch.float64, device="cpu") @ means
    contrast = torch.where(contrast.abs() <= _noise(values), 0.0, contrast)
    error = sigma * spread**0.5
    return Fit(means, contrast, error, sigma, torch.where(contrast == 0, 0.0, (contrast / error).square()), df)


def _noise(values: Tensor) -> Tensor:
    return 1e-12 * values.abs().amax(dim=0)


def _design(cells: Tensor) -> tuple[Tensor, Tensor, float, int]:
    """The matrix that sums cells (4, texts), of zeros and ones; their sizes (4, 1); the contrast's variance in units of
    sigma^2; degrees of freedom."""
    sizes = cells.bincount(minlength=4)
    if len(sizes) != 4 or int(sizes.min()) < 2:
        raise ValueError(f"anova: expected at least 2 texts in each of 4 cells; got {sizes.tolist()}")
    members = torch.zeros(4, len(cells), dtype=torch.float64, device="cpu")
    members[cells, torch.arange(len(cells), device="cpu")] = 1.0
    sizes = sizes.double().unsqueeze(1)
    return members, sizes, float((1 / sizes).sum()), len(cells) - 4


class Permuted(NamedTuple):
    """P values of the interaction by permutation, (features,) each."""

    p: Tensor
    """Share of permutations with an F at least as large, the observed one among them."""
    p_family: Tensor
    """Share of permutations in which the largest F of all features is at least as large: the chance that any feature
    shows as much by luck."""


def permute(values: Tensor, cells: Tensor, permutations: int, generator: torch.Generator) -> Permuted:
    """Freedman and Lane's permutations: what the two factors explain one by one stays, its residuals change places.

    So main effects are no evidence of an interaction, whatever the features' distributions. All features share the
    permutations. Those whose p is still small get more, until 10 permutations exceed (Besag and Clifford 1991), or so
    many have been drawn that all that are left could be discoveries: q comes down to about 0.0125, and no further.
    Residuals change places between cells, so their spread should not differ much where the cells' sizes do.
    """
    members, sizes, spread, _ = _design(cells)
    average = members / sizes
    first, second = (torch.tensor(c, dtype=torch.float64, device="cpu")[cells].sign() for c in MAIN)
    additive = torch.stack([torch.ones_like(first), first, second], dim=1)
    residuals = values - additive @ torch.linalg.lstsq(additive, values).solution
    residuals = torch.where(residuals.abs() <= _noise(values), 0.0, residuals)
    contrast = torch.tensor(INTERACTION, dtype=torch.float64, device="cpu")
    squares = residuals.square().sum(dim=0)

    def shares(order: Tensor, features: Tensor) -> Tensor:
        """The interaction's share of the squares it leaves and takes, which grows with F and is finite: order
        (permutations, texts) to (permutations, features)."""
        moved = average[:, order].permute(1, 0, 2).reshape(4 * len(order), -1)  # the design is moved, not the data
        found = []
        for part in features.split(_AT_ONCE):
            means = (moved @ residuals[:, part]).view(len(order), 4, -1)
            within = (squares[part] - (sizes * means.square()).sum(dim=1)).clamp_min(0)
            explained = torch.einsum("c,bcf->bf", contrast, means).square() / spread
            explained = torch.where(explained > 1e-12 * squares[part], explained, 0.0)  # no rounding over no spread
            found.append((explained / (explained + within)).nan_to_num(0))
        return torch.cat(found, dim=1)

    n_features = values.shape[1]
    exceed, done = (
        torch.zeros(n_features, dtype=torch.int64, device="cpu"),
        torch.zeros(n_features, dtype=torch.int64, device="cpu"),
    )
    exceed_any = torch.zeros(n_features, dtype=torch.int64, device="cpu")
    observed = shares(torch.arange(len(cells), device="cpu").unsqueeze(0), torch.arange(n_features, device="cpu"))[0]
    least = (1 - 1e-9) * observed  # a permutation that is the data itself counts, rounding or not
    left, rounds = torch.arange(n_features, device="cpu"), 0
    while len(left) and (rounds < permutations or rounds < 4 * n_features / (LEVEL * len(left))):
        block = min(_BLOCK, permutations - rounds) if rounds < permutations else _BLOCK
        order = torch.stack([torch.randperm(len(cells), generator=generator, device="cpu") for _ in range(block)])
        found = shares(order, left)
        exceed[left] += (least[left] <= found).sum(dim=0)
        done[left] += block
        if rounds < permutations:
            exceed_any += (least <= found.amax(dim=1, keepdim=True)).sum(dim=0)
        rounds += block
        if rounds >= permutations:
            left = left[exceed[left] < _ENOUGH]
    p_family = (exceed_any + 1).double() / (min(rounds, permutations) + 1)
    return Permuted((exceed + 1).double() / (done + 1), p_family)


def discovery_rates(p: Tensor) -> Tensor:
    """Benjamini and Hochberg's q values: calling all with q <= 0.05 makes 5 % of what is called false, on average."""
    if len(p) == 0:
        return p
    return torch.from_numpy(statsmodels("stats.multitest").multipletests(p.numpy(), method="fdr_bh")[1])


def family_rates(p: Sequence[float]) -> list[float]:
    """Holm's p values: calling all of at most 0.05 makes one false call or more in 5 % of families."""
    return statsmodels("stats.multitest").multipletests(p, method="holm")[1].tolist() if p else []


def table(values: Tensor, cells: Tensor, names: tuple[str, str]) -> dict[str, dict[str, float]]:
    """statsmodels' two-way ANOVA of one feature (texts,), type III: F and p of both factors and of the interaction."""
    anova_lm, ols = statsmodels("stats.anova").anova_lm, statsmodels("formula.api").ols
    first, second = (np.sign(np.array(c))[cells.numpy()] for c in MAIN)
    columns = frame({"y": values.numpy(), "first": first, "second": second})
    found = anova_lm(ols("y ~ first * second", columns).fit(), typ=3)
    rows = {names[0]: "first", names[1]: "second", "interaction": "first:second"}
    return {name: {"F": float(found.loc[row, "F"]), "p": float(found.loc[row, "PR(>F)"])} for name, row in rows.items()}


def detectable(cells: Tensor, tests: int, power: float = 0.8) -> float:
    """The interaction, in standard deviations within cells, that is found with this power when so many features are
    tested (at LEVEL / tests, as the first of Benjamini and Hochberg's steps)."""
    try:
        from scipy import optimize, stats
    except ImportError as error:
        raise ImportError(_MISSING) from error

    _, _, spread, df = _design(cells)
    critical = stats.t.ppf(1 - LEVEL / max(1, tests) / 2, df)

    def missing(d: float) -> float:
        return float(stats.nct.sf(critical, df, d / spread**0.5)) - power

    most = 100.0
    return float(optimize.brentq(missing, 0.0, most)) if missing(most) > 0 else inf  # type: ignore[arg-type]


_MISSING = f"factorial experiments need statsmodels: {LAB}"


def frame(columns: dict[str, Any]) -> Any:
    """Columns as statsmodels wants them."""
    return importlib.import_module("pandas").DataFrame(columns)  # which comes with statsmodels


def statsmodels(module: str) -> Any:
    """A module of statsmodels. Raises ImportError saying how to get it."""
    try:
        return importlib.import_module(f"statsmodels.{module}")
    except ImportError as error:
        raise ImportError(_MISSING) from error
