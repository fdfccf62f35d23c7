"""The sparse autoencoders: parameters, names, named results."""

from pathlib import Path

import torch

from fastsae.config import TopKSAEConfig, to_dict
from fastsae.modules.base import ARCHITECTURES, Components, SAEOutput, SparseAutoencoder, evaluating, is_a, uncompiled
from fastsae.modules.joint import JointSAE
from fastsae.modules.saved import read_description, saved_in
from fastsae.modules.secondary import HiddenActivations, SecondarySAE
from fastsae.modules.sequential import SequentialSAE
from fastsae.modules.topk import TopKSAE

ARCHITECTURES |= {c.architecture: c for c in (TopKSAE, JointSAE, SequentialSAE, SecondarySAE)}


def new(
    config: TopKSAEConfig, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> SparseAutoencoder:
    """An untrained SAE of the architecture that `config` describes."""
    by_config = {architecture.config_class: architecture for architecture in ARCHITECTURES.values()}
    return by_config[type(config)](**to_dict(config), device=device, dtype=dtype)


def load(folder: str | Path, *, backend: str = "auto", device: torch.device | str | None = None) -> SparseAutoencoder:
    """Load a saved SAE of any architecture from `folder`: what save_pretrained wrote, or a finished run (its sae/)."""
    folder = saved_in(folder)
    architecture = read_description(folder)["architecture"]
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{folder} holds architecture {architecture!r}; known here: {', '.join(ARCHITECTURES)}. A class of your "
            "own loads it by its from_pretrained"
        )
    return ARCHITECTURES[architecture].from_pretrained(folder, backend=backend, device=device)


__all__ = [
    "ARCHITECTURES",
    "Components",
    "HiddenActivations",
    "JointSAE",
    "SAEOutput",
    "SecondarySAE",
    "SequentialSAE",
    "SparseAutoencoder",
    "TopKSAE",
    "evaluating",
    "is_a",
    "load",
    "new",
    "read_description",
    "uncompiled",
]
