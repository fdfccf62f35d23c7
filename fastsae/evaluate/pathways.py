"""A reconstruction with some of its pathways left out."""

from torch import Tensor

from fastsae.code import SparseCode
from fastsae.modules import Components, JointSAE, SecondarySAE, SparseAutoencoder, uncompiled

IDENTITY, LINEAR, INTERACTION, FULL = "identity", "identity + linear", "identity + interaction", "full"
NO_INTERACTION, OWN_HIDDEN = "no interaction", "own hidden layer"


def pathways(sae: SparseAutoencoder) -> tuple[str, ...]:
    """The components this SAE has beside identity."""
    weights = {"linear": "W_lin", "interaction": "V"}
    return tuple(name for name, weight in weights.items() if getattr(sae, weight, None) is not None)


def conditions(sae: SparseAutoencoder, secondary: SecondarySAE | None = None) -> tuple[str, ...]:
    """Names of what `ablations` gives, or `through_secondary`."""
    if secondary is not None:
        return NO_INTERACTION, OWN_HIDDEN, FULL
    return ((FULL,), (IDENTITY, FULL), (IDENTITY, LINEAR, INTERACTION, FULL))[len(pathways(sae))]


def ablations(sae: SparseAutoencoder, parts: Components) -> dict[str, Tensor]:
    """Reconstructions with pathways left out, whole one last: (..., d_in) by what is kept.

    Left out is the whole summand, its bias with it, as in the paper's component test. An SAE without integration has
    only "full", one with a single pathway beside identity only "identity" and "full".
    """
    there = pathways(sae)
    full = parts.identity + parts.linear + parts.interaction
    if not there:
        return {FULL: full}
    kept = {IDENTITY: parts.identity}
    if len(there) == 2:
        kept |= {LINEAR: parts.identity + parts.linear, INTERACTION: parts.identity + parts.interaction}
    return kept | {FULL: full}


def through_secondary(sae: SparseAutoencoder, secondary: SecondarySAE, code: SparseCode) -> dict[str, Tensor]:
    """Reconstructions (..., d_in) of a code: without interaction, with it as trained, and with it computed from what
    `secondary` makes of the hidden layer."""
    sae = uncompiled(sae)
    if not isinstance(sae, JointSAE):
        raise ValueError(f"a secondary SAE reads the hidden layer of a JointSAE; got {type(sae).__name__}")
    parts = sae.summands(code)
    rest = parts.identity + parts.linear
    through = sae.interaction_from(secondary.reconstruct(sae.hidden(code)))
    return {NO_INTERACTION: rest, OWN_HIDDEN: rest + parts.interaction, FULL: rest + through}
