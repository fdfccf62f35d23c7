"""One number per text and feature: how active the feature is on the text, by family of features."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fastsae.activations import Document, ModelActivations, TokenWindows, tokenize
from fastsae.evaluate.pairs import embedded, in_parts, row_pairs
from fastsae.factorial.stimuli import Stimuli
from fastsae.fp64 import in_fp64
from fastsae.modules import JointSAE, SecondarySAE, SparseAutoencoder, evaluating, uncompiled

Pool = Literal["mean", "max"]
MIN_SHARE = 0.05
"""A feature that is active on fewer of the texts is not tested: it could show nothing, and would cost power."""
MAX_PAIRS = 4096
"""Most pairs tested: those that put most into z on these texts; cells play no part in the choice."""


@dataclass(frozen=True)
class Responses:
    """Pooled activations of one family of features."""

    family: Literal["identity", "pair", "secondary"]
    features: Tensor
    """(features, 1), or (features, 2) for pairs: the indices."""
    values: Tensor
    """(texts, features) fp64"""


@dataclass(frozen=True)
class Texts:
    """All texts of a set, in the order of their cells."""

    windows: TokenWindows
    """One window a text."""
    cells: Tensor
    """(texts,) int64: index into LEVELS"""

    @property
    def tokens(self) -> Tensor:
        """Tokens of each text, BOS not counted."""
        return self.windows.is_text().sum(dim=1)


def tokenized(stimuli: Stimuli, model: Any) -> Texts:
    """The texts as windows. Raises ValueError naming a text that is longer than the model reads."""
    texts = [text for cell in stimuli.cells.values() for text in cell.texts]
    documents = [Document(f"{number}", text) for number, text in enumerate(texts)]
    windows = tokenize(documents, model, model.cfg.n_ctx, held_out=None)
    if len(windows) != len(texts):
        several = windows.documents.bincount(minlength=len(texts)) != 1
        number = int(several.nonzero()[0])
        raise ValueError(
            f"stimuli {stimuli.name!r}: {texts[number]!r} does not fit into the {model.cfg.n_ctx} tokens the model "
            "reads, or has none; use other texts"
        )
    longest = int(windows.lengths.max())
    windows = replace(windows, tokens=windows.tokens[:, :longest].clone())
    cells = torch.repeat_interleave(torch.tensor([len(cell.texts) for cell in stimuli.cells.values()], device="cpu"))
    return Texts(windows, cells)


def responses(
    sae: SparseAutoencoder,
    secondary: SecondarySAE | None,
    model: Any,
    hook_name: str,
    texts: Texts,
    pool: Pool = "mean",
) -> list[Responses]:
    """Measure the responses of every family this SAE has: identity, pair, and secondary if there is a secondary SAE.

    A feature's response to a text is the mean, or the largest, of its activations over the text's tokens, BOS left out.
    A pair's response is that of a_i a_j, among the strongest features of a token (evaluate.pairs.PER_ROW).
    """
    source, sae = ModelActivations(model, hook_name, texts.windows), uncompiled(sae)
    pools = {"identity": _Pool(pool, sae.d_sae)}
    paired = isinstance(sae, JointSAE) and sae.V is not None
    if paired:
        pools["pair"] = _Pool(pool, sae.d_sae**2)
    if secondary is not None:
        pools["secondary"] = _Pool(pool, secondary.d_sae)
    with evaluating(sae), evaluating(secondary or sae):
        for i in range(len(source.block_rows)):
            rows = source.rows(i)
            at = rows.documents.long().to(sae.W_enc.device)
            code = sae.encode_raw(rows.activations)
            pools["identity"].add(at, code.values, code.indices)
            if isinstance(sae, JointSAE) and paired:
                pools["pair"].add(at, *row_pairs(sae.strongest(code)))
                if secondary is not None:
                    integration = secondary.encode_raw(sae.hidden(code))
                    pools["secondary"].add(at, integration.values, integration.indices)
    return [_responses(family, one, texts, sae) for family, one in pools.items()]


class _Pool:
    """Sums, or maxima, of activations by text and feature, of those that are active at all. Each text comes at once, so
    what was added is never looked at again."""

    def __init__(self, kind: Pool, width: int) -> None:
        self.kind, self.width = kind, width
        self._keys = [torch.empty(0, dtype=torch.int64, device="cpu")]
        self._values = [torch.empty(0, dtype=torch.float64, device="cpu")]

    @property
    def keys(self) -> Tensor:
        return torch.cat(self._keys)

    @property
    def values(self) -> Tensor:
        return torch.cat(self._values)

    def add(self, texts: Tensor, values: Tensor, features: Tensor) -> None:
        active = values > 0
        keys = (texts.unsqueeze(1) * self.width + features)[active].cpu()
        values = in_fp64(values[active]).cpu()
        keys, place = keys.unique(return_inverse=True)
        pooled = torch.zeros(len(keys), dtype=torch.float64, device="cpu")
        how = "sum" if self.kind == "mean" else "amax"
        self._keys.append(keys)
        self._values.append(pooled.scatter_reduce_(0, place, values, how))


def _responses(family: Any, pool: _Pool, texts: Texts, sae: Any) -> Responses:
    keys, values = pool.keys, pool.values
    text, feature = keys // pool.width, keys % pool.width
    features, column, texts_active = feature.unique(return_inverse=True, return_counts=True)
    if pool.kind == "mean":
        values = values / texts.tokens[text].double()
    kept = texts_active >= max(2, MIN_SHARE * len(texts.cells))
    pairs = torch.stack([features // sae.d_sae, features % sae.d_sae], dim=1)
    if family == "pair" and len(features):
        V = sae.V.detach()
        sizes = in_parts(pairs.to(V.device), lambda part: in_fp64(embedded(V, part)).norm(dim=1)).cpu()
        sizes = torch.where(kept, sizes * torch.zeros_like(sizes).index_add_(0, column, values), -1.0)
        kept = kept & torch.zeros_like(kept).index_fill_(0, sizes.topk(min(MAX_PAIRS, len(sizes))).indices, True)
    place = torch.full((len(features),), -1, device="cpu")
    place[kept] = torch.arange(int(kept.sum()), device="cpu")
    column = place[column]
    dense = torch.zeros(len(texts.cells), int(kept.sum()), dtype=torch.float64, device="cpu")
    dense[text[column >= 0], column[column >= 0]] = values[column >= 0]
    return Responses(family, (pairs if family == "pair" else features.unsqueeze(1))[kept], dense)
