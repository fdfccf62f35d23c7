"""Finished runs, measured: which can stand side by side, what is announced, kept until all is done, and compared."""

import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastsae import __version__, experiment, planner, progress, provenance
from fastsae.activations import ModelActivations, TokenWindows
from fastsae.config import DataConfig
from fastsae.evaluate import DocumentSums, Interval, pathways
from fastsae.evaluate.metrics import CE_INCREASE, FVU, KL, L0, LOSS_RECOVERED
from fastsae.evaluate.parts import Parts
from fastsae.experiment import Measured, Trained
from fastsae.modules import SecondarySAE, evaluating, read_description


class Reading(NamedTuple):
    """Text that runs are measured on."""

    data: DataConfig
    other_text: bool
    """Whether it is text that none of them was trained on: all of it is held out."""

    @property
    def name(self) -> str:
        """Name of the results, without .json: eval.json is for the run's own text."""
        if not self.other_text:
            return "eval"
        text = Path(self.data.text).name if Path(self.data.text).exists() else self.data.text
        return f"eval-{re.sub(r'[^A-Za-z0-9_.-]+', '-', text)}"

    @property
    def text(self) -> str:
        """In words."""
        if self.other_text:
            return f"documents of {self.data.text} (not the run's text: all of it counts as held out)"
        return f"held-out documents of {self.data.text}"


def reading(runs: Sequence[Path], text: str | None = None) -> Reading:
    """Choose the text that these finished runs are measured on together; text: other text than theirs.

    Raises ValueError where they are not of one model, hook and text, FileNotFoundError where one is not finished.
    """
    trained_on = [provenance.recorded(run, read_text=False) for run in runs]
    first = trained_on[0]
    data = first if text is None else provenance.resolved(dataclasses.replace(first, text=text))
    other_text = all(seen.text != data.text for seen in trained_on)
    for run, seen in zip(runs, trained_on, strict=True):
        for name in ("activations", "model", "hook", *(() if other_text else ("text",)), "context", "prepend_bos"):
            if (ours := getattr(first, name)) != (theirs := getattr(seen, name)):
                raise ValueError(
                    f"eval: {runs[0]} has {name} {ours!r}, {run} has {theirs!r}: only runs of one model, hook and text "
                    "(context and BOS alike) are measured side by side. Measure them one by one"
                )
    for run in runs:
        experiment.check_finished(run)
        if not other_text:
            provenance.recorded(run)  # raises where its text has changed
    bases = [_base(run) for run in runs]
    for run, base in zip(runs, bases, strict=True):
        if base != bases[0]:
            raise ValueError(
                f"eval: {runs[0]} and {run} do not read the same: a secondary SAE reads the hidden layer of its base, "
                "and stands beside others on that base only. Measure them one by one"
            )
    return Reading(data, other_text)


def _base(run: Path) -> int | None:
    """The checksum of what a secondary SAE reads; None for an SAE that reads the model itself."""
    if read_description(run / "sae")["architecture"] != SecondarySAE.architecture:
        return None
    return read_description(provenance.recorded_base(run) / "sae")["weights_crc32"]


def measure(
    model: Any, run: Path, read: Reading, windows: TokenWindows, on: str, several: bool = False
) -> tuple[Measured, Parts]:
    """Measure `run` on the windows; also give its finished stages, which are kept until they are removed.

    Logs first what will be measured, and how long it takes. several: whether bars have to name the run.
    """
    there = experiment.trained(run, on, read_text=not read.other_text)
    identity = ModelActivations(model, there.data.hook, windows).identity
    sae = {"sae": read_description(run / "sae")["weights_crc32"], "base": _base(run)}
    parts = Parts(run, {**identity, **sae, "device": on, "version": __version__})
    progress.logger.info(announcement(model, run, there, read, windows, parts))
    stages = experiment.stages(windows)
    try:
        with progress.of(str(run)) if several else nullcontext():
            return experiment.measure(model, there, windows, parts), parts
    except KeyboardInterrupt as stop:
        left = [stage for stage in stages if stage not in parts.done]
        done = f"{', '.join(parts.done)} of {run} is kept" if parts.done else f"no stage of {run} was finished"
        raise KeyboardInterrupt(
            f"eval: stopped; {done}. Run the same command again, it goes on with: {left[0] if left else 'the rest'}"
        ) from stop


def announcement(model: Any, run: Path, there: Trained, read: Reading, windows: TokenWindows, parts: Parts) -> str:
    """Announce what will be measured of a run, on what, and for how long."""
    stages = experiment.stages(windows)
    left = [stage for stage in stages if not parts.has(stage)]
    kept = [stage for stage in stages if stage not in left]
    conditions = pathways.conditions(there.spliced, there.secondary)
    whole, *rest = conditions[::-1]
    without = f", and of parts of it ({'; '.join(rest[::-1])})" if rest else ""
    what = [
        "FVU, cosine, L0 of the reconstructed activations",
        f"KL and cross-entropy of the model with the {whole} reconstruction in their place{without}, each beside "
        "random errors of its size",
        "the same with BOS replaced too",
    ][: len(stages)]
    lines = [
        f"{run}: {there.sae.architecture} SAE of {there.data.hook} of model {there.data.model}, measured on "
        f"{windows.n_tokens:,} tokens of {len(windows.documents.unique()):,} {read.text}",
        *(f"  {number}. {stage}: {told}" for number, (stage, told) in enumerate(zip(stages, what, strict=True), 1)),
        f"  There from before: {', '.join(kept)}." if kept else "",
        f"  {_in_words(_seconds(model, there, windows, left))} on {model.cfg.device}. Interrupted, the same command "
        "goes on with the next stage.",
    ]
    return "\n".join(line for line in lines if line)


def _seconds(model: Any, there: Trained, windows: TokenWindows, stages: Sequence[str]) -> float:
    """Estimate the time of the stages, from the time of the first windows and the passes that each stage makes."""
    some = max(1, 1024 // windows.context)
    first = windows[:some]
    source = experiment.held_out_activations(model, there, first)
    tokens, rows = first.tokens.to(model.cfg.device), source.block(0).to(there.sae.W_enc.device)

    @torch.no_grad()
    def forward() -> float:
        return float(model.run_with_hooks(tokens, return_type="logits").float().log_softmax(dim=-1)[0, 0, 0])

    def reconstruct() -> float:
        with evaluating(there.sae):
            return float(there.sae.reconstruct(rows)[0, 0])

    of_model, of_sae = (_timed(one) for one in (forward, reconstruct))
    passes = 2 + 2 * len(pathways.conditions(there.spliced, there.secondary))
    each = {experiment.RECONSTRUCTION: of_model + 3 * of_sae}
    return math.ceil(len(windows) / some) * sum(each.get(stage, passes * of_model + of_sae) for stage in stages)


def _timed(call: Any) -> float:
    call()  # the first takes longer
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _in_words(seconds: float) -> str:
    return "A few seconds" if seconds < 10 else f"About {planner.duration(seconds)}"


class _Measured(NamedTuple):
    sums: DocumentSums


def differences(ours: Measured, first: Measured) -> dict[str, Interval]:
    """Subtract the first run from another, by measure, paired by document: an interval without 0 is beyond chance."""
    found = {}
    for metric in (FVU, KL, CE_INCREASE, LOSS_RECOVERED, L0):
        a, b = (_Measured(_sums(m, of_rows=metric in (FVU, L0))) for m in (ours, first))
        if a.sums.names != b.sums.names:
            raise ValueError("eval: two runs were measured on other documents; run the same command again")
        found[metric.name] = a.sums.ratio(*metric.paired(a, b))
    return found


def _sums(measured: Measured, of_rows: bool) -> DocumentSums:
    if of_rows:
        return measured.reconstruction.sums
    sums = measured.bos_out.sums
    return DocumentSums(sums.names, sums.sums | {"predictions": sums.sums["rows"]})


def side_by_side(found: Mapping[str, Measured]) -> list[dict[str, str]]:
    """A row for each run by its name, and one for each less the first."""
    rows = []
    for name, measured in found.items():
        r, full = measured.reconstruction, measured.bos_out.full
        row = {"run": name, "FVU": f"{r.fvu:.4f}", "KL": f"{full.kl:.4f}", "CE increase": f"{full.ce_increase:.4f}"}
        rows.append(row | {"loss recovered": f"{full.loss_recovered:.4f}", "L0": f"{r.l0:.1f}"})
    first, *others = found
    for name in others:
        less = differences(found[name], found[first])
        cells = {metric: f"{interval:{'+.1f' if metric == L0.name else '+.4f'}}" for metric, interval in less.items()}
        rows.append({"run": f"{name} less {first}", **cells})
    return rows
