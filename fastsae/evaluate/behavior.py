"""Behaviour of a language model whose activations are replaced by their reconstructions: KL and cross-entropy."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsae import progress
from fastsae.activations import PaddingMask, TokenWindows, check_hook, check_tokens, output_mask, with_hooks
from fastsae.evaluate.intervals import DocumentSums, DocumentTotals, Interval, at_most
from fastsae.evaluate.pathways import FULL, IDENTITY, ablations, through_secondary
from fastsae.modules import SecondarySAE, SparseAutoencoder, evaluating
from fastsae.report import table

# Logits of more tokens would be fresh memory of hundreds of megabytes at every call.
_CPU_TOKENS = 1024


@dataclass(frozen=True)
class Spliced:
    """One reconstruction in place of the activations. In nats per predicted token."""

    kl: Interval
    """KL(clean || spliced) of the next-token distributions."""
    ce: Interval
    """Next-token cross-entropy."""
    ce_increase: Interval
    """Over the clean model's, token by token."""
    loss_recovered: Interval
    """(ce_ablated - ce) / (ce_ablated - ce_clean): 1 is the clean model, 0 is zero ablation. NaN where ablation changes
    nothing, as at a hook that scales."""
    epsilon_kl: Interval
    """KL when each activation is moved as far as this reconstruction moves it, in a random direction (paper 3.4)."""
    kl_over_epsilon: Interval
    """1: errors are as harmful as random ones of their size. Above: they hit directions that matter."""


@dataclass(frozen=True)
class Behavior:
    """Means over predicted tokens, intervals over documents. Clean is the model untouched, ablated has zeros."""

    tokens: int
    """Predictions that count."""
    documents: int
    ce_clean: Interval
    ce_ablated: Interval
    conditions: dict[str, Spliced]
    """By what is kept of the reconstruction; "full" is all of it."""
    kl_reduction_against_own_identity_pathway: dict[str, Interval]
    """The paper's "KL reduction": 1 - KL / KL of the identity pathway of the same SAE, which was never trained to
    reconstruct alone. No comparison with a TopK SAE. Empty without integration."""
    ce_reduction_against_own_identity_pathway: dict[str, Interval]
    """Reduction of the cross-entropy itself, clean part included, as in the paper."""
    sums: DocumentSums = field(repr=False)
    """Per document, for paired comparisons."""

    @property
    def full(self) -> Spliced:
        return self.conditions[FULL]

    def __str__(self) -> str:
        """A table, for reading: the conditions by what is kept of the reconstruction."""
        rows = [
            {
                "reconstruction": name,
                "KL": f"{spliced.kl:.4f}",
                "CE increase": f"{spliced.ce_increase:.4f}",
                "loss recovered": f"{spliced.loss_recovered:.4f}",
                "KL / random error of its size": f"{spliced.kl_over_epsilon:.2f}",
            }
            for name, spliced in self.conditions.items()
        ]
        return "\n".join(
            [
                f"{self.tokens:,} predictions of {self.documents:,} documents. Cross-entropy of the model "
                f"{self.ce_clean:.4f}, with zeros at the hook {self.ce_ablated:.4f}",
                table(rows),
            ]
        )


def behavior(
    sae: SparseAutoencoder,
    model: Any,
    hook_name: str,
    windows: TokenWindows,
    batch_windows: int = 16,
    bos: bool = False,
    draws: int = 1,
    pathways: bool = True,
    secondary: SecondarySAE | None = None,
) -> Behavior:
    """Splice reconstructions into `model` at the hook the SAE was trained on, over held-out token windows.

    Every condition (pathways left out) is compared with its own epsilon-random control: each token moved by the norm of
    its own error, in raw activations, in a random direction, averaged over `draws` of them.
    bos: also replace activations at BOS and separators, on which no SAE was trained, and count what is predicted there.
    Otherwise, and at padding always, positions keep their activations in every run.
    pathways: also splice with pathways left out; without, the whole reconstruction only.
    secondary: of `sae`'s integration network. Then "full" has the interaction computed from its reconstruction of the
    hidden layer, beside "own hidden layer" (`sae` as it is) and "no interaction": how much of what the interaction does
    passes through the secondary SAE.
    model: anything with TransformerLens' run_with_hooks and hook_dict, which is put into eval mode, or a transformers
    model in memory. One that reads in both directions gets an attention mask, and has seen what it would predict: its
    cross-entropies are NaN.
    """
    model = with_hooks(model)
    check_hook(model, hook_name)
    check_tokens(model, windows, "behavior")
    model.eval()  # dropout would make the clean run another one each time
    for name, value in (("batch_windows", batch_windows), ("draws", draws)):
        if value < 1:
            raise ValueError(f"behavior: expected {name} of at least 1; got {value}")
    if torch.device(model.cfg.device).type == "cpu":
        batch_windows = min(batch_windows, max(1, _CPU_TOKENS // windows.context))
    mask = output_mask(model, windows)
    if mask.reads_ahead:
        warnings.warn(
            "behavior: this model reads in both directions: it has seen the token that comes next, so there is no "
            "cross-entropy of predicting it, and no loss recovered. KL is of its outputs at each token.",
            stacklevel=2,
        )
    totals = DocumentTotals(windows.names)
    device = torch.device(model.cfg.device)
    noise = torch.Generator(device).manual_seed(0)
    name = "KL with BOS" if bos else "KL"
    with evaluating(sae), evaluating(secondary or sae):
        for lo in progress.over(name, range(0, len(windows), batch_windows), "batch"):
            batch = windows[lo : lo + batch_windows]
            splice = _Splice(sae, secondary, model, hook_name, batch, mask, bos, noise, windows.context)
            totals.add(*splice.sums(draws, pathways))
    if totals.rows == 0:
        raise ValueError(
            f"behavior: no token of text is predicted from another one in these windows of {windows.context} tokens; "
            "use a longer context or longer documents"
        )
    return of_sums(totals.finish())


def of_sums(sums: DocumentSums) -> Behavior:
    """Make the result of `behavior` from sums that it left before."""
    kept = [name[3:] for name in sums.sums if name.startswith("kl ")]
    ablated = sums.sums["ce ablated"]
    conditions = {
        name: Spliced(
            kl=sums.ratio(f"kl {name}", "rows", least=0),
            ce=sums.ratio(f"ce {name}", "rows", least=0),
            ce_increase=sums.ratio(sums.sums[f"ce {name}"] - sums.sums["ce clean"], "rows"),
            loss_recovered=at_most(1, sums.ratio(ablated - sums.sums[f"ce {name}"], ablated - sums.sums["ce clean"])),
            epsilon_kl=sums.ratio(f"epsilon {name}", "rows", least=0),
            kl_over_epsilon=sums.ratio(f"kl {name}", f"epsilon {name}", least=0),
        )
        for name in kept
    }

    def reductions(metric: str) -> dict[str, Interval]:
        others = [name for name in kept if name != IDENTITY] if IDENTITY in kept else []
        return {name: sums.reduction(f"{metric} {name}", f"{metric} {IDENTITY}") for name in others}

    return Behavior(
        tokens=int(sums.total("rows")),
        documents=len(sums.names),
        ce_clean=sums.ratio("ce clean", "rows", least=0),
        ce_ablated=sums.ratio("ce ablated", "rows", least=0),
        conditions=conditions,
        kl_reduction_against_own_identity_pathway=reductions("kl"),
        ce_reduction_against_own_identity_pathway=reductions("ce"),
        sums=sums,
    )


class _Splice:
    """One batch of windows, run once for every replacement of its activations."""

    def __init__(
        self,
        sae: SparseAutoencoder,
        secondary: SecondarySAE | None,
        model: Any,
        hook_name: str,
        windows: TokenWindows,
        mask: PaddingMask,
        bos: bool,
        noise: torch.Generator,
        context: int,
    ) -> None:
        self.sae, self.secondary, self.model, self.hook_name = sae, secondary, model, hook_name
        self.noise, self.context = noise, context
        self.predicts, self.mask = not mask.reads_ahead, mask(windows.is_token())
        is_text = windows.is_text()
        self.replaced = windows.is_token() if bos else is_text
        counts = self.replaced[:, :-1] & is_text[:, 1:]  # position t + 1, predicted at t
        self.documents = windows.documents.unsqueeze(1).expand_as(counts)[counts]
        device = model.cfg.device
        self.tokens, self.replaced, self.counts = (
            windows.tokens.to(device),
            self.replaced.to(device),
            counts.to(device),
        )
        self.targets = self.tokens[:, 1:][self.counts]

    def sums(self, draws: int, pathways: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The document of each prediction, and KL and cross-entropies by prediction."""
        original: list[Tensor] = []
        clean = self._log_probabilities(lambda x: original.append(x) or x)
        found = {"ce clean": self._ce(clean), "ce ablated": self._ce(self._log_probabilities(torch.zeros_like))}
        for name, replacement in self._replacements(original[0], pathways).items():
            spliced = self._log_probabilities(lambda _, y=replacement: y)
            found[f"kl {name}"], found[f"ce {name}"] = _kl(clean, spliced), self._ce(spliced)
            error = (replacement - original[0]).float().norm(dim=-1, keepdim=True)
            moved = [
                _kl(clean, self._log_probabilities(lambda x, e=error: x + self._random(x, e))) for _ in range(draws)
            ]
            found[f"epsilon {name}"] = torch.stack(moved).mean(dim=0)
        return self.documents, found

    def _replacements(self, raw: Tensor, pathways: bool) -> dict[str, Tensor]:
        """Raw activations (windows, tokens, d_in) as they are reconstructed, by what is kept."""
        x = self.sae.normalizer(raw.to(self.sae.W_enc.device))
        if self.secondary is None:
            kept = ablations(self.sae, self.sae.components(x))
            kept = kept if pathways else {FULL: kept[FULL]}
        else:
            kept = through_secondary(self.sae, self.secondary, self.sae.encode(x))
        return {name: self.sae.normalizer.invert(y).to(raw) for name, y in kept.items()}

    def _random(self, x: Tensor, length: Tensor) -> Tensor:
        # As many draws as for the longest windows: others do not get another direction because these are short.
        shape = (len(x), self.context, x.shape[-1])
        direction = torch.randn(shape, generator=self.noise, device=x.device)[:, : x.shape[1]]
        return (length * F.normalize(direction, dim=-1)).to(x)

    def _log_probabilities(self, replace: Callable[[Tensor], Tensor]) -> Tensor:
        """Next-token log-probabilities at the positions that count: (predictions, vocabulary)."""

        def splice(activation: Tensor, hook: Any) -> Tensor:
            flat = activation.flatten(2)
            return torch.where(self.replaced.unsqueeze(-1), replace(flat).to(flat), flat).view_as(activation)

        logits = self.model.run_with_hooks(
            self.tokens, fwd_hooks=[(self.hook_name, splice)], return_type="logits", **self.mask
        )
        return logits[:, :-1][self.counts].float().log_softmax(dim=-1)

    def _ce(self, log_probabilities: Tensor) -> Tensor:
        ce = F.nll_loss(log_probabilities, self.targets, reduction="none")
        return ce if self.predicts else torch.full_like(ce, torch.nan)


def _kl(clean: Tensor, spliced: Tensor) -> Tensor:
    return F.kl_div(spliced, clean, log_target=True, reduction="none").sum(dim=-1)
