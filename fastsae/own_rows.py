"""Runs measured on activations in files, without a language model."""

import random
import re
from pathlib import Path
from typing import Any, NamedTuple

from fastsae import evaluate, experiment, progress, provenance
from fastsae.activations import ActivationStore, ArrayActivations, open_activations
from fastsae.evaluate import FeatureExamples, Geometry, Reconstruction, strongest_rows
from fastsae.modules import HiddenActivations, JointSAE, SecondarySAE, SparseAutoencoder, load


class Reading(NamedTuple):
    """A finished run, and the rows that it is measured on."""

    sae: SparseAutoencoder
    source: ArrayActivations | ActivationStore
    read: ArrayActivations | ActivationStore | HiddenActivations
    """The rows as the SAE reads them: those of the source, or the hidden layer of a secondary SAE's base over them."""
    path: Path
    held_out: bool
    """Whether they are the held-out groups of what the run was trained on; otherwise they are all rows of `path`."""
    suffix: str
    """The end of the names of results: nothing for the rows of the run, or where it does not know any."""

    @property
    def options(self) -> dict[str, Any]:
        """As they are written beside the results."""
        return {"activations": str(self.path.resolve()), "held_out": self.held_out}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the groups."""
        return self.source.document_names if isinstance(self.source, ActivationStore) else self.source.names

    @property
    def words(self) -> str:
        if self.held_out:
            return f"held-out groups of rows of {self.path}"
        return f"groups of rows of {self.path} (all of them: those that were trained on too, if there are any)"


def are_asked_for(run: Path, activations: Path | None) -> bool:
    """Whether a run is measured on activations in files: it was trained on such, or they are named."""
    if activations is not None:
        return True
    return (run / "data.json").is_file() and provenance.recorded(run, read_text=False).activations is not None


def reading(run: Path, activations: Path | None, on: str | None = None) -> Reading:
    """The SAE of a finished run and what to measure it on: `activations`, or the held-out part of what it knows.

    on: a device; None is the GPU if there is one.
    Raises FileNotFoundError or ValueError saying what is missing or does not fit.
    """
    experiment.check_finished(run)
    path, held_out = _place(run, activations)
    source = open_activations(path, held_out=True if held_out else None)
    sae = load(run / "sae", device=experiment.device(on))
    read: ArrayActivations | ActivationStore | HiddenActivations = source
    if isinstance(sae, SecondarySAE):
        base = load(provenance.recorded_base(run) / "sae", device=experiment.device(on))
        assert isinstance(base, JointSAE)
        read = HiddenActivations(source, base)
        expected = base.d_in
    else:
        expected = sae.d_in
    if source.d_in != expected:
        raise ValueError(f"{path} holds rows of width {source.d_in}; the SAE of {run} reads rows of width {expected}")
    is_other = not held_out and (run / "data.json").is_file()
    suffix = f"-{re.sub(r'[^A-Za-z0-9_.-]+', '-', path.resolve().name)}" if is_other else ""
    return Reading(sae, source, read, path, held_out, suffix)


def _place(run: Path, activations: Path | None) -> tuple[Path, bool]:
    """The place of the rows to measure on, and whether they are what the run was trained on."""
    known = (run / "data.json").is_file()
    recorded = provenance.recorded(run, read_text=False).activations if known else None
    if activations is not None and (recorded is None or activations.resolve() != recorded.resolve()):
        return activations, provenance.has_seen(run, activations)
    path = provenance.recorded(run).activations  # raises where they are gone, or others
    if path is None:
        raise ValueError(
            f"{run} was trained on a language model's activations, and is not measured beside runs on files; measure "
            "it by itself, or name a file for all of them: --activations FILE"
        )
    return path, True


def reconstruction(given: Reading) -> Reconstruction:
    blocks = progress.over("reconstruction", range(len(given.source.block_rows)), "block")
    return evaluate.reconstruction(given.sae, (given.read.rows(i) for i in blocks), given.names)


def geometry(given: Reading) -> Geometry:
    """Rows in an order in which groups are mixed: what costs much is measured on the first ones only."""
    order = list(range(len(given.source.block_rows)))
    random.Random(0).shuffle(order)
    return evaluate.geometry(given.sae, (given.read.block(i) for i in progress.over("geometry", order, "block")))


def features(given: Reading) -> list[FeatureExamples]:
    """The features with the largest contribution, each with the rows it is strongest on."""
    return strongest_rows(given.sae, given.read, given.names)
