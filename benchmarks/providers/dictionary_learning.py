"""dictionary_learning's TopKTrainer under the autocast that its trainSAE would run it under, its Adam made fused."""

import importlib
import sys
from importlib.metadata import version
from types import ModuleType

import torch
from torch import Tensor, nn

from benchmarks.cases import Shape
from benchmarks.outcomes import Missing
from benchmarks.place import Place
from benchmarks.providers.base import LR, Provider, weights

NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "b_dec": "b_dec"}


class DictionaryLearning(Provider):
    """Steps are counted from 1: at step 0 it would set b_dec to the geometric median of the batch."""

    transposed = ("W_dec",)

    def __init__(self, shape: Shape, place: Place) -> None:
        self.theirs = without_nnsight("dictionary_learning.trainers.top_k")
        self.version, self.count, self.place = version("dictionary-learning"), 1, place
        self.trainer = self.theirs.TopKTrainer(
            steps=10**9,
            activation_dim=shape.D,
            dict_size=shape.M,
            k=shape.K,
            layer=0,
            lm_name="none",
            lr=LR,
            warmup_steps=0,
            threshold_start_step=0,  # from then on it is part of every step
            device=str(place.device),
        )
        self.ae, self.optimizer = self.trainer.ae, self.trainer.optimizer
        w = weights(shape, place, joint=False)
        state = {theirs: w[ours].T if theirs == "decoder.weight" else w[ours] for theirs, ours in NAMES.items()}
        self.ae.load_state_dict(self.ae.state_dict() | state)
        for group in self.optimizer.param_groups:
            group["fused"], group["foreach"] = True, False

    def encode(self, x: Tensor) -> Tensor:
        with self.place.precision():
            return self.ae.encode(x)

    def decode(self, code: Tensor) -> Tensor:
        with self.place.precision():
            return self.ae.decode(code)

    def loss(self, x: Tensor) -> Tensor:
        with self.place.precision():
            return self.trainer.loss(x, step=self.count)

    def scale(self, x: Tensor) -> float:
        return float(x.shape[1])

    def update(self) -> None:
        """As in its trainer's `update`, which cannot be called in parts."""
        ae, W = self.ae, self.ae.decoder.weight
        W.grad = self.theirs.remove_gradient_parallel_to_decoder_directions(W, W.grad, ae.activation_dim, ae.dict_size)
        torch.nn.utils.clip_grad_norm_(ae.parameters(), 1.0)
        self.optimizer.step()
        W.data = self.theirs.set_decoder_norm_to_unit_norm(W, ae.activation_dim, ae.dict_size)

    def step(self, x: Tensor) -> Tensor:
        self.count += 1
        with self.place.precision():
            return torch.tensor(self.trainer.update(self.count, x))

    def parameters(self) -> dict[str, nn.Parameter]:
        return {NAMES[name]: p for name, p in self.ae.named_parameters()}


def without_nnsight(module: str) -> ModuleType:
    """A module of its, without nnsight: only its buffers need that, and 0.3 breaks torch.compile by being imported."""
    stub = ModuleType("nnsight")
    stub.LanguageModel = None  # type: ignore[attr-defined]
    absent = "nnsight" not in sys.modules
    if absent:
        sys.modules["nnsight"] = stub
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise Missing(f"cannot be imported ({type(error).__name__}: {error})") from error
    finally:
        if absent:
            del sys.modules["nnsight"]
