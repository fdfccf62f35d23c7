"""A reconstruction with some of its pathways left out."""

from torch import Tensor

from fastsae.modules import Components, SparseAutoencoder

IDENTITY, LINEAR, INTERACTION, FULL = "identity", "identity + linear", "identity + interaction", "full"


def pathways(sae: SparseAutoencoder) -> tuple[str, ...]:
    """The components this SAE has beside identity."""
    weights = {"linear": "W_lin", "interaction": "V"}
    return tuple(name for name, weight in weights.items() if getattr(sae, weight, None) is not None)


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
