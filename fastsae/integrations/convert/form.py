"""What every form is read to and written from, and the steps they share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae import files
from fastsae.config import to_dict
from fastsae.fp64 import in_fp64
from fastsae.modules import JointSAE, SparseAutoencoder, TopKSAE, uncompiled

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Converted:
    """An SAE on its way from one form to another."""

    sae: SparseAutoencoder
    metadata: dict[str, Any] = field(default_factory=dict)
    """Of the activations, under SAELens' names: model_name, hook_name, ..."""
    notes: list[str] = field(default_factory=list)
    """What does not show in the files."""
    sees_normalised_tokens: bool = False
    """Whether each token must be brought to mean 0 and standard deviation 1 before, as OpenAI's loader does."""


def topk(
    k: int, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, dtype: torch.dtype | None = None
) -> TopKSAE:
    """A TopKSAE of these weights, W_enc and W_dec (d_sae, d_in), in the dtype of W_enc or in `dtype`.

    Raises ValueError if they do not fit one another.
    """
    weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    d_sae, d_in = W_enc.shape
    sae = TopKSAE(d_in, d_sae, k, device="meta", dtype=dtype or W_enc.dtype)
    return loaded(sae, weights)


def loaded(sae: Any, weights: dict[str, Tensor]) -> Any:
    """`sae` with these weights and no normalisation, on the CPU."""
    d_in = sae.d_in
    precise = torch.promote_types(sae.W_enc.dtype, torch.float32)
    statistics = {
        "normalizer.mean": torch.zeros(d_in, dtype=precise, device="cpu"),
        "normalizer.scale": torch.ones(d_in, dtype=precise, device="cpu"),
    }
    own = {name: t.detach().to(sae.W_enc.dtype).contiguous().clone() for name, t in weights.items()}
    try:
        sae.load_state_dict(own | statistics, assign=True)
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise ValueError(f"convert: the weights do not fit one another: {said}") from error
    return sae.eval()


@torch.no_grad()
def in_raw_space(sae: SparseAutoencoder) -> SparseAutoencoder:
    """The same function of raw activations without a normaliser: statistics are folded into the weights.

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
    return loaded(plain(**options, device="meta", dtype=dtype), weights)


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


def read_pickled(path: Path) -> dict[str, Any]:
    """A torch.save file of tensors and plain values. Nothing else in it is executed: it is refused."""
    with path.open("rb") as file:
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises as many kinds as there are ways to be damaged
            raise ValueError(
                f"{path} cannot be read as tensors ({type(error).__name__}); it is damaged, or holds code, which is "
                "not run"
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


def expect(where: Path, values: dict[str, Any], names: tuple[str, ...]) -> list[Any]:
    """The values of these names. Raises ValueError naming the ones that are missing."""
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; it holds {', '.join(map(str, values))}")
    return [values[name] for name in names]


def expect_k(where: Path, values: dict[str, Any]) -> int:
    (k,) = expect(where, values, ("k",))
    k = k.tolist() if isinstance(k, Tensor) else k
    if type(k) is not int:
        raise ValueError(f"{where}: expected a whole number for k; got {k!r}")
    return k


def expect_weights(where: Path, values: dict[str, Any], names: tuple[str, str, str, str]) -> list[Tensor]:
    """W_enc, b_enc, W_dec and b_dec, which have these names here, each a float tensor of two or one dimensions."""
    found = expect(where, values, names)
    for name, t, dimensions in zip(names, found, (2, 1, 2, 1), strict=True):
        if not (isinstance(t, Tensor) and t.dtype in _FLOATS and t.ndim == dimensions):
            got = f"{t.dtype} of shape {tuple(t.shape)}" if isinstance(t, Tensor) else repr(t)
            raise ValueError(f"{where}: expected {name} to be a float tensor of {dimensions} dimensions; got {got}")
    return found


def by_name(where: object, found: Any) -> dict[str, Any]:
    """`found`, which must be a dict, as files of options and of weights are."""
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected values by name; got {type(found).__name__}")
    return found
