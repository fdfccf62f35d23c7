"""Processes to kill, and the kills. Each does one small work into a folder, and goes on where the last one ended.

A server that has imported everything forks the processes, so that each costs milliseconds.
"""

import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastsae
from fastsae import files
from fastsae.activations import ActivationStore, ActivationStream, harvest
from fastsae.activations.store import Rows
from fastsae.evaluate import reconstruction, record
from fastsae.evaluate.parts import Parts
from fastsae.evaluate.reconstruction import of_sums
from fastsae.integrations import convert
from fastsae.train import Trainer

Work = Callable[[Path], object]
_CONTEXT = multiprocessing.get_context("forkserver")

# Of what Python tells its audit hooks, all that touches the disk. What safetensors writes by itself is not among it:
# there the limit on a file's size strikes.
_OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.scandir", "shutil.rmtree"}

D, M, K, BLOCK, BLOCKS = 12, 60, 4, 40, 5


@dataclass(frozen=True)
class Kill:
    """End of a process: after some seconds, before the n-th operation on the disk, or at the n-th byte of a file."""

    seconds: float | None = None
    operation: int | None = None
    byte: int | None = None


class Took(NamedTuple):
    """Cost of a whole work: seconds as busy as the machine is, and operations on the disk."""

    seconds: float
    operations: int


def random_kill(draw: random.Random, round: int, whole: Took, size: int) -> Kill:
    """A moment anywhere in a work, the largest of whose files has `size` bytes; each kind of moment in its turn."""
    moments = (
        Kill(seconds=draw.uniform(0, whole.seconds)),
        Kill(operation=draw.randint(1, whole.operations)),
        Kill(byte=draw.randint(0, size)),
    )
    return moments[round % len(moments)]


@cache
def _serve() -> None:
    _CONTEXT.set_forkserver_preload(["warm"])
    with pytest.MonkeyPatch.context() as patch:  # Python 3.11 forgets to tell the server where to look
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()


def start(work: Work, folder: Path, kill: Kill = Kill(), took: Any = None) -> Any:
    _serve()
    process = _CONTEXT.Process(target=_live, args=(work, folder, kill, took))
    process.start()
    return process


def die(work: Work, folder: Path, kill: Kill) -> bool:
    """Begin the work and end it at that moment. False if it was done before."""
    process = start(work, folder, kill)
    if kill.seconds is not None:
        process.join(kill.seconds)
        process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL, -signal.SIGXFSZ), "it ended by itself: see its traceback above"
    return process.exitcode != 0


def finish(work: Work, folder: Path) -> Took:
    """Do the work to its end."""
    took = _CONTEXT.Array("d", 2)
    process = start(work, folder, took=took)
    process.join()
    assert process.exitcode == 0, "see its traceback above"
    return Took(took[0], round(took[1]))


def _live(work: Work, folder: Path, kill: Kill, took: Any) -> None:
    torch.set_num_threads(1)
    os.fsync = lambda _: None  # against power cuts: a kill leaves what was written
    if kill.byte is not None:  # the kernel cuts the write off there, and ends who writes on
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (kill.byte, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    count = 0

    def count_operations(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        # Within rmtree paths are relative to a folder that is open.
        if event in _OPERATIONS and (str(arguments[0]).startswith(str(folder)) or event in ("os.remove", "os.rmdir")):
            count += 1
            if count == kill.operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count_operations)
    begun = time.monotonic()
    work(folder)
    if took is not None:
        took[:] = time.monotonic() - begun, count


# ---- the works ------------------------------------------------------------------------------------------------------


class Source:
    """Activation rows that cost nothing, by document and position, with what harvest asks of a model."""

    d_in = D
    block_rows = (BLOCK,) * BLOCKS
    n_rows = BLOCK * BLOCKS
    identity: dict[str, Any] = {"model": "none", "d_in": D, "dtype": "float32"}  # noqa: RUF012
    windows = SimpleNamespace(names=("a", "b"))

    def rows(self, i: int) -> Rows:
        generator = torch.Generator().manual_seed(i)
        planted = torch.randn(30, D, generator=torch.Generator().manual_seed(99))
        code = torch.rand(BLOCK, 30, generator=generator) * (torch.rand(BLOCK, 30, generator=generator) < 0.1)
        numbers = torch.arange(BLOCK, dtype=torch.int32)
        return Rows(code @ planted, numbers % 2, numbers)


def harvest_all(folder: Path) -> None:
    harvest(Source(), folder)  # type: ignore[arg-type]  # all that it asks for


def joint(seed: int = 3) -> fastsae.JointSAE:
    torch.manual_seed(seed)
    return fastsae.JointSAE(D, M, K, d_embedding=6)


def train(folder: Path) -> None:
    """A run with all that a checkpoint must carry: moments, schedule, dropout, counters of dead features, position."""
    trainer(folder / "run").fit(ActivationStream(ActivationStore(folder / "store"), 32, 2 * BLOCK))


def trainer(run_dir: Path | None, **changes: Any) -> Trainer:
    options: dict[str, Any] = {
        "steps": 10,
        "lr": 1e-2,
        "normalize_rows": 64,
        "auxk": 4,
        "dead_after_tokens": 64,
        "warmup_steps": 3,
        "decay_steps": 4,
        "clip_grad_norm": 0.1,
        "k_anneal_from": 8,
        "k_anneal_steps": 5,
        "log_every": 1,
        "checkpoint_every": 1,
        "progress": False,
        "resume": True,
    }
    return Trainer(joint(), fastsae.TrainerConfig(run_dir=run_dir, **options | changes))


def save_again_and_again(folder: Path) -> None:
    """One SAE over another; both have the same shape, and files of the same size."""
    for seed in (1, 2) * 4:
        joint(seed).save_pretrained(folder)


def measure(folder: Path) -> None:
    """Three stages of a measurement of an SAE, each kept when it is done, and what they come to."""
    folder.mkdir(exist_ok=True)
    sae, source, parts = joint(), Source(), Parts(folder, {"sae": 3})
    rows = {f"stage {n}": source.rows(n) for n in range(3)}
    found = {
        name: parts.stage(
            name,
            lambda part=part: reconstruction(sae, [part], source.windows.names),
            lambda r: (r.sums, {"dead_share": r.dead_share}),
            lambda sums, numbers: of_sums(sums, **numbers),
        )
        for name, part in rows.items()
    }
    files.write_json(folder / "eval.json", record.plain(found))
    parts.remove()


def train_or_be_refused(folder: Path) -> None:
    _or_be_refused(train, folder)


def harvest_or_be_refused(folder: Path) -> None:
    _or_be_refused(harvest_all, folder)


def _or_be_refused(work: Work, folder: Path) -> None:
    try:
        work(folder)
    except RuntimeError as error:
        if "another process is writing into" not in str(error):
            raise


def may_not_write(folder: Path) -> None:
    """Check the errors for a user without rights to the folder. (Root has all rights: it becomes nobody.)"""
    with tempfile.TemporaryDirectory() as elsewhere:  # nobody may read the interpreter either: what is imported late
        _into(train, Path(elsewhere) / "run")
        harvest_all(Path(elsewhere) / "store")
    os.chdir(folder)  # the folders above belong to others
    if os.getuid() == 0:
        os.setuid(65534)
    here = Path()
    for work, where in ((train, "run"), (harvest_all, "")):
        for name in (where, f"{where}/new" if where else "new"):
            with pytest.raises(OSError, match=rf"cannot write into {name or '.'}: Permission denied"):
                work(here) if work is train and name == where else _into(work, here / name)
    with pytest.raises(OSError, match=r"Permission denied: .*new"):
        joint().save_pretrained("new")
    assert ActivationStore("store").n_rows == BLOCK * BLOCKS
    fastsae.load("sae")  # whoever may read the folder may read the files


def _into(work: Work, folder: Path) -> None:
    if work is train:
        trainer(folder).fit([torch.randn(8, D)])
    else:
        work(folder)


def refuse_what_is_huge(folder: Path) -> None:
    """Each SAE, store and file of weights below the folder claims to be huge; there is memory for none of them."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 2**28, held + 2**28))
    with pytest.raises(RuntimeError, match="allocate"):
        torch.zeros(2**28)
    cases = sorted(folder.iterdir())
    assert len(cases) >= 8
    for path in cases:
        with pytest.raises(ValueError, match=path.name) as caught:
            ActivationStore(path) if (path / "index.json").exists() else convert.read(path)
        assert "allocate" not in str(caught.value), "it was tried"


def weights(sae: Any) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in sae.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but what only says that it is in use."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


def steps(run_dir: Path) -> Iterator[int]:
    import json

    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        yield json.loads(line)["step"]
