"""What a language model loses when its activations are replaced by their reconstructions."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fastsae.activations import TokenWindows, check_hook
from fastsae.modules import SparseAutoencoder, evaluating


@dataclass(frozen=True)
class Behavior:
    """Means over predicted tokens, in nats. Clean is the model untouched, spliced has reconstructions in place of
    activations, ablated has zeros."""

    tokens: int
    """Predictions made at positions of text, of a token of text. What BOS predicts no splicing can change."""
    kl: float
    """KL(clean || spliced) of the next-token distributions."""
    ce_clean: float
    """Next-token cross-entropy."""
    ce_spliced: float
    ce_ablated: float
    loss_recovered: float
    """(ce_ablated - ce_spliced) / (ce_ablated - ce_clean): 1 is the clean model, 0 is zero ablation. NaN where ablation
    changes nothing, as at a hook that scales."""


def behavior(
    sae: SparseAutoencoder, model: Any, hook_name: str, windows: TokenWindows, batch_windows: int = 16
) -> Behavior:
    """Splice `sae.reconstruct` into `model` at the hook the SAE was trained on, over held-out token windows.

    Positions that no SAE was trained on (BOS, padding) keep their activations in the spliced and the ablated run.
    model: anything with TransformerLens' run_with_hooks and hook_dict.
    """
    check_hook(model, hook_name)
    if batch_windows < 1:
        raise ValueError(f"behavior: expected batch_windows of at least 1; got {batch_windows}")
    totals = torch.zeros(4, dtype=torch.float64)
    tokens = 0
    with evaluating(sae):
        for lo in tqdm(range(0, len(windows), batch_windows), desc="KL", unit="batch", leave=False):
            batch = slice(lo, lo + batch_windows)
            n, sums = _sums(sae, model, hook_name, windows.tokens[batch], windows.is_text(batch))
            totals += sums
            tokens += n
    if tokens == 0:
        raise ValueError(
            f"behavior: no token of text is predicted from another one in these windows of {windows.context} tokens; "
            "use a longer context or longer documents"
        )
    kl, ce_clean, ce_spliced, ce_ablated = (totals / tokens).tolist()
    range_ = ce_ablated - ce_clean
    recovered = (ce_ablated - ce_spliced) / range_ if range_ else math.nan
    return Behavior(tokens, kl, ce_clean, ce_spliced, ce_ablated, recovered)


def _sums(sae: SparseAutoencoder, model: Any, hook_name: str, tokens: Tensor, is_text: Tensor) -> tuple[int, Tensor]:
    """Over one batch of windows: how many predictions count, and the sums of KL and of the three cross-entropies."""
    inputs, is_text = tokens.to(model.cfg.device), is_text.to(model.cfg.device)
    predicted = is_text[:, :-1] & is_text[:, 1:]  # position t + 1, predicted at t
    targets = inputs[:, 1:][predicted]

    def log_probabilities(replace: Callable[[Tensor], Tensor] | None) -> Tensor:
        def splice(activation: Tensor, hook: Any) -> Tensor:
            flat = activation.flatten(2)
            assert replace is not None
            return torch.where(is_text.unsqueeze(-1), replace(flat).to(flat), flat).view_as(activation)

        hooks = [] if replace is None else [(hook_name, splice)]
        logits = model.run_with_hooks(inputs, fwd_hooks=hooks, return_type="logits")
        return logits[:, :-1][predicted].float().log_softmax(dim=-1)

    clean = log_probabilities(None)
    spliced = log_probabilities(lambda x: sae.reconstruct(x.to(sae.W_enc.device)))
    ablated = log_probabilities(torch.zeros_like)
    kl = F.kl_div(spliced, clean, log_target=True, reduction="sum")
    losses = [F.nll_loss(p, targets, reduction="sum") for p in (clean, spliced, ablated)]
    return len(targets), torch.stack([kl, *losses]).double().cpu()
