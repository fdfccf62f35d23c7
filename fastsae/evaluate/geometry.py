"""Geometry of a trained SAE's weights, split by how often features fire and compared with chance."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastsae.code import SparseCode
from fastsae.evaluate.contribution import (
    Contribution,
    WeightNormShare,
    contribution,
    squared_norms,
    weight_norm_share,
)
from fastsae.evaluate.directions import Concentration, Directions, concentration, directions
from fastsae.extras import LAB
from fastsae.modules import SparseAutoencoder, evaluating, uncompiled
from fastsae.modules.joint import STD_AT_INIT
from fastsae.report import table

BINS = 60


@dataclass(frozen=True)
class FiringGroup:
    """Features that fire about equally often."""

    features: int
    """Number of features."""
    share: float
    """Share of all features."""
    lowest_rate: float | None
    """Lowest firing rate in the group; None if it is empty."""
    mean_rate: float | None
    """Mean firing rate."""
    highest_rate: float | None
    """Highest firing rate."""


@dataclass(frozen=True)
class GroupNorms:
    """Squared norms of one weight's rows in one group."""

    mean: float | None
    """Mean squared norm; None in an empty group."""
    median: float | None
    """Median squared norm."""
    share: float | None
    """Share of the squared norms summed over all features; None if that sum is 0."""
    histogram: list[int]
    """Features per bin."""


@dataclass(frozen=True)
class SquaredNorms:
    """Squared norms of the rows of one weight."""

    at_init: float
    """Expected value at initialisation: of an SAE as it is made, before a base's weights or unit norm."""
    at_init_histogram: list[int]
    """Rows of an SAE at initialisation, in the same bins: what untrained features would look like."""
    edges: list[float]
    """Edges of the bins, the same for every group and for the rows at initialisation."""
    groups: dict[str, GroupNorms]
    """Firing group -> its numbers."""


@dataclass(frozen=True)
class Dip:
    """Hartigan's dip test: is there more than one mode?"""

    dip: float
    """Largest distance to the nearest unimodal distribution function."""
    p: float
    """Chance of a dip at least this large from the uniform, the least favourable unimodal distribution."""


@dataclass(frozen=True)
class Geometry:
    """Groups are "all", "dead" (fired on no row), and the rest in three of equal size by firing rate: "rare", "middle",
    "common". Pathways are "identity", "linear", "interaction", and "integration" for the last two together."""

    rows: int
    """Rows of activations read."""
    firing_rate: list[float]
    """Share of rows each feature is active on."""
    groups: dict[str, FiringGroup]
    """Firing group -> its size and rates."""
    squared_norms: dict[str, SquaredNorms]
    """W_enc, W_dec, and W_lin and V where the SAE has them."""
    dip_W_dec: dict[str, Dip | None]
    """Firing group, or "alive" -> test of the squared norms of W_dec; None below 4 features. Modes that vanish within
    the groups are explained by firing rate."""
    weight_norm_share: WeightNormShare | None
    """The pathways' shares of weight norm; None without integration."""
    contribution: Contribution | None
    """The pathways' shares of what features contribute to the output; None without integration."""
    directions: Directions | None
    """Angles and spectrum of W_dec; None if fewer than two rows are not zero."""
    concentration_V: Concentration | None
    """Gini coefficient and effective rank of the rows of V; None if there are none."""

    def __str__(self) -> str:
        """Tables, for reading: features by firing rate, and what their pathways' shares go with."""
        norms = self.squared_norms["W_dec"]
        rows = []
        for name, group in self.groups.items():
            dip = self.dip_W_dec.get(name)
            rows.append(
                {
                    "features": name,
                    "count": f"{group.features:,}",
                    "mean rate": _number(group.mean_rate, ".5f"),
                    "mean |W_dec|^2": _number(norms.groups[name].mean, ".3f"),
                    "dip": "" if dip is None else f"{dip.dip:.4f}",
                    "p (unimodal)": "" if dip is None else f"{dip.p:.3f}",
                }
            )
        lines = [
            f"{self.rows:,} rows. Features by firing rate, and if their squared decoder norms have two modes:",
            table(rows),
            "",
            f"At initialisation |W_dec|^2 is {norms.at_init:.3f}.",
        ]
        if self.weight_norm_share is not None:
            shares = [
                {
                    "pathway": name,
                    "trained": f"{s.value:.3f}",
                    "random baseline": f"{s.null_mean:.3f} ({s.null_min:.3f} to {s.null_max:.3f})",
                }
                for name, s in self.weight_norm_share.spearman.items()
                if s is not None
            ]
            lines += [
                "",
                "Rank correlation of a pathway's share of weight norm with |W_dec|^2, beside the same with",
                "random W_lin and V (what correlates there is built into the share, not learned):",
                *([table(shares)] if shares else []),
            ]
        return "\n".join(lines)


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def geometry(sae: SparseAutoencoder, activations: Iterable[Tensor], seed: int = 0, max_rows: int = 20_000) -> Geometry:
    """Measure the weights of `sae`, with its code on raw held-out activations, (B, d_in) tensors that are read once.

    Firing rates are over all rows, contributions over the first `max_rows`. `seed` draws the nulls.
    Raises ImportError without scipy and diptest, ValueError if there are no rows.
    """
    try:
        import diptest  # noqa: F401
        import scipy.stats  # noqa: F401
    except ImportError as error:
        raise ImportError(f"geometry needs scipy and diptest: {LAB}") from error
    rng, sae = np.random.default_rng(seed), uncompiled(sae)
    with evaluating(sae):
        rows, fired, code = _read(sae, activations, max_rows)
        groups = firing_groups(fired)
        weights = {name: getattr(sae, name, None) for name in ("W_enc", "W_dec", "W_lin", "V")}
        norms = {name: squared_norms(w).cpu() for name, w in weights.items() if w is not None}
        alive = {"alive": fired.nonzero().flatten()}
        V = weights["V"]
        return Geometry(
            rows=rows,
            firing_rate=(fired.double() / rows).tolist(),
            groups={name: _firing_group(fired[group], rows, sae.d_sae) for name, group in groups.items()},
            squared_norms={name: _squared_norms(n, sae, name, groups, rng) for name, n in norms.items()},
            dip_W_dec={name: dip(norms["W_dec"][group]) for name, group in (groups | alive).items()},
            weight_norm_share=weight_norm_share(sae, rng),
            contribution=contribution(sae, code, groups, rng),
            directions=directions(sae.W_dec, rng),
            concentration_V=None if V is None else concentration(V, rng),
        )


def _read(sae: SparseAutoencoder, activations: Iterable[Tensor], max_rows: int) -> tuple[int, Tensor, SparseCode]:
    """Number of rows, how many each feature is active on (d_sae,), and the code of the first max_rows."""
    rows, fired = 0, torch.zeros(sae.d_sae, dtype=torch.int64, device="cpu")
    kept: list[SparseCode] = []
    for batch in activations:
        code = sae.encode_raw(batch).flatten()
        fired += code.firing_counts().cpu()
        if rows < max_rows:
            wanted = max_rows - rows
            kept.append(SparseCode(code.values[:wanted], code.indices[:wanted], sae.d_sae))
        rows += len(code.values)
    if rows == 0:
        raise ValueError("geometry: expected at least 1 row of activations; got none")
    return rows, fired, SparseCode(torch.cat([c.values for c in kept]), torch.cat([c.indices for c in kept]), sae.d_sae)


def firing_groups(fired: Tensor) -> dict[str, Tensor]:
    """Name -> indices of its features. Features of equal count go to the rarer group by index."""
    order = fired.argsort(stable=True)
    dead, alive = order.split([int((fired == 0).sum()), int((fired > 0).sum())])
    rare, middle, common = alive.tensor_split(3)
    return {
        "all": torch.arange(len(fired), device="cpu"),
        "dead": dead,
        "rare": rare,
        "middle": middle,
        "common": common,
    }


def _firing_group(fired: Tensor, rows: int, d_sae: int) -> FiringGroup:
    n = len(fired)
    if n == 0:
        return FiringGroup(0, 0.0, None, None, None)
    mean = int(fired.sum()) / (n * rows)  # of counts, not of rates, each of which is rounded
    return FiringGroup(n, n / d_sae, int(fired.min()) / rows, mean, int(fired.max()) / rows)


def at_init(sae: SparseAutoencoder, name: str) -> float:
    """Expected squared norm of a row at initialisation."""
    if name in STD_AT_INIT:
        return getattr(sae, name).shape[1] * STD_AT_INIT[name] ** 2
    return sae.d_in / (3 * sae.d_sae) if sae.config.init == "paper" else 1.0  # W_enc starts as a copy of W_dec


def _drawn_at_init(sae: SparseAutoencoder, name: str, rng: np.random.Generator) -> np.ndarray:
    """Squared norms of d_sae rows at initialisation."""
    expected = at_init(sae, name)
    if name in STD_AT_INIT:  # squares of normals
        df = getattr(sae, name).shape[1]
        return expected / df * rng.chisquare(df, sae.d_sae)
    if sae.config.init == "unit":
        return np.ones(sae.d_sae)
    # d_in squares of uniforms, each of variance (4 / 45) / d_sae^2: their sum is normal for all that a histogram shows.
    return rng.normal(expected, np.sqrt(4 / 45 * sae.d_in) / sae.d_sae, sae.d_sae)


def _squared_norms(
    norms: Tensor, sae: SparseAutoencoder, name: str, groups: dict[str, Tensor], rng: np.random.Generator
) -> SquaredNorms:
    untrained = _drawn_at_init(sae, name, rng)
    edges = np.histogram_bin_edges(np.concatenate([norms.numpy(), untrained]), BINS)
    total = float(norms.sum())

    def group_norms(group: Tensor) -> GroupNorms:
        part = norms[group]
        return GroupNorms(
            mean=float(part.mean()) if len(part) else None,
            median=float(part.quantile(0.5)) if len(part) else None,
            share=float(part.sum()) / total if total else None,
            histogram=np.histogram(part.numpy(), edges)[0].tolist(),
        )

    return SquaredNorms(
        at_init=at_init(sae, name),
        at_init_histogram=np.histogram(untrained, edges)[0].tolist(),
        edges=edges.tolist(),
        groups={group_name: group_norms(group) for group_name, group in groups.items()},
    )


def dip(values: Tensor) -> Dip | None:
    """None below 4 values, where the test is not defined."""
    import diptest

    if len(values) < 4:
        return None
    with warnings.catch_warnings():  # above 72000 values the p of 72000 is taken: sqrt(n) dip no longer changes with n
        warnings.simplefilter("ignore", UserWarning)
        statistic, p = diptest.diptest(values.double().numpy())  # pyright: ignore
    return Dip(float(statistic), float(p))  # pyright: ignore
