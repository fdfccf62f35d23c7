"""Training and measuring every arm with every seed, one after the other; what is done is not done again."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fastsae import files
from fastsae.activations import ActivationStream
from fastsae.activations.stream import Source
from fastsae.config import DataConfig, IntegrationConfig, StudyConfig, TrainerConfig, to_dict
from fastsae.evaluate import DocumentSums, reconstruction
from fastsae.modules import ARCHITECTURES, SequentialSAE, SparseAutoencoder, load
from fastsae.study.arms import Arm, arms
from fastsae.train import Trainer

# Rows of training documents by which an arm's learning rate is chosen.
_CHOICE_ROWS = 16_384
# What may change between a study and its continuation.
_FREE = {"folder"}


@dataclass(frozen=True)
class Outcome:
    """One trained SAE on held-out documents."""

    seed: int
    lr: float
    dead_share: float
    sums: DocumentSums


Measure = Callable[[SparseAutoencoder], tuple[float, DocumentSums]]
"""A trained SAE -> its dead share, and sums per held-out document."""


def run_arms(
    study: StudyConfig, data: DataConfig, source: Source, measure: Measure, say: Callable[[str], object]
) -> dict[str, list[Outcome]]:
    """Outcomes by arm, a seed each. `source` holds training activations, `measure` looks at held-out ones."""
    _claim(study, data)
    runs = _Runs(study, data, source, measure, say)
    return {arm.name: runs.outcomes(arm) for arm in arms(study, source.d_in)}


def _claim(study: StudyConfig, data: DataConfig) -> None:
    """Note what the study in this folder is; raise ValueError if it is another one."""
    path = study.folder / "config.json"
    ours = {"study": {k: v for k, v in to_dict(study).items() if k not in _FREE}, "data": to_dict(data)}
    ours["study"]["lrs"] = list(study.lrs)
    if path.exists():
        there = files.read_json(path)
        differing = [
            f"{name} was {there[part].get(name)!r}, is {value!r}"
            for part in ours
            for name, value in ours[part].items()
            if there[part].get(name) != value
        ]
        if differing:
            raise ValueError(
                f"study: {study.folder} holds another study: {'; '.join(differing)}. Choose another --folder."
            )
    study.folder.mkdir(parents=True, exist_ok=True)
    files.write_json(path, ours)


class _Runs:
    def __init__(
        self, study: StudyConfig, data: DataConfig, source: Source, measure: Measure, say: Callable[[str], object]
    ) -> None:
        self.study, self.data, self.source, self.measure, self.say = study, data, source, measure, say
        self.total = len(arms(study, source.d_in)) * (study.seeds + len(study.lrs) - 1)

    def outcomes(self, arm: Arm) -> list[Outcome]:
        lr = self._best_lr(arm)
        return [self._outcome(arm, lr, seed) for seed in range(self.study.seeds)]

    def _best_lr(self, arm: Arm) -> float:
        """The learning rate whose first seed leaves the least error on rows of training documents."""
        fvu = {}
        for lr in self.study.lrs:
            folder = self._trained(arm, lr, seed=0)
            path = folder / "choice.json"
            if not path.exists():
                rows = reconstruction(load(folder / "sae"), self._choice_rows())
                files.write_json(path, {"fvu_on_training_documents": rows.fvu.estimate})
            fvu[lr] = files.read_json(path)["fvu_on_training_documents"]
        best = min(fvu, key=lambda lr: fvu[lr])
        files.write_json(
            self.study.folder / arm.name / "lr.json", {"lr": best, "fvu": {str(k): v for k, v in fvu.items()}}
        )
        return best

    def _choice_rows(self) -> Iterator[torch.Tensor]:
        left = _CHOICE_ROWS
        for i in range(len(self.source.block_rows)):
            if left <= 0:
                return
            yield (block := self.source.block(i)[:left])
            left -= len(block)

    def _outcome(self, arm: Arm, lr: float, seed: int) -> Outcome:
        folder = self._trained(arm, lr, seed)
        path = folder / "outcome.json"
        if not path.exists():
            dead_share, sums = self.measure(load(folder / "sae"))
            kept = {name: values.tolist() for name, values in sums.sums.items()}
            files.write_json(path, {"dead_share": dead_share, "documents": sums.names, "sums": kept})
        found = files.read_json(path)
        tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in found["sums"].items()}
        return Outcome(seed, lr, found["dead_share"], DocumentSums(tuple(found["documents"]), tensors))

    def _trained(self, arm: Arm, lr: float, seed: int) -> Path:
        """The folder of a finished run; trained now, or from where it stopped, if need be."""
        folder = self.study.folder / arm.name / f"lr_{lr:g}" / f"seed_{seed}"
        if (folder / "done.json").exists():
            return folder
        done = len(list(self.study.folder.glob("*/*/*/done.json")))
        self.say(f"[{done + 1} of {self.total}] {arm.name}, lr {lr:g}, seed {seed}: {arm.meaning}")
        sae = self._new(arm, seed)
        steps = arm.steps
        config = TrainerConfig(
            steps=steps,
            lr=lr,
            run_dir=folder,
            resume=True,
            warmup_steps=steps // 20,
            decay_steps=steps // 5,
            checkpoint_every=max(1, steps // 4),
            seed=seed,
        )
        stream = ActivationStream(self.source, self.data.batch_size, self.data.buffer_rows, seed)
        result = Trainer(sae, config).fit(stream)
        files.write_json(folder / "done.json", {"steps": result.steps, "metrics": result.metrics})
        shutil.rmtree(folder / "checkpoints")  # gigabytes over a study; the SAE itself stays
        return folder

    def _new(self, arm: Arm, seed: int) -> SparseAutoencoder:
        torch.manual_seed(seed)
        if arm.base is None:
            made_by = {architecture.config_class: architecture for architecture in ARCHITECTURES.values()}
            return made_by[type(arm.config)](**to_dict(arm.config))
        lr = files.read_json(self.study.folder / arm.base / "lr.json")["lr"]
        base = load(self.study.folder / arm.base / f"lr_{lr:g}" / f"seed_{seed}" / "sae")
        options = {f.name: getattr(arm.config, f.name) for f in dataclasses.fields(IntegrationConfig)}
        return SequentialSAE.on(base, **options)  # type: ignore[arg-type]  # it refuses other architectures itself
