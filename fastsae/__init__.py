"""fastsae: sparse autoencoders joined by feature integration, exact and fast."""

from fastsae import backends, ops
from fastsae.activations import batches
from fastsae.code import SparseCode
from fastsae.config import JointSAEConfig, SecondarySAEConfig, SequentialSAEConfig, TopKSAEConfig, TrainerConfig
from fastsae.modules import JointSAE, SecondarySAE, SequentialSAE, TopKSAE, load
from fastsae.normalize import Normalizer
from fastsae.train import Trainer, auxk_loss

__version__ = "0.1.0"

__all__ = [
    "JointSAE",
    "JointSAEConfig",
    "Normalizer",
    "SecondarySAE",
    "SecondarySAEConfig",
    "SequentialSAE",
    "SequentialSAEConfig",
    "SparseCode",
    "TopKSAE",
    "TopKSAEConfig",
    "Trainer",
    "TrainerConfig",
    "auxk_loss",
    "backends",
    "batches",
    "load",
    "ops",
]
