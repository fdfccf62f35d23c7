"""The folder of a saved SAE: which one is meant, what describes it, and what it is if it holds none."""

from pathlib import Path
from typing import Any

from fastsae import files

FORMAT = 1
CONFIG, NEW_CONFIG, WEIGHTS = "config.json", ".config.json.new", "weights.safetensors"


def saved_in(folder: str | Path) -> Path:
    """The folder with the SAE: `folder`, or what a run there has finished with."""
    folder = Path(folder)
    finished = (folder / "sae").is_dir() and not (folder / WEIGHTS).exists()
    return folder / "sae" if finished else folder


def read_description(folder: Path) -> dict[str, Any]:
    """The config.json of a saved SAE. Raises FileNotFoundError or ValueError saying what is wrong with it."""
    path = folder / CONFIG
    if (folder / NEW_CONFIG).is_file():
        path = _of_these_weights(folder, folder / NEW_CONFIG, path)
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no saved SAE: {_instead(folder)}")
    description = files.read_json(path)
    expected = {"format": int, "architecture": str, "config": dict, "weights_crc32": int}
    if not isinstance(description, dict) or not all(isinstance(description.get(k), t) for k, t in expected.items()):
        raise ValueError(
            f"{path} is no fastsae config: expected the keys {sorted(expected)}. If another package wrote "
            f"it: {_CONVERT}"
        )
    if not isinstance(description.get("reads", {}), dict):
        raise ValueError(f"{path} is damaged: reads says what the SAE was trained on, by name; take it out of the file")
    if description["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {description['format']}, this fastsae reads format {FORMAT}; update fastsae"
        )
    return description


def _of_these_weights(folder: Path, new: Path, old: Path) -> Path:
    """Find the config that belongs to the weights, after a save that was cut off."""
    weights = folder / WEIGHTS
    description = files.read_object(new)
    return new if weights.is_file() and description.get("weights_crc32") == files.crc32(weights) else old


_CONVERT = "`fastsae convert SOURCE TARGET --to fastsae` makes an SAE of it that fastsae.load reads"


def _instead(folder: Path) -> str:
    """Say what a folder without a config.json is, and what to do with it."""
    if not folder.exists():
        return "there is no such folder"
    if not folder.is_dir():
        return f"it is a file; give the folder that save_pretrained wrote. If another package wrote it: {_CONVERT}"
    if steps := sorted((folder / "checkpoints").glob("step_*")):
        return f"it is a run that has not finished. Resume it, or take its last checkpoint: {_of_checkpoint(steps[-1])}"
    if (folder / "state.json").is_file():
        return f"it is a checkpoint of several ranks: {_of_checkpoint(folder)}"
    if (folder / "index.json").is_file():
        return f"it is a store of activations: fastsae.activations.ActivationStore({str(folder)!r})"
    theirs = [*folder.glob("cfg.json"), *folder.glob("*.safetensors"), *folder.glob("*.pt")]
    return f"there is no config.json in it{f'. If another package wrote it: {_CONVERT}' if theirs else ''}"


def _of_checkpoint(step: Path) -> str:
    if (step / CONFIG).is_file():
        return f"fastsae.load({str(step)!r})"
    return f"fastsae.distributed.consolidate({str(step)!r}, folder), then fastsae.load(folder)"
