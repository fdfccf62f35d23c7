"""The study on a language model's activations, and its results as one JSON."""

import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastsae import __version__, experiment, files
from fastsae.activations import ModelActivations, harvest
from fastsae.config import DataConfig, StudyConfig, to_dict
from fastsae.evaluate import DocumentSums, behavior
from fastsae.evaluate.metrics import Metric
from fastsae.evaluate.record import plain
from fastsae.modules import SparseAutoencoder
from fastsae.study.arms import Arm, arms
from fastsae.study.compare import METRICS, SHOWN, answers, arm_mean
from fastsae.study.run import Outcome, claim, run_arms


def run_study(config: StudyConfig, data: DataConfig, say: Callable[[str], object] = print) -> dict[str, Any]:
    """Run or finish the study in config.folder; returns what it writes into study.json there."""
    model = experiment.language_model(data)
    data = experiment.as_read(model, data)
    # What can be wrong with the options is found before hours of work.
    windows = experiment.held_out_windows(model, data, config.held_out_tokens, config.windows_per_document)
    if windows.n_predictions == 0:
        raise ValueError(
            f"study: {windows.n_tokens} held-out tokens in windows of {data.context}: none is predicted from another "
            "one, so there is no KL to measure; use a longer --context or more --held-out-tokens"
        )
    source = ModelActivations(model, data.hook, experiment.training_windows(model, data))
    trained = arms(config, source.d_in)
    if data.batch_size > source.n_rows:
        raise ValueError(f"study: batches of {data.batch_size} rows, but the text has only {source.n_rows} to train on")
    with files.locked(config.folder, "study"):
        claim(config, data)
    store = harvest(source, data.store or config.folder / "activations")

    def measure(sae: SparseAutoencoder) -> DocumentSums:
        rows = experiment.held_out_reconstruction(model, experiment.Trained(sae, data), windows)
        return _together(rows.sums, behavior(sae, model, data.hook, windows).sums)

    outcomes = run_arms(config, data, store, measure, windows.digest(), say)
    found = results(config, data, trained, outcomes, METRICS)
    found["data"] |= {"training_rows": store.n_rows, "held_out_tokens": windows.n_tokens}
    files.write_json(config.folder / "study.json", found)
    return found


def _together(rows: DocumentSums, predictions: DocumentSums) -> DocumentSums:
    """Sums over rows and over predictions of the documents that have both."""
    places = [predictions.names.index(name) for name in rows.names if name in predictions.names]
    kept = [i for i, name in enumerate(rows.names) if name in predictions.names]
    sums = {name: values[kept] for name, values in rows.sums.items()}
    named = {"predictions" if name == "rows" else name: values[places] for name, values in predictions.sums.items()}
    return DocumentSums(tuple(rows.names[i] for i in kept), sums | named)


def results(
    config: StudyConfig,
    data: DataConfig,
    trained: Sequence[Arm],
    outcomes: dict[str, list[Outcome]],
    metrics: Sequence[Metric],
) -> dict[str, Any]:
    """Everything the page says, as JSON."""
    by_name = {arm.name: arm for arm in trained}
    said = {}
    for arm in trained:
        runs, base = outcomes[arm.name], by_name.get(arm.base or "")
        flops = sum(part.training_flops(data.batch_size) for part in (arm, base) if part)
        said[arm.name] = {
            "arm": arm.name,
            "meaning": arm.meaning,
            "d_sae": arm.config.d_sae,
            "parameters": arm.parameters,
            "steps": sum(part.steps for part in (arm, base) if part),
            "training_flops": flops,
            "lr": runs[0].lr,
            "dead_share": sum(r.dead_share for r in runs) / len(runs),
            "metrics": {m.name: plain(arm_mean(runs, m)) for m in metrics},
            "shown": {m.name: plain(arm_mean(runs, m)) for m in SHOWN if m.known(runs[0])},
            "by_seed": [
                plain({"seed": r.seed, **{m.name: float(m.of(r)[0].sum() / m.of(r)[1].sum()) for m in metrics}})
                for r in runs
            ],
        }
    answered = plain(answers(outcomes, metrics))
    for answer in answered:
        arm, baseline = (said[answer["question"][side]] for side in ("arm", "baseline"))
        answer["cost"] = {what: arm[what] / baseline[what] for what in ("parameters", "training_flops")}
    return {
        "study": to_dict(config),
        "data": to_dict(data),
        "held_out_documents": len(next(iter(outcomes.values()))[0].sums.names),
        "arms": list(said.values()),
        "answers": answered,
        "environment": {
            "date": time.strftime("%Y-%m-%d"),
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "fastsae": __version__,
            "python": platform.python_version(),
        },
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
