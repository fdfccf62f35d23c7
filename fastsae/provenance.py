"""What a run was trained on, left in its folder: so that it is measured on the same, and held-out, text."""

import dataclasses
from pathlib import Path
from typing import Any

from fastsae import files
from fastsae.activations.text import STDLIB
from fastsae.config import DataConfig, from_dict, to_dict
from fastsae.lm import EMBEDDED
from fastsae.modules import read_description

_TEXT_CHECKSUM = "text_crc32"
_BASE, _BASE_CHECKSUM = "base", "base_crc32"
BEFORE = {"prepend_bos": True}
"""Of runs from before there was such an option."""


def record(data: DataConfig, run_dir: Path, base: Path | None = None) -> None:
    """Leave in the run's folder what it is trained on. Raises ValueError if another run lies there.

    base: the run whose SAE this one stands on.
    """
    path, ours = run_dir / "data.json", _description(data) | _base_description(base)
    with files.locked(run_dir, "train"):
        begun = any((run_dir / name).exists() for name in ("metrics.jsonl", "checkpoints", "sae"))
        if begun and path.exists():
            there = BEFORE | files.read_object(path)
            if base is not None and there.get(_BASE_CHECKSUM) == ours[_BASE_CHECKSUM]:
                there[_BASE] = ours[_BASE]  # the same SAE, wherever it lies now
            differing = [f"{k} was {there.get(k)!r}, is {v!r}" for k, v in ours.items() if there.get(k) != v]
            if differing:
                raise ValueError(
                    f"{run_dir} is a run on other activations: {'; '.join(differing)}. Choose another --run-dir."
                )
        files.write_json(path, ours)


def resolved(data: DataConfig) -> DataConfig:
    """The same with those options that are paths absolute, as they are recorded."""
    text, model = Path(data.text), Path(data.model)
    if data.text != STDLIB and text.exists():
        data = dataclasses.replace(data, text=str(text.resolve()))
    if data.model != EMBEDDED and model.is_dir():
        data = dataclasses.replace(data, model=str(model.resolve()))
    return data


def recorded(run_dir: Path, read_text: bool = True) -> DataConfig:
    """What `record` left. Raises FileNotFoundError or ValueError saying what is missing or has changed.

    read_text: whether its text is going to be read, and has to be there as it was.
    """
    path = run_dir / "data.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir} is no run of `fastsae train`: there is no data.json in it")
    there = BEFORE | files.read_object(path)
    checksum = there.pop(_TEXT_CHECKSUM, None)
    for name in (_BASE, _BASE_CHECKSUM):
        there.pop(name, None)
    try:
        data = from_dict(DataConfig, there)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not read_text:
        return data
    if checksum is not None and not Path(data.text).is_file():
        raise FileNotFoundError(f"{data.text}, which {run_dir} was trained on, does not exist any more")
    if checksum is not None and files.crc32(Path(data.text)) != checksum:
        raise ValueError(
            f"{data.text} is not the text that {run_dir} was trained on: other documents would be held out now"
        )
    return data


def recorded_base(run_dir: Path) -> Path:
    """The run that the run in run_dir stands on. Raises FileNotFoundError or ValueError if it is gone or changed."""
    path = run_dir / "data.json"
    there = files.read_object(path)
    if not isinstance(there.get(_BASE), str):
        raise ValueError(f"{path} is damaged: it names no base; train the run again")
    base = Path(there[_BASE])
    beside = run_dir.resolve().parent / base.name  # where it is if both runs were moved or copied together
    places = [place for place in (base, beside) if (place / "sae" / "config.json").is_file()]
    if not places:
        raise FileNotFoundError(
            f"{run_dir} stands on the SAE of {base}, which is neither there nor beside it any more: bring it back"
        )
    for place in places:
        if read_description(place / "sae")["weights_crc32"] == there.get(_BASE_CHECKSUM):
            return place
    raise ValueError(f"{base} was trained again since {run_dir} was trained on its SAE; train that one again too")


def _base_description(base: Path | None) -> dict[str, Any]:
    if base is None:
        return {}
    return {_BASE: str(base.resolve()), _BASE_CHECKSUM: read_description(base / "sae")["weights_crc32"]}


def _description(data: DataConfig) -> dict[str, Any]:
    """The options, resolved. One text file is held out by the place of each part, so its content belongs to the
    split."""
    text = Path(data.text)
    checksum = {_TEXT_CHECKSUM: files.crc32(text)} if data.text != STDLIB and text.is_file() else {}
    return to_dict(resolved(data)) | checksum
