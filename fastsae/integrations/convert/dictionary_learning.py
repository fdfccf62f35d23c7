"""dictionary_learning: ae.pt and config.json, of its TopKTrainer or of ours."""

from pathlib import Path
from typing import Any

import torch

from fastsae import files
from fastsae.config import JointSAEConfig, from_dict, to_dict
from fastsae.integrations.convert.form import (
    Converted,
    by_name,
    expect,
    expect_k,
    expect_sizes,
    expect_weights,
    loaded,
    naming,
    read_pickled,
    topk,
    topk_only,
    write_pickled,
)
from fastsae.modules import JointSAE, SparseAutoencoder

FILES = "ae.pt, with config.json beside it"
# What JointTrainer writes for dict_class.
JOINT = "fastsae.JointSAE"


def written(source: Path) -> bool:
    return (source / "ae.pt").is_file()


def read(source: Path) -> Converted:
    path, config = source / "ae.pt", source / "config.json"
    recorded = by_name(config, files.read_json(config)) if config.is_file() else {}
    trainer = by_name(f"{config}, trainer", recorded.get("trainer", {}))
    weights, kind = read_pickled(path), trainer.get("dict_class", "AutoEncoderTopK")
    names = {"lm_name": "model_name", "submodule_name": "hook_name"}
    metadata = {theirs: trainer[ours] for ours, theirs in names.items() if trainer.get(ours)}
    if kind == JOINT:
        (options,) = expect(config, trainer, ("sae",))
        with naming(f"{config}, sae"):
            sae = JointSAE(**to_dict(from_dict(JointSAEConfig, options)), device="meta")
        prefix = "sae."
        parameters = {n.removeprefix(prefix): t for n, t in weights.items() if not n.startswith(f"{prefix}normalizer.")}
        loaded(path, sae, parameters)
        _expect_sizes(config, trainer, sae, f"{config}, sae")
        return Converted(sae, metadata)
    if kind != "AutoEncoderTopK":
        raise ValueError(f"{config} is of a {kind}; expected AutoEncoderTopK (or {JOINT}, of our JointTrainer)")
    names = ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec")
    own = expect_weights(path, weights, names, ignored=("k", "threshold"))
    sae = topk(path, path, expect_k(path, weights), own | {"W_dec": own["W_dec"].T})
    _expect_sizes(config, trainer, sae, path)
    notes = []
    if weights.get("threshold", -1) >= 0:
        notes.append(f"The threshold of {float(weights['threshold']):.4g} is left behind: a TopK SAE has none.")
    if not config.is_file():
        notes.append(f"{config} is missing: {path} is taken for an AutoEncoderTopK.")
    return Converted(sae, metadata, notes)


def _expect_sizes(config: Path, trainer: dict[str, Any], sae: SparseAutoencoder, held: object) -> None:
    sizes = {"activation_dim": sae.d_in, "dict_size": sae.d_sae, "k": sae.k}
    expect_sizes(config, trainer, sizes, held)


def write(found: Converted, target: Path) -> list[str]:
    k, w = topk_only(found.sae, "dictionary_learning")
    state = {
        "b_dec": w["b_dec"],
        "k": torch.tensor(k, dtype=torch.int32, device="cpu"),
        "threshold": torch.tensor(-1.0, device="cpu"),  # none was measured
        "decoder.weight": w["W_dec"].T.contiguous(),
        "encoder.weight": w["W_enc"],
        "encoder.bias": w["b_enc"],
    }
    trainer: dict[str, Any] = {
        "trainer_class": "TopKTrainer",
        "dict_class": "AutoEncoderTopK",
        "activation_dim": found.sae.d_in,
        "dict_size": found.sae.d_sae,
        "k": k,
        "lm_name": found.metadata.get("model_name"),
        "submodule_name": found.metadata.get("hook_name"),
    }
    write_pickled(target / "ae.pt", state)
    files.write_json(target / "config.json", {"trainer": trainer})
    return []
