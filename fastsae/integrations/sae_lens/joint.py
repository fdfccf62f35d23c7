"""The joint architecture (arXiv 2507.00269) as one of SAELens'."""

# These classes take the place of others, whose types are narrower than their use.
# pyright: basic

from dataclasses import dataclass
from typing import Any, cast

import torch
from sae_lens.saes.sae import (
    SAE,
    SAEConfig,
    TrainCoefficientConfig,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
    TrainStepOutput,
)
from torch import Tensor, nn

from fastsae import ops
from fastsae.integrations.dense import strongest_first
from fastsae.integrations.sae_lens.feature_major import (
    FeatureMajorEncoder,
    as_coo,
    finished,
    hooked,
    prepared,
    subtracted,
)
from fastsae.modules import JointSAE


@dataclass
class FastJointSAEConfig(SAEConfig):
    """JointSAE for inference."""

    k: int = 100
    """Active features per token."""
    k_integration: int | None = None
    """Number of the strongest features that the integration sees; None means half of k."""
    d_embedding: int = 128
    """Width of the factorization machine's feature embeddings V."""
    linear: bool = True
    """Have the linear pathway W_lin."""
    interaction: bool = True
    """Have the pairwise pathway: V and the two-layer network over z."""

    @classmethod
    def architecture(cls) -> str:
        return "fastsae_joint"


@dataclass(kw_only=True)
class FastJointTrainingSAEConfig(TrainingSAEConfig):
    """JointSAE in training; fields as in FastJointSAEConfig."""

    k: int = 100
    k_integration: int | None = None
    d_embedding: int = 128
    linear: bool = True
    interaction: bool = True
    dropout: float = 0.15
    """Share of the pairwise interactions z dropped in training."""
    decoder_init_norm: float | None = None
    """Norm of the rows of W_dec at the start; None is the paper's U(+-1/sqrt(d_sae))."""

    @classmethod
    def architecture(cls) -> str:
        return "fastsae_joint"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return FastJointSAEConfig


class _Joint(FeatureMajorEncoder):
    """Parameters, decoder and folding of both: W_dec W_lin (d_sae, d_in), V (d_sae, d_embedding), W1 b1 W2 b2 b_lin."""

    b_enc: nn.Parameter

    def initialize_weights(self) -> None:
        sae, cfg = cast(Any, self), cast(Any, self).cfg
        options = {name: getattr(cfg, name) for name in ("k_integration", "d_embedding", "linear", "interaction")}
        made = JointSAE(cfg.d_in, cfg.d_sae, cfg.k, pre_bias=True, device=sae.device, dtype=sae.dtype, **options)
        norm = getattr(cfg, "decoder_init_norm", None)
        if norm is not None:
            with torch.no_grad():
                made.W_dec *= norm / made.W_dec.norm(dim=1, keepdim=True)
                made.W_enc.copy_(made.W_dec)
        for name, parameter in made.named_parameters():
            setattr(self, "W_enc_rows" if name == "W_enc" else name, parameter)
        for name in ("W_lin", "b_lin", "V", "W1", "b1", "W2", "b2"):
            if not hasattr(self, name):
                setattr(self, name, None)
        self.n = made.k_integration

    def get_activation_fn(self) -> Any:
        return self._dense_code

    def _dense_code(self, pre: Tensor) -> Tensor:
        """relu of the k largest of pre (..., d_sae), zeros elsewhere: SAELens hands codes on as dense tensors."""
        values, indices = pre.relu().topk(cast(Any, self).cfg.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter_(-1, indices, values)

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        sae = cast(Any, self)
        pre = sae.hook_sae_acts_pre(sae.process_sae_in(x) @ self.W_enc + self.b_enc)
        return sae.hook_sae_acts_post(sae.activation_fn(pre)), pre

    def decode(self, feature_acts: Tensor) -> Tensor:
        """The reconstruction (..., d_in) of a dense code (..., d_sae): all pathways, of whatever is active."""
        dense = feature_acts.reshape(-1, feature_acts.shape[-1])
        values, indices = strongest_first(dense, cast(Any, self).cfg.k)
        out = self.reconstruct(values, indices, dropout=0.0)
        return finished(cast(Any, self), out.view(*feature_acts.shape[:-1], out.shape[-1]))

    def reconstruct(self, values: Tensor, indices: Tensor, dropout: float) -> Tensor:
        """The reconstruction (B, d_in) of a code (B, k), strongest first."""
        sae = cast(Any, self)
        biases = [b for b in (sae.b_dec, sae.b_lin, sae.b2) if b is not None]
        mlp = None if sae.V is None else (sae.W1, sae.b1, sae.W2)
        return ops.reconstruct(
            values,
            indices,
            sae.W_dec,
            sae.W_lin,
            sae.V,
            self.n,
            bias=torch.stack(biases).sum(0),
            mlp=mlp,
            dropout=dropout,
        )[0]

    def fold_W_dec_norm(self) -> None:
        raise NotImplementedError(
            f"{type(self).__name__}: folding decoder norms into the encoder would change which features are the k "
            "largest; leave fold_W_dec_norm off"
        )

    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor)  # type: ignore[misc]  # of the SAE beside it
        for weight in self._outputs():
            weight.data /= scaling_factor

    @torch.no_grad()
    def fold_activation_whitening(self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor) -> None:
        super().fold_activation_whitening(mean, whitening_matrix, unwhitening_matrix)  # type: ignore[misc]
        for weight in self._outputs():
            precise = torch.promote_types(weight.dtype, unwhitening_matrix.dtype)
            back = unwhitening_matrix.to(weight.device, precise)
            wide = weight.data.to(precise)
            weight.data.copy_(back.T @ wide if weight is cast(Any, self).W2 else wide @ back)

    def _outputs(self) -> list[nn.Parameter]:
        """List the parameters in the space of the output, other than W_dec and b_dec."""
        sae = cast(Any, self)
        return [w for w in (sae.W_lin, sae.b_lin, sae.W2, sae.b2) if w is not None]


class FastJointSAE(_Joint, SAE[FastJointSAEConfig]):
    """JointSAE for inference in SAELens. Codes are dense there, as everywhere in its inference."""

    def encode(self, x: Tensor) -> Tensor:
        return self.encode_with_hidden_pre(x)[0]


class FastJointTrainingSAE(_Joint, TrainingSAE[FastJointTrainingSAEConfig]):
    """JointSAE in SAELens' trainers, whose training step never holds a (B, d_sae) tensor unless a hook wants one.

    The loss is the squared error summed over d_in, as SAELens has it: d_in times the paper's.
    """

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        target, k = step_input.sae_in, self.cfg.k
        if hooked(self):
            values, indices = strongest_first(self.encode_with_hidden_pre(target)[0], k)
        else:
            values, indices = ops.topk_encode(
                prepared(self, target), self.W_enc_rows, self.b_enc, k, b_dec=subtracted(self)
            )
        sae_out = finished(self, self.reconstruct(values, indices, self.cfg.dropout if self.training else 0.0))
        loss = self.mse_loss_fn(sae_out, target).sum(dim=-1).mean()
        return TrainStepOutput(
            sae_in=target,
            sae_out=sae_out,
            feature_acts=as_coo(values, indices, self.cfg.d_sae),
            hidden_pre=None,  # type: ignore[arg-type]  # dense, and nobody reads it
            loss=loss,
            losses={"mse_loss": loss},
        )

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {}

    def calculate_aux_loss(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        """None: the paper's loss is the squared error alone."""
        return {}
