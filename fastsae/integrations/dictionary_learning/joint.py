"""The joint architecture (arXiv 2507.00269) as a dictionary and a trainer of dictionary_learning."""

# These classes take the place of others, whose types are narrower than their use.
# pyright: basic

from collections import namedtuple
from pathlib import Path
from typing import Any

import torch
from dictionary_learning.dictionary import Dictionary
from dictionary_learning.trainers.trainer import SAETrainer, get_lr_schedule
from torch import Tensor

from fastsae import files
from fastsae.code import SparseCode
from fastsae.config import JointSAEConfig, from_dict, to_dict
from fastsae.integrations.convert.dictionary_learning import JOINT
from fastsae.integrations.convert.form import by_name, expect, read_pickled
from fastsae.integrations.dense import strongest_first
from fastsae.integrations.dictionary_learning.steps import Step
from fastsae.modules import JointSAE


class JointDictionary(Dictionary):
    """A JointSAE, `sae`, as dictionary_learning evaluates dictionaries: with dense codes (batch, dict_size)."""

    def __init__(self, sae: JointSAE) -> None:
        super().__init__()
        self.sae = sae
        self.activation_dim, self.dict_size = sae.d_in, sae.d_sae

    def encode(self, x: Tensor) -> Tensor:
        return self.sae.encode(x).to_dense()

    def decode(self, f: Tensor) -> Tensor:
        return self.sae.decode(SparseCode(*strongest_first(f, self.sae.k), self.dict_size))

    def forward(self, x: Tensor, output_features: bool = False) -> Any:
        code = self.sae.encode(x)
        x_hat = self.sae.decode(code)
        return (x_hat, code.to_dense()) if output_features else x_hat

    @torch.no_grad()
    def scale_biases(self, scale: float) -> None:
        """Make it the dictionary of activations `scale` times as large. Codes scale along; the pairwise pathway is
        quadratic in them, so V takes `scale` off again, and W2 puts it on."""
        sae = self.sae
        for weight in (sae.b_enc, sae.b_dec, sae.b_lin, sae.W2, sae.b2):
            if weight is not None:
                weight.mul_(scale)
        if sae.V is not None:
            sae.V.div_(scale)

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | None = None) -> "JointDictionary":
        """Load an ae.pt that trainSAE saved, with the config.json beside it (of a checkpoint: in the folder above)."""
        path = Path(path)
        beside = [folder / "config.json" for folder in (path.parent, path.parent.parent)]
        config = next((file for file in beside if file.is_file()), None)
        if config is None:
            raise FileNotFoundError(f"{path}: there is no config.json beside it, which says what the weights are")
        trainer = by_name(f"{config}, trainer", files.read_object(config).get("trainer"))
        if trainer.get("dict_class") != JOINT:
            raise ValueError(
                f"{config} is of a {trainer.get('dict_class')}, not of a {JOINT}; dictionary_learning loads it"
            )
        weights = read_pickled(path)
        try:
            (options,) = expect(config, trainer, ("sae",))
            made = cls(JointSAE(**to_dict(from_dict(JointSAEConfig, options)), device="meta"))
            made.load_state_dict(weights, assign=True)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{config} is damaged, or {path} is not of it: {error}") from error
        return made.to(device or "cpu").eval()


class JointTrainer(SAETrainer):
    """Trains a JointSAE in trainSAE: loss, learning rate and schedule as its TopKTrainer has them, gradients clipped at
    1.0, no auxiliary loss and no unit-norm rows, as in the paper.

    What trainSAE saves is loaded by JointDictionary.from_pretrained; dictionary_learning's own load_dictionary knows no
    such dictionary.
    """

    def __init__(
        self,
        steps: int,
        activation_dim: int,
        dict_size: int,
        k: int,
        layer: int,
        lm_name: str,
        k_integration: int | None = None,
        d_embedding: int = 128,
        dropout: float = 0.15,
        linear: bool = True,
        interaction: bool = True,
        pre_bias: bool = False,
        lr: float | None = None,
        warmup_steps: int = 1000,
        decay_start: int | None = None,
        seed: int | None = None,
        device: str | None = None,
        wandb_name: str = "JointSAE",
        submodule_name: str | None = None,
    ) -> None:
        super().__init__(seed)
        if seed is not None:
            torch.manual_seed(seed)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        sae = JointSAE(
            activation_dim,
            dict_size,
            k,
            k_integration=k_integration,
            d_embedding=d_embedding,
            dropout=dropout,
            linear=linear,
            interaction=interaction,
            pre_bias=pre_bias,
            device=self.device,
        )
        self.ae = JointDictionary(sae).eval()  # as it is evaluated; only updates have dropout
        self.lr = 2e-4 / (dict_size / 2**14) ** 0.5 if lr is None else lr
        self.steps, self.warmup_steps, self.decay_start = steps, warmup_steps, decay_start
        self.layer, self.lm_name, self.submodule_name, self.wandb_name = layer, lm_name, submodule_name, wandb_name
        self.optimizer = torch.optim.Adam(self.ae.parameters(), lr=self.lr, betas=(0.9, 0.999))
        schedule = get_lr_schedule(steps, warmup_steps, decay_start=decay_start)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lr_lambda=schedule)
        self._step = Step(self.ae.parameters(), self.optimizer)

    def loss(self, x: Tensor, step: int | None = None, logging: bool = False) -> Any:
        x = x.to(self.ae.sae.W_enc.dtype)
        output = self.ae.sae(x)
        loss = output.loss * x.shape[-1]  # summed over dimensions, as everywhere in dictionary_learning
        if not logging:
            return loss
        log = namedtuple("LossLog", ["x", "x_hat", "f", "losses"])
        return log(x, output.reconstruction, output.code.values, {"l2_loss": loss.item(), "loss": loss.item()})

    def update(self, step: int, x: Tensor) -> float:
        x = x.to(self.device)
        self.ae.train()
        try:
            loss = self._step(lambda: self.loss(x, step=step))
        finally:
            self.ae.eval()
        self.scheduler.step()
        return loss.item()

    @property
    def config(self) -> dict[str, Any]:
        return {
            "trainer_class": "JointTrainer",
            "dict_class": JOINT,
            "sae": to_dict(self.ae.sae.config),
            "lr": self.lr,
            "steps": self.steps,
            "warmup_steps": self.warmup_steps,
            "decay_start": self.decay_start,
            "seed": self.seed,
            "activation_dim": self.ae.activation_dim,
            "dict_size": self.ae.dict_size,
            "k": self.ae.sae.k,
            "device": self.device,
            "layer": self.layer,
            "lm_name": self.lm_name,
            "wandb_name": self.wandb_name,
            "submodule_name": self.submodule_name,
        }
