"""The sparse code that flows from encoder to decoder, and the same code seen feature by feature."""

from collections.abc import Iterable, Iterator, Sequence
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


@dataclass(frozen=True, repr=False)
class SparseCode:
    """k active features per token: strongest first, distinct within a token, ties to the lower index.

    values (..., k) float, never negative; indices (..., k) int64 in [0, d_sae). A token with fewer than k positive
    pre-activations is filled up with entries of value 0. `code[3]`, `code[:10]` and `code[mask]` are codes of some of
    the tokens, len(code) is the size of the first axis.
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

    def __len__(self) -> int:
        self._expect_tokens("len")
        return len(self.values)

    def __getitem__(self, tokens: Any) -> "SparseCode":
        """The code of some tokens, chosen as entries of a tensor (...) are: by number, slice, mask or several of them.

        Raises IndexError where there are no such tokens.
        """
        self._expect_tokens("an index")
        shape = self.values.shape[:-1]
        chosen = torch.arange(shape.numel(), device=self.indices.device).view(shape)[tokens]
        flat = self.flatten()
        return SparseCode(flat.values[chosen], flat.indices[chosen], self.d_sae)

    def __iter__(self) -> Iterator["SparseCode"]:
        self._expect_tokens("a loop")
        return (SparseCode(v, i, self.d_sae) for v, i in zip(self.values, self.indices, strict=True))

    def _expect_tokens(self, what: str) -> None:
        if self.values.dim() < 2:
            raise IndexError(f"SparseCode: {what} needs several tokens; this is the code of one. See .values, .indices")

    def to(self, *device_or_dtype: Any) -> "SparseCode":
        """The code on another device, or with values of another dtype, as Tensor.to has them."""
        values = self.values.to(*device_or_dtype)
        return SparseCode(values, self.indices.to(values.device), self.d_sae)

    def __repr__(self) -> str:
        """The shape, how many features are active, and the strongest ones of the first tokens."""
        first = self._first(2)
        if first is None:
            return f"SparseCode({self._shape}, {self.values.dtype})"
        strongest = "; ".join(_listed(active[:4]) for active in first)
        return f"SparseCode({self._shape}, {self._mean_active:.1f} active on average, of the first {strongest})"

    def _repr_html_(self) -> str:
        first = self._first(10)
        if first is None:
            return f"<code>{self!r}</code>"
        cells = [(str(number), str(len(active)), _listed(active[:8])) for number, active in enumerate(first)]
        rows = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in cells)
        return (
            f"<p>SparseCode: {self._shape}, {self._mean_active:.1f} active on average</p>"
            f"<table><tr><th>token</th><th>active</th><th>feature: value, strongest first</th></tr>{rows}</table>"
        )

    @property
    def _shape(self) -> str:
        tokens = " x ".join(map(str, self.values.shape[:-1])) or "1"
        return f"{tokens} tokens, k={self.k} of {self.d_sae} features"

    @property
    def _mean_active(self) -> float:
        return float((self.values > 0).sum()) / max(self.values.shape[:-1].numel(), 1)

    def _first(self, tokens: int) -> list[list[tuple[int, float]]] | None:
        """The active features of the first tokens with their values; None where there are no numbers to show: on the
        meta device, and while torch traces or maps."""
        try:
            values = self.values.detach().reshape(-1, self.k)[:tokens].tolist()
            indices = self.indices.reshape(-1, self.k)[:tokens].tolist()
        except (RuntimeError, NotImplementedError):
            return None
        return [[(f, v) for f, v in zip(*row, strict=True) if v > 0] for row in zip(indices, values, strict=True)]

    def to_dense(self) -> Tensor:
        """The code as a (..., d_sae) tensor. Meant for inspection: it is d_sae / k times larger."""
        dense = self.values.new_zeros(*self.values.shape[:-1], self.d_sae)
        return dense.scatter(-1, self.indices, self.values)

    def columns(self, features: Tensor | Sequence[int] | int) -> Tensor:
        """Values of some features, distinct (n,), or of one: (..., n), 0 where they are not active."""
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
        """Number of tokens that each feature is active on (value above 0): (d_sae,) int64."""
        return torch.bincount(self.indices[self.values > 0], minlength=self.d_sae)

    def flatten(self) -> "SparseCode":
        """Put the tokens of all axes into one: values and indices (B, k)."""
        return SparseCode(self.values.reshape(-1, self.k), self.indices.reshape(-1, self.k), self.d_sae)

    def detach(self) -> "SparseCode":
        return SparseCode(self.values.detach(), self.indices, self.d_sae)


def _listed(active: list[tuple[int, float]]) -> str:
    return ", ".join(f"{feature}: {value:.3g}" for feature, value in active) or "none"


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
