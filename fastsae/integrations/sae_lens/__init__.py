"""fastsae's architectures in SAELens: its runners train, checkpoint, resume, export and evaluate them.

from fastsae.integrations import sae_lens as fast
fast.register()
cfg = fast.FastTopKTrainingSAEConfig(d_in=768, d_sae=32768, k=32)      # or FastJointTrainingSAEConfig
LanguageModelSAETrainingRunner(LanguageModelSAERunnerConfig(sae=cfg, ...)).run()
"""

try:  # all that is used of it, here and below, so that what is missing is said in one line
    from sae_lens import TopKSAE, register_sae_class, register_sae_training_class
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
except ImportError as error:
    raise ImportError(
        f"fastsae.integrations.sae_lens needs SAELens ({error}): pip install sae-lens; 6.54.12 is tested"
    ) from error

from fastsae.integrations.sae_lens.joint import (
    FastJointSAE,
    FastJointSAEConfig,
    FastJointTrainingSAE,
    FastJointTrainingSAEConfig,
)
from fastsae.integrations.sae_lens.topk import (
    FastTopKSAEConfig,
    FastTopKTrainingSAE,
    FastTopKTrainingSAEConfig,
)

__all__ = [
    "FastJointSAE",
    "FastJointSAEConfig",
    "FastJointTrainingSAE",
    "FastJointTrainingSAEConfig",
    "FastTopKSAEConfig",
    "FastTopKTrainingSAE",
    "FastTopKTrainingSAEConfig",
    "register",
]


def register() -> None:
    """Make "fastsae_topk" and "fastsae_joint" known to SAELens, for training and for loading. Any number of times."""
    for sae, config in ((TopKSAE, FastTopKSAEConfig), (FastJointSAE, FastJointSAEConfig)):
        if config.architecture() not in SAE_CLASS_REGISTRY:
            register_sae_class(config.architecture(), sae, config)
    for sae, config in (
        (FastTopKTrainingSAE, FastTopKTrainingSAEConfig),
        (FastJointTrainingSAE, FastJointTrainingSAEConfig),
    ):
        if config.architecture() not in SAE_TRAINING_CLASS_REGISTRY:
            register_sae_training_class(config.architecture(), sae, config)
