"""SAELens' SAETrainer, its options as it ships them."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Shape
from benchmarks.outcomes import Missing
from benchmarks.providers.base import LR
from benchmarks.trainers.base import Batches, Loop


class SAELensLoop(Loop):
    def __init__(self, shape: Shape, who: str, steps: int) -> None:
        try:
            from sae_lens import LoggingConfig, TopKTrainingSAEConfig, TrainingSAE
            from sae_lens.config import SAETrainerConfig
            from sae_lens.training.sae_trainer import SAETrainer

            from fastsae.integrations import sae_lens as fast
        except ImportError as error:
            raise Missing(f"cannot be imported ({error})") from error
        fast.register()
        configs = {"stock": TopKTrainingSAEConfig, "topk": fast.FastTopKTrainingSAEConfig}
        sizes: dict[str, Any] = {"d_in": shape.D, "d_sae": shape.M, "k": shape.K}
        if who == "joint":
            config: Any = fast.FastJointTrainingSAEConfig(**sizes, k_integration=shape.N, d_embedding=shape.E)
        else:
            config = configs[who](**sizes)
        torch.manual_seed(0)
        self.sae, self.version = TrainingSAE.from_dict(config.to_dict()), version("sae-lens")
        self._make = SAETrainer
        self._config = SAETrainerConfig(
            total_training_samples=shape.B * steps,
            train_batch_size_samples=shape.B,
            lr=LR,
            lr_end=LR,
            dead_feature_window=1000,
            device="cpu",
            autocast=False,
            n_checkpoints=0,
            checkpoint_path=None,
            logger=LoggingConfig(log_to_wandb=False),
        )

    def run(self, batches: Batches) -> None:
        self._make(cfg=self._config, sae=self.sae, data_provider=batches).fit()
        next(batches)  # its loop does not ask for another one, which ends the last iteration

    def watched(self) -> tuple[Any, str, Callable[[Any], Tensor]]:
        return self.sae, "training_forward_pass", lambda output: output.loss
