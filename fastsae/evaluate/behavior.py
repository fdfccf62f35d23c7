"""What a language model loses when its activations are replaced by their reconstructions."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fastsae.activations import TokenWindows, check_hook
from fastsae.modules import SparseAutoencoder


@dataclass(frozen=True)
class Behavior:
    """Means over all predicted tokens of text, in nats. Clean is the model untouched, spliced has reconstructions in
    place of activations, ablated has zeros."""

    tokens: int
    kl: float
    """KL(clean || spliced) of the next-token distributions."""
    ce_clean: float
    """Next-token cross-entropy."""
    ce_spliced: float
    ce_ablated: float
    loss_recovered: float
    """(ce_ablated - ce_spliced) / (ce_ablated - ce_clean): 1 is the clean model, 0 is zero ablation."""


@torch.no_grad()
def behavior(
    sae: SparseAutoencoder, model: Any, hook_name: str, windows: TokenWindows, batch_windows: int = 16
) -> Behavior:
    """Splice `sae.reconstruct` into `model` at the hook the SAE was trained on, over held-out token windows.

    Positions that no SAE was trained on (BOS, padding) keep their activations in the spliced and the ablated run.
    model: anything with TransformerLens' run_with_hooks and hook_dict.
    """
    check_hook(model, hook_name)
    was_training = sae.training
    sae.eval()
    totals = torch.zeros(4, dtype=torch.float64)
    tokens = 0
    for lo in tqdm(range(0, len(windows), batch_windows), desc="KL", unit="batch", leave=False):
        batch = slice(lo, lo + batch_windows)
        inputs = windows.tokens[batch].to(model.cfg.device)
        is_text = windows.is_text(batch).to(inputs.device)
        predicted = is_text[:, 1:]  # position t is predicted at t - 1, by BOS too
        targets = inputs[:, 1:][predicted]

        def log_probabilities(
            replace: Any, inputs: Tensor = inputs, is_text: Tensor = is_text, predicted: Tensor = predicted
        ) -> Tensor:
            def hook(activation: Tensor, hook: Any) -> Tensor:
                flat = activation.flatten(2)
                replaced = torch.where(is_text.unsqueeze(-1), replace(flat).to(flat), flat)
                return replaced.view_as(activation)

            hooks = [] if replace is None else [(hook_name, hook)]
            logits = model.run_with_hooks(inputs, fwd_hooks=hooks, return_type="logits")
            return logits[:, :-1][predicted].float().log_softmax(dim=-1)

        clean = log_probabilities(None)
        spliced = log_probabilities(lambda x: sae.reconstruct(x.to(sae.W_enc)))
        ablated = log_probabilities(torch.zeros_like)
        kl = F.kl_div(spliced, clean, log_target=True, reduction="sum")
        losses = [F.nll_loss(p, targets, reduction="sum") for p in (clean, spliced, ablated)]
        totals += torch.stack([kl, *losses]).double().cpu()
        tokens += len(targets)
    sae.train(was_training)
    kl, ce_clean, ce_spliced, ce_ablated = (totals / tokens).tolist()
    recovered = (ce_ablated - ce_spliced) / (ce_ablated - ce_clean)
    return Behavior(tokens, kl, ce_clean, ce_spliced, ce_ablated, recovered)
