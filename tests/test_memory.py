"""Memory: what `fastsae plan` counts is what training holds, and a store is read that does not fit it."""

import dataclasses
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastsae
from benchmarks import narrow as quality
from benchmarks.machine import newest
from fastsae import planner
from fastsae.config import TrainerConfig
from fastsae.optim import AdamInBackward
from fastsae.planner import MEMORY
from fastsae.train import Trainer

ROOT = Path(__file__).parents[1]
SAES: dict[str, Callable[[torch.dtype], fastsae.TopKSAE]] = {
    "topk": lambda dtype: fastsae.TopKSAE(96, 300, 4, dtype=dtype),
    "joint": lambda dtype: fastsae.JointSAE(769, 90, 4, d_embedding=70, pre_bias=True, dtype=dtype),
}


def held(tensors) -> int:
    return sum(t.numel() * t.itemsize for t in tensors)


@pytest.mark.parametrize("memory", [m for m in MEMORY if not m.adam_in_backward], ids=lambda m: m.name)
@pytest.mark.parametrize("make", SAES.values(), ids=SAES)
def test_bytes_counted_are_bytes_held(make, memory):
    sae = make(memory.dtype)
    trainer = Trainer(sae, TrainerConfig(steps=1, progress=False, optimizer_state=memory.optimizer_state))
    trainer._train_step(torch.randn(32, sae.d_in).to(memory.dtype))
    state = [t for p in sae.parameters() for name, t in trainer._optimizer.state[p].items() if name != "step"]
    p = planner.plan(sae.config, 32, memory=memory)
    assert held(sae.parameters()) == p.weights_bytes
    assert held(q.grad for q in sae.parameters()) == p.gradients_bytes
    assert held(state) == p.optimizer_bytes


@pytest.mark.parametrize("memory", [m for m in MEMORY if m.adam_in_backward], ids=lambda m: m.name)
@pytest.mark.parametrize("make", SAES.values(), ids=SAES)
def test_bytes_counted_of_adam_in_the_backward(make, memory):
    """Its states; that it holds no gradients is tested with its kernels."""
    sae = make(memory.dtype)
    optimizer = AdamInBackward(sae.parameters())
    sae(torch.randn(32, sae.d_in).to(memory.dtype)).loss.backward()
    optimizer.step()
    p = planner.plan(sae.config, 32, memory=memory)
    state = [t for q in sae.parameters() for name, t in optimizer.state[q].items() if name != "step"]
    assert held(state) == p.optimizer_bytes
    large = ("W_enc", "W_dec", "W_lin", "V")
    assert held(q for name, q in sae.named_parameters() if name not in large) == p.gradients_bytes


@pytest.mark.parametrize("memory", MEMORY, ids=lambda m: m.name)
def test_the_largest_that_fits_is_the_largest(memory):
    config = fastsae.JointSAEConfig(768, 1024, 32)
    d_sae = planner.largest(config, 24e9, 4096, memory)
    assert d_sae is not None
    assert d_sae % 1024 == 0
    taken = [planner.on_gpu(dataclasses.replace(config, d_sae=n), 24e9, 4096, memory) for n in (d_sae, d_sae + 1024)]
    assert taken[0] <= planner.USABLE * 24e9 < taken[1]


@pytest.mark.parametrize("memory", MEMORY, ids=lambda m: m.name)
def test_ranks_that_share_the_features_hold_a_part_each(memory):
    """Tensors that every rank holds whole, b_dec and the network over z, are counted on each."""
    config = fastsae.JointSAEConfig(768, 8192, 32, d_embedding=64, pre_bias=True)
    alone, shared = (planner.plan(config, 512, memory=memory, feature_ranks=n) for n in (1, 4))
    each = {"W_enc", "b_enc", "W_dec", "W_lin", "V"}
    assert shared.parameters == {n: size // 4 if n in each else size for n, size in alone.parameters.items()}
    held = planner.plan(dataclasses.replace(config, d_sae=2048), 512, memory=memory)
    for name in ("weights_bytes", "gradients_bytes", "optimizer_bytes", "pre_activations_bytes"):
        assert getattr(shared, name) == getattr(held, name), name
    assert shared.activations_bytes - held.activations_bytes == 32 * 512 * 4 * 32  # what all ranks offer for each row
    d_sae = planner.largest(config, 24e9, 4096, memory, feature_ranks=4)
    taken = [
        planner.on_gpu(dataclasses.replace(config, d_sae=n), 24e9, 4096, memory, feature_ranks=4)
        for n in (d_sae, d_sae + 4096)
    ]
    assert taken[0] <= planner.USABLE * 24e9 < taken[1]


def test_what_is_assumed_of_a_gpu():
    """92 % of it can be used, and pre-activations take 3 % of it at most."""
    fits = fastsae.TopKSAEConfig(64, 1024, 4, pre_bias=False)
    for rows, pre_activations in ((16, 16 * 1024 * 4), (2048, 0.03 * 1e7)):
        p = planner.plan(fits, rows)
        held = 16 * (2 * 64 * 1024 + 1024) + p.activations_bytes
        assert planner.on_gpu(fits, 1e7, rows, MEMORY[0]) == held + pre_activations
    assert planner.USABLE == 0.92  # as docs/memory.md says


def test_nothing_fits_a_small_gpu():
    assert planner.largest(fastsae.TopKSAEConfig(4096, 1024, 32), 1e7, 2048, MEMORY[0]) is None
    wide = planner.largest(fastsae.TopKSAEConfig(64, 4096, 2000), 24e9, 64, MEMORY[0])
    assert wide is not None
    assert wide >= 2048


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


TRAIN = """
    import resource, torch, fastsae
    def peak():
        return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
    def activations(d_in, dtype):
        while True:
            yield torch.randn(256, d_in)
    def train(d_in, d_sae, dtype, state):
        sae = fastsae.TopKSAE(d_in, d_sae, 8, dtype=dtype)
        config = fastsae.TrainerConfig(steps=2, progress=False, optimizer_state=state, normalize="none")
        fastsae.Trainer(sae, config).fit(x.to(dtype) for x in activations(d_in, dtype))
    torch.set_num_threads(1)
    dtype, state = getattr(torch, {dtype!r}), {state!r}
    train(64, 4096, dtype, state)  # imports and workspaces
    before = peak()
    train(512, 24576, dtype, state)
    print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's high-water mark; there is none elsewhere")
@pytest.mark.parametrize(
    "memory", [m for m in MEMORY if not m.adam_in_backward and "fp32 weights, 8" not in m.name], ids=lambda m: m.name
)
def test_peak_of_a_process_is_what_was_counted(memory):
    """403 MB in fp32, 302 with bf16 weights, 153 with 8-bit moments too, and what is used at once on the way."""
    p = planner.plan(fastsae.TopKSAEConfig(512, 24576, 8), 256, memory=memory)
    counted = p.weights_bytes + p.gradients_bytes + p.optimizer_bytes
    measured = int(run(TRAIN.format(dtype=str(memory.dtype)[6:], state=memory.optimizer_state)))
    # Measured on the way of a bf16 gradient on a CPU, which sums in fp32: 7.5 bytes per entry of one matrix.
    on_the_way = 8 * p.parameters["W_enc"] if memory.dtype is torch.bfloat16 else 0
    counted_at_once = counted + p.pre_activations_bytes + p.activations_bytes + on_the_way
    assert 0.9 * counted < measured < counted_at_once + 60e6


STORE = """
    import sys, torch, fastsae
    from pathlib import Path
    from fastsae.activations import ActivationStore, ActivationStream
    from fastsae.activations.store import Rows, StoreWriter
    def peak():
        return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
    torch.set_num_threads(1)
    shard, count, d_in = 8192, 40, 256
    writer = StoreWriter(Path({folder!r}), {{"d_in": d_in}}, ["a"])
    rows = Rows(torch.randn(shard, d_in), *torch.zeros(2, shard, dtype=torch.int32).unbind())
    for i in range(count):
        writer.write(i, rows)
    writer.finish([shard] * count)
    def train(steps):
        sae = fastsae.TopKSAE(d_in, 512, 8)
        stream = ActivationStream(ActivationStore(Path({folder!r})), 1024, buffer_rows=16384, epochs=1)
        config = fastsae.TrainerConfig(steps=steps, progress=False)
        return fastsae.Trainer(sae, config).fit(stream).steps
    train(1)
    before = peak()
    assert train(320) == 320
    print(shard * count * d_in * 4, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's high-water mark; there is none elsewhere")
def test_a_store_several_times_larger_than_what_may_be_held(tmp_path):
    """336 MB, every row of which is trained on through a buffer of 17 MB."""
    size, taken = map(int, run(STORE.format(folder=str(tmp_path / "store"))).split())
    assert size > 300e6
    assert taken < size / 4


def test_plan_says_what_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    from fastsae import cli

    words = "fastsae plan topk --d-in 1024 --d-sae 65536 --k 64 --gpu-memory-gb 12 80"
    monkeypatch.setattr(sys, "argv", words.split())
    cli.main()
    out = capsys.readouterr().out
    config = fastsae.TopKSAEConfig(1024, 65536, 64)
    for memory in MEMORY:
        (counted,) = (line for line in out.splitlines() if re.match(rf"{memory.name} .*MiB|{memory.name} .*256", line))
        assert f"{planner.plan(config, memory=memory).total_bytes / 2**20:,.0f}" in counted
        (fitting,) = (line for line in out.splitlines() if line.startswith(memory.name) and line != counted)
        sizes = fitting.removesuffix(memory.flags).split()
        assert sizes[-2:] == [f"{planner.largest(config, gb * 1e9, 2048, memory):,}" for gb in (12, 80)]
    monkeypatch.setattr(sys, "argv", [*words.split(), "--feature-ranks", "4", "--data-ranks", "2"])
    cli.main()
    out = capsys.readouterr().out
    assert MEMORY[1].name not in out  # holds no gradients to add up
    config = fastsae.TopKSAEConfig(1024, 65536, 64)
    for memory in (MEMORY[0], MEMORY[-1]):
        counted, fitting = (line for line in out.splitlines() if line.startswith(memory.name))
        assert counted.split()[-1] == f"{planner.plan(config, 1024, 1, memory, 4).total_bytes / 2**20:,.0f}"
        assert fitting.removesuffix(memory.flags).split()[-1] == f"{planner.largest(config, 80e9, 1024, memory, 4):,}"
    monkeypatch.setattr(sys, "argv", [*words.split()[:-2], "0"])
    with pytest.raises(SystemExit, match="expected sizes above 0"):
        cli.main()


def test_the_page_shows_what_was_measured():
    found = newest("narrow")
    measured = [quality.Case(r["architecture"], r["choice"], r["seed"]) for r in found["runs"]]
    assert sorted(measured) == sorted(quality.cases())
    assert found["settings"] == quality.SETTINGS
    assert quality.told(found) in (ROOT / quality.PAGE).read_text()
