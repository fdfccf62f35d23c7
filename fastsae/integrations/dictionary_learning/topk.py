"""dictionary_learning's TopKTrainer, without a dense code: the same weights, losses and files."""

# These classes take the place of others, whose types are narrower than their use.
# pyright: basic

from collections import namedtuple
from typing import Any

import torch
from dictionary_learning.trainers import top_k as stock
from torch import Tensor, nn

from fastsae import ops
from fastsae.integrations.dictionary_learning.steps import Step


class _Decoder(nn.Module):
    """A linear decoder that holds a row per feature, (dict_size, activation_dim), and shows and saves the transpose."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)

    @property
    def weight(self) -> Tensor:
        return self.rows.T

    def forward(self, f: Tensor) -> Tensor:
        return f @ self.rows

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        weight = self.rows.T if keep_vars else self.rows.detach().T
        destination[f"{prefix}weight"] = weight.contiguous()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if f"{prefix}weight" in state_dict:
            state_dict = {f"{prefix}rows": state_dict[f"{prefix}weight"].T.contiguous()}
        super()._load_from_state_dict(state_dict, prefix, *rest)


class AutoEncoderTopK(stock.AutoEncoderTopK):
    """The stock dictionary with decoder rows that lie together. Its ae.pt is that of the stock class, both ways."""

    def __init__(self, activation_dim: int, dict_size: int, k: int) -> None:
        super().__init__(activation_dim, dict_size, k)
        self.decoder = _Decoder(self.decoder.weight.data.T.contiguous())
        # The stock class leaves it with the strides of a transpose.
        self.encoder.weight.data = self.encoder.weight.data.contiguous()


class TopKTrainer(stock.TopKTrainer):
    """The stock TopKTrainer with its arguments (but dict_class, which it brings), losses, steps and config.

    Neither the loss nor the step holds a (batch, dict_size) tensor. On logging steps `f` is the code (batch, k).
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        if "dict_class" in options or len(args) > 6:
            raise TypeError(
                "TopKTrainer of fastsae.integrations.dictionary_learning: dict_class is its own AutoEncoderTopK and "
                "cannot be given; pass options after lm_name by name, or use the stock TopKTrainer"
            )
        super().__init__(*args, dict_class=AutoEncoderTopK, **options)
        self._step = Step(self.ae.parameters(), self.optimizer, unit_norm=self.ae.decoder.rows)

    def loss(self, x: Tensor, step: int, logging: bool = False) -> Any:
        ae = self.ae
        x = x.to(ae.decoder.rows.dtype)
        values, indices = ops.topk_encode(x, ae.encoder.weight, ae.encoder.bias, self.k, b_dec=ae.b_dec)
        if step > self.threshold_start_step:
            self.update_threshold(values)
        x_hat = ops.sparse_decode(values, indices, ae.decoder.rows) + ae.b_dec
        error = x - x_hat
        self.effective_l0 = self.k
        self.num_tokens_since_fired += len(x)
        # As in the stock trainer what is selected counts as fired, with an activation of 0 too.
        self.num_tokens_since_fired.index_fill_(0, indices.reshape(-1), 0)
        l2_loss = error.pow(2).sum(dim=-1).mean()
        auxk_loss = self._auxk_loss(x, error.detach()) if self.auxk_alpha > 0 else x.new_zeros(())
        loss = l2_loss + self.auxk_alpha * auxk_loss
        if not logging:
            return loss
        losses = {"l2_loss": l2_loss.item(), "auxk_loss": auxk_loss.item(), "loss": loss.item()}
        return namedtuple("LossLog", ["x", "x_hat", "f", "losses"])(x, x_hat, values, losses)

    def update(self, step: int, x: Tensor) -> float:
        if step == 0:
            self.ae.b_dec.data.copy_(stock.geometric_median(x))
        x = x.to(self.device)
        loss = self._step(lambda: self.loss(x, step=step))
        self.scheduler.step()
        return loss.item()

    def _auxk_loss(self, x: Tensor, residual: Tensor) -> Tensor:
        """As get_auxiliary_loss, among the rows of dead features alone."""
        dead = torch.ge(self.num_tokens_since_fired, self.dead_feature_threshold).nonzero().squeeze(1)
        self.dead_features, self.pre_norm_auxk_loss = len(dead), -1
        if len(dead) == 0:
            return x.new_zeros(())
        ae, k = self.ae, min(self.top_k_aux, len(dead))
        values, indices = ops.topk_encode(x, ae.encoder.weight, ae.encoder.bias, k, features=dead, b_dec=ae.b_dec)
        missing = residual - ops.sparse_decode(values, indices, ae.decoder.rows)
        self.pre_norm_auxk_loss = missing.float().pow(2).sum(dim=-1).mean()
        variance = (residual - residual.mean(dim=0)).float().pow(2).sum(dim=-1).mean()
        return (self.pre_norm_auxk_loss / variance).nan_to_num(0.0)
