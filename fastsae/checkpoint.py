"""Training checkpoints: folders that appear whole or not at all, the last two kept, checked before they are used.

run_dir/checkpoints/step_00001000/
    config.json weights.safetensors     the SAE, as save_pretrained writes it
    optimizer.safetensors               Adam's moments, dead-feature counters, random generator state
    state.json                          step, position in the data, trainer config
    checksums.json                      of all these files; written last
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsae import files
from fastsae.modules import SparseAutoencoder

KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back and verified."""

    folder: Path
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save(run_dir: Path, step: int, sae: SparseAutoencoder, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write the checkpoint of `step`, then delete all but the last two. A failure leaves the earlier ones alone."""
    parent = run_dir / "checkpoints"
    parent.mkdir(parents=True, exist_ok=True)
    final, temporary = parent / f"step_{step:08d}", parent / f".step_{step:08d}.tmp"
    try:
        for left_by_a_killed_run in parent.glob(".step_*.tmp"):
            shutil.rmtree(left_by_a_killed_run)
        sae.save_pretrained(temporary)
        files.write_tensors(temporary / "optimizer.safetensors", tensors)
        files.write_json(temporary / "state.json", {**state, "step": step})
        files.write_json(temporary / "checksums.json", {p.name: files.crc32(p) for p in sorted(temporary.iterdir())})
        replaced = parent / f".step_{step:08d}.old.tmp"
        if final.exists():  # put out of the way whole, so that no kill leaves half of it in place
            os.rename(final, replaced)
        os.rename(temporary, final)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        last = next(iter(folders(run_dir)), None)
        standing = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
        raise OSError(error.errno, f"could not write checkpoint {final}: {error.strerror}; {standing}") from error
    files.sync(parent)
    for old in folders(run_dir)[KEPT:]:
        shutil.rmtree(old)
    return final


def folders(run_dir: Path) -> list[Path]:
    """The finished checkpoints of a run, newest first."""
    parent = run_dir / "checkpoints"
    found = parent.iterdir() if parent.is_dir() else ()
    return sorted((p for p in found if re.fullmatch(r"step_\d{8}", p.name)), reverse=True)


def load(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint of a run, verified; None if there is none.

    Raises ValueError naming the damaged file, and the earlier checkpoint that can be used instead.
    """
    found = folders(run_dir)
    if not found:
        return None
    newest, *older = found
    try:
        for name, expected in files.read_json(newest / "checksums.json").items():
            if files.crc32(newest / name) != expected:
                raise ValueError(f"{newest / name} is damaged: its checksum is not the one that was stored")
        state = files.read_json(newest / "state.json")
        weights = files.read_tensors(newest / "weights.safetensors")
        tensors = files.read_tensors(newest / "optimizer.safetensors")
    except (OSError, ValueError) as error:
        offer = f"delete {newest} to go on from {older[0].name}" if older else "there is no earlier checkpoint"
        raise ValueError(f"checkpoint {newest} cannot be used: {error}. To resume, {offer}.") from error
    return Checkpoint(newest, weights, tensors, state)
