"""Effects of clamping a feature on the words of the four cells, beside controls that change activations as much.

The readout of a prompt and word is the change of the word's log-probability. The readout of a prompt is the contrast
between the four groups of words, in which whatever is common to all words cancels. Prompts are the units: what one
prompt's words share is no independent evidence. Several amounts are one test: the effect per unit of amount.
"""

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite, nan
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsae.evaluate.intervals import DocumentSums, Interval, student_t
from fastsae.factorial import anova
from fastsae.factorial.clamp import Carrier, Clamp, Target
from fastsae.factorial.readout import WordReadout
from fastsae.factorial.stimuli import Stimuli

_MATCHED = 0.9
"""A control that moves less than this share of what it is compared with says nothing."""
CONTRASTS: dict[str, tuple[float, ...]] = {
    "first": anova.MAIN[0],
    "second": anova.MAIN[1],
    "interaction": anova.INTERACTION,
}
"""Over the groups of words, in the order of LEVELS."""


@dataclass(frozen=True)
class Level:
    """One amount."""

    amount: float
    change: float
    """Length of the change over that of the activation, mean over the tokens read."""
    contrasts: dict[str, Interval]
    """Contrasts of the first factor, the second, and the interaction: in nats of log-probability, in logits for words
    of one token."""


@dataclass(frozen=True)
class Control:
    """Another change of the same length at every token."""

    name: str
    interaction: float
    """Per unit of amount."""
    matched: float
    """Its length over the target's, summed over tokens: below 1 where it has no direction at some of them."""


@dataclass(frozen=True)
class Mixed:
    """A linear mixed model of the effect per unit of amount: prompts and words are random, prompts also in how far the
    interaction goes."""

    interaction: Interval
    p: float
    p_family: float
    """Holm's, over all targets clamped in one experiment."""
    converged: bool


@dataclass(frozen=True)
class Effect:
    """Effect of clamping one target."""

    target: str
    operation: str
    active: float
    """Share of the tokens read at which the clamp changes anything: tokens of prompts, and for words of several tokens
    all but the last."""
    levels: tuple[Level, ...]
    contrasts: dict[str, Interval]
    """Per unit of amount, all amounts together; intervals over prompts."""
    mixed: Mixed | None
    """None where nothing changes."""
    random: tuple[Control, ...]
    """Random directions."""
    other: tuple[Control, ...]
    """Other features of the same kind, not selected."""
    linear: Control | None
    """Control by the same features in the linear pathway; None for that pathway itself, and if they are not known."""
    p_random: float
    """Share of random directions whose interaction is at least as large, the target among them."""
    verdict: str = ""


def effect(
    carriers: Sequence[Carrier],
    readout: WordReadout,
    stimuli: Stimuli,
    target: Target,
    amounts: Sequence[float],
    operation: Any,
    splice: bool,
    primaries: Sequence[int] | None,
    others: Sequence[Target],
    directions: Tensor,
) -> Effect:
    """Clamp `target` to each amount in front of every prompt, and the controls as far.

    carriers: one for each part of the readout. primaries: the features that the linear control takes, () for all, None
    for no such control. others: targets of the same kind to compare with. directions (draws, d_in): the random ones.
    """
    clamps = [Clamp(target, amount, operation) for amount in amounts]
    weights = _per_unit(amounts, operation)
    clean = readout.scores([c.replaced(None, splice) for c in carriers])
    steps = [[carrier.step(clamp) for carrier in carriers] for clamp in clamps]
    changes = [[c.output_change(s) for c, s in zip(carriers, row, strict=True)] for row in steps]

    def scores(per_clamp: Sequence[Sequence[Tensor]]) -> Tensor:
        """Compute the gain of each word: (amounts, prompts, words)."""
        spliced = [[c.replaced(d, splice) for c, d in zip(carriers, row, strict=True)] for row in per_clamp]
        return torch.stack([readout.scores(row) - clean for row in spliced])

    gains = scores(changes)
    per_unit = torch.einsum("l,lpw->pw", weights, gains)

    def control(name: str, make: Any) -> Control:
        made = [
            [make(carrier, change, step, clamp) for carrier, change, step in zip(carriers, row, on, strict=True)]
            for row, on, clamp in zip(changes, steps, clamps, strict=True)
        ]
        slope = torch.einsum("l,lpw->pw", weights, scores(made))
        length, own = (sum(float(d.norm(dim=1).sum()) for row in what for d in row) for what in (made, changes))
        return Control(name, float(_contrast(slope, stimuli, "interaction").mean()), length / own if own else 0.0)

    finite = bool(gains.isfinite().all())
    moved = finite and any(bool(d.any()) for row in changes for d in row)
    random, other, linear = [], [], None
    if moved:
        for number, direction in enumerate(directions):
            random.append(control(f"random {number}", lambda c, d, s, _, v=direction: c.random_control(d, s, v)))
        for one in others:
            other.append(control(str(one), lambda c, d, s, clamp, t=one: c.other_control(d, s, clamp, t)))
        if target.kind != "linear" and primaries is not None:
            linear = control("linear pathway", lambda c, d, s, _: c.linear_control(d, s, primaries))
    contrasts = {name: _interval(_contrast(per_unit, stimuli, name)) for name in CONTRASTS}
    own = abs(contrasts["interaction"].estimate)
    p_random = (1 + sum(not abs(c.interaction) < own for c in random)) / (1 + len(random))  # NaN is no smaller
    rows = sum(len(c.raw) for c in carriers)
    changed = [torch.stack([d.any(dim=1) for d in by_amount]).any(dim=0) for by_amount in zip(*changes, strict=True)]
    levels = tuple(
        Level(
            clamp.amount,
            sum(
                float((d.norm(dim=1) / c.raw.float().norm(dim=1).to(d)).sum())
                for d, c in zip(row, carriers, strict=True)
            )
            / rows,
            {name: _interval(_contrast(gain, stimuli, name)) for name in CONTRASTS},
        )
        for clamp, row, gain in zip(clamps, changes, gains, strict=True)
    )
    found = Effect(
        target=str(target),
        operation=operation,
        active=sum(int(c.sum()) for c in changed) / rows,
        levels=levels,
        contrasts=contrasts,
        mixed=_mixed(per_unit, stimuli) if moved else None,
        random=tuple(random),
        other=tuple(other),
        linear=linear,
        p_random=p_random,
    )
    return judged([found])[0]


def _per_unit(amounts: Sequence[float], operation: str) -> Tensor:
    """Weights that make what happens at the amounts an effect per unit of amount, by least squares. Multiplied by 1
    nothing happens; what a set amount takes the place of differs by token, so there the line has an intercept."""
    doses = torch.tensor(amounts, dtype=torch.float64, device="cpu")
    doses = doses - (1 if operation == "multiply" else doses.mean())
    return doses / doses.square().sum()


def _contrast(gains: Tensor, stimuli: Stimuli, name: str) -> Tensor:
    """Contrast the means of the four groups of words: (prompts,)."""
    parts = gains.split([len(cell.words) for cell in stimuli.cells.values()], dim=-1)
    means = torch.stack([part.mean(dim=-1) for part in parts], dim=-1)
    return means @ torch.tensor(CONTRASTS[name], dtype=torch.float64, device="cpu")


def _interval(values: Tensor) -> Interval:
    """The mean over prompts, from a bootstrap over them."""
    names = tuple(str(i) for i in range(len(values)))
    return DocumentSums(names, {"value": values, "rows": torch.ones_like(values)}).ratio("value", "rows")


def _mixed(gains: Tensor, stimuli: Stimuli) -> Mixed | None:
    """gains (prompts, words) = interaction and main effects + prompt + word + prompt's own interaction + error."""
    sizes = [len(cell.words) for cell in stimuli.cells.values()]
    cell = np.repeat(np.arange(4), sizes)
    prompts, words = gains.shape
    first, second = (np.sign(np.array(signs))[cell] / 2 for signs in anova.MAIN)
    scale = float(gains.std()) or 1.0
    columns = {
        "y": gains.numpy().ravel() / scale,
        "first": np.tile(first, prompts),
        "second": np.tile(second, prompts),
        "both": np.tile(first * second, prompts),
        "prompt": np.repeat(np.arange(prompts), words),
        "word": np.tile(np.arange(words), prompts),
        "one": np.zeros(prompts * words, dtype=int),
    }
    parts = {"prompt": "0 + C(prompt)", "word": "0 + C(word)", "prompt_both": "0 + C(prompt):both"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a variance at its bound of 0 is no failure; `converged` says the rest
        mixedlm, frame = anova.statsmodels("formula.api").mixedlm, anova.frame(columns)
        formula = "y ~ first + second + both"
        try:
            found = mixedlm(formula, frame, groups="one", vc_formula=parts, re_formula="0").fit(reml=True)
        except np.linalg.LinAlgError:
            return Mixed(Interval(nan), nan, nan, False)
    estimate, error = float(found.fe_params["both"]) * scale, float(found.bse_fe["both"]) * scale
    # As many degrees of freedom as prompts or words of a cell give, whichever are fewer: the normal law is too sure.
    df = min(prompts, *sizes) - 1
    half = student_t(df) * error
    p = 2 * float(importlib.import_module("scipy.stats").t.sf(abs(estimate / error), df))
    return Mixed(Interval(estimate, estimate - half, estimate + half), p, p, bool(found.converged))


_NOT_FINITE = (
    "Not measured: what the model says under this clamp is no finite number. Use smaller amounts; if small ones do the "
    "same, the SAE's weights are damaged."
)


def judged(effects: Sequence[Effect]) -> tuple[Effect, ...]:
    """Each with its verdict among all: the more that is clamped, the more shows an effect by luck."""
    fits = {i: e.mixed for i, e in enumerate(effects) if e.mixed is not None and isfinite(e.mixed.p)}
    corrected = anova.family_rates([mixed.p for mixed in fits.values()])
    found = list(effects)
    for (i, mixed), p in zip(fits.items(), corrected, strict=True):
        found[i] = replace(found[i], mixed=replace(mixed, p_family=p))
    return tuple(replace(effect, verdict=_verdict(effect)) for effect in found)


def _verdict(effect: Effect) -> str:
    """Word what may be said of an effect: more than nothing only if prompts, words and all controls agree."""
    found, mixed, random, linear = effect.contrasts["interaction"], effect.mixed, effect.random, effect.linear
    if not all(isfinite(contrast.estimate) for level in effect.levels for contrast in level.contrasts.values()):
        return _NOT_FINITE
    if mixed is None:
        return "Nothing changes: it is active at no token of the prompts."
    said = f"Interaction {found:.2g} per unit of amount"
    if random:
        size = max(abs(c.interaction) for c in random)
        said += f"; the largest of {len(random)} random directions of the same length gives {size:.2g}"
    if linear is not None and linear.matched >= _MATCHED:
        said += f", the same features in the linear pathway {linear.interaction:.2g}"
    said += "."
    if not (found.low > 0 or found.high < 0):
        return f"{said} Not told from none: the interval over prompts holds 0."
    if effect.p_random > anova.LEVEL and 1 / (1 + len(random)) > anova.LEVEL:
        return f"{said} Not told from a random direction, as {len(random)} of them are too few for that: 19 are enough."
    if effect.p_random > anova.LEVEL:
        return f"{said} Not told from a random direction."
    if linear is not None and linear.matched >= _MATCHED and abs(linear.interaction) >= abs(found.estimate):
        return f"{said} No more than the same features do without being combined."
    if not mixed.converged:
        return f"{said} More than random directions, for these words: what words differ by, no model fits."
    if not mixed.p <= anova.LEVEL:
        return f"{said} More than random directions, for these words: over words it is not told from none."
    if not mixed.p_family <= anova.LEVEL:
        return f"{said} More than random directions, over words too; not told from luck among all that was clamped."
    if Target.parse(effect.target).kind in ("identity", "linear"):
        return f"{said} More than random directions do; but one feature's direction combines nothing."
    return f"{said} More than random directions do, over prompts and over words."
