"""dictionary_learning's trainSAE with its TopKTrainer, and with ours."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from torch import Tensor

from benchmarks.cases import Shape
from benchmarks.providers.base import LR
from benchmarks.providers.dictionary_learning import without_nnsight
from benchmarks.trainers.base import Batches, Loop


class DictionaryLearningLoop(Loop):
    def __init__(self, shape: Shape, who: str, steps: int) -> None:
        self._train = without_nnsight("dictionary_learning.training").trainSAE
        stock = without_nnsight("dictionary_learning.trainers.top_k").TopKTrainer
        from fastsae.integrations import dictionary_learning as fast

        self.version, self.steps = version("dictionary-learning"), steps
        sizes: dict[str, Any] = {"activation_dim": shape.D, "dict_size": shape.M, "k": shape.K}
        options = sizes | {"layer": 0, "lm_name": "none", "lr": LR, "warmup_steps": 1, "steps": steps, "seed": 0}
        if who == "joint":
            options |= {"k_integration": shape.N, "d_embedding": shape.E}
        kind = {"stock": stock, "topk": fast.TopKTrainer, "joint": fast.JointTrainer}[who]
        self._trainer = kind(**options, device="cpu")

    def run(self, batches: Batches) -> None:
        config = {"trainer": lambda: self._trainer}
        self._train(batches, [config], steps=self.steps, device="cpu")

    def watched(self) -> tuple[Any, str, Callable[[Any], Tensor]]:
        return self._trainer, "loss", lambda output: output
