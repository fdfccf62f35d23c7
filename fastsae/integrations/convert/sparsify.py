"""EleutherAI's sparsify: cfg.json and sae.safetensors."""

from pathlib import Path

from fastsae import files
from fastsae.integrations.convert.form import (
    Converted,
    by_name,
    expect_k,
    expect_sizes,
    expect_weights,
    read_tensors,
    topk,
    topk_only,
)

FILES = "cfg.json and sae.safetensors"


def written(source: Path) -> bool:
    return (source / "cfg.json").is_file() and (source / "sae.safetensors").is_file()


def read(source: Path) -> Converted:
    path, held = source / "cfg.json", source / "sae.safetensors"
    cfg, tensors = by_name(path, files.read_json(path)), read_tensors(held)
    for option, only in (("transcode", False), ("skip_connection", False), ("activation", "topk"), ("signed", False)):
        if cfg.get(option, only) != only:
            raise ValueError(
                f"{path} has {option} = {cfg[option]!r}: a TopK SAE has {only!r}, nothing else is converted"
            )
    names = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
    sae = topk(path, held, expect_k(path, cfg), expect_weights(held, tensors, names))
    # Only without num_latents does sparsify count by the factor.
    width = {"num_latents": sae.d_sae} if cfg.get("num_latents") else {"expansion_factor": sae.d_sae / sae.d_in}
    expect_sizes(path, cfg, {"d_in": sae.d_in} | width, held)
    return Converted(sae)


def write(found: Converted, target: Path) -> list[str]:
    k, w = topk_only(found.sae, "sparsify")
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, found.sae.d_sae // found.sae.d_in),
        "normalize_decoder": False,  # rows of W_dec have the norm they have
        "num_latents": found.sae.d_sae,
        "k": k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": found.sae.d_in,
    }
    tensors = {"encoder.weight": w["W_enc"], "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    target.mkdir(parents=True, exist_ok=True)
    files.write_tensors(target / "sae.safetensors", tensors)
    files.write_json(target / "cfg.json", cfg)
    return []
