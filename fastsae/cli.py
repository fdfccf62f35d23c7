"""The command line: fastsae demo | train | eval | plan."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from fastsae import files, planner, report
from fastsae.config import DataConfig, JointSAEConfig, TopKSAEConfig, TrainerConfig, from_dict, to_dict
from fastsae.modules import ARCHITECTURES, SparseAutoencoder, load
from fastsae.train import Trainer

_DEFAULT_DATA = DataConfig()
_DEFAULT_RUN = TrainerConfig(steps=2000, run_dir=Path("runs/train"))
# One level of names: `fastsae train joint --d-sae 16384 --steps 5000`, all flags after the subcommands.
_FLAT = (
    tyro.conf.OmitArgPrefixes,
    tyro.conf.OmitSubcommandPrefixes,
    tyro.conf.CascadeSubcommandArgs,
    tyro.conf.SuppressFixed,
)
# d_in is not asked for: it is the width of the hook (train, demo), or given to `plan` on its own.
Topk = Annotated[TopKSAEConfig, tyro.conf.subcommand("topk", default=TopKSAEConfig(d_in=1, d_sae=8192, k=32))]
Joint = Annotated[JointSAEConfig, tyro.conf.subcommand("joint", default=JointSAEConfig(d_in=1, d_sae=8192, k=32))]


def main() -> None:
    """Run the command line. Errors that say what to do are printed without a traceback."""
    commands = {"demo": demo, "train": train, "eval": evaluate, "plan": plan}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="fastsae", description=__doc__, config=_FLAT)
    except KeyboardInterrupt as stop:
        sys.exit(f"\n{stop}" if str(stop) else 130)
    except (OSError, ValueError, RuntimeError, ImportError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


def train(
    sae: Topk | Joint,
    data: DataConfig = _DEFAULT_DATA,
    trainer: TrainerConfig = _DEFAULT_RUN,
) -> None:
    """Train an SAE on activations of a language model."""
    model = _model(data)
    trained = _train(model, data, sae, trainer)
    _say(f"Trained {trainer.steps} steps. The SAE lies in {trainer.run_dir}/sae. Next:")
    _say(f"  fastsae eval {trainer.run_dir}")
    _say(f"  python -c \"import fastsae; print(fastsae.load('{trainer.run_dir}/sae'))\"")
    del trained


def evaluate(run: tyro.conf.Positional[Path], tokens: int = 50_000, batch_windows: int = 16) -> None:
    """Measure a trained SAE on held-out documents of the text it was trained on.

    Args:
        run: The run_dir of `fastsae train`.
        tokens: Tokens of held-out text.
        batch_windows: Windows of text the model reads at once.
    """
    description = run / "data.json"
    if not description.is_file():
        raise FileNotFoundError(f"{run} is no run of `fastsae train`: there is no data.json in it")
    data = from_dict(DataConfig, files.read_json(description))
    sae = load(run / "sae")
    _say(report.table([_measure(_model(data), data, {str(run): sae}, tokens, batch_windows)[0]]))


def plan(sae: Topk | Joint, d_in: int, batch_size: int = 2048, tokens: int = 100_000_000, bf16: bool = False) -> None:
    """Print parameters, memory and steps for a shape, before anything is allocated.

    Args:
        sae: The architecture and its shape.
        d_in: Width of the activations.
        batch_size: Activations per step.
        tokens: Activations to train on.
        bf16: Parameters, gradients and moments in bf16 instead of fp32.
    """
    config = dataclasses.replace(sae, d_in=d_in)
    p = planner.plan(config, batch_size, tokens, torch.bfloat16 if bf16 else torch.float32)
    rows = [{"parameter": name, "entries": f"{n:,}"} for name, n in p.parameters.items()]
    _say(report.table([*rows, {"parameter": "all", "entries": f"{p.n_parameters:,}"}]), "")
    held = {
        "weights": p.weights_bytes,
        "gradients": p.gradients_bytes,
        "Adam's moments": p.optimizer_bytes,
        "pre-activations, one chunk": p.pre_activations_bytes,
        "activations (estimate)": p.activations_bytes,
        "all": p.total_bytes,
    }
    _say(report.table([{"memory": name, "MiB": f"{size / 2**20:,.0f}"} for name, size in held.items()]), "")
    _say(f"{p.flops_per_step / 1e9:,.1f} GFLOP a step, {p.steps:,} steps of {batch_size:,} for {tokens:,} activations")


def demo(
    folder: Path = Path("runs/demo"),
    tokens: int = 500_000,
    steps: int = 1000,
    d_sae: int = 8192,
    k: int = 32,
    held_out_tokens: int = 20_000,
) -> None:
    """Train a TopK SAE and a joint SAE on the same activations of a real model, and compare them.

    Args:
        folder: Where everything is written; emptied of an earlier demo first.
        tokens: Tokens of text to harvest.
        steps: Training steps for each SAE.
        d_sae: Features of each SAE.
        k: Active features per token in each SAE.
        held_out_tokens: Tokens of held-out documents to measure on.
    """
    import shutil

    if folder.exists():
        if not (folder / "demo").exists() and any(folder.iterdir()):
            raise FileExistsError(f"demo: {folder} holds something else; choose another --folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / "demo").touch()
    data = DataConfig(tokens=tokens, store=folder / "activations")
    model = _model(data)
    _say(f"Activations: {data.hook} of the embedded language model on the Python standard library's sources.")
    trained: dict[str, SparseAutoencoder] = {}
    for name, config in {
        "topk": TopKSAEConfig(d_in=1, d_sae=d_sae, k=k),
        "joint": JointSAEConfig(d_in=1, d_sae=d_sae, k=k),
    }.items():
        _say(f"\n{name}: d_sae = {d_sae}, k = {k}, {steps} steps of {data.batch_size} activations")
        trainer = TrainerConfig(
            steps=steps,
            run_dir=folder / name,
            warmup_steps=steps // 20,
            decay_steps=steps // 5,
            checkpoint_every=steps,
        )
        trained[name] = _train(model, data, config, trainer)
    rows = _measure(model, data, trained, held_out_tokens, 16)
    for row, (name, sae) in zip(rows, trained.items(), strict=True):
        row["parameters"] = f"{sum(p.numel() for p in sae.parameters()):,}"
        rates = [line["rows_per_second"] for line in report.read_metrics(folder / name)]
        row["rows/s"] = f"{sorted(rates)[len(rates) // 2]:,.0f}"
    report.plot_training({name: folder / name for name in trained}, folder / "training.png")
    files.write_json(folder / "results.json", rows)
    _say("\nHeld-out documents, same k, data, steps and seed for both:", report.table(rows))
    _say(
        "The joint SAE has more parameters: a better row alone does not show that integration helps.",
        f"\nCurves: {folder}/training.png   Activations: {folder}/activations   Runs: {folder}/topk, {folder}/joint",
        "Next:",
        f"  python -c \"import fastsae; print(fastsae.load('{folder}/joint/sae'))\"",
        f"  fastsae eval {folder}/joint --tokens 50000",
        "  fastsae train joint --help",
    )


def _say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)  # noqa: T201  # the command line speaks


def _model(data: DataConfig) -> Any:
    from fastsae import lm

    return lm.load(data.model)


def _windows(model: Any, data: DataConfig, held_out: bool, tokens: int) -> Any:
    from fastsae.activations import read_documents, tokenize

    return tokenize(read_documents(data.text), model.tokenizer, data.context, tokens, held_out)


def _train(model: Any, data: DataConfig, config: TopKSAEConfig, trainer: TrainerConfig) -> SparseAutoencoder:
    from fastsae.activations import ActivationStream, ModelActivations, harvest

    if trainer.run_dir:
        _record(data, trainer.run_dir)
    source = ModelActivations(model, data.hook, _windows(model, data, False, data.tokens))
    stored = harvest(source, data.store) if data.store else None
    stream = ActivationStream(stored or source, data.batch_size, data.buffer_rows, trainer.seed)
    torch.manual_seed(trainer.seed)
    config = dataclasses.replace(config, d_in=source.d_in)
    architecture = "joint" if isinstance(config, JointSAEConfig) else "topk"
    sae = ARCHITECTURES[architecture](**to_dict(config))
    run = Trainer(sae, trainer)
    run.fit(stream)
    return sae


def _record(data: DataConfig, run_dir: Path) -> None:
    """Leave in the run's folder what it was trained on; a folder that says otherwise is another run's."""
    path = run_dir / "data.json"
    if path.exists() and files.read_json(path) != to_dict(data):
        raise ValueError(f"{path} says that this run was trained on other activations; choose another --run-dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    files.write_json(path, to_dict(data))


def _measure(
    model: Any, data: DataConfig, saes: dict[str, SparseAutoencoder], tokens: int, batch_windows: int
) -> list[dict[str, str]]:
    from fastsae.activations import ModelActivations
    from fastsae.evaluate import behavior, reconstruction

    windows = _windows(model, data, True, tokens)
    source = ModelActivations(model, data.hook, windows, batch_windows)
    rows = []
    for name, sae in saes.items():
        r = reconstruction(sae, (source.block(i) for i in range(len(source.block_rows))))
        b = behavior(sae, model, data.hook, windows, batch_windows)
        rows.append(
            {
                "SAE": name,
                "MSE": f"{r.mse:.4f}",
                "FVU": f"{r.fvu:.4f}",
                "L0": f"{r.l0:.1f}",
                "dead": f"{r.dead_share:.1%}",
                "KL": f"{b.kl:.4f}",
                "CE": f"{b.ce_clean:.3f} -> {b.ce_spliced:.3f}",
                "loss recovered": f"{b.loss_recovered:.2%}",
            }
        )
    return rows


if __name__ == "__main__":
    main()
