"""Train sparse autoencoders and measure them. `fastsae COMMAND --help` has all options; -V, --version the version."""

import dataclasses
import itertools
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from fastsae import packages

try:
    import tyro.conf
except ImportError:
    packages.need("tyro", "the command line")
    raise

from fastsae import (
    __version__,
    checkpoint,
    distributed,
    evaluation,
    experiment,
    files,
    own_rows,
    planner,
    progress,
    report,
)
from fastsae.activations import TokenWindows
from fastsae.config import (
    DataConfig,
    FactorialConfig,
    JointSAEConfig,
    SecondaryRunConfig,
    SequentialRunConfig,
    StudyConfig,
    TopKSAEConfig,
    TrainerConfig,
    to_dict,
)
from fastsae.distributed import cost
from fastsae.evaluate import Behavior, Pair, Reconstruction, behavior, drivers, record, top_features, top_pairs
from fastsae.evaluate.intervals import FEWEST_DOCUMENTS
from fastsae.factorial import Stimuli, run_factorial
from fastsae.factorial.discover import Family
from fastsae.factorial.generate import side_by_side
from fastsae.factorial.run import Factorial
from fastsae.integrations import convert as forms
from fastsae.modules import JointSAE, SecondarySAE, SparseAutoencoder
from fastsae.study import page, run_study

_DEFAULT_DATA = DataConfig()
_DEFAULT_STUDY, _DEFAULT_STUDY_DATA = StudyConfig(), DataConfig(tokens=2_500_000)
_DEFAULT_FACTORIAL = FactorialConfig()
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
Sequential = Annotated[SequentialRunConfig, tyro.conf.subcommand("sequential")]
Secondary = Annotated[SecondaryRunConfig, tyro.conf.subcommand("secondary")]
Run = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
Others = Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="[RUN ...]")]


def main() -> None:
    """Run the command line. Errors that say what to do are printed without a traceback."""
    if sys.argv[1:] in (["--version"], ["-V"]):
        _say(f"fastsae {__version__}")
        return
    commands = {
        "demo": demo,
        "train": train,
        "eval": evaluate,
        "analyze": analyze,
        "report": html_report,
        "study": study,
        "factorial": factorial,
        "plan": plan,
        "convert": convert,
    }
    if os.environ.get("NO_COLOR"):
        tyro._experimental_options["ansi_codes"] = False
    logging.basicConfig(format="%(message)s")
    progress.logger.setLevel(logging.INFO)  # which text is read, and how far it has got
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="fastsae", description=__doc__, config=_FLAT)
    except KeyboardInterrupt as stop:
        sys.exit(f"\n{stop}" if str(stop) else 130)
    except (OSError, ValueError, RuntimeError, ImportError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


def train(
    sae: Topk | Joint | Sequential | Secondary,
    data: DataConfig = _DEFAULT_DATA,
    trainer: TrainerConfig = _DEFAULT_RUN,
    dtype: Literal["float32", "bfloat16"] = "float32",
    feature_ranks: int = 1,
) -> None:
    """Train an SAE on activations of a language model, or on your own (--activations).

    Under torchrun its processes train one SAE together.

    Args:
        dtype: dtype of the weights. bfloat16 takes half the memory, and rounds at random so that small steps add up.
        feature_ranks: Under torchrun, processes that share the features; groups of them train on different rows.
    """
    trainer, run_dir = _in_own_folder(trainer)
    together = feature_ranks > 1 or distributed.launched()
    ranks = distributed.start(feature_ranks) if together else None
    model = experiment.language_model(data) if data.activations is None else None
    experiment.train(model, data, sae, trainer, ranks, getattr(torch, dtype))
    if ranks is not None and not ranks.first:
        return
    for last in report.read_metrics(run_dir)[-1:]:
        _say(_end(last), *_doubts(last))
    _say(f"The SAE lies in {run_dir}/sae. Next:")
    _say(f"  fastsae eval {run_dir}")
    _say(f"  python -c \"import fastsae; print(fastsae.load('{run_dir}/sae'))\"")


def _in_own_folder(trainer: TrainerConfig) -> tuple[TrainerConfig, Path]:
    """The config with a run_dir in which a run can begin, and that run_dir: the default gets a number if it is taken.

    Raises FileExistsError for another one, before a model is loaded.
    """
    if trainer.run_dir is None:
        raise ValueError("train: --run-dir says where the SAE is written; None would lose it")
    if trainer.resume or not checkpoint.begun(trainer.run_dir):
        return trainer, trainer.run_dir
    if trainer.run_dir != _DEFAULT_RUN.run_dir:
        raise FileExistsError(
            f"train: {trainer.run_dir} already holds a run. Continue it with --resume, or choose another --run-dir."
        )
    numbered = (trainer.run_dir.with_name(f"{trainer.run_dir.name}-{n}") for n in itertools.count(2))
    free = next(folder for folder in numbered if not checkpoint.begun(folder))
    return dataclasses.replace(trainer, run_dir=free), free


def _end(metrics: dict[str, Any]) -> str:
    """Last metrics of a training, in one line."""
    fvu, dead = (_number(metrics[name], spec) for name, spec in (("fvu", ".4f"), ("dead_share", ".1%")))
    return (
        f"Trained {metrics['step']} steps: FVU {fvu} of the last batch, L0 {metrics['l0']:.1f}, dead features {dead}."
    )


def _doubts(metrics: dict[str, Any]) -> list[str]:
    """Reasons why an SAE that ended with these metrics may be of no use, and what to try."""
    doubts = []
    if metrics["fvu"] is None or metrics["fvu"] > 1:
        doubts.append(
            f"Warning: an FVU above 1 is worse than the mean activation: the training diverged. Try a lower --lr than "
            f"{metrics['lr']:g}, --warmup-steps, or --clip-grad-norm 1."
        )
    if metrics["dead_share"] is not None and metrics["dead_share"] > 0.5:
        doubts.append(
            "Warning: most features were inactive on the last dead_after_tokens tokens. Try --auxk 256, a smaller "
            "--d-sae, another --lr, or more --steps."
        )
    return doubts


def evaluate(
    run: Run,
    others: Others = (),
    tokens: int = 50_000,
    text: str | None = None,
    device: str | None = None,
    activations: Path | None = None,
) -> None:
    """Measure a trained SAE on held-out documents of the text it was trained on, into RUN/eval.json.

    Several runs of one model, hook and text are measured on the same documents, and end in one table with their
    differences. Interrupted, the same command goes on with the next stage.

    Args:
        run: The run_dir of `fastsae train`.
        others: More of them, to be compared with the first.
        tokens: Tokens of held-out text, spread over documents.
        text: Other text than the run's, all of which counts as held out; the result is RUN/eval-TEXT.json.
        device: Where to compute, such as cpu or cuda:1; None is the GPU if there is one.
        activations: Measure on these activations, in a file or folder, without a language model; None is what the run
            was trained on.
    """
    if own_rows.are_asked_for(run, activations):
        if text is not None:
            raise ValueError(f"eval: --text is for runs on a language model; {run} is measured on activations in files")
        for one in dict.fromkeys((run, *others)):
            _evaluate_rows(one, own_rows.reading(one, activations, experiment.device(device)))
        return
    runs = tuple(dict.fromkeys((run, *others)))
    on, read = experiment.device(device), evaluation.reading(runs, text)
    model = experiment.language_model(read.data, on)
    windows = experiment.held_out_windows(model, read.data, tokens, all_of_it=read.other_text)
    found, kept = {}, []
    for one in runs:
        found[one], parts = evaluation.measure(model, one, read, windows, on, several=len(runs) > 1)
        kept.append(parts)
        _tell_measured(one, found[one], read)
    if len(runs) > 1:
        _say(report.table(evaluation.side_by_side({str(one): measured for one, measured in found.items()})))
        _say(
            "Differences are paired by document: one whose interval holds no 0 is beyond chance, each taken by itself."
        )
    for one, measured in found.items():  # last: what was measured is said on a full disk too
        record.write(one, read.name, measured, tokens=tokens, **({"text": read.data.text} if read.other_text else {}))
    for parts in kept:
        parts.remove()


def _evaluate_rows(run: Path, given: own_rows.Reading) -> None:
    measured = own_rows.reconstruction(given)
    _say(f"{run}: {given.words}", str(measured), "")
    found = {"reconstruction": measured, "bos_out": None, "bos_in": None}
    record.write(run, f"eval{given.suffix}", found, **given.options)


def _tell_measured(run: Path, measured: experiment.Measured, read: evaluation.Reading) -> None:
    r, b = measured.reconstruction, measured.bos_out
    over = f"[95 % intervals] over {b.documents} {read.text}"
    if b.documents < FEWEST_DOCUMENTS:
        over = f"{b.documents} {read.text}: no intervals, which take {FEWEST_DOCUMENTS} documents or more"
    _say(f"{run}: {r.rows:,} rows and {b.tokens:,} predictions, {over}")
    _say(f"MSE {r.mse:.4f}   cosine {r.cosine:.4f}   L0 {r.l0:.1f}   dead in these rows {r.dead_share:.1%}", "")
    _say(report.table([_condition(name, r, b) for name in b.conditions]), "")
    if measured.bos_in is not None:
        full = measured.bos_in.full
        _say(f"Including BOS: KL {full.kl:.4f}, recovered {full.loss_recovered:.4f}")
    own = r.error_reduction_against_own_identity_pathway
    if own is not None:
        kl = b.kl_reduction_against_own_identity_pathway["full"]
        _say(
            f"Against its own identity pathway, as in the paper (no comparison with a TopK SAE): error {own:.1%} less, "
            f"KL {kl:.1%} less"
        )


def _condition(name: str, r: Reconstruction, b: Behavior) -> dict[str, str]:
    spliced = b.conditions[name]
    return {
        "reconstruction": name,
        "FVU": f"{r.conditions[name]:.4f}" if name in r.conditions else "",
        "KL": f"{spliced.kl:.4f}",
        "CE increase": f"{spliced.ce_increase:.4f}",
        "loss recovered": f"{spliced.loss_recovered:.4f}",
        "KL / random error of its size": f"{spliced.kl_over_epsilon:.2f}",
    }


def analyze(run: Run, tokens: int = 50_000, activations: Path | None = None) -> None:
    """Geometry of a trained SAE's weights, and the text its largest features are active on.

    Writes RUN/geometry.json, RUN/features.json, and RUN/pairs.json: the pairs of features that the integration works
    with, or that drive the features of a secondary SAE.

    Args:
        run: The run_dir of `fastsae train`.
        tokens: Tokens of held-out text, spread over documents.
        activations: Measure on these activations, in a file or folder, without a language model; None is what the run
            was trained on.
    """
    if own_rows.are_asked_for(run, activations):
        _analyze_rows(run, own_rows.reading(run, activations))
        return
    there = experiment.trained(run)
    sae, data, base = there
    model = experiment.language_model(data)
    windows = experiment.held_out_windows(model, data, tokens)
    geometry = experiment.held_out_geometry(model, there, windows)
    features = top_features(sae, model, data.hook, windows, base=base)
    results: dict[str, Any] = {"geometry": geometry, "features": {"features": features}}
    pairs: list[Pair] = []
    if isinstance(sae, JointSAE) and sae.V is not None:
        pairs = top_pairs(sae, model, data.hook, windows)
        results["pairs"] = {"pairs": pairs}
    elif isinstance(sae, SecondarySAE) and base is not None:
        found = drivers(sae, base, model, data.hook, windows, [f.feature for f in features])
        results["pairs"] = {"drivers": found}
    _say(f"{run}: {geometry}")
    if pairs:
        _say("", "Pairs of features that put most into z, and what leaving one out changes of the interaction output:")
        _say(report.table([_pair(pair) for pair in pairs[:8]]))
    for name, result in results.items():  # last, as in evaluate
        record.write(run, name, result, tokens=tokens)
    _say("", f"Text of the {len(features)} largest features: {run}/features.json")


def _analyze_rows(run: Path, given: own_rows.Reading) -> None:
    geometry, features = own_rows.geometry(given), own_rows.features(given)
    _say(f"{run}: {given.words}", str(geometry))
    record.write(run, f"geometry{given.suffix}", geometry, **given.options)
    record.write(run, f"features{given.suffix}", {"features": features}, **given.options)
    _say("", f"Rows on which the {len(features)} largest features are strongest: {run}/features{given.suffix}.json")


def _pair(pair: Pair) -> dict[str, str]:
    return {
        "pair": "{}, {}".format(*pair.features),
        "together": f"{pair.together:.3%}",
        "if independent": f"{pair.together_if_independent:.3%}",
        "V_i . V_j": f"{pair.dot:.3f}",
        "output change": f"{pair.output_change:.2%}",
    }


def html_report(run: Run, activations: Path | None = None) -> None:
    """One HTML page of a run, to open from disk: curves, pathways, KL, geometry, features with their text.

    What was not measured yet is measured first, as `fastsae eval` and `fastsae analyze` do.

    Args:
        run: The run_dir of `fastsae train`.
        activations: Measure on these activations, in a file or folder, without a language model; None is what the run
            was trained on.
    """
    if own_rows.are_asked_for(run, activations):
        _say(f"Open {_page(run, _measured_on_rows(run, activations)).resolve()}")
        return
    experiment.trained(run)
    if record.read(run, "eval") is None:
        evaluate(run)
    if record.read(run, "geometry") is None or record.read(run, "features") is None:
        analyze(run)
    _say(f"Open {_page(run).resolve()}")


def _measured_on_rows(run: Path, activations: Path | None) -> str:
    """Measure what was not measured yet on these rows; returns the suffix of the results."""
    experiment.check_finished(run)
    if activations is None and None not in [record.read(run, name) for name in ("eval", "geometry", "features")]:
        return ""  # rows that are gone by now are not missed
    given = own_rows.reading(run, activations)

    def is_there(name: str) -> bool:
        found = record.read(run, f"{name}{given.suffix}")
        return found is not None and found["options"] == given.options

    if not is_there("eval"):
        _evaluate_rows(run, given)
    if not (is_there("geometry") and is_there("features")):
        _analyze_rows(run, given)
    return given.suffix


def _page(run: Path, suffix: str = "") -> Path:
    results = {name: record.read(run, f"{name}{suffix}") for name in ("eval", "geometry", "features", "pairs")}
    experiments = sorted(path.stem for path in run.glob("factorial-*.json"))
    return report.write_html(run, results | {name: record.read(run, name) for name in experiments})


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def study(study: StudyConfig = _DEFAULT_STUDY, data: DataConfig = _DEFAULT_STUDY_DATA) -> None:
    """Does integration help? Train every arm fairly, with several seeds, and say what came out.

    Interrupted, it goes on where it stopped when it is run again. Writes FOLDER/study.md, its plots, and study.json.
    """
    found = run_study(study, data, _say)
    _say(
        "",
        report.table(page.arm_rows(found)),
        "",
        *page.verdicts(found),
        "",
        f"All of it: {page.write(found, study.folder)}, study.json",
    )


def factorial(
    run: Run,
    stimuli: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="STIMULI")],
    design: FactorialConfig = _DEFAULT_FACTORIAL,
) -> None:
    """Find features that respond to two factors together, and measure what clamping them does, beside controls.

    Writes RUN/factorial-NAME.json, text under clamps as RUN/factorial-NAME.txt, and RUN/report.html.

    Args:
        run: The run_dir of `fastsae train`; a secondary SAE brings its base with it.
        stimuli: A JSON file (docs/factorial.md has the format), or a set of ours: formality_emotion, code_files,
            code_failure.
    """
    there = experiment.trained(run)
    loaded = Stimuli.load(stimuli)
    name = f"factorial-{loaded.name}"
    with files.locked(run, "factorial"):
        pass  # hours later is too late to find out that nothing can be written there
    model, known = experiment.language_model(there.data), []

    def keep(found: Factorial) -> None:
        known[:] = [found]
        record.write(run, name, found, **to_dict(design))

    try:
        found = run_factorial(there, model, loaded, design, _say, keep)
    finally:  # stopped, or on a full disk, there is still what is known
        for one in known:
            _tell(one)
    if found.texts:
        text = "\n".join(f"== {target} ==\n\n{side_by_side(found.prompts, t)}" for target, t in found.texts.items())
        files.write_atomically(run / f"{name}.txt", lambda p: p.write_text(text, encoding="utf-8"))
        _say("", f"Text under clamps: {run}/{name}.txt")
    _say("", f"Open {_page(run).resolve()}")


def _tell(found: Factorial) -> None:
    for family, tested in found.discovery.families.items():
        if tested.features:
            _say("", f"{family}: the features with the least p of an interaction", report.table(_effects(tested)))
    for effect in found.effects:
        _say("", f"{effect.target}: {effect.verdict}")


def _effects(family: Family) -> list[dict[str, str]]:
    return [
        {
            "features": ", ".join(map(str, f.features)),
            **{level: f"{mean.estimate:.3g}" for level, mean in f.means.items()},
            "crosses": "yes" if f.crossover else "",
            "d": f"{f.d:.2f}",
            "F": f"{f.anova['interaction']['F']:.1f}",
            "p": f"{f.p:.2g}",
            "q": f"{f.q:.2g}",
        }
        for f in family.features[:6]
    ]


def plan(
    sae: Topk | Joint,
    d_in: int,
    batch_size: int = 2048,
    tokens: int = 100_000_000,
    gpu_memory_gb: tuple[float, ...] = (24, 40, 80, 141),
    data_ranks: int = 1,
    feature_ranks: int = 1,
) -> None:
    """Print parameters, memory and steps for a shape, before anything is allocated; of several ranks, what they send.

    Memory is that of each process, by how weights and Adam's state are kept, and what d_sae fits which GPUs.

    Args:
        sae: The architecture and its shape.
        d_in: Width of the activations.
        batch_size: Activations per step.
        tokens: Activations to train on.
        gpu_memory_gb: Memory of GPUs, to say what fits them.
        data_ranks: Groups of processes that train on different rows.
        feature_ranks: Processes of a group, each with its part of the features.
    """
    config = dataclasses.replace(sae, d_in=d_in)
    if not all(0 < size <= 1e6 for size in gpu_memory_gb):
        raise ValueError(f"plan: --gpu-memory-gb: expected sizes above 0 and up to 1e6; got {gpu_memory_gb}")
    layout = distributed.Layout(data_ranks, feature_ranks)
    layout.features_each(config.d_sae)  # raises where ranks cannot share it
    p = planner.plan(config, batch_size, tokens)
    rows = [{"parameter": name, "entries": f"{n:,}"} for name, n in p.parameters.items()]
    _say(report.table([*rows, {"parameter": "all", "entries": f"{p.n_parameters:,}"}]), "")
    own_rows = -(-batch_size // data_ranks)
    # Data ranks add gradients, which Adam in the backward does not hold.
    choices = [memory for memory in planner.MEMORY if data_ranks == 1 or not memory.adam_in_backward]
    _say(report.table([_memory(config, own_rows, memory, feature_ranks) for memory in choices]), "")
    if gpu_memory_gb:
        gpus = "a GPU's memory" if feature_ranks == 1 else f"the memory of each of {feature_ranks} GPUs"
        _say(f"The largest d_sae that trains at d_in = {d_in:,}, by {gpus} ({planner.USABLE:.0%} of it used):")
        fitting = [_fitting(config, own_rows, memory, feature_ranks, gpu_memory_gb) for memory in choices]
        _say(report.table(fitting), "")
    _say(f"{p.flops_per_step / 1e9:,.1f} GFLOP a step, {p.steps:,} steps of {batch_size:,} for {tokens:,} activations")
    if layout.ranks == 1:
        rate = planner.product_rate()
        step = planner.cpu_seconds(config, batch_size, rate)
        _say(
            "",
            f"Estimated for this machine's CPU, whose fp32 products were just measured at {rate / 1e9:,.0f} GFLOP/s, "
            f"the language model not counted: {step:.2g} seconds a step, {planner.duration(step * p.steps)} for all "
            "steps.",
        )
    _say("", *cost.report(config, batch_size, layout, p.steps))


def _memory(config: TopKSAEConfig, own_rows: int, memory: planner.Memory, feature_ranks: int) -> dict[str, str]:
    p = planner.plan(config, own_rows, memory=memory, feature_ranks=feature_ranks)
    held = {
        "weights": p.weights_bytes,
        "gradients": p.gradients_bytes,
        "Adam's state": p.optimizer_bytes,
        "pre-activations, one chunk": p.pre_activations_bytes,
        "activations (estimate)": p.activations_bytes,
        "all": p.total_bytes,
    }
    return {"memory, MiB": memory.name, **{name: f"{size / 2**20:,.0f}" for name, size in held.items()}}


def _fitting(
    config: TopKSAEConfig, own_rows: int, memory: planner.Memory, feature_ranks: int, sizes: tuple[float, ...]
) -> dict[str, str]:
    found = {f"{size:g} GB": planner.largest(config, size * 1e9, own_rows, memory, feature_ranks) for size in sizes}
    by_size = {size: f"{d_sae:,}" if d_sae else "none" for size, d_sae in found.items()}
    return {"": memory.name, **by_size, "fastsae train": memory.flags}


def convert(
    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")],
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TARGET")],
    to: forms.Format,
    overwrite: bool = False,
) -> None:
    """Write an SAE in the form of another package. The format of SOURCE is detected.

    Args:
        source: A folder with an SAE of fastsae (or a run_dir), SAELens, dictionary_learning or sparsify, or a file of
            OpenAI's sparse_autoencoder.
        target: Where to write; a file for openai, a folder for the others.
        to: The form to write.
        overwrite: Replace what lies at TARGET, a folder with all that is in it.
    """
    notes = forms.convert(source, target, to, overwrite=overwrite)
    _say(f"{source} ({forms.detect(source)}) -> {target} ({to})", *notes)


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
    data = DataConfig(tokens=tokens, store=folder / "activations")
    trainers = {
        name: TrainerConfig(
            steps=steps,
            run_dir=folder / name,
            warmup_steps=steps // 20,
            decay_steps=steps // 5,
            checkpoint_every=steps,
            dead_after_tokens=100_000,
        )
        for name in ("topk", "joint")
    }
    saes = {"topk": TopKSAEConfig(d_in=1, d_sae=d_sae, k=k), "joint": JointSAEConfig(d_in=1, d_sae=d_sae, k=k)}
    _empty_demo_folder(folder)
    model = experiment.language_model(data)
    _say(f"Activations: {data.hook} of the embedded language model on the Python standard library's sources.")
    trained: dict[str, SparseAutoencoder] = {}
    for name, config in saes.items():
        _say(f"\n{name}: d_sae = {d_sae}, k = {k}, {steps} steps of {data.batch_size} activations")
        trained[name] = experiment.train(model, data, config, trainers[name])
    rows = _compare(model, data, trained, experiment.held_out_windows(model, data, held_out_tokens))
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


def _empty_demo_folder(folder: Path) -> None:
    """Delete what an earlier demo left in `folder`, and nothing else."""
    mark, ours = folder / ".fastsae-demo", ("activations", "topk", "joint", "training.png", "results.json")
    if folder.exists() and not mark.is_file() and any(folder.iterdir()):
        raise FileExistsError(f"demo: {folder} holds something else; choose another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()
    for path in (folder / name for name in ours):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)  # noqa: T201  # the command line speaks


def _compare(
    model: Any, data: DataConfig, saes: dict[str, SparseAutoencoder], windows: TokenWindows
) -> list[dict[str, str]]:
    rows = []
    for name, sae in saes.items():
        r = experiment.held_out_reconstruction(model, experiment.Trained(sae, data), windows)
        b = behavior(sae, model, data.hook, windows, pathways=False)
        rows.append(
            {
                "SAE": name,
                "MSE": f"{r.mse.estimate:.4f}",
                "FVU": f"{r.fvu:.4f}",
                "L0": f"{r.l0.estimate:.1f}",
                f"dead in {r.rows:,} rows": f"{r.dead_share:.1%}",
                "KL": f"{b.full.kl:.4f}",
                "CE": f"{b.ce_clean.estimate:.3f} -> {b.full.ce.estimate:.3f}",
                "loss recovered": f"{b.full.loss_recovered.estimate:.2%}",
            }
        )
    return rows


if __name__ == "__main__":
    main()
