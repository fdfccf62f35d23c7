"""Does training end where fp32 does, with bf16 weights and 8-bit moments? On activations of the embedded model.

`python -m benchmarks.narrow` trains every choice from several seeds, the same batches for all, measures each on
held-out documents and writes benchmarks/results/narrow/<machine>.json; stopped, it goes on with what is missing there.
The table goes to docs/memory.md (`--write`: from what is there). 40 minutes on 2 cores that did other work too.
"""

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.machine import RESULTS, hardware, newest, results_file, versions
from fastsae import JointSAE, TopKSAE, Trainer, TrainerConfig, files
from fastsae.narrow import OptimizerState
from fastsae.report import markdown

ROOT = Path(__file__).parents[1]
PAGE = "docs/memory.md"
SETTINGS = {
    "tokens": 300_000,
    "held_out_tokens": 30_000,
    "batch_size": 1024,
    "steps": 300,
    "d_sae": 4096,
    "k": 32,
    "d_embedding": 128,
    "lr": 1e-3,
    "seeds": 3,
}
MAKERS: dict[str, Callable[..., TopKSAE | JointSAE]] = {
    "TopKSAE": TopKSAE,
    "JointSAE": lambda *shape, **options: JointSAE(*shape, d_embedding=SETTINGS["d_embedding"], **options),
}
# By name: dtype of weights, state of Adam.
CHOICES: dict[str, tuple[torch.dtype, OptimizerState]] = {
    "fp32": (torch.float32, "fp32"),
    "bf16 weights": (torch.bfloat16, "fp32"),
    "8-bit state": (torch.float32, "8bit"),
    "bf16 weights, 8-bit state": (torch.bfloat16, "8bit"),
}


class Case(NamedTuple):
    architecture: str
    choice: str
    seed: int


def cases() -> list[Case]:
    return [Case(a, c, s) for s in range(int(SETTINGS["seeds"])) for a in MAKERS for c in CHOICES]


def make_stores(folder: Path) -> None:
    """In a process of its own: nobody else needs the language model."""
    from fastsae import experiment
    from fastsae.activations import ModelActivations, harvest
    from fastsae.config import DataConfig

    data = DataConfig(tokens=int(SETTINGS["tokens"]))
    model = experiment.language_model(data)
    held_out = experiment.held_out_windows(model, data, int(SETTINGS["held_out_tokens"]))
    harvest(ModelActivations(model, data.hook, experiment.training_windows(model, data)), folder / "train")
    harvest(ModelActivations(model, data.hook, held_out), folder / "held_out")


def trained(task: tuple[Path, Case]) -> dict[str, Any]:
    """One run, and its FVU on the held-out activations."""
    from fastsae.activations import ActivationStore, ActivationStream

    folder, case = task
    torch.set_num_threads(1)
    dtype, state = CHOICES[case.choice]
    store = ActivationStore(folder / "train")
    torch.manual_seed(case.seed)
    sae = MAKERS[case.architecture](store.d_in, SETTINGS["d_sae"], SETTINGS["k"], dtype=dtype)
    run = TrainerConfig(
        int(SETTINGS["steps"]),
        lr=SETTINGS["lr"],
        optimizer_state=state,
        seed=case.seed,
        progress=False,
        log_every=10**6,
    )
    Trainer(sae, run).fit(ActivationStream(store, int(SETTINGS["batch_size"]), seed=case.seed))
    held_out = ActivationStore(folder / "held_out")
    x = torch.cat([held_out.block(i) for i in range(len(held_out.block_rows))])
    return {**case._asdict(), "fvu": fvu(sae.eval(), x)}


@torch.no_grad()
def fvu(sae: TopKSAE | JointSAE, x: Tensor) -> float:
    """Compute the FVU of raw activations, in fp32 whatever the weights are."""
    error = sum((sae.reconstruct(part).float() - part).square().sum().item() for part in x.split(2048))
    return error / (x - x.mean(dim=0)).square().sum().item()


def measure(path: Path) -> dict[str, Any]:
    """Whatever is missing in `path`, which is written after each run."""
    found: dict[str, Any] = {"settings": SETTINGS, "hardware": hardware(), "versions": versions(), "runs": []}
    if path.exists() and (before := files.read_json(path))["settings"] == SETTINGS:
        found = before
    done = {Case(r["architecture"], r["choice"], r["seed"]) for r in found["runs"]}
    missing = [case for case in cases() if case not in done]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = context.Process(target=make_stores, args=(folder,))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit("the activations could not be harvested: see the traceback above")
        with context.Pool(2) as pool:
            runs: Iterator[dict[str, Any]] = pool.imap(trained, [(folder, case) for case in missing])
            for run in tqdm(runs, total=len(missing), desc="runs"):
                found["runs"].append(run)
                files.write_json(path, found)
    return found


def table(found: dict[str, Any]) -> str:
    """Markdown: FVU of each choice, and by how much it is above that of fp32 from the same seed."""
    of = {Case(r["architecture"], r["choice"], r["seed"]): r["fvu"] for r in found["runs"]}
    seeds = range(found["settings"]["seeds"])
    rows = []
    for architecture in MAKERS:
        for choice in CHOICES:
            ours = [of[Case(architecture, choice, s)] for s in seeds]
            beside = [of[Case(architecture, "fp32", s)] for s in seeds]
            above = ", ".join(f"{100 * (a / b - 1):+.2f}" for a, b in zip(ours, beside, strict=True))
            rows.append([architecture, choice, f"{mean(ours):.4f}", "" if choice == "fp32" else above])
    return markdown.table(["SAE", "kept as", "held-out FVU, mean", "against fp32 from the same seed, %"], rows, words=2)


def told(found: dict[str, Any]) -> str:
    """Write the text that docs/memory.md shows."""
    s, machine = found["settings"], found["hardware"]
    return (
        f"{table(found)}\n\n{s['steps']} steps of {s['batch_size']:,} activations of the embedded model, d_sae = "
        f"{s['d_sae']:,}, k = {s['k']}, {s['seeds']} seeds; FVU on {s['held_out_tokens']:,} tokens of held-out "
        f"documents. {machine['cpu']}, torch {found['versions']['torch']}; `python -m benchmarks.narrow`."
    )


def publish(found: dict[str, Any]) -> None:
    markdown.put_section(ROOT / PAGE, "narrow", told(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="measure nothing; write the page from what is there")
    if parser.parse_args().write:
        publish(newest("narrow"))
        return
    path = RESULTS / "narrow" / results_file().name
    path.parent.mkdir(parents=True, exist_ok=True)
    publish(measure(path))


if __name__ == "__main__":
    main()
