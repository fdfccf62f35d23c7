"""A whole 2x2 experiment on a finished run: discovery, clamping, text under clamps."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastsae import progress
from fastsae.config import FactorialConfig
from fastsae.evaluate import drivers
from fastsae.experiment import Trained
from fastsae.factorial.clamp import Carrier, Clamp, Target
from fastsae.factorial.discover import Discovery, discover
from fastsae.factorial.effects import Effect, effect, judged
from fastsae.factorial.generate import Edit, begin, generate
from fastsae.factorial.readout import WordReadout
from fastsae.factorial.responses import tokenized
from fastsae.factorial.stimuli import LEVELS, Stimuli
from fastsae.modules import JointSAE, SparseAutoencoder, evaluating

_GENERATED_PROMPTS = 5
_DRIVING_PAIRS = 4


@dataclass(frozen=True)
class Factorial:
    """Results that `fastsae factorial` writes."""

    stimuli: dict[str, Any]
    """Name, description, factors, and the label of each cell."""
    discovery: Discovery
    effects: tuple[Effect, ...]
    """Effects of the clamped targets; none if the set has no prompts."""
    prompts: tuple[str, ...]
    """Prompts after which text was written."""
    texts: dict[str, dict[str, list[str]]]
    """Target -> what was done to it -> what came after each prompt."""


def run_factorial(
    run: Trained,
    model: Any,
    stimuli: Stimuli,
    config: FactorialConfig,
    say: Callable[[str], object] = print,
    keep: Callable[[Factorial], object] = lambda _: None,
) -> Factorial:
    """Discover, clamp and generate. `run` is of a joint, sequential or TopK SAE, or of a secondary one on its base.

    Features are chosen on the stimuli's texts and clamped in front of its prompts, which no choice has seen.
    keep: is given what is known after discovery, and after each target.
    """
    sae, secondary = run.spliced, run.secondary
    named = [Target.parse(text) for text in config.clamp]
    for target in named:
        target.check(sae, secondary)
        for amount in config.amounts:
            Clamp(target, amount, config.operation)
    if named and not stimuli.clampable:
        raise ValueError(
            f"clamp: stimuli {stimuli.name!r} have no prompts and words to read an effect from; add them, or clamp "
            "nothing"
        )
    prompts = stimuli.prompts[:_GENERATED_PROMPTS] if config.new_tokens else ()
    with evaluating(sae), evaluating(secondary or sae):
        clamping = stimuli.clampable and (config.clamped > 0 or named != [])
        if clamping and prompts:
            begin(model, prompts, config.new_tokens)  # what does not fit is found out before all else is done
        experiment = _Clamping(run, model, stimuli, config) if clamping else None
        discovery = discover(
            sae, secondary, model, run.data.hook, stimuli, config.pool, config.permutations, config.seed
        )
        for family, found in discovery.families.items():
            say(
                f"{family}: {found.discoveries} discoveries among {found.tested} features (q at most 0.05; "
                f"{found.small_p:.1%} have p of at most 0.05)"
            )
        effects: list[Effect] = []
        written: dict[str, dict[str, list[str]]] = {}

        def known() -> Factorial:
            return Factorial(_described(stimuli), discovery, judged(effects), tuple(prompts), dict(written))

        keep(known())
        if experiment is not None:
            targets = _targets(sae, discovery, config) + named
            for target in progress.over("clamp", list(dict.fromkeys(targets)), "target"):
                effects.append(experiment.effect(target, discovery))
                if prompts:
                    written[str(target)] = experiment.text(target)
                keep(known())
        return known()


def _described(stimuli: Stimuli) -> dict[str, Any]:
    return {
        "name": stimuli.name,
        "description": stimuli.description,
        "factors": [asdict(factor) for factor in stimuli.factors],
        "cells": {level: stimuli.label(level) for level in LEVELS},
    }


def _targets(sae: SparseAutoencoder, discovery: Discovery, config: FactorialConfig) -> list[Target]:
    """The chosen features of the integration, and the whole of it; of an SAE without, those of its code."""
    integrated = isinstance(sae, JointSAE) and sae.V is not None
    families = [f for f in discovery.families if (f != "identity") == integrated]
    chosen = [Target(f, e.features) for f in families for e in discovery.families[f].features[: config.clamped]]
    whole = integrated and config.operation == "multiply" and config.clamped > 0
    return [*chosen, Target("interaction")] if whole else chosen


class _Clamping:
    """Everything that is the same for all targets: carriers of the prompts, readout, random directions."""

    def __init__(self, run: Trained, model: Any, stimuli: Stimuli, config: FactorialConfig) -> None:
        self.run, self.model, self.stimuli, self.config = run, model, stimuli, config
        self.sae, self.secondary = run.spliced, run.secondary
        self.prompts = stimuli.prompts[:_GENERATED_PROMPTS]
        words = [word for cell in stimuli.cells.values() for word in cell.words]
        self.readout = WordReadout(model, run.data.hook, stimuli.prompts, words)
        self.carriers = [self._carrier(self.readout.spliced.raw(part)) for part in self.readout.spliced.parts]
        generator = torch.Generator().manual_seed(config.seed)
        directions = torch.randn(config.directions, self.sae.d_in, generator=generator, device="cpu")
        self.directions = torch.nn.functional.normalize(directions, dim=1)
        self.generator = generator

    def effect(self, target: Target, discovery: Discovery) -> Effect:
        return effect(
            self.carriers,
            self.readout,
            self.stimuli,
            target,
            self.config.amounts,
            self.config.operation,
            self.config.splice,
            self._primaries(target),
            self._others(target, discovery),
            self.directions,
        )

    @cached_property
    def _unclamped(self) -> dict[str, list[str]]:
        """Texts written without any clamp, for comparison with every target."""
        edits: dict[str, Edit | None] = {"untouched": None}
        if self.config.splice:
            edits["reconstruction"] = lambda raw: self._carrier(raw).replaced(None, True)
        return self._written(edits)

    def text(self, target: Target) -> dict[str, list[str]]:
        edits: dict[str, Edit | None] = {}
        clamps = {f"{self.config.operation} {amount:g}": amount for amount in self.config.amounts}
        for name, amount in clamps.items():
            edits[name] = self._edit(Clamp(target, amount, self.config.operation), None)
        if len(self.directions):
            largest = max(clamps, key=lambda name: abs(clamps[name]))
            clamp = Clamp(target, clamps[largest], self.config.operation)
            edits[f"random, as {largest}"] = self._edit(clamp, self.directions[0])
        return self._unclamped | self._written(edits)

    def _written(self, edits: dict[str, Edit | None]) -> dict[str, list[str]]:
        return generate(self.model, self.run.data.hook, self.prompts, edits, self.config.new_tokens)

    def _edit(self, clamp: Clamp, direction: Tensor | None) -> Edit:
        def edit(raw: Tensor) -> Tensor:
            carrier = self._carrier(raw)
            step = carrier.step(clamp)
            change = carrier.output_change(step)
            if direction is not None:
                change = carrier.random_control(change, step, direction)
            return carrier.replaced(change, self.config.splice)

        return edit

    def _carrier(self, raw: Tensor) -> Carrier:
        return Carrier(self.sae, self.secondary, raw)

    def _primaries(self, target: Target) -> tuple[int, ...] | None:
        """Find the features of the code that make up the target: for a secondary feature those of the pairs that drive
        it on the texts, None if it is active on none."""
        if target.kind != "secondary":
            return target.features
        assert self.secondary is not None
        assert self.run.base is not None
        found = drivers(
            self.secondary,
            self.run.base,
            self.model,
            self.run.data.hook,
            tokenized(self.stimuli, self.model).windows,
            target.features,
            _DRIVING_PAIRS,
        )
        return tuple(sorted({feature for driver in found[0].pairs for feature in driver.features})) or None

    def _others(self, target: Target, discovery: Discovery) -> list[Target]:
        """Features of the kind at random, among those that show no interaction of the factors."""
        family = {"pair": "pair", "secondary": "secondary", "identity": "identity", "linear": "identity"}
        if target.kind not in family or not target.features:
            return []
        features = [f for f in discovery.families[family[target.kind]].unlike if f != target.features]
        order = torch.randperm(len(features), generator=self.generator, device="cpu")[: self.config.others].tolist()
        return [Target(target.kind, features[i]) for i in order]
