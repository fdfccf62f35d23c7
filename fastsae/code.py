"""The sparse code that flows from encoder to decoder, and the same code seen feature by feature."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree


def check_tensors(who: str, **given: Any) -> None:
    """Raise TypeError, saying what to pass, unless all that is given is a tensor."""
    for name, x in given.items():
        if not isinstance(x, Tensor):
            advice = f". Make it one: torch.from_numpy({name})" if hasattr(x, "__array__") else ""
            raise TypeError(f"{who}: {name} must be a tensor; got {type(x).__name__}{advice}")


class FeatureOrder(NamedTuple):
    """The entries of a code grouped by feature, tokens ascending within a feature.

    entries (nnz,) int64: positions in the flattened code.  features, tokens (nnz,) int32: what each entry belongs to.
    offsets (d_sae + 1,) int32: feature f owns entries[offsets[f]:offsets[f + 1]].
    """

    entries: Tensor
    features: Tensor
    tokens: Tensor
    offsets: Tensor


def feature_order(indices: Tensor, d_sae: int) -> FeatureOrder:
    """Group the entries of `indices` (B, k) by feature. Stable, so sums over a feature have one fixed order."""
    features = indices.reshape(-1).to(torch.int32)
    features, entries = features.sort(stable=True)
    offsets = torch.zeros(d_sae + 1, dtype=torch.int32, device=indices.device)
    torch.cumsum(torch.bincount(features, minlength=d_sae), 0, dtype=torch.int32, out=offsets[1:])
    tokens = (entries // max(indices.shape[-1], 1)).to(torch.int32)
    return FeatureOrder(entries, features, tokens, offsets)


@dataclass(frozen=True)
class SparseCode:
    """k active features per token: strongest first, distinct within a token, ties to the lower index.

    values (..., k) float, never negative; indices (..., k) int64 in [0, d_sae). A token with fewer than k positive
    pre-activations is filled up with entries of value 0.
    """

    values: Tensor
    indices: Tensor
    d_sae: int

    def __post_init__(self) -> None:
        check_tensors("SparseCode", values=self.values, indices=self.indices)
        if self.values.shape != self.indices.shape:
            raise ValueError(
                f"SparseCode: values and indices must have one shape; got {tuple(self.values.shape)} and "
                f"{tuple(self.indices.shape)}"
            )

    @property
    def k(self) -> int:
        return self.values.shape[-1]

    def to_dense(self) -> Tensor:
        """The code as a (..., d_sae) tensor. Meant for inspection: it is d_sae / k times larger."""
        dense = self.values.new_zeros(*self.values.shape[:-1], self.d_sae)
        return dense.scatter(-1, self.indices, self.values)

    def columns(self, features: Tensor | Sequence[int] | int) -> Tensor:
        """What the code holds of some features, distinct (n,), or of one: (..., n), 0 where they are not active."""
        if not isinstance(features, Tensor):
            features = torch.tensor(features, dtype=torch.int64, device=self.indices.device)
        if features.dtype != torch.int64:
            raise TypeError(f"SparseCode.columns: expected int64 numbers of features; got {features.dtype}")
        features = features.reshape(-1)
        column = torch.full((self.d_sae,), -1, device=self.indices.device)
        column[features] = torch.arange(len(features), device=column.device)
        flat = self.flatten()
        columns = column[flat.indices]
        row, entry = (columns >= 0).nonzero(as_tuple=True)
        dense = flat.values.new_zeros(len(flat.values), len(features))
        dense[row, columns[row, entry]] = flat.values[row, entry]
        return dense.view(*self.values.shape[:-1], len(features))

    def feature_order(self) -> FeatureOrder:
        """The entries grouped by feature, over all tokens."""
        return feature_order(self.indices.reshape(-1, self.k), self.d_sae)

    def firing_counts(self) -> Tensor:
        """How many tokens each feature is active on (value above 0): (d_sae,) int64."""
        return torch.bincount(self.indices[self.values > 0], minlength=self.d_sae)

    def flatten(self) -> "SparseCode":
        """The same code with one row per token: values and indices (B, k)."""
        return SparseCode(self.values.reshape(-1, self.k), self.indices.reshape(-1, self.k), self.d_sae)

    def detach(self) -> "SparseCode":
        return SparseCode(self.values.detach(), self.indices, self.d_sae)


def _unflatten(tensors: Iterable[Any], d_sae: int) -> SparseCode:
    code = object.__new__(SparseCode)  # not checked: whoever maps over a code puts anything in
    vars(code).update(zip(("values", "indices"), tensors, strict=True), d_sae=d_sae)
    return code


def _flatten_with_keys(code: SparseCode) -> tuple[list[tuple[Any, Tensor]], int]:
    return [(_pytree.GetAttrKey(name), getattr(code, name)) for name in ("values", "indices")], code.d_sae


# For torch.func, torch.export and whatever else looks for the tensors in what a module returns.
_pytree.register_pytree_node(
    SparseCode,
    lambda code: ([code.values, code.indices], code.d_sae),
    _unflatten,
    serialized_type_name="fastsae.SparseCode",
    to_dumpable_context=lambda d_sae: d_sae,
    from_dumpable_context=lambda d_sae: d_sae,
    flatten_with_keys_fn=_flatten_with_keys,
)
