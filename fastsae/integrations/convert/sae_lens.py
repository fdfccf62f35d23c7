"""SAELens: cfg.json and sae_weights.safetensors, of a training checkpoint or an exported SAE."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae import files
from fastsae.config import IntegrationConfig
from fastsae.integrations.convert.form import (
    Converted,
    by_name,
    expect_k,
    expect_sizes,
    expect_weights,
    loaded,
    naming,
    read_tensors,
    topk,
    widest,
)
from fastsae.modules import JointSAE, SparseAutoencoder, TopKSAE

FILES = "cfg.json and sae_weights.safetensors"
# Without a version of at least 6, SAELens reads a config by the rules of older ones, and drops metadata.
VERSION = "6.54.12"
# What older configs held beside everything else, and SAELens 6 holds as metadata.
_METADATA = {
    *("model_name", "model_class_name", "model_from_pretrained_kwargs", "neuronpedia_id", "dataset_path"),
    *("hook_name", "hook_head_index", "hook_name_out", "hook_head_index_out", "hf_hook_name", "hf_hook_name_out"),
    *("context_size", "prepend_bos", "exclude_special_tokens", "seqpos_slice"),
}
_PATHWAYS = ("k_integration", "d_embedding", "linear", "interaction")


def written(source: Path) -> bool:
    return (source / "cfg.json").is_file() and (source / "sae_weights.safetensors").is_file()


def read(source: Path) -> Converted:
    path, held = source / "cfg.json", source / "sae_weights.safetensors"
    cfg, tensors = _as_version_6(path, by_name(path, files.read_json(path))), read_tensors(held)
    for option, known in (("normalize_activations", ("none", "layer_norm")), ("reshape_activations", ("none",))):
        if cfg.get(option, "none") not in known:
            raise ValueError(
                f"{path} has {option} = {cfg[option]!r}, which happens outside of the weights and would be lost. "
                "Export the SAE with save_inference_model after training, which folds what can be folded."
            )
    k, joint = expect_k(path, cfg), cfg["architecture"] == "fastsae_joint"
    _drop_ones(held, tensors)
    beside = tuple(tensors) if joint else ("topk_threshold",)  # a JointSAE has them, or refuses them by name
    weights = expect_weights(held, tensors, ("W_enc", "b_enc", "W_dec", "b_dec"), ignored=beside)
    weights |= tensors if joint else {}
    dtype = widest(weights)
    weights = _folded(cfg, weights)
    sae = _joint(path, held, k, cfg, weights, dtype) if joint else topk(path, held, k, weights, dtype)
    # In older configs the factor stands beside d_sae, which need not be of it.
    width = {"d_sae": sae.d_sae} if cfg.get("d_sae") else {"expansion_factor": sae.d_sae / sae.d_in}
    expect_sizes(path, cfg, {"d_in": sae.d_in} | width, held)
    metadata = {key: value for key, value in cfg["metadata"].items() if not key.startswith("sae_lens_")}
    return Converted(sae, metadata, sees_normalised_tokens=cfg.get("normalize_activations") == "layer_norm")


def _folded(cfg: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in fp64, to be rounded once, with what SAELens does beside them."""
    weights = {name: t.double() for name, t in weights.items()}
    weights["W_enc"] = weights["W_enc"].T
    if not cfg.get("apply_b_dec_to_input", True):
        weights["b_enc"] = weights["b_enc"] + weights["W_enc"] @ weights["b_dec"]
    if cfg.get("rescale_acts_by_decoder_norm", False):
        norms = weights["W_dec"].norm(dim=1).clamp(min=1e-8)
        weights["W_enc"], weights["b_enc"] = weights["W_enc"] * norms.unsqueeze(1), weights["b_enc"] * norms
        weights["W_dec"] = weights["W_dec"] / norms.unsqueeze(1)
    return weights


def _as_version_6(path: Path, cfg: dict[str, Any]) -> dict[str, Any]:
    """The config of any version. Before 6, TopK was an activation function, and what is now metadata stood beside it.

    Raises ValueError for what is not TopK.
    """
    activation = cfg.get("activation_fn", cfg.get("activation_fn_str"))
    architecture = cfg.get("architecture", "standard")
    if architecture == "standard" and activation == "topk":
        architecture = "topk"
    if architecture not in ("topk", "fastsae_topk", "fastsae_joint") or activation not in (None, "topk"):
        function = f" with the activation {activation!r}" if activation else ""
        what = ", a ReLU SAE without k" if architecture == "standard" and activation in (None, "relu") else ""
        raise ValueError(
            f"{path} is of architecture {architecture!r}{function}{what}; expected topk, fastsae_topk or fastsae_joint"
        )
    options = by_name(f"{path}, activation_fn_kwargs", cfg.get("activation_fn_kwargs") or {})
    if "postact_fn" in options and "relu" not in str(options["postact_fn"]).lower():
        raise ValueError(f"{path} has the activation topk followed by {options['postact_fn']!r}; expected relu")
    if "k" in options:
        k = expect_k(f"{path}, activation_fn_kwargs", options)
        expect_sizes(path, cfg, {"k": k}, f"{path}, activation_fn_kwargs")
        cfg = cfg | {"k": k}
    known = by_name(f"{path}, metadata", cfg["metadata"] or {}) if "metadata" in cfg else _metadata_before_6(cfg)
    normalize = cfg.get("normalize_activations") or "none"
    return (
        {"reshape_activations": "hook_z" if "hook_z" in str(known.get("hook_name")) else "none"}
        | cfg
        | {
            "architecture": architecture,
            "normalize_activations": "expected_average_only_in" if normalize is True else normalize,
            "metadata": known,
        }
    )


def _metadata_before_6(cfg: dict[str, Any]) -> dict[str, Any]:
    """Metadata that SAELens itself takes out of such a config."""
    renamed = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index"}
    known = {renamed.get(name, name): value for name, value in cfg.items()}
    return {"prepend_bos": True} | {name: value for name, value in known.items() if name in _METADATA}


def _drop_ones(held: Path, tensors: dict[str, Tensor]) -> None:
    """Take out the factors on the code that SAELens wrote for a time, which are 1 where nothing was finetuned."""
    factor = tensors.pop("scaling_factor", None)
    if factor is not None and not torch.allclose(factor.double(), torch.ones_like(factor, dtype=torch.float64)):
        raise ValueError(
            f"{held} has a scaling_factor that is not 1, of finetuning: it scales the code before W_dec, which SAELens "
            "6 does not read either. Multiply the rows of W_dec with it, and leave it out."
        )


def _joint(
    path: Path, held: Path, k: int, cfg: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype
) -> SparseAutoencoder:
    d_sae, d_in = weights["W_enc"].shape
    options = {f.name: cfg[f.name] for f in dataclasses.fields(IntegrationConfig) if f.name in cfg}
    with naming(path):
        sae = JointSAE(d_in, d_sae, k, pre_bias=True, device="meta", **options)
    return loaded(held, sae, weights, dtype)


def write(found: Converted, target: Path) -> list[str]:
    """As an SAE for inference; a TopKSAE as SAELens' own "topk", which needs no fastsae to load."""
    sae = found.sae
    weights = {name: p.detach() for name, p in sae.named_parameters()}
    weights.setdefault("b_dec", torch.zeros(sae.d_in, dtype=sae.W_enc.dtype, device="cpu"))
    weights["W_enc"] = weights["W_enc"].T
    plain = isinstance(sae, TopKSAE)
    cfg = {
        "architecture": "topk" if plain else "fastsae_joint",
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "k": sae.k,
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "layer_norm" if found.sees_normalised_tokens else "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": VERSION, "sae_lens_training_version": None} | found.metadata,
    }
    cfg |= {"rescale_acts_by_decoder_norm": False} if plain else {n: getattr(sae.config, n) for n in _PATHWAYS}
    target.mkdir(parents=True, exist_ok=True)
    files.write_tensors(target / "sae_weights.safetensors", weights)
    files.write_json(target / "cfg.json", cfg)
    notes = [] if plain else ["To load it in SAELens, call fastsae.integrations.sae_lens.register() first."]
    if found.sees_normalised_tokens:
        notes.append(
            "SAELens normalises each token itself (layer_norm), as OpenAI's loader does: give it raw activations."
        )
    return notes
