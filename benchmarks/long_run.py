"""Half an hour of training, watched: is memory flat, are files closed, is the speed steady?

`python -m benchmarks.long_run` trains as a user would (a store of the embedded model's activations on disk, a shuffled
stream over it, checkpoints) and writes benchmarks/results/long_run/<machine>.json. `--draw` draws what is there into
docs/reliability/long_run.png and says it in docs/reliability.md.
"""

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import RESULTS, hardware, newest, results_file, versions
from fastsae import JointSAE, Trainer, TrainerConfig, files
from fastsae.report import markdown, png

ROOT = Path(__file__).parents[1]
PLOT, PAGE = "docs/reliability/long_run.png", "docs/reliability.md"
# Matrices and buffer of more than 32 MiB, which glibc maps and unmaps. An earlier run with d_sae = 8192 and a buffer of
# 16 MiB went up and down by 4 %, and by 8 % once, without growing; its heap is the likely reason, not measured.
SETTINGS = {
    "tokens": 500_000,
    "batch_size": 1024,
    "buffer_rows": 65_536,
    "d_sae": 33_000,
    "d_embedding": 256,
    "k": 32,
    "checkpoint_every": 50,
}
# By then every shard was read once, and what is allocated once (workspaces, the allocator's own pools) is there.
WARM_UP_SECONDS = 300
_EVERY = 10.0


class Watched:
    """The stream until the time is up, and what the process holds between two steps, now and then."""

    def __init__(self, stream: Any, seconds: float) -> None:
        self.stream, self.seconds = stream, seconds
        self.samples: list[dict[str, float]] = []
        self._batches, self._begun = 0, time.monotonic()

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        batch = next(self.stream)
        now = time.monotonic() - self._begun
        if now >= len(self.samples) * _EVERY:
            self.samples.append({"seconds": round(now, 2), "rows": self._batches * len(batch), **held()})
        if now >= self.seconds:
            raise StopIteration
        self._batches += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)


def held() -> dict[str, float]:
    """Memory, open files and threads of this process, and how busy the machine is."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "rss_mib": round(pages * resource.getpagesize() / 2**20, 2),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "load": os.getloadavg()[0],
    }


def make_store(folder: Path) -> None:
    """In a process of its own: the language model's memory is not what is watched."""
    from fastsae import experiment
    from fastsae.activations import ModelActivations, harvest
    from fastsae.config import DataConfig

    torch.set_num_threads(1)
    data = DataConfig(tokens=SETTINGS["tokens"])
    model = experiment.language_model(data)
    harvest(ModelActivations(model, data.hook, experiment.training_windows(model, data)), folder)


def measure(minutes: float, folder: Path, remarks: list[str]) -> dict[str, Any]:
    from fastsae.activations import ActivationStore, ActivationStream

    process = multiprocessing.get_context("spawn").Process(target=make_store, args=(folder / "store",))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"making the store ended with exit code {process.exitcode}; see above")
    torch.set_num_threads(1)
    store = ActivationStore(folder / "store")
    stream = Watched(ActivationStream(store, SETTINGS["batch_size"], SETTINGS["buffer_rows"]), 60 * minutes)
    sae = JointSAE(store.d_in, SETTINGS["d_sae"], SETTINGS["k"], d_embedding=SETTINGS["d_embedding"])
    run = TrainerConfig(
        10**7, run_dir=folder / "run", checkpoint_every=SETTINGS["checkpoint_every"], log_every=10, progress=False
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "activations ended")
        result = Trainer(sae, run).fit(stream)
    return {
        "settings": SETTINGS | {"minutes": minutes, "architecture": sae.architecture, "d_in": store.d_in},
        "hardware": hardware(),
        "versions": versions(),
        "remarks": remarks,
        "steps": result.steps,
        "fvu": result.metrics["fvu"],
        "samples": stream.samples,
    }


def after_warm_up(found: dict[str, Any]) -> list[dict[str, float]]:
    return [s for s in found["samples"] if s["seconds"] >= WARM_UP_SECONDS]


def by_minute(found: dict[str, Any]) -> list[float]:
    """Rows per second of each minute after the warm-up."""
    samples = after_warm_up(found)
    kept = samples[:: round(60 / _EVERY)]
    return [(b["rows"] - a["rows"]) / (b["seconds"] - a["seconds"]) for a, b in pairwise(kept)]


def spread(found: dict[str, Any]) -> float:
    """By how much the largest resident memory after the warm-up exceeds the smallest."""
    rss = [s["rss_mib"] for s in after_warm_up(found)]
    return max(rss) / min(rss) - 1


def told(found: dict[str, Any]) -> str:
    """The sentence of docs/reliability.md."""
    samples, rates, machine = after_warm_up(found), by_minute(found), found["hardware"]
    rss, opened = [s["rss_mib"] for s in samples], sorted({s["files"] for s in samples})
    loads, saves = [s["load"] for s in samples], found["steps"] // found["settings"]["checkpoint_every"]
    return (
        f"{found['settings']['minutes']:g} minutes on {machine['cpu']}, {machine['threads']} thread of "
        f"{machine['cores']} cores, torch {found['versions']['torch']}: {found['steps']:,} steps, "
        f"{found['samples'][-1]['rows']:,} rows, {saves} checkpoints. "
        f"After the first {WARM_UP_SECONDS // 60} minutes resident memory lay between {min(rss):.1f} and "
        f"{max(rss):.1f} MiB ({spread(found):.2%}), open files were {' or '.join(map(str, opened))}, and a minute's "
        f"speed lay between {min(rates):,.0f} and {max(rates):,.0f} rows/s (median {median(rates):,.0f}), at a load of "
        f"the machine between {min(loads):.1f} and {max(loads):.1f}."
        + "".join(f" {remark}" for remark in found["remarks"])
    )


def draw(figure: Any, found: dict[str, Any]) -> None:
    """Memory, speed and open files over time, into a matplotlib figure."""
    samples, rates = found["samples"], by_minute(found)
    minutes = [s["seconds"] / 60 for s in samples]
    memory, speed, handles = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1.4))
    low = min(s["rss_mib"] for s in after_warm_up(found))
    memory.plot(minutes, [s["rss_mib"] for s in samples], color="#2563a8", label="resident memory")
    memory.axhspan(low, 1.02 * low, color="#2563a8", alpha=0.12, label="2 % above the least after the warm-up")
    memory.set(ylabel="MiB", ylim=(0.9 * low, 1.1 * low))
    memory.legend(loc="lower right")
    centres = [(WARM_UP_SECONDS + 60 * i + 30) / 60 for i in range(len(rates))]
    speed.plot(centres, rates, color="#2563a8", marker=".", label="rows/s, by minute")
    speed.set(ylabel="rows/s", ylim=(0, 1.25 * max(rates)))
    load = speed.twinx()
    load.plot(minutes, [s["load"] for s in samples], color="#9aa1ad", linewidth=1, label="load of the machine")
    load.set(ylabel="load", ylim=(0, None))
    lines = [*speed.lines, *load.lines]
    speed.legend(lines, [line.get_label() for line in lines], loc="lower right")
    handles.step(minutes, [s["files"] for s in samples], color="#2563a8", where="post")
    handles.set(ylabel="open files", xlabel="minutes", ylim=(0, 1.5 * max(s["files"] for s in samples)))
    for axes in (memory, speed, handles):
        axes.grid(alpha=0.3)


def publish() -> None:
    """Draw the newest results, and say them in the page."""
    found = newest("long_run")
    png.save(ROOT / PLOT, (8, 7), lambda figure: draw(figure, found), png.told("results", found))
    markdown.put_section(ROOT / PAGE, "long run", told(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--remark", action="append", default=[], help="a sentence that belongs to the results")
    parser.add_argument("--draw", action="store_true", help="measure nothing; draw what is there")
    given = parser.parse_args()
    if not given.draw:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(given.minutes, Path(folder), given.remark)
        path = RESULTS / "long_run" / results_file().name
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, found)
    publish()


if __name__ == "__main__":
    main()
