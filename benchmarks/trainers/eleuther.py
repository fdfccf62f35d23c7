"""sparsify's Trainer on a language model that is nothing but its activations, so that what is timed is the training."""

import contextlib
import io
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Shape
from benchmarks.outcomes import Missing
from benchmarks.providers.eleuther import without_triton
from benchmarks.trainers.base import Batches, Loop

CONTEXT = 128


class SparsifyLoop(Loop):
    has_joint = False

    def __init__(self, shape: Shape, who: str, steps: int) -> None:
        without_triton()
        try:
            from datasets import Dataset
            from sparsify import SparseCoderConfig, TrainConfig, Trainer

            from fastsae.integrations.sparsify import accelerate
        except Exception as error:  # importing Triton code may fail in many ways
            raise Missing(f"cannot be imported ({type(error).__name__}: {error})") from error
        self.version, self.model = version("eai-sparsify"), _activations_as_model(shape)
        self._folder = tempfile.TemporaryDirectory()
        rows = shape.B // CONTEXT
        config = TrainConfig(
            SparseCoderConfig(num_latents=shape.M, k=shape.K),
            batch_size=rows,
            layers=[0],
            log_to_wandb=False,
            save_dir=self._folder.name,
        )
        tokens = torch.zeros(rows * steps, CONTEXT, dtype=torch.int64)
        dataset = Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("torch")
        with accelerate() if who == "topk" else contextlib.nullcontext():
            self._trainer = Trainer(config, dataset, self.model)
        (self.sae,) = self._trainer.saes.values()

    def run(self, batches: Batches) -> None:
        self.model.batches = batches
        with contextlib.redirect_stdout(io.StringIO()):
            self._trainer.fit()

    def watched(self) -> tuple[Any, str, Callable[[Any], Tensor]]:
        return self.sae, "forward", lambda output: output.fvu


def _activations_as_model(shape: Shape) -> Any:
    """A model of one layer, whose output is the next batch."""
    from transformers import PretrainedConfig, PreTrainedModel

    class Activations(PreTrainedModel):
        config_class = PretrainedConfig
        batches: Any = None

        def __init__(self) -> None:
            super().__init__(PretrainedConfig(num_hidden_layers=1))
            self.layers = nn.ModuleList([nn.Identity()])
            self.place = nn.Parameter(torch.zeros(1))  # it is asked for its device

        @property
        def dummy_inputs(self) -> dict[str, Tensor]:
            return {"input_ids": torch.zeros(1, 2, dtype=torch.int64)}

        def forward(self, input_ids: Tensor) -> Tensor:
            if self.batches is None:
                return self.layers[0](torch.zeros(*input_ids.shape, shape.D))
            return self.layers[0](next(self.batches).view(*input_ids.shape, shape.D))

    return Activations()
