"""fastsae's own form: config.json and weights.safetensors, in a run_dir or by themselves."""

from pathlib import Path
from typing import Any

from fastsae import files
from fastsae.integrations.convert import others
from fastsae.integrations.convert.form import Converted, by_name, expect_finite, widest
from fastsae.modules import load
from fastsae.modules.saved import saved_in

# What other forms say of an SAE and fastsae's config does not; it is there to be written into such forms again.
_KEPT = "converted.json"
# Of the activations an SAE reads, and what SAELens calls it.
_NAMES = {
    "model": "model_name",
    "hook": "hook_name",
    "context": "context_size",
    "text": "dataset_path",
    "prepend_bos": "prepend_bos",
}
FILES = "config.json and weights.safetensors, or a run_dir with sae/"


def written(source: Path) -> bool:
    return (saved_in(source) / "weights.safetensors").is_file()


def read(source: Path) -> Converted:
    folder = saved_in(source)
    held = folder / "weights.safetensors"
    others.refuse(held, expected="safetensors")
    sae = load(folder)
    expect_finite(held, sae.state_dict().items())
    kept = files.read_object(folder / _KEPT) if (folder / _KEPT).is_file() else {}
    metadata = _metadata(sae.reads or {}, folder.parent / "data.json")
    metadata |= by_name(f"{folder / _KEPT}, metadata", kept.get("metadata", {}))
    sees_normalised_tokens = kept.get("sees_normalised_tokens", False) is True
    return Converted(
        sae.to(widest(dict(sae.named_parameters()))), metadata, sees_normalised_tokens=sees_normalised_tokens
    )


def write(found: Converted, target: Path) -> list[str]:
    known = {ours: found.metadata[theirs] for ours, theirs in _NAMES.items() if theirs in found.metadata}
    if found.sae.reads is None and known:
        found.sae.reads = known
    found.sae.save_pretrained(target)
    if found.metadata or found.sees_normalised_tokens:
        kept = {"metadata": found.metadata, "sees_normalised_tokens": found.sees_normalised_tokens}
        files.write_json(target / _KEPT, kept)
    return []


def _metadata(reads: dict[str, Any], recorded: Path) -> dict[str, Any]:
    """The activations that an SAE reads, under SAELens' names; of older ones, as the run has them beside the SAE."""
    data = reads or (files.read_object(recorded) if recorded.is_file() else {})
    return {theirs: data[ours] for ours, theirs in _NAMES.items() if data.get(ours) is not None}
