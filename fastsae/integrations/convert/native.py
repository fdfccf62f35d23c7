"""fastsae's own form: config.json and weights.safetensors, in a run_dir or by themselves."""

from pathlib import Path
from typing import Any

from fastsae import files
from fastsae.integrations.convert.form import Converted
from fastsae.modules import load

FILES = "config.json and weights.safetensors, or a run_dir with sae/"


def written(source: Path) -> bool:
    return (_folder(source) / "weights.safetensors").is_file()


def read(source: Path) -> Converted:
    folder = _folder(source)
    return Converted(load(folder), _metadata(folder.parent / "data.json"))


def write(found: Converted, target: Path) -> list[str]:
    found.sae.save_pretrained(target)
    return []


def _folder(source: Path) -> Path:
    return source / "sae" if (source / "sae").is_dir() else source


def _metadata(recorded: Path) -> dict[str, Any]:
    """Of what a run of `fastsae train` was trained on, if that is beside the SAE."""
    data = files.read_object(recorded) if recorded.is_file() else {}
    names = {"model": "model_name", "hook": "hook_name", "context": "context_size", "text": "dataset_path"}
    return {theirs: data[ours] for ours, theirs in names.items() if ours in data}
