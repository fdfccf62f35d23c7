"""Record of the data of a run, left in its folder: so that it is measured on that text, and on what was held out."""

import dataclasses
import importlib.metadata
import os
from pathlib import Path
from typing import Any

from fastsae import __version__, files
from fastsae.activations import open_activations
from fastsae.activations.text import STDLIB
from fastsae.config import DataConfig, from_dict, to_dict
from fastsae.lm import EMBEDDED
from fastsae.modules import read_description

_TEXT_CHECKSUM, _ROWS_CHECKSUM = "text_crc32", "activations_crc32"
_RELATIVE = "relative_to_run"
"""Paths as seen from the run's folder: a tree that was moved as a whole is found again."""
_PATHS = ("text", "model", "activations")
_BASE, _BASE_CHECKSUM = "base", "base_crc32"
BEFORE = {"prepend_bos": True}
"""Options of runs from before there were these."""


def record(data: DataConfig, run_dir: Path, base: Path | None = None) -> None:
    """Leave in the run's folder what it is trained on. Raises ValueError if another run lies there.

    base: the run whose SAE this one stands on.
    """
    path, ours = run_dir / "data.json", _description(data, run_dir) | _base_description(base)
    if base is not None:
        ours[_RELATIVE][_BASE] = os.path.relpath(base.resolve(), run_dir.resolve())
    with files.locked(run_dir, "train"):
        begun = any((run_dir / name).exists() for name in ("metrics.jsonl", "checkpoints", "sae"))
        if begun and path.exists():
            there = _found_again(run_dir, BEFORE | files.read_object(path))
            ours.setdefault("activations", None)
            there.setdefault("activations", None)
            if base is not None and there.get(_BASE_CHECKSUM) == ours[_BASE_CHECKSUM]:
                there[_BASE] = ours[_BASE]  # the same SAE, wherever it lies now
            differing = [
                f"{k} was {there.get(k)!r}, is {v!r}" for k, v in ours.items() if k != _RELATIVE and there.get(k) != v
            ]
            if differing:
                raise ValueError(
                    f"{run_dir} is a run on other activations: {'; '.join(differing)}. Choose another --run-dir."
                )
        files.write_json(path, ours)


def resolved(data: DataConfig) -> DataConfig:
    """Make those options absolute that are paths, as they are recorded."""
    text, model = Path(data.text), Path(data.model)
    if data.text != STDLIB and text.exists():
        data = dataclasses.replace(data, text=str(text.resolve()))
    if data.model != EMBEDDED and model.is_dir():
        data = dataclasses.replace(data, model=str(model.resolve()))
    if data.activations is not None:
        data = dataclasses.replace(data, activations=data.activations.resolve())
    return data


def reads(data: DataConfig) -> dict[str, Any]:
    """The activations in `data`, and the versions they were made with, for the config of an SAE that reads them."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformer-lens") if _is_installed(name)}
    versions = {"fastsae": __version__} | versions
    described = to_dict(resolved(data))
    names = ("activations",) if data.activations is not None else ("model", "hook", "text", "context", "prepend_bos")
    return {name: described[name] for name in names} | {"versions": versions}


def _is_installed(distribution: str) -> bool:
    return bool(list(importlib.metadata.distributions(name=distribution)))


def recorded(run_dir: Path, read_text: bool = True) -> DataConfig:
    """Read what `record` left. Raises FileNotFoundError or ValueError saying what is missing or has changed.

    read_text: whether its text is going to be read, and has to be there as it was.
    """
    path = run_dir / "data.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{run_dir} is no run of `fastsae train`: there is no data.json in it. If it is one of a Trainer in "
            "Python, say what to measure it on: --activations FILE"
        )
    there = _found_again(run_dir, BEFORE | files.read_object(path))
    checksum, of_rows = (there.pop(name, None) for name in (_TEXT_CHECKSUM, _ROWS_CHECKSUM))
    for name in (_BASE, _BASE_CHECKSUM, _RELATIVE):
        there.pop(name, None)
    try:
        data = from_dict(DataConfig, there)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not read_text:
        return data
    if data.activations is not None:
        if not data.activations.exists():
            raise FileNotFoundError(
                f"{data.activations}, which {run_dir} was trained on, does not exist any more. If it lies "
                "elsewhere now, say where: --activations FILE"
            )
        if open_activations(data.activations).identity["rows"] != of_rows:
            raise ValueError(
                f"{data.activations} does not hold what {run_dir} was trained on: other rows would be held out now"
            )
    if checksum is not None and not Path(data.text).is_file():
        raise FileNotFoundError(f"{data.text}, which {run_dir} was trained on, does not exist any more")
    if checksum is not None and files.crc32(Path(data.text)) != checksum:
        raise ValueError(
            f"{data.text} is not the text that {run_dir} was trained on: other documents would be held out now"
        )
    return data


def has_seen(run_dir: Path, activations: Path) -> bool:
    """Whether the run was trained on these activations, wherever they lie now: they are split as they were then."""
    path = run_dir / "data.json"
    checksum = files.read_object(path).get(_ROWS_CHECKSUM) if path.is_file() else None
    return checksum is not None and open_activations(activations).identity.get("rows") == checksum


def recorded_base(run_dir: Path) -> Path:
    """The run that the run in run_dir stands on. Raises FileNotFoundError or ValueError if it is gone or changed."""
    path = run_dir / "data.json"
    there = files.read_object(path)
    if not isinstance(there.get(_BASE), str):
        raise ValueError(f"{path} is damaged: it names no base; train the run again")
    base = Path(there[_BASE])
    beside = run_dir.resolve().parent / base.name  # where it is if both runs were moved or copied together
    relative = there.get(_RELATIVE)
    moved = run_dir.resolve() / str(relative.get(_BASE, base)) if isinstance(relative, dict) else base
    places = [place for place in (base, moved.resolve(), beside) if (place / "sae" / "config.json").is_file()]
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


def _description(data: DataConfig, run_dir: Path) -> dict[str, Any]:
    """The options, resolved. One text file is held out by the place of each part, so its content belongs to the
    split."""
    text, described = Path(data.text), to_dict(resolved(data))
    if data.activations is not None:
        described[_ROWS_CHECKSUM] = open_activations(data.activations).identity["rows"]
    elif data.text != STDLIB and text.is_file():
        described[_TEXT_CHECKSUM] = files.crc32(text)
    paths = {name: described[name] for name in _PATHS if described[name] and Path(described[name]).is_absolute()}
    described[_RELATIVE] = {name: os.path.relpath(path, run_dir.resolve()) for name, path in paths.items()}
    return described


def _found_again(run_dir: Path, there: dict[str, Any]) -> dict[str, Any]:
    """Correct paths that do not exist any more to where they are now, if the run moved with them."""
    relative = there.get(_RELATIVE)
    for name, place in relative.items() if isinstance(relative, dict) else ():
        moved = (run_dir / str(place)).resolve()
        gone = Path(str(there.get(name)))
        if name in _PATHS and not gone.exists() and moved.exists() and moved.name == gone.name:
            there = there | {name: str(moved)}
    return there
