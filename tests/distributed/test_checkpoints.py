"""Checkpoints of ranks: written whole or not at all, read by any number of ranks, and resumed to the same bits."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ranked import Recording, activations, assert_equal_to_rounding, config, new, trained, whole

import fastsae
from fastsae import checkpoint, distributed, files

EVERYTHING = {"auxk": 5, "dead_after_tokens": 24, "clip_grad_norm": 0.05, "unit_norm_decoder": True, "steps": 6}


def cut(name: str, features: int, run_dir: Path, after: int, options: dict[str, Any]) -> None:
    """A run whose activations end before it does."""
    sae = new(name)
    if features:
        sae = distributed.shard(sae, distributed.start(features))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Recording(sae, config(**options, run_dir=run_dir)).fit(activations(after))


def gone_on_with(name: str, features: int, run_dir: Path, options: dict[str, Any]) -> dict[str, Any]:
    return trained(name, features, options | {"run_dir": run_dir, "resume": True})


@pytest.mark.parametrize(("name", "features"), [("joint", 2), ("topk", 4), ("all", 1)])
def test_the_same_layout_goes_on_to_the_same_bits(four, tmp_path, name, features):
    four(cut, name, features, tmp_path / "cut", 3, EVERYTHING)
    assert [p.name for p in checkpoint.folders(tmp_path / "cut")] == ["step_00000003"]
    resumed = four(gone_on_with, name, features, tmp_path / "cut", EVERYTHING)
    straight = four(trained, name, features, EVERYTHING | {"run_dir": tmp_path / "straight"})
    for a, b in zip(resumed, straight, strict=True):
        assert a["lines"] == b["lines"][3:]
        assert torch.equal(a["rng"], b["rng"])
        assert torch.equal(a["counters"], b["counters"])
        assert [n for n in a["weights"] if not torch.equal(a["weights"][n], b["weights"][n])] == []
    lines = [(p / "metrics.jsonl").read_text().splitlines() for p in (tmp_path / "cut", tmp_path / "straight")]
    assert [json.loads(line)["step"] for line in lines[0]] == [1, 2, 3, 4, 5, 6]
    saved = fastsae.load(tmp_path / "cut" / "sae").state_dict()
    for n, t in whole(straight, features).items():
        assert n == "rows_since_fired" or torch.equal(saved[n], t), n


def test_from_2_ranks_to_4_to_1_to_4(two, four, tmp_path):
    alone = trained("joint", 0, EVERYTHING)
    two(cut, "joint", 2, tmp_path, 2, EVERYTHING)  # as many as the normalisation is measured on
    four(cut_again, "joint", 2, tmp_path, 3, EVERYTHING)
    cut_again("joint", 0, tmp_path, 4, EVERYTHING)
    assert (checkpoint.folders(tmp_path)[0] / "weights.safetensors").exists()
    results = four(gone_on_with, "joint", 4, tmp_path, EVERYTHING)
    assert [line["step"] for line in results[0]["lines"]] == [5, 6]
    assert_equal_to_rounding(results, 4, alone | {"lines": alone["lines"][4:]})


def cut_again(name: str, features: int, run_dir: Path, after: int, options: dict[str, Any]) -> None:
    cut(name, features, run_dir, after, options | {"resume": True})


def test_one_process_goes_on_from_many(four, tmp_path):
    alone = trained("topk", 0, EVERYTHING)
    four(cut, "topk", 2, tmp_path, 3, EVERYTHING)
    result = gone_on_with("topk", 0, tmp_path, EVERYTHING)
    assert_equal_to_rounding([result], 1, alone | {"lines": alone["lines"][3:]})


def test_consolidate(four, tmp_path):
    results = four(trained, "joint", 2, {"run_dir": tmp_path / "run"})
    last = checkpoint.folders(tmp_path / "run")[0]
    assert sorted(p.name for p in last.iterdir())[:2] == [
        "checksums.json",
        "shard-00001-model-00001-of-00001.safetensors",
    ]
    distributed.consolidate(last, tmp_path / "sae")
    ours, saved = fastsae.load(tmp_path / "sae"), fastsae.load(tmp_path / "run" / "sae")
    assert saved.architecture == "joint"
    for name, t in whole(results, 2).items():
        if name != "rows_since_fired":
            assert torch.equal(ours.state_dict()[name], t)
            assert torch.equal(saved.state_dict()[name], t)


@pytest.mark.parametrize("at_once", [1 << 26, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_weights_are_written_too(two, tmp_path, dtype, at_once):
    results = two(saved_as, 2, tmp_path, dtype, at_once)
    sae = fastsae.load(tmp_path)
    assert sae.W_enc.dtype == dtype
    for name, t in whole(results, 2).items():
        assert name == "rows_since_fired" or torch.equal(sae.state_dict()[name], t)


def saved_as(features: int, folder: Path, dtype: torch.dtype, at_once: int) -> dict[str, Any]:
    sae = distributed.shard(new("joint", dtype=dtype), distributed.start(features))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastsae.distributed.parts._WRITTEN_AT_ONCE", at_once)
        sae.save_pretrained(folder)
    return {"weights": sae.state_dict(), "counters": torch.zeros(0)}


def test_a_damaged_part_is_named_on_every_rank(two, tmp_path):
    two(cut, "topk", 2, tmp_path, 3, {"checkpoint_every": 2})
    newest, older = checkpoint.folders(tmp_path)
    part = max(newest.glob("*.safetensors"))
    content = bytearray(part.read_bytes())
    content[-3] ^= 1
    part.write_bytes(content)
    for message in two(refused, "topk", 2, tmp_path):
        assert message == (
            f"checkpoint {newest} cannot be used: {part} is damaged: its checksum is not the one that was stored. "
            f"To resume, delete {newest} to go on from {older.name}."
        )
    part.unlink()
    for message in two(refused, "topk", 2, tmp_path):
        told = f"{newest / 'checksums.json'} is damaged: it is of other files than there are ({part.name}). To resume"
        assert told in message


def without(name: str, content: bytes) -> bytes:
    """A part that lacks a tensor, and says nothing of it."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    lo, hi = header.pop(name)["data_offsets"]
    for other in header.values():
        if "data_offsets" in other and other["data_offsets"][0] >= hi:
            other["data_offsets"] = [n - hi + lo for n in other["data_offsets"]]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[:lo] + data[hi:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[: len(b) // 2], r"shard-00001\S+ is damaged or truncated"),
        (lambda b: without("exp_avg/W_enc", b), "exp_avg/W_enc is not whole"),
        (lambda b: b.replace(b"saved_offsets", b"saved_offsetz", 1), "does not say of what it is a part"),
        (None, "is not whole"),
    ],
    ids=["cut off", "a moment of one rank", "no places", "gone"],
)
def test_parts_that_are_not_whole_are_refused_whatever_their_checksums(two, tmp_path, change, message):
    two(cut, "topk", 2, tmp_path, 3, {})
    (folder,) = checkpoint.folders(tmp_path)
    part = min(folder.glob("*.safetensors"))
    if change:
        part.write_bytes(change(part.read_bytes()))
    else:
        part.unlink()
    sums = {p.name: files.crc32(p) for p in folder.iterdir() if p.name != "checksums.json"}
    files.write_json(folder / "checksums.json", sums)
    for said in [*two(refused, "topk", 2, tmp_path), refused("topk", 0, tmp_path)]:
        assert re.search(message, said), said
        assert said.startswith(f"checkpoint {folder} cannot be used")


def refused(name: str, features: int, run_dir: Path) -> str:
    try:
        gone_on_with(name, features, run_dir, {})
    except (ValueError, OSError, RuntimeError) as error:
        return str(error)
    return "not refused"


def test_files_are_those_that_the_first_rank_sees(two, tmp_path):
    """A folder on a network does not show at once to all ranks the files that one has just written."""
    assert two(looked_at, tmp_path) == [dict.fromkeys("abc", tmp_path.name)] * 2


def looked_at(folder: Path) -> dict[str, str]:
    seen = ["a", "c"] if torch.distributed.get_rank() else ["a", "b", "c"]
    return distributed.start(2).on_files(folder, seen, lambda path: path.parent.name)


def test_ranks_that_no_longer_agree_are_found_out(four, tmp_path):
    messages = four(moved, tmp_path)
    assert all("W1 of rank 1 is no longer that of the others" in m for m in messages), messages
    assert checkpoint.folders(tmp_path) == []


def moved(run_dir: Path) -> str:
    ranks = distributed.start(2)
    trainer = Recording(distributed.shard(new("joint"), ranks), config(run_dir=run_dir, steps=1))
    step = trainer._train_step

    def spoiled(x):
        result = step(x)
        if ranks.rank == 1:
            trainer.sae.W1.data[0, 0] += 1e-12
        return result

    trainer._train_step = spoiled
    try:
        trainer.fit(activations())
    except RuntimeError as error:
        return str(error)
    return "not noticed"


def test_a_rank_that_cannot_write_stops_all_and_leaves_the_last_good_one(two, tmp_path):
    two(cut, "topk", 2, tmp_path, 2, {"steps": 4})
    messages = two(cannot_write, tmp_path)
    for message in messages:
        assert "could not write checkpoint" in message
        assert "the last good checkpoint is" in message
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


def cannot_write(run_dir: Path) -> str:
    import resource

    ranks = distributed.start(2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    trainer = Recording(
        distributed.shard(new("topk"), ranks), config(run_dir=run_dir, resume=True, steps=4, log_every=100)
    )
    if ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        trainer.fit(activations())
    except OSError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return "written"
