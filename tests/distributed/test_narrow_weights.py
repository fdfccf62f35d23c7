"""bf16 weights and 8-bit moments on several ranks: ranks stay equal, losses end where those of one process do, and a
checkpoint is the same moments whoever reads it."""

import functools
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ranked import Recording, config, whole
from test_narrow import BF16, activations, each_choice, joint, topk
from torch import Tensor

import fastsae
from fastsae import checkpoint, distributed, narrow
from fastsae.distributed import parts

MAKERS = {"topk": topk, "joint": joint}
EVERYTHING = {"auxk": 4, "dead_after_tokens": 512, "clip_grad_norm": 0.05, "unit_norm_decoder": True}


def trained(name: str, features: int, dtype: torch.dtype, options: dict[str, Any], batches: int = 1000):
    """A run on this process, alone (features = 0) or as a rank of a layout."""
    sae = MAKERS[name](dtype)
    if features:
        sae = distributed.shard(sae, distributed.start(features))
    trainer = Recording(sae, config(**options))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "activations ended")
        trainer.fit(itertools.islice(activations(), batches))
    state = {f"{kind}/{p}": t for p, q in sae.named_parameters() for kind, t in trainer._optimizer.state[q].items()}
    return {
        "lines": trainer.lines,
        "weights": dict(sae.state_dict()),
        "counters": trainer._rows_since_fired[:-1],
        "state": state,
    }


@each_choice
@pytest.mark.parametrize("features", [1, 2])
def test_losses_end_where_those_of_one_process_do(two, features, dtype, state):
    """In bf16, gradients of data ranks and partial sums of feature ranks are rounded once more."""
    options = {"steps": 200, "lr": 2e-3, "optimizer_state": state, "log_every": 1, "normalize": "scale"}
    results = two(trained, "topk", features, dtype, options)
    whole(results, features)  # asserts that ranks with the same part hold the same bits
    lines = results[0]["lines"]
    assert last_losses(lines) < 0.3 * lines[0]["loss"]
    assert last_losses(lines) == pytest.approx(of_one_process(dtype, *options.items()), rel=0.02)


def last_losses(lines) -> float:
    return sum(line["loss"] for line in lines[-50:]) / 50


@functools.cache
def of_one_process(dtype, *options) -> float:
    return last_losses(trained("topk", 0, dtype, dict(options))["lines"])


@each_choice
def test_a_checkpoint_is_read_by_any_number_of_ranks(two, four, tmp_path, dtype, state):
    options = EVERYTHING | {"steps": 6, "optimizer_state": state, "normalize_rows": 256}
    straight = four(trained, "joint", 2, dtype, options | {"run_dir": tmp_path / "straight"})
    four(trained, "joint", 2, dtype, options | {"run_dir": tmp_path / "cut"}, 3)
    resumed = four(trained, "joint", 2, dtype, options | {"run_dir": tmp_path / "cut", "resume": True})
    for ours, theirs in zip(resumed, straight, strict=True):
        assert ours["lines"] == theirs["lines"][3:]
        for part in ("weights", "state"):
            assert [n for n, t in theirs[part].items() if not torch.equal(ours[part][n], t)] == []
    (last, *_) = checkpoint.folders(tmp_path / "straight")
    read = checkpoint.read(last)  # by one process
    for group in (straight[:2], two(read_as, last)):  # the ranks of one SAE
        for name, t in (read.tensors | read.weights).items():
            if "rng" not in name:
                every = [(r["state"] | r["weights"] | {"rows_since_fired": r["counters"]})[name] for r in group]
                found = torch.cat(every) if parts.by_feature(name) else every[0]
                assert torch.equal(found.reshape(t.shape), t), name
    kept = [n for n, t in read.tensors.items() if t.dtype is torch.uint8 and "codes" in n]
    assert sorted(kept) == ([] if state == "fp32" else sorted(expected_codes(read.weights)))


def read_as(folder: Path) -> dict[str, Any]:
    found = checkpoint.read(folder, distributed.start(2))
    return {"state": found.tensors, "weights": found.weights, "counters": found.tensors["rows_since_fired"]}


def expected_codes(weights: dict[str, Tensor]) -> list[str]:
    return [
        f"{moment}_codes/{n}" for n, t in weights.items() if narrow.is_quantised(t.shape) for moment in narrow._MOMENTS
    ]


def test_one_process_goes_on_from_many(four, tmp_path):
    """Rounded otherwise from there on, and no worse."""
    options = {"steps": 120, "lr": 2e-3, "optimizer_state": "8bit", "normalize": "scale"}
    alone = trained("topk", 0, BF16, options)
    four(trained, "topk", 4, BF16, options | {"run_dir": tmp_path}, 60)
    ends = trained("topk", 0, BF16, options | {"run_dir": tmp_path, "resume": True})
    assert [line["step"] for line in ends["lines"]] == list(range(61, 121))
    losses = [sum(line["loss"] for line in run["lines"][-30:]) / 30 for run in (alone, ends)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_to_consolidate_reads_no_moments(two, tmp_path, monkeypatch):
    two(trained, "joint", 2, BF16, {"steps": 2, "run_dir": tmp_path / "run"})
    (last,) = checkpoint.folders(tmp_path / "run")
    found: dict[str, Tensor] = {}
    read = parts.read
    monkeypatch.setattr(parts, "read", lambda *given: found.update(read(*given)) or found)
    sae = fastsae.load(distributed.consolidate(last, tmp_path / "sae"))
    assert found.keys() == sae.state_dict().keys()
