"""The common ground of all forms: what each is read to and written from, and shared steps."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae import files
from fastsae.config import to_dict
from fastsae.fp64 import in_fp64
from fastsae.integrations.convert import others
from fastsae.modules import JointSAE, SparseAutoencoder, TopKSAE, uncompiled

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


NORMALISED = (
    "OpenAI's TopK SAEs, and SAELens' with layer_norm, see each token less its mean, over its standard deviation "
    "(unbiased, + 1e-5); so does this one, and whoever uses it must do that before, and undo it afterwards."
)


@dataclass(frozen=True)
class Converted:
    """An SAE on its way from one form to another."""

    sae: SparseAutoencoder
    metadata: dict[str, Any] = field(default_factory=dict)
    """Facts about the activations, under SAELens' names: model_name, hook_name, ..."""
    notes: list[str] = field(default_factory=list)
    """Sentences about what does not show in the files."""
    sees_normalised_tokens: bool = False
    """Whether each token must be brought to mean 0 and standard deviation 1 before, as NORMALISED says."""


def topk(
    said: Path, held: Path, k: int, weights: dict[str, Tensor], dtype: torch.dtype | None = None
) -> SparseAutoencoder:
    """A TopKSAE of W_enc, b_enc, W_dec and b_dec, the matrices (d_sae, d_in), in their widest dtype or in `dtype`.

    said, held: the files that k and the weights are from, for ValueErrors of what does not fit.
    """
    d_sae, d_in = weights["W_enc"].shape
    with naming(said):
        sae = TopKSAE(d_in, d_sae, k, device="meta")
    return loaded(held, sae, weights, dtype)


def loaded(where: object, sae: Any, weights: dict[str, Tensor], dtype: torch.dtype | None = None) -> Any:
    """`sae` with these weights and no normalisation, on the CPU, in their widest dtype or in `dtype`.

    Raises ValueError naming `where` they are from if they do not fit one another or are not finite.
    """
    for name, t in weights.items():
        if not (isinstance(t, Tensor) and t.dtype in _FLOATS):
            raise ValueError(f"{where}: expected {name} to be a float tensor; got {getattr(t, 'dtype', t)}")
    dtype = dtype or widest(weights)
    precise = torch.promote_types(dtype, torch.float32)
    statistics = {
        "normalizer.mean": torch.zeros(sae.d_in, dtype=precise, device="cpu"),
        "normalizer.scale": torch.ones(sae.d_in, dtype=precise, device="cpu"),
    }
    own = {name: t.detach().to(dtype).contiguous().clone() for name, t in weights.items()}
    try:
        sae.load_state_dict(own | statistics, assign=True)
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{where}: the weights do not fit one another: {said}") from error
    expect_finite(where, own.items())
    return sae.eval()


def widest(weights: dict[str, Tensor]) -> torch.dtype:
    """The dtype in which none of these weights is rounded."""
    return reduce(torch.promote_types, (t.dtype for t in weights.values()))


@torch.no_grad()
def in_raw_space(sae: SparseAutoencoder) -> SparseAutoencoder:
    """Fold the statistics into the weights: an SAE of raw activations, without a normaliser, that computes the same.

    With x' = (x - mean) / scale:  W_enc x' = (W_enc / scale) (x - mean),  and what lies in the output is scaled back.
    Narrow weights become fp32 where there are statistics, which would lose their differences if they were rounded.
    """
    sae = uncompiled(sae)
    mean, scale = (in_fp64(t) for t in (sae.normalizer.mean, sae.normalizer.scale))
    dtype = torch.promote_types(sae.W_enc.dtype, torch.float32) if sae.normalizer.measured else sae.W_enc.dtype
    shift = bool((mean != 0).any())
    weights = {name: in_fp64(p) for name, p in sae.named_parameters()}
    weights["W_enc"] = weights["W_enc"] / scale
    if sae.config.pre_bias or shift:
        weights["b_dec"] = weights.get("b_dec", torch.zeros_like(mean)) * scale + mean
    for name in ("W_dec", "W_lin", "b_lin", "b2"):
        if name in weights:
            weights[name] = weights[name] * scale
    if "W2" in weights:
        weights["W2"] = weights["W2"] * scale.unsqueeze(1)
    options: dict[str, Any] = to_dict(sae.config) | {"pre_bias": sae.config.pre_bias or shift}
    plain = TopKSAE if isinstance(sae, TopKSAE) else JointSAE
    return loaded("convert, statistics folded into the weights", plain(**options, device="meta"), weights, dtype)


def topk_only(sae: SparseAutoencoder, form: str) -> tuple[int, dict[str, Tensor]]:
    """k and the weights of a TopKSAE, b_dec among them. Raises ValueError for an SAE that `form` cannot hold."""
    if not isinstance(sae, TopKSAE):
        raise ValueError(
            f"convert: {form} has no place for the integration of a {type(sae).__name__}, and without it the SAE would "
            "be another one. Forms that hold it: fastsae, sae_lens."
        )
    weights = {name: p.detach() for name, p in sae.named_parameters()}
    weights.setdefault("b_dec", torch.zeros(sae.d_in, dtype=sae.W_enc.dtype, device="cpu"))
    return sae.k, weights


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file. Raises ValueError saying what it is, if it is another."""
    others.refuse(path, expected="safetensors")
    return files.read_tensors(path)


def read_pickled(path: Path) -> dict[str, Any]:
    """A torch.save file of tensors and plain values. Nothing else in it is executed: it is refused."""
    others.refuse(path, expected="torch")
    with path.open("rb") as file:
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises as many kinds as there are ways to be damaged
            damaged = "" if others.is_whole(path) else "is damaged, or "
            raise ValueError(
                f"{path} cannot be read as tensors ({type(error).__name__}); it {damaged}holds code, which is not run. "
                f"{others.LOAD_THERE}"
            ) from error
    for name, t in by_name(path, found).items():
        # A view of strides 0 claims any size in a few bytes; copied, it would take all memory.
        if isinstance(t, Tensor) and t.numel() * t.element_size() > t.untyped_storage().nbytes():
            raise ValueError(f"{path}: {name} claims to be {tuple(t.shape)}, which is more than the file holds")
    return found


def write_pickled(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # torch's own error, when it opens a file, does not name it
            torch.save(values, file)

    files.write_atomically(path, write)


def expect(where: object, values: dict[str, Any], names: tuple[str, ...]) -> list[Any]:
    """The values of these names. Raises ValueError naming the ones that are missing."""
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; it holds {', '.join(map(str, values))}")
    return [values[name] for name in names]


def expect_k(where: object, values: dict[str, Any]) -> int:
    """A whole number, which JSON may hold as 4.0."""
    (k,) = expect(where, values, ("k",))
    k = k.tolist() if isinstance(k, Tensor) else k
    if not (type(k) is int or (type(k) is float and k.is_integer())):
        raise ValueError(f"{where}: expected a whole number for k; got {k!r}")
    return int(k)


def expect_sizes(where: Path, values: dict[str, Any], sizes: Mapping[str, float], held: object) -> None:
    """Raises ValueError for the sizes that `values` of the file `where` gives otherwise than `held` has them."""
    for name, size in sizes.items():
        given = values.get(name)
        if given is not None and given != size:
            raise ValueError(
                f"{where}: {name} is {given!r}, but {size} in {held}: one of them is of another SAE. Take those that "
                f"were saved together, or correct {name} if you know better."
            )


def expect_weights(
    where: Path, values: dict[str, Any], names: tuple[str, str, str, str], ignored: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """W_enc, b_enc, W_dec and b_dec, which have these names here, each a float tensor of two or one dimensions.

    Raises ValueError for a tensor beside them that is not `ignored`: it would take part in what the SAE computes.
    """
    if any(name not in values for name in names) and (what := others.by_names(values)):
        raise ValueError(f"{where} {what}")
    found = expect(where, values, names)
    for name, t, dimensions in zip(names, found, (2, 1, 2, 1), strict=True):
        if not (isinstance(t, Tensor) and t.dtype in _FLOATS and t.ndim == dimensions):
            got = f"{t.dtype} of shape {tuple(t.shape)}" if isinstance(t, Tensor) else repr(t)
            raise ValueError(f"{where}: expected {name} to be a float tensor of {dimensions} dimensions; got {got}")
    beside = sorted(name for name, t in values.items() if isinstance(t, Tensor) and name not in (*names, *ignored))
    if beside:
        raise ValueError(f"{where} holds {', '.join(beside)} too, which a TopK SAE has no place for: it is another SAE")
    return dict(zip(("W_enc", "b_enc", "W_dec", "b_dec"), found, strict=True))


def expect_finite(where: object, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Raises ValueError for weights with NaN or infinity: one NaN in W_enc takes part in the ranking of every row."""
    for name, t in weights:
        lowest, highest = t.aminmax()  # NaN is handed through; nothing of the size of t is made
        if not (lowest.isfinite() and highest.isfinite()):
            wrong = (~t.isfinite()).nonzero()
            raise ValueError(
                f"{where}: {name} (in {t.dtype}) holds NaN or infinity in {len(wrong)} of {t.numel()} places, first at "
                f"{wrong[0].tolist()}. Use another copy, or put numbers in their place."
            )


@contextmanager
def naming(where: object) -> Iterator[None]:
    """Begin a ValueError with the file that what it is about stands in."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def by_name(where: object, found: Any) -> dict[str, Any]:
    """`found`, which must be a dict, as files of options and of weights are."""
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected values by name; got {type(found).__name__}")
    return found
