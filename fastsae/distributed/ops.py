"""fastsae.ops where features are spread over ranks: the same functions, and on every rank the same results.

Weights are this rank's rows; codes hold indices of all features, and are equal on all ranks of a group. A gradient
that reaches a sum or a code is whole on every rank, so each rank's part of the backward needs no one else; only what
enters all encoders (x, b_dec) collects its gradient from them.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastsae import ops
from fastsae.backends import choose
from fastsae.distributed.ranks import Ranks


class _Spread(torch.autograd.Function):
    """Identity on a tensor that is equal on all feature ranks; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        summed = grads[0].contiguous().clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed, None


class _Sum(torch.autograd.Function):
    """The sum over feature ranks. What follows is computed alike on all, so each has the whole gradient already."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any) -> Tensor:
        summed = t.contiguous().clone()
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class ShardedOps:
    """The functions of fastsae.ops that an SAE calls, for this rank's rows of its weights."""

    interaction_mlp = staticmethod(ops.interaction_mlp)

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def topk_encode(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        k: int,
        backend: str = "auto",
        features: Tensor | None = None,
        b_dec: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """ops.topk_encode over all features: exact, with its order and its rule for ties.

        `features` are ours, by their place in W_enc; k is of all.
        """
        ranks = self.ranks
        if ranks.layout.features == 1:
            return ops.topk_encode(x, W_enc, b_enc, k, backend, features, b_dec)
        x = _Spread.apply(x, ranks.feature_group)
        b_dec = None if b_dec is None else _Spread.apply(b_dec, ranks.feature_group)
        counts = [len(W_enc)] * ranks.layout.features if features is None else ranks.counts(len(features))
        if not 1 <= k <= sum(counts):
            raise ValueError(f"topk_encode: k must be between 1 and {sum(counts)}, of all ranks; got {k}")
        ours, width = min(k, counts[ranks.feature_rank]), min(k, max(counts))
        if ours:
            values, indices = ops.topk_encode(x, W_enc, b_enc, ours, backend, features, b_dec)
        else:  # in autograd's graph none the less: its backward is where ranks meet
            empty = x.new_zeros(1) * (x.sum() if b_dec is None else x.sum() + b_dec.sum())
            values = empty.expand(len(x), 1)[:, :0]
            indices = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
        # -1 is below every activation: there are k others.
        values, indices = F.pad(values, (0, width - ours), value=-1.0), F.pad(indices, (0, width - ours))
        candidates, of = self._gathered(values.detach(), indices)
        # Ranks hold ascending features, each in order: a stable sort leaves ties to the lower feature.
        best = candidates.sort(dim=1, descending=True, stable=True).indices[:, :k]
        place = best - ranks.feature_rank * width
        own = (place >= 0) & (place < width)
        chosen = values.gather(1, place.clamp(0, width - 1))
        return torch.where(own, chosen, candidates.gather(1, best).to(values.dtype)), of.gather(1, best).long()

    def _gathered(self, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The candidates of all feature ranks, (B, ranks * width), indices among all features; in one message."""
        ranks, shape = self.ranks, values.shape
        precise = torch.promote_types(values.dtype, torch.float32)
        whole = torch.int64 if precise == torch.float64 else torch.int32
        message = torch.cat([values.to(precise).contiguous().view(whole), indices.to(whole)])
        every = message.new_empty(ranks.layout.features, *message.shape)
        dist.all_gather(list(every.unbind()), message, group=ranks.feature_group)
        candidates, of = every.split(shape[0], dim=1)
        first = torch.arange(ranks.layout.features, device=of.device, dtype=whole).view(-1, 1, 1) * ranks.features_each

        def by_row(t: Tensor) -> Tensor:
            return t.permute(1, 0, 2).reshape(shape[0], -1)

        return by_row(candidates.contiguous().view(precise)), by_row(of + first)

    def sparse_decode(self, values: Tensor, indices: Tensor, W_dec: Tensor, backend: str = "auto") -> Tensor:
        """ops.sparse_decode."""
        if self.ranks.layout.features == 1:
            return ops.sparse_decode(values, indices, W_dec, backend)
        return self._sums(values, indices, W_dec, None, None, values.shape[1], backend)[0]

    def pairwise_interaction(self, values: Tensor, indices: Tensor, V: Tensor, backend: str = "auto") -> Tensor:
        """ops.pairwise_interaction."""
        if self.ranks.layout.features == 1:
            return ops.pairwise_interaction(values, indices, V, backend)
        _, s, q = self._sums(values, indices, None, None, V, values.shape[1], backend)
        return ops.pooled(s, q).to(V.dtype)

    def reconstruct(
        self,
        values: Tensor,
        indices: Tensor,
        W_dec: Tensor,
        W_lin: Tensor | None,
        V: Tensor | None,
        n: int,
        *,
        bias: Tensor | None = None,
        mlp: tuple[Tensor, Tensor, Tensor] | None = None,
        dropout: float = 0.0,
        target: Tensor | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """ops.reconstruct. Dropout is that of one process on the whole batch, of which these are our rows."""
        ranks = self.ranks
        drawn = None
        if dropout and mlp is not None and ranks.layout.data > 1:
            drawn = self._dropped(len(values), mlp[0], dropout, choose(backend, values.device, values.dtype))
        finish = {"bias": bias, "mlp": mlp, "dropout": dropout, "target": target, "backend": backend}
        if ranks.layout.features == 1 and drawn is None:
            return ops.reconstruct(values, indices, W_dec, W_lin, V, n, **finish)
        sums = self._sums(values, indices, W_dec, W_lin, V, n, backend)
        return ops.finish(*sums, **finish, compute=values.dtype, drawn=drawn)

    def _dropped(self, rows: int, W1: Tensor, dropout: float, backend: str) -> Tensor:
        """Our part of what is drawn for the whole batch. All ranks draw all of it: their generators stay equal."""
        ranks = self.ranks
        if backend == "cuda":
            seeds = torch.randint(2**31 - 1, (ranks.layout.data,), device=W1.device)
            return seeds[ranks.data_rank :][:1]
        before = ranks.rows_before(rows)
        whole = torch.ones(ranks.batch_rows(rows), len(W1), dtype=W1.dtype, device=W1.device)
        return F.dropout(whole, dropout)[before : before + rows]

    def _sums(
        self,
        values: Tensor,
        indices: Tensor,
        W_dec: Tensor | None,
        W_lin: Tensor | None,
        V: Tensor | None,
        n: int,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """identity + linear sum, s and q of all features, from those of each rank; in one message."""
        if self.ranks.layout.features == 1:
            return ops.decode_sums(values, indices, W_dec, W_lin, V, n, backend)
        # Of one entry there are no pairs, and none are computed: our part of several may be one.
        strongest = self._own(values[:, :n], indices[:, :n], min(n, 2))
        rest = self._own(values[:, n:], indices[:, n:], 0)
        values, indices = (torch.cat(parts, dim=1) for parts in zip(strongest, rest, strict=True))
        base, s, q = ops.decode_sums(values, indices, W_dec, W_lin, V, strongest[0].shape[1], backend)
        summed = _Sum.apply(torch.cat([t.to(s.dtype) for t in (base, s, q)], dim=1), self.ranks.feature_group)
        whole, s, q = summed.split([base.shape[1], s.shape[1], q.shape[1]], dim=1)
        return whole.to(base.dtype), s, q

    def _own(self, values: Tensor, indices: Tensor, at_least: int) -> tuple[Tensor, Tensor]:
        """Our entries of a code, by their place in our weights: moved to the left, and cut to the longest row."""
        each = self.ranks.features_each
        place = self.ranks.own_features(indices, -1)
        own = place >= 0
        # A wait for the device; k entries a row everywhere would cost more.
        longest = int(own.sum(dim=1).max()) if own.numel() else 0
        order = own.byte().sort(dim=1, descending=True, stable=True).indices[:, : max(at_least, longest)]
        own = own.gather(1, order)
        # Value 0 counts nothing. Spread over features, or one of them would get them all in the backward.
        place = torch.where(own, place.gather(1, order), indices.gather(1, order) % each)
        return torch.where(own, values.gather(1, order), 0.0), place
