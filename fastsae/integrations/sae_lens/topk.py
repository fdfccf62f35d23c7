"""SAELens' TopK SAE, trained without a dense code: the same weights, losses and files."""

# These classes take the place of others, whose types are narrower than their use.
# pyright: basic

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.sae import SAEConfig, TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor, nn

from fastsae import ops
from fastsae.backends import choose
from fastsae.integrations.sae_lens.feature_major import (
    FeatureMajorEncoder,
    as_coo,
    finished,
    hooked,
    prepared,
    subtracted,
)

# Pre-activations of dead features are ranked for so many numbers at a time.
_DEAD_AT_ONCE = 2**24


@dataclass
class FastTopKSAEConfig(TopKSAEConfig):
    """SAELens' TopKSAEConfig, under which training checkpoints of FastTopKTrainingSAE can be loaded as they are."""

    @classmethod
    def architecture(cls) -> str:
        return "fastsae_topk"


@dataclass
class FastTopKTrainingSAEConfig(TopKTrainingSAEConfig):
    """SAELens' TopKTrainingSAEConfig, trained by fastsae. What is exported for inference is a stock "topk" SAE."""

    @classmethod
    def architecture(cls) -> str:
        return "fastsae_topk"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopKSAEConfig


class FastTopKTrainingSAE(FeatureMajorEncoder, TopKTrainingSAE):
    """SAELens' TopKTrainingSAE whose training step never holds a (B, d_sae) tensor.

    Of dead features, which the auxiliary loss ranks, it holds at most 2^24 pre-activations at a time.

    It begins with the weights, and makes the losses and gradients, of the stock class. A hook on its activations
    (hook_sae_acts_pre, hook_sae_acts_post) needs them dense: with one attached, the stock step runs.
    """

    def initialize_weights(self) -> None:
        stock = TopKTrainingSAE.__new__(TopKTrainingSAE)
        nn.Module.__init__(stock)
        stock.cfg, stock.dtype, stock.device = self.cfg, self.dtype, self.device
        stock.initialize_weights()
        self.b_dec, self.W_dec, self.b_enc = stock.b_dec, stock.W_dec, stock.b_enc
        self.W_enc_rows = nn.Parameter(stock.W_enc.data.T.contiguous())

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        if hooked(self):
            return super().training_forward_pass(step_input)
        x, target = prepared(self, step_input.sae_in), step_input.sae_in
        # The norms only rank: what they multiply before the selection is divided by them in the decoder.
        norms = self.W_dec.detach().norm(dim=1) if self.cfg.rescale_acts_by_decoder_norm else None
        values, indices = ops.topk_encode(
            x, self.W_enc_rows, self.b_enc, self.cfg.k, b_dec=subtracted(self), scale=norms
        )
        sae_out = finished(self, ops.sparse_decode(values, indices, self.W_dec) + self.b_dec)
        mse_loss = self.mse_loss_fn(sae_out, target).sum(dim=-1).mean()
        auxiliary = self._auxiliary_loss(x, target, sae_out, step_input.dead_neuron_mask, norms)
        return TrainStepOutput(
            sae_in=target,
            sae_out=sae_out,
            feature_acts=as_coo(values, indices, self.cfg.d_sae),
            hidden_pre=None,  # type: ignore[arg-type]  # dense, and nobody reads it
            loss=mse_loss + auxiliary,
            losses={"mse_loss": mse_loss, "auxiliary_reconstruction_loss": auxiliary},
        )

    def _auxiliary_loss(
        self, x: Tensor, target: Tensor, sae_out: Tensor, dead: Tensor | None, norms: Tensor | None
    ) -> Tensor:
        """As calculate_topk_aux_loss, from the pre-activations of dead features alone."""
        features = None if dead is None else dead.nonzero().squeeze(1)
        if features is None or len(features) == 0:
            return sae_out.new_tensor(0.0)
        if self.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm"):
            raise ValueError(
                "FastTopKTrainingSAE: the auxiliary loss for dead features does not know normalize_activations = "
                f"{self.cfg.normalize_activations!r}, in SAELens' own TopK neither. Use another normalisation."
            )
        heuristic = target.shape[-1] // 2
        k = min(heuristic, len(features))
        values, indices = _strongest_dead(x, self.W_enc_rows, self.b_enc, subtracted(self), features, norms, k)
        recons = self.reshape_fn_out(ops.sparse_decode(values, indices, self.W_dec), self.d_head)
        error = (recons - (target - sae_out).detach()).pow(2).sum(dim=-1).mean()
        return self.cfg.aux_loss_coefficient * min(len(features) / heuristic, 1.0) * error


def _strongest_dead(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, dead: Tensor, scale: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """Find the k largest pre-activations of the features `dead` (n,), negative ones too: values, indices (B, k)."""
    if choose("auto", x.device, x.dtype) == "reference":  # autograd does all of it
        pre = torch.addmm(b_enc[dead], x if b_dec is None else x - b_dec, W_enc[dead].T)
        places = (pre if scale is None else pre * scale[dead]).topk(k, sorted=False).indices
        return pre.gather(1, places), dead[places]
    # In the dtype of the weights, as topk_encode on the CPU, whatever autocast says.
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        W, b = W_enc[dead], b_enc[dead]
        rows = (x if b_dec is None else x - b_dec).split(max(1, _DEAD_AT_ONCE // len(dead)))
        found = []
        for part in rows:
            pre = torch.addmm(b, part, W.T)
            places = (pre if scale is None else pre * scale[dead]).topk(k, sorted=False).indices
            found.append((pre.gather(1, places), dead[places]))
        values, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
    return _WithGradient.apply(values, indices, x, W_enc, b_enc, b_dec), indices  # type: ignore[return-value]


class _WithGradient(torch.autograd.Function):
    """Pre-activations x . W_enc[i] + b_enc[i] that are known already, and their gradients."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, indices: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(indices, x, W_enc, b_dec)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        indices, x, W_enc, b_dec = ctx.saved_tensors
        _, _, need_x, need_W, _, need_b_dec = ctx.needs_input_grad
        active = torch.ones_like(grads[0])  # negative ones too have a gradient
        backend = choose("auto", x.device, x.dtype)
        d_x, d_W, d_b_enc, d_b_dec = ops.topk_encode_backward(
            grads[0], active, indices, x, W_enc, b_dec, need_x, need_W, need_b_dec, backend
        )
        return None, None, d_x, d_W, d_b_enc, d_b_dec
