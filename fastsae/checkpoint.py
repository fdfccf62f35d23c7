"""Training checkpoints: folders that appear whole or not at all, the last two kept, checked before they are used.

run_dir/checkpoints/step_00001000/
    config.json weights.safetensors     the SAE, as save_pretrained writes it
    optimizer.safetensors               Adam's moments, dead-feature counters, random generator state
    state.json                          step, position in the data, trainer config
    checksums.json                      of all these files; written last
Of several ranks each writes its part of all tensors, shard-...safetensors, in place of the first three. Either kind is
read by any number of ranks.
"""

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae import files
from fastsae.modules import SparseAutoencoder
from fastsae.ranks import ALONE, Alone

KEPT = 2
_RANDOM_STATES = ("rng_cpu", "rng_cuda")
# Tensors that are neither weights nor moments.
_OF_TRAINING = ("rows_since_fired", *_RANDOM_STATES)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back and verified."""

    folder: Path
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save(run_dir: Path, step: int, sae: SparseAutoencoder, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write the checkpoint of `step`, then delete all but the last two. A failure leaves the earlier ones alone."""
    parent, ranks = run_dir / "checkpoints", sae.ranks
    final, temporary = parent / f"step_{step:08d}", parent / f".step_{step:08d}.tmp"

    def begin() -> None:
        parent.mkdir(parents=True, exist_ok=True)
        tidy(run_dir)
        temporary.mkdir()

    def put_in_place() -> None:
        files.write_json(temporary / "checksums.json", sums)
        replaced = parent / f".step_{step:08d}.old.tmp"
        if final.exists():  # put out of the way whole, so that no kill leaves half of it in place
            os.rename(final, replaced)
        os.rename(temporary, final)
        shutil.rmtree(replaced, ignore_errors=True)

    def drop_old() -> None:
        files.sync(parent)
        tidy(run_dir)

    try:
        ranks.first_does(begin)
        if ranks.count == 1:
            sae.save_pretrained(temporary)
            files.write_tensors(temporary / "optimizer.safetensors", tensors)
        else:
            from fastsae.distributed import parts  # half as long to import as everything else of ours

            parts.write(temporary, {**sae.state_dict(), **tensors}, ranks)
        ranks.first_does(lambda: files.write_json(temporary / "state.json", {**state, "step": step}))
        sums = ranks.on_files(temporary, sorted(p.name for p in temporary.iterdir()), files.crc32)
        ranks.first_does(put_in_place)
    except OSError as error:
        if ranks.first:
            shutil.rmtree(temporary, ignore_errors=True)
        last = next(iter(folders(run_dir)), None)
        standing = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
        raise OSError(error.errno, f"could not write checkpoint {final}: {error.strerror}; {standing}") from error
    ranks.first_does(drop_old)
    return final


def tidy(run_dir: Path) -> None:
    """Delete what is older than the last two, and what a killed run left half written."""
    for left in [*(run_dir / "checkpoints").glob(".step_*.tmp"), *folders(run_dir)[KEPT:]]:
        shutil.rmtree(left)


def folders(run_dir: Path) -> list[Path]:
    """The finished checkpoints of a run, newest first."""
    parent = run_dir / "checkpoints"
    found = parent.iterdir() if parent.is_dir() else ()
    return sorted((p for p in found if re.fullmatch(r"step_\d{8}", p.name)), reverse=True)


def begun(run_dir: Path) -> bool:
    """Whether a run has been begun in `run_dir`."""
    return bool(folders(run_dir)) or (run_dir / "metrics.jsonl").exists()


def load(run_dir: Path, ranks: Alone = ALONE) -> Checkpoint | None:
    """The newest checkpoint of a run, verified; None if there is none. With ranks, this one's part of its tensors.

    Raises ValueError naming the damaged file, and the earlier checkpoint that can be used instead.
    """
    found = folders(run_dir)
    if not found:
        return None
    newest, *older = found
    try:
        return read(newest, ranks)
    except (OSError, ValueError) as error:
        offer = f"delete {newest} to go on from {older[0].name}" if older else "there is no earlier checkpoint"
        raise ValueError(f"checkpoint {newest} cannot be used: {error}. To resume, {offer}.") from error


def read(folder: Path, ranks: Alone = ALONE, *, weights_only: bool = False) -> Checkpoint:
    """One checkpoint, verified; its `tensors` are left out where only weights are wanted.

    Raises OSError or ValueError naming what is missing or damaged.
    """
    sums = files.read_object(folder / "checksums.json")
    if differing := sorted(sums.keys() ^ ({p.name for p in folder.iterdir()} - {"checksums.json"})):
        damaged = f"{folder / 'checksums.json'} is damaged: it is of other files than there are"
        raise ValueError(f"{damaged} ({', '.join(differing)})")
    for name, found in ranks.on_files(folder, sorted(sums), files.crc32).items():
        if found != sums[name]:
            raise ValueError(f"{folder / name} is damaged: its checksum is not the one that was stored")
    state = files.read_object(folder / "state.json")
    if ranks.count == 1 and "weights.safetensors" in sums:
        weights = files.read_tensors(folder / "weights.safetensors")
        tensors = {} if weights_only else files.read_tensors(folder / "optimizer.safetensors")
        tensors = {plain_name(name): t for name, t in tensors.items()}
        return Checkpoint(folder, weights, tensors, state)
    from fastsae.distributed import parts

    found = parts.read(folder, ranks, lambda name: not (weights_only and _is_of_training(name)))
    weights = {name: t for name, t in found.items() if not _is_of_training(name)}
    return Checkpoint(folder, weights, {name: t for name, t in found.items() if name not in weights}, state)


def plain_name(name: str) -> str:
    """A weight's name; runs of compiled SAEs used to be written with the names that torch.compile gives."""
    return name.replace("_orig_mod.", "")


def _is_of_training(name: str) -> bool:
    return "/" in name or name in _OF_TRAINING


def check_state(
    folder: Path,
    tensors: Mapping[str, Tensor],
    kept: Mapping[str, Mapping[str, tuple[tuple[int, ...], torch.dtype]]],
    rows_since_fired: Tensor,
) -> None:
    """Raise ValueError unless the tensors of a checkpoint are what training leaves: Adam's kernel would read and write
    beyond a moment that is smaller than its weight. kept: shape and dtype of each moment of each weight."""
    moments: dict[str, set[str]] = {name: set() for name in kept}
    for key, t in tensors.items():
        moment, _, name = key.partition("/")
        if name in kept:
            moments[name].add(moment)
            shape, dtype = kept[name].get(moment, kept[name].get("exp_avg", ((), torch.float32)))
            fits = t.numel() == 1 if moment == "step" else t.shape == shape
            fits = fits and t.is_floating_point() == (dtype.is_floating_point or moment == "step")
        else:
            counted = key == "rows_since_fired" and (t.shape, t.dtype) == (rows_since_fired.shape, torch.int64)
            fits = counted or (key in _RANDOM_STATES and t.dtype == torch.uint8 and t.dim() == 1)
        if not fits:
            raise ValueError(f"{folder} does not fit this SAE: {key} is {tuple(t.shape)} of {t.dtype}")
    whole = all(kinds == set() or kinds >= {"step", *kept[name]} for name, kinds in moments.items())
    if not whole or not tensors.keys() >= {"rows_since_fired", "rng_cpu"}:
        raise ValueError(f"{folder} is damaged: it lacks some of Adam's moments")
