"""Search for features that respond to the combination of two factors, beyond what each factor does alone."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsae.evaluate.intervals import Interval, student_t
from fastsae.factorial import anova
from fastsae.factorial.responses import Pool, Responses, responses, tokenized
from fastsae.factorial.stimuli import LEVELS, Stimuli
from fastsae.modules import SecondarySAE, SparseAutoencoder

SHOWN = 12
"""Features described of each family, those with the least p."""
UNLIKE = 0.5
"""A feature with a larger p shows nothing of an interaction."""


@dataclass(frozen=True)
class FeatureEffect:
    """One feature's responses in the four cells."""

    features: tuple[int, ...]
    """The feature, or both of a pair."""
    means: dict[str, Interval]
    """By cell."""
    contrast: Interval
    """high high - high low - low high + low low"""
    d: float
    """The contrast in standard deviations within cells."""
    partial_eta_squared: float
    crossover: bool
    """Whether a factor's effect changes sign with the level of the other. Without, the interaction may be one of scale:
    an activation that is 0 in two cells cannot be lower in one of them."""
    anova: dict[str, dict[str, float]]
    """statsmodels' F and p: of both factors and of the interaction, for this feature alone."""
    p: float
    """P value of the interaction, by permutation."""
    q: float
    """p adjusted after Benjamini and Hochberg, over the family."""
    p_family: float
    """The chance that any feature of the family shows as much by luck."""
    active: float
    """Share of texts on which it is active."""


@dataclass(frozen=True)
class Family:
    """All features of one kind."""

    tested: int
    """Those active on at least 5 % of the texts, whatever their cell."""
    discoveries: int
    """Number with q of at most 0.05. A pair's response is a product, so pairs found are features active together: a_i
    a_j of two features that answer to one factor each has an interaction, whatever is done with it."""
    crossing: int
    """Number of discoveries that cross."""
    small_p: float
    """Share of the tested with p of at most 0.05: about 0.05 where there is nothing."""
    detectable_d: float
    """The interaction, in standard deviations within cells, that is found as a first discovery in 4 of 5 cases."""
    features: tuple[FeatureEffect, ...]
    """The SHOWN with the least p, discoveries or not."""
    unlike: tuple[tuple[int, ...], ...]
    """Features with a p above UNLIKE: what discoveries are compared with."""


@dataclass(frozen=True)
class Discovery:
    """Interactions of a set's two factors in the features of an SAE."""

    texts: dict[str, int]
    """By cell."""
    tokens: dict[str, float]
    """Mean tokens a text, by cell."""
    tokens_p: dict[str, float]
    """Do lengths differ? statsmodels' p of both factors and of the interaction."""
    families: dict[str, Family]


def discover(
    sae: SparseAutoencoder,
    secondary: SecondarySAE | None,
    model: Any,
    hook_name: str,
    stimuli: Stimuli,
    pool: Pool = "mean",
    permutations: int = 2000,
    seed: int = 0,
) -> Discovery:
    """Test every feature of every family for an interaction.

    A unit is a text: its tokens are pooled first. The test is Freedman and Lane's permutation of the two-way ANOVA's F
    (see anova.permute), the same permutations for all features; false discoveries are controlled within a family.
    """
    texts = tokenized(stimuli, model)
    sizes = texts.cells.bincount(minlength=4)
    if int(sizes.max()) > 1.1 * int(sizes.min()):
        warnings.warn(
            f"stimuli {stimuli.name!r}: cells hold {sizes.tolist()} texts; where spreads differ between cells too, p "
            "is too small or too large. Cells of one size are safe.",
            stacklevel=2,
        )
    generator = torch.Generator().manual_seed(seed)
    names = (stimuli.factors[0].name, stimuli.factors[1].name)
    found = {r.family: r for r in responses(sae, secondary, model, hook_name, texts, pool)}
    lengths = texts.tokens.double()
    means = anova.fit(lengths.unsqueeze(1), texts.cells).means[:, 0].tolist()
    alike = bool((lengths == lengths[0]).all())
    return Discovery(
        texts={level: len(stimuli.cells[level].texts) for level in LEVELS},
        tokens=dict(zip(LEVELS, means, strict=True)),
        tokens_p={} if alike else {n: row["p"] for n, row in anova.table(lengths, texts.cells, names).items()},
        families={f: _family(r, texts.cells, names, permutations, generator) for f, r in found.items()},
    )


def _family(
    found: Responses, cells: Tensor, names: tuple[str, str], permutations: int, generator: torch.Generator
) -> Family:
    tested = found.values.shape[1]
    if tested == 0:
        return Family(0, 0, 0, 0.0, anova.detectable(cells, 1), (), ())
    fit = anova.fit(found.values, cells)
    permuted = anova.permute(found.values, cells, permutations, generator)
    q = anova.discovery_rates(permuted.p)
    order = sorted(range(tested), key=lambda f: (float(permuted.p[f]), -float(fit.F[f])))[:SHOWN]
    t = student_t(fit.df)
    sizes = cells.bincount(minlength=4).double()

    def described(f: int) -> FeatureEffect:
        half = t * float(fit.sigma[f]) / sizes.sqrt()
        means = {
            level: Interval(float(m), float(m - h), float(m + h))
            for level, m, h in zip(LEVELS, fit.means[:, f], half, strict=True)
        }
        contrast, error = float(fit.contrast[f]), t * float(fit.error[f])
        return FeatureEffect(
            features=tuple(found.features[f].tolist()),
            means=means,
            contrast=Interval(contrast, contrast - error, contrast + error),
            crossover=bool(_crosses(fit.means)[f]),
            d=float(fit.d[f]),
            partial_eta_squared=float(fit.partial_eta_squared[f]),
            anova=anova.table(found.values[:, f], cells, names),
            p=float(permuted.p[f]),
            q=float(q[f]),
            p_family=float(permuted.p_family[f]),
            active=float((found.values[:, f] > 0).double().mean()),
        )

    return Family(
        tested=tested,
        discoveries=int((q <= anova.LEVEL).sum()),
        crossing=int(((q <= anova.LEVEL) & _crosses(fit.means)).sum()),
        small_p=float((permuted.p <= anova.LEVEL).double().mean()),
        detectable_d=anova.detectable(cells, tested),
        features=tuple(described(f) for f in order),
        unlike=tuple(tuple(row) for row in found.features[permuted.p > UNLIKE].tolist()),
    )


def _crosses(means: Tensor) -> Tensor:
    """means (4, features): whether a factor's effect has another sign at the other's other level."""
    high_high, high_low, low_high, low_low = means
    first = (high_high - low_high) * (high_low - low_low)
    return (first < 0) | ((high_high - high_low) * (low_high - low_low) < 0)
