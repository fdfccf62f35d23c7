"""A rank that is killed ends the run within seconds, with an error that says what to do; and the run goes on."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from ranked import D, activations, trained
from torch import Tensor

import fastsae
from fastsae import checkpoint, files
from fastsae.activations.store import Rows, StoreWriter

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SCRIPT = """
import os, signal, sys
from ranked import activations, config, new
from fastsae import Trainer, distributed

run_dir, killed_at = sys.argv[1], int(sys.argv[2])

def stream(rank):
    for i, x in enumerate(activations()):
        if i == killed_at and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield x

ranks = distributed.start(2)
sae = distributed.shard(new("joint"), ranks)
Trainer(sae, config(run_dir=run_dir, steps=8, checkpoint_every=2, resume=True)).fit(stream(ranks.rank))
"""


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


def test_a_killed_rank(two, tmp_path):
    script, run_dir = tmp_path / "train.py", tmp_path / "run"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in ("0", "1"):  # without torchrun, which would end the others itself
        own = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        ranks.append(
            subprocess.Popen(
                [sys.executable, script, run_dir, "5"], env=environment() | own, stderr=subprocess.PIPE, text=True
            )
        )
    ranks[1].wait(120)
    died = time.monotonic()
    _, said = ranks[0].communicate(timeout=60)
    assert time.monotonic() - died < 30
    assert ranks[0].returncode == 1
    assert "rank 0 of 2: another rank does not answer. It has died, or hangs" in said
    assert f"go on from {run_dir} with resume" in said
    assert checkpoint.folders(run_dir)[0].name == "step_00000004"

    options = {"steps": 8, "checkpoint_every": 2}
    resumed = two(trained, "joint", 2, options | {"run_dir": run_dir, "resume": True})
    for ours, straight in zip(resumed, two(trained, "joint", 2, options), strict=True):
        assert [line["step"] for line in ours["lines"]] == [5, 6, 7, 8]
        assert [n for n, t in straight["weights"].items() if not torch.equal(ours["weights"][n], t)] == []


def test_a_killed_rank_under_torchrun(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [*TORCHRUN, tmp_path / "train.py", tmp_path / "run", "5"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    told = done.stderr.split("Root Cause")[1]
    assert re.search(r"rank +: 1 \(local_rank: 1\)", told)
    assert "Signal 9 (SIGKILL)" in told
    assert checkpoint.folders(tmp_path / "run")[0].name == "step_00000004"


def holding(run_dir: Path, steps: int) -> str:
    """Ranks train; meanwhile one that does not hold the lock tries to take it, as another run would."""

    def stream() -> Iterator[Tensor]:
        for i, x in enumerate(activations()):
            if i == 2 and torch.distributed.get_rank() == 1:
                with files.locked(run_dir, "another run"):
                    pass
            yield x

    try:
        trained("topk", 2, {"run_dir": run_dir, "steps": steps}, stream=stream())
    except RuntimeError as error:
        return str(error)
    return "not refused"


def test_two_runs_in_one_folder(two, tmp_path):
    run_dir = tmp_path / "run"
    assert f"another run: another process is writing into {run_dir}; wait for it" in two(holding, run_dir, 4)[1]
    with files.locked(run_dir, "test"):
        for said in two(holding, run_dir, 4):
            assert f"Trainer: another process is writing into {run_dir}; wait for it" in said
    # The first run was stopped by the second's error, with what it had trained saved; the second wrote nothing.
    assert [p.name for p in checkpoint.folders(run_dir)] == ["step_00000002"]


def test_the_command_line_under_torchrun(tmp_path):
    command = "train joint --feature-ranks 2 --d-embedding 8 --tokens 3000 --context 64 --batch-size 64"
    options = "--buffer-rows 1000 --d-sae 128 --k 8 --no-progress --steps 3 --run-dir run --store acts"
    done = subprocess.run(
        [*TORCHRUN, "-m", "fastsae.cli", *command.split(), *options.split()],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "torchao" not in done.stderr  # which warns of its own libraries, if it is installed
    assert done.stdout.count("Trained 3 steps: FVU ") == done.stdout.count("The SAE lies in run/sae.") == 1
    assert fastsae.load(tmp_path / "run" / "sae").V.shape == (128, 8)
    (newest,) = checkpoint.folders(tmp_path / "run")
    assert len(list(newest.glob("shard-*.safetensors"))) == 2


def test_the_script_of_the_page_and_what_comes_after(tmp_path):
    script, after = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "distributed.md").read_text(), re.DOTALL)
    for name, on_the_page, small in (
        ("script", "features=4", "features=2"),
        ("script", "d_sae=65536, k=32", "d_sae=64, k=4"),
        ("script", "batch_size=2048", "batch_size=16"),
        ("script", "steps=1000", "steps=3, normalize_rows=32"),
        ("after", "step_00001000", "step_00000003"),
    ):
        text = script if name == "script" else after
        assert on_the_page in text
        text = text.replace(on_the_page, small)
        script, after = (text, after) if name == "script" else (script, text)
    writer = StoreWriter(tmp_path / "activations", {"d_in": D}, ["a"])
    writer.write(0, Rows(torch.randn(200, D), *torch.zeros(2, 200, dtype=torch.int32).unbind()))
    writer.finish([200])
    (tmp_path / "script.py").write_text(script)
    (tmp_path / "after.py").write_text(after)
    for command in ([*TORCHRUN, "script.py"], [sys.executable, "after.py"]):
        done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    ours, saved = fastsae.load(tmp_path / "sae"), fastsae.load(tmp_path / "runs" / "script" / "sae")
    assert ours.W_dec.shape == (64, D)
    assert all(torch.equal(t, saved.state_dict()[name]) for name, t in ours.state_dict().items())
