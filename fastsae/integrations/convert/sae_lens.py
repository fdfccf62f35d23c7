"""SAELens: cfg.json and sae_weights.safetensors, of a training checkpoint or an exported SAE."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae import files
from fastsae.config import IntegrationConfig
from fastsae.integrations.convert.form import Converted, by_name, expect_k, expect_weights, loaded, topk
from fastsae.modules import JointSAE, SparseAutoencoder, TopKSAE

FILES = "cfg.json and sae_weights.safetensors"
# Without a version of at least 6, SAELens reads a config by the rules of older ones, and drops metadata.
VERSION = "6.54.12"
_PATHWAYS = ("k_integration", "d_embedding", "linear", "interaction")


def written(source: Path) -> bool:
    return (source / "cfg.json").is_file() and (source / "sae_weights.safetensors").is_file()


def read(source: Path) -> Converted:
    path = source / "cfg.json"
    cfg, weights = by_name(path, files.read_json(path)), files.read_tensors(source / "sae_weights.safetensors")
    architecture = cfg.get("architecture")
    if architecture not in ("topk", "fastsae_topk", "fastsae_joint"):
        raise ValueError(f"{path} is of architecture {architecture!r}; expected topk, fastsae_topk or fastsae_joint")
    for option, only in (("normalize_activations", "none"), ("reshape_activations", "none")):
        if cfg.get(option, only) != only:
            raise ValueError(
                f"{path} has {option} = {cfg[option]!r}, which happens outside of the weights and would be lost. "
                "Export the SAE with save_inference_model after training, which folds what can be folded."
            )
    k = expect_k(path, cfg)
    expect_weights(source / "sae_weights.safetensors", weights, ("W_enc", "b_enc", "W_dec", "b_dec"))
    dtype = weights["W_enc"].dtype
    weights = {name: t.double() for name, t in weights.items()}  # folded in fp64, and rounded once
    weights["W_enc"] = weights["W_enc"].T
    if not cfg.get("apply_b_dec_to_input", True):
        weights["b_enc"] = weights["b_enc"] + weights["W_enc"] @ weights["b_dec"]
    if cfg.get("rescale_acts_by_decoder_norm", False):
        norms = weights["W_dec"].norm(dim=1).clamp(min=1e-8)
        weights["W_enc"], weights["b_enc"] = weights["W_enc"] * norms.unsqueeze(1), weights["b_enc"] * norms
        weights["W_dec"] = weights["W_dec"] / norms.unsqueeze(1)
    known = by_name(f"{path}, metadata", cfg.get("metadata") or {})
    metadata = {key: value for key, value in known.items() if not key.startswith("sae_lens_")}
    return Converted(_sae(architecture, k, cfg, weights, dtype), metadata)


def _sae(
    architecture: str, k: int, cfg: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype
) -> SparseAutoencoder:
    if architecture != "fastsae_joint":
        return topk(k, *(weights[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")), dtype=dtype)
    d_sae, d_in = weights["W_enc"].shape
    options = {f.name: cfg[f.name] for f in dataclasses.fields(IntegrationConfig) if f.name in cfg}
    sae = JointSAE(d_in, d_sae, k, pre_bias=True, device="meta", dtype=dtype, **options)
    return loaded(sae, weights)


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
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": VERSION, "sae_lens_training_version": None} | found.metadata,
    }
    cfg |= {"rescale_acts_by_decoder_norm": False} if plain else {n: getattr(sae.config, n) for n in _PATHWAYS}
    target.mkdir(parents=True, exist_ok=True)
    files.write_tensors(target / "sae_weights.safetensors", weights)
    files.write_json(target / "cfg.json", cfg)
    return [] if plain else ["To load it in SAELens, call fastsae.integrations.sae_lens.register() first."]
