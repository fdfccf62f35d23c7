"""Runs measured on activations in files, without a language model."""

import random
from pathlib import Path
from typing import NamedTuple

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
    recorded = provenance.recorded(run).activations if (run / "data.json").is_file() else None
    path = activations or recorded
    assert path is not None, "are_asked_for says so"
    held_out = recorded is not None and path.resolve() == recorded.resolve()
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
    return Reading(sae, source, read, path, held_out)


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
