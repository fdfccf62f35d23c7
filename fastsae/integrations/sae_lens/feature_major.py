"""Parts that both architectures share: an encoder with a row per feature, and codes that are never dense."""

# These classes take the place of others, whose types are narrower than their use.
# pyright: basic

from typing import Any

import torch
from sae_lens.saes.sae import SAE
from torch import Tensor, nn


class FeatureMajorEncoder:
    """Holds W_enc as `W_enc_rows` (d_sae, d_in); under SAELens' own name it is a view of the shape SAELens knows.

    On disk it lies as SAELens lays it: W_enc (d_in, d_sae).
    """

    W_enc_rows: nn.Parameter

    @property
    def W_enc(self) -> Tensor:
        return self.W_enc_rows.T

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        state_dict["W_enc"] = state_dict.pop("W_enc_rows").T.contiguous()

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        state_dict["W_enc_rows"] = state_dict.pop("W_enc").T.contiguous()


def prepared(sae: SAE[Any], x: Tensor) -> Tensor:
    """x (B, d_in) as it is encoded, but for b_dec, which the encode itself subtracts."""
    return sae.run_time_activation_norm_fn_in(sae.hook_sae_input(sae.reshape_fn_in(x.to(sae.dtype))))


def finished(sae: SAE[Any], reconstruction: Tensor) -> Tensor:
    """A reconstruction (B, d_in), biases and all, as `decode` returns it."""
    return sae.reshape_fn_out(sae.run_time_activation_norm_fn_out(sae.hook_sae_recons(reconstruction)), sae.d_head)


def subtracted(sae: SAE[Any]) -> Tensor | None:
    """Give the vector that is subtracted from x before it is encoded, if any."""
    return sae.b_dec if sae.cfg.apply_b_dec_to_input else None


def hooked(sae: SAE[Any]) -> bool:
    """Whether someone wants to see, or to change, activations, which must be dense for that."""
    hooks = (sae.hook_sae_acts_pre, sae.hook_sae_acts_post)
    return any(hook._forward_hooks or hook._backward_hooks for hook in hooks)


def as_coo(values: Tensor, indices: Tensor, d_sae: int) -> Tensor:
    """A code (B, k) as the sparse (B, d_sae) tensor in which SAELens' trainer counts what fired."""
    rows = torch.arange(len(values), device=values.device).repeat_interleave(values.shape[1])
    places = torch.stack([rows, indices.reshape(-1)])
    return torch.sparse_coo_tensor(places, values.detach().reshape(-1), (len(values), d_sae), check_invariants=False)
