"""Training and measuring every arm with every seed, one after the other; what is done is not done again."""

import dataclasses
import itertools
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastsae import experiment, files, provenance
from fastsae.activations import ActivationStream
from fastsae.activations.stream import Source
from fastsae.config import DataConfig, IntegrationConfig, StudyConfig, TrainerConfig, to_dict
from fastsae.evaluate import DocumentSums, reconstruction
from fastsae.modules import SequentialSAE, SparseAutoencoder, load, new
from fastsae.study.arms import Arm, arms
from fastsae.train import Trainer

# By so many rows of training documents an arm's learning rate is chosen, from so many places all over them.
_CHOICE_ROWS, _CHOICE_BLOCKS = 16_384, 64
# What may change between a study and its continuation.
_FREE = {"folder", "seeds"}


@dataclass(frozen=True)
class Outcome:
    """One trained SAE on held-out documents."""

    seed: int
    lr: float
    dead_share: float
    """Share of features active on none of the last tenth of its training rows."""
    sums: DocumentSums


Measure = Callable[[SparseAutoencoder], DocumentSums]
"""A trained SAE -> sums per held-out document."""


def run_arms(
    study: StudyConfig, data: DataConfig, source: Source, measure: Measure, held_out: str, say: Callable[[str], object]
) -> dict[str, list[Outcome]]:
    """Outcomes by arm, a seed each. `source` holds training activations, `measure` looks at held-out ones, of which
    `held_out` is a fingerprint: outcomes on others are measured again."""
    with files.locked(study.folder, "study"):
        claim(study, data)
        runs = _Runs(study, data, source, measure, held_out, say)
        return {arm.name: runs.outcomes(arm) for arm in arms(study, source.d_in)}


def claim(study: StudyConfig, data: DataConfig) -> None:
    """Note what the study in this folder is; raise ValueError if it is another one."""
    path = study.folder / "config.json"
    ours = {"study": to_dict(study), "data": to_dict(provenance.resolved(data))}
    ours["study"]["lrs"] = list(study.lrs)
    if path.exists():
        there = files.read_json(path)
        if not isinstance(there, dict) or not all(isinstance(there.get(part), dict) for part in ours):
            raise ValueError(f"{path} is damaged, or not of a study; choose another --folder")
        there["data"] = provenance.BEFORE | there["data"]
        differing = [
            f"{name} was {there[part].get(name)!r}, is {value!r}"
            for part in ours
            for name, value in ours[part].items()
            if name not in _FREE and there[part].get(name) != value
        ]
        if differing:
            raise ValueError(
                f"study: {study.folder} holds another study: {'; '.join(differing)}. Choose another --folder."
            )
    files.write_json(path, ours)


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise TypeError(repr(value))
    return value


class _Runs:
    def __init__(
        self,
        study: StudyConfig,
        data: DataConfig,
        source: Source,
        measure: Measure,
        held_out: str,
        say: Callable[[str], object],
    ) -> None:
        self.study, self.data, self.source = study, data, source
        self.measure, self.held_out, self.say = measure, held_out, say
        self.total = len(arms(study, source.d_in)) * (study.seeds + len(study.lrs) - 1)

    def outcomes(self, arm: Arm) -> list[Outcome]:
        """With the learning rate whose first seed leaves the least error on rows of training documents, among those at
        which no seed diverges."""
        for lr, seed in itertools.product(self.study.lrs, range(self.study.seeds)) if arm.base else ():
            self._begin_anew_on_another_base(arm.base or "", self._folder(arm, lr, seed))
        fvu = {lr: self._fit(arm, lr) for lr in self.study.lrs}
        converged = {lr: value for lr, value in fvu.items() if value is not None}
        for lr in sorted(converged, key=lambda lr: converged[lr]):
            try:
                folders = [self._trained(arm, lr, seed) for seed in range(self.study.seeds)]
            except FloatingPointError as error:
                self.say(f"{arm.name} at lr {lr:g}: {error}")
                continue
            by_lr = {f"{lr:g}": value for lr, value in fvu.items()}
            files.write_json(self.study.folder / arm.name / "lr.json", {"lr": lr, "fvu_on_training_documents": by_lr})
            return [self._outcome(folder, lr, seed) for seed, folder in enumerate(folders)]
        raise ValueError(
            f"study: {arm.name} diverged at every learning rate of {self.study.lrs}; choose lower --lrs, and another "
            "--folder"
        )

    def _fit(self, arm: Arm, lr: float) -> float | None:
        """FVU on rows of training documents; None if training diverged."""
        path = self._folder(arm, lr, seed=0) / "choice.json"
        if not path.exists():
            try:
                sae = load(self._trained(arm, lr, seed=0) / "sae", device=experiment.device())
            except FloatingPointError as error:
                self.say(f"{arm.name} at lr {lr:g}: {error}")
                return None
            fvu = reconstruction(sae, self._choice_rows()).fvu.estimate
            files.write_json(path, {"fvu": fvu if math.isfinite(fvu) else None})
        with files.expected_in(path, "delete it: the rows are looked at again"):
            fvu = files.read_object(path)["fvu"]
            return None if fvu is None else _number(fvu)

    def _choice_rows(self) -> Iterator[torch.Tensor]:
        n = len(self.source.block_rows)
        blocks = sorted({(2 * i + 1) * n // (2 * _CHOICE_BLOCKS) for i in range(_CHOICE_BLOCKS)})
        for i in blocks:
            block = self.source.block(i)
            yield block[:: max(1, len(block) * len(blocks) // _CHOICE_ROWS)]

    def _outcome(self, folder: Path, lr: float, seed: int) -> Outcome:
        path, done = folder / "outcome.json", folder / "done.json"
        if not path.exists() or files.read_object(path).get("held_out") != self.held_out:
            sums = self.measure(load(folder / "sae", device=experiment.device()))
            kept = {name: values.tolist() for name, values in sums.sums.items()}
            files.write_json(path, {"held_out": self.held_out, "documents": sums.names, "sums": kept})
        with files.expected_in(done, f"delete {folder}: it is trained again"):
            dead_share = _number(files.read_object(done)["metrics"]["dead_share"])
        with files.expected_in(path, "delete it: the SAE is measured again"):
            found = files.read_object(path)
            names = tuple(found["documents"])
            sums = {
                name: torch.tensor([*map(_number, v)], dtype=torch.float64, device="cpu")
                for name, v in found["sums"].items()
            }
            if not sums or any(len(values) != len(names) for values in sums.values()):
                raise TypeError(f"a sum for each of {len(names)} documents")
        return Outcome(seed, lr, dead_share, DocumentSums(names, sums))

    def _folder(self, arm: Arm, lr: float, seed: int) -> Path:
        return self.study.folder / arm.name / f"lr_{lr:g}" / f"seed_{seed}"

    def _trained(self, arm: Arm, lr: float, seed: int) -> Path:
        """The folder of a finished run; trained now, or from where it stopped, if need be. Raises FloatingPointError if
        training diverges, or has diverged."""
        folder = self._folder(arm, lr, seed)
        diverged, done = folder / "diverged.json", folder / "done.json"
        if diverged.exists():
            with files.expected_in(diverged, f"delete {folder}: it is trained again"):
                told = files.read_object(diverged)["error"]
            raise FloatingPointError(told)
        if not done.exists():
            before = len(list(self.study.folder.glob("*/*/*/done.json")))
            self.say(f"[{before + 1} of {self.total}] {arm.name}, lr {lr:g}, seed {seed}: {arm.meaning}")
            config = TrainerConfig(
                steps=arm.steps,
                lr=lr,
                run_dir=folder,
                resume=True,
                warmup_steps=arm.steps // 20,
                decay_steps=arm.steps // 5,
                checkpoint_every=max(1, arm.steps // 4),
                dead_after_tokens=max(1, arm.steps * self.data.batch_size // 10),
                seed=seed,
            )
            stream = ActivationStream(self.source, self.data.batch_size, self.data.buffer_rows, seed)
            if arm.base:  # the rows that come after those its base has seen, as in an arm that trains as long
                path = self._base(arm.base, seed) / "done.json"
                with files.expected_in(path, f"delete {path.parent}: it is trained again"):
                    stream.load_state_dict(files.read_object(path)["position"])
            provenance.record(self.data, folder)
            try:
                result = Trainer(self._new(arm, seed), config).fit(stream)
            except KeyboardInterrupt as stop:
                raise KeyboardInterrupt(f"{stop}; run the same study again, it goes on from there") from stop
            except FloatingPointError as error:
                files.write_json(diverged, {"error": str(error)})
                raise
            files.write_json(done, {"steps": result.steps, "metrics": result.metrics, "position": stream.state_dict()})
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # gigabytes over a study; the SAE itself stays
        return folder

    def _new(self, arm: Arm, seed: int) -> SparseAutoencoder:
        torch.manual_seed(seed)
        if arm.base is None:
            return new(arm.config, device=experiment.device())
        base = load(self._base(arm.base, seed) / "sae", device=experiment.device())
        options = {f.name: getattr(arm.config, f.name) for f in dataclasses.fields(IntegrationConfig)}
        return SequentialSAE.on(base, **options)  # type: ignore[arg-type]  # it refuses other architectures itself

    def _begin_anew_on_another_base(self, name: str, folder: Path) -> None:
        """Drop a run that stands on a base with a learning rate that is not the chosen one any more."""
        note, lr = folder / "base.json", self._chosen(name)
        if note.exists():
            with files.expected_in(note, f"delete {folder}: it is trained again"):
                if _number(files.read_object(note)["lr"]) == lr:
                    return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        files.write_json(note, {"lr": lr})

    def _chosen(self, name: str) -> float:
        path = self.study.folder / name / "lr.json"
        with files.expected_in(path, "delete it, and run the same study again"):
            return _number(files.read_object(path)["lr"])

    def _base(self, name: str, seed: int) -> Path:
        """The finished run of this seed of another arm, with the learning rate chosen for it."""
        lr = self._chosen(name)
        return self.study.folder / name / f"lr_{lr:g}" / f"seed_{seed}"
