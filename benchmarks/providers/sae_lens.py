"""SAELens' TopK through its own SAETrainer, its Adam made fused."""

from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Shape
from benchmarks.outcomes import Missing
from benchmarks.place import Place
from benchmarks.providers.base import LR, Provider, weights


class SAELens(Provider):
    """Without `rescale_acts_by_decoder_norm`: rows have norm 1, and its sparse code cannot be trained with it."""

    transposed = ("W_enc",)

    def __init__(self, shape: Shape, place: Place, sparse: bool = False) -> None:
        try:
            from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
            from sae_lens.config import SAETrainerConfig
            from sae_lens.training.sae_trainer import SAETrainer
        except Exception as error:
            raise Missing(f"cannot be imported ({type(error).__name__}: {error})") from error
        self.version, self.shape = version("sae-lens"), shape
        config = TopKTrainingSAEConfig(
            d_in=shape.D,
            d_sae=shape.M,
            k=shape.K,
            device=str(place.device),
            apply_b_dec_to_input=True,
            rescale_acts_by_decoder_norm=False,
            use_sparse_activations=sparse,
        )
        self.sae = TopKTrainingSAE(config)
        w = weights(shape, place, joint=False)
        w["W_enc"] = w["W_enc"].T.contiguous()
        self.sae.load_state_dict(w)
        trained = SAETrainerConfig(
            total_training_samples=10**9 * shape.B,
            train_batch_size_samples=shape.B,
            lr=LR,
            lr_end=LR,
            device=str(place.device),
            autocast=place.products is not None,
        )
        self.trainer = SAETrainer(cfg=trained, sae=self.sae, data_provider=iter(()))
        self.optimizer = self.trainer.optimizer
        for group in self.optimizer.param_groups:
            group["fused"], group["foreach"] = True, False

    def encode(self, x: Tensor) -> Any:
        with self.trainer.autocast_if_enabled:
            return self.sae.encode(x)

    def decode(self, code: Any) -> Tensor:
        with self.trainer.autocast_if_enabled:
            return self.sae.decode(code)

    def loss(self, x: Tensor) -> Tensor:
        from sae_lens.saes.sae import TrainStepInput

        with self.trainer.autocast_if_enabled:
            step_input = TrainStepInput(
                sae_in=x,
                dead_neuron_mask=self.trainer.dead_neurons,
                coefficients=self.trainer.get_coefficients(),
                n_training_steps=self.trainer.n_training_steps,
                is_logging_step=False,
            )
            return self.sae.training_forward_pass(step_input=step_input).loss

    def scale(self, x: Tensor) -> float:
        return float(x.shape[1])

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), 1.0)
        self.optimizer.step()

    def step(self, x: Tensor) -> Tensor:
        return self.trainer._train_step(sae=self.sae, sae_in=x).loss.detach()

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.sae.named_parameters())
