"""Every file that is read, damaged in every way: it is named, or it does no harm, and there is no traceback.

Bytes are cut off, flipped and zeroed; values become others of another kind, vanish, or claim to be huge. What can be
noticed only by a checksum is noticed by it: weights, checkpoints and shards are never taken for others.
"""

import copy
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import victims
from safetensors.torch import load_file, save_file
from victims import same, weights

import fastsae
from fastsae import checkpoint, experiment, files, provenance, report
from fastsae.activations import ActivationStore, ActivationStream
from fastsae.config import DataConfig, FactorialConfig
from fastsae.evaluate import record
from fastsae.factorial import run_factorial
from fastsae.integrations import convert
from fastsae.report import figures

# What the command line prints without a traceback.
TOLD = (OSError, ValueError, RuntimeError)
ODD: list[Any] = [None, "x", -1, 0.5, 10**12, 10**30, 1e308, float("nan"), True, [], {}, [[]], {"x": None}, "../../x"]


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch):
    """Skip flushing: its use cannot be seen here, and it takes most of the time on a busy disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def bytes_damaged(content: bytes, draw: random.Random, n: int) -> Iterator[bytes]:
    yield b""
    yield content[:-1]
    yield content + content
    for _ in range(n):
        yield content[: draw.randrange(len(content))]
        place = draw.randrange(len(content))
        yield content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]
        end = min(len(content), place + draw.randint(1, 512))  # a page that never reached the disk
        yield content[:place] + bytes(end - place) + content[end:]
    for other in ("null", "[]", "{}", '"x"', "3", "NaN", "[" * 100_000, '{"a":' * 100_000, "\xff", "[[], {}]"):
        yield other.encode("latin1")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value within a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield (*path, key)
        yield from places(part, (*path, key))


def values_damaged(value: Any, draw: random.Random, n: int) -> Iterator[Any]:
    """Yield n copies of a value, each with one place removed or filled with a value of another kind."""
    chosen = list(places(value))
    for *way, last in draw.sample(chosen, min(n, len(chosen))):
        damaged = copy.deepcopy(value)
        inner = damaged
        for key in way:
            inner = inner[key]
        if draw.random() < 0.2:
            del inner[last]
        else:
            inner[last] = draw.choice(ODD)
        yield damaged


def assert_told(read: Callable[[], Any], names: str, harmless: Callable[[Any], bool] = lambda _: True) -> bool:
    """Reading gives what was there before, or an error of one line that names the file. Whether it was an error."""
    try:
        found = read()
    except TOLD as error:
        told = error
    else:
        assert harmless(found), "the damage was not noticed"
        return False
    assert not isinstance(told, RecursionError | NotImplementedError | UnicodeError), repr(told)
    assert re.search(names, str(told)), f"nothing of {names} in: {told!r}"
    return True


def damage(path: Path, draw: random.Random, n: int) -> Iterator[None]:
    """The file in ever other states, and at the end as it was."""
    content = path.read_bytes()
    for damaged in bytes_damaged(content, draw, n):
        path.write_bytes(damaged)
        yield
    if path.suffix == ".json":
        for value in values_damaged(json.loads(content), draw, 4 * n):
            path.write_text(json.dumps(value))
            yield
    path.write_bytes(content)


# ---- a saved SAE ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: fastsae.TopKSAE(6, 20, 3), victims.joint], ids=["topk", "joint"])
def test_a_saved_sae(make, tmp_path, times):
    sae, draw = make(), random.Random(0)
    sae.save_pretrained(tmp_path)
    for name in ("weights.safetensors", "config.json"):
        noticed = [
            assert_told(
                lambda: fastsae.load(tmp_path),
                r"config\.json|weights\.safetensors|holds architecture",
                lambda found: same(weights(found), weights(sae)) and found.config == sae.config,
            )
            for _ in damage(tmp_path / name, draw, 15 * times)
        ]
        assert sum(noticed) > 0.9 * len(noticed)
    assert_told(lambda: fastsae.load(tmp_path), "never")


def test_a_bit_that_makes_another_k(tmp_path):
    path = fastsae.TopKSAE(6, 20, 3).save_pretrained(tmp_path) / "config.json"
    content = path.read_text()
    path.write_text(content.replace('"k": 3', '"k": 2'))
    with pytest.raises(ValueError, match=r"config\.json is damaged: its config is not the one that was saved"):
        fastsae.load(tmp_path)
    path.write_text(re.sub(r'\s*"config_crc32": \d+,', "", content))  # as it was written before there was one
    assert fastsae.load(tmp_path).k == 3


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_of(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    victims.harvest_all(folder / "store")
    victims.train(folder)
    return folder


@pytest.fixture
def there(run_of, tmp_path) -> Path:
    """A copy of a run to be damaged."""
    shutil.copytree(run_of / "run", tmp_path / "run")
    (tmp_path / "store").symlink_to(run_of / "store")
    return tmp_path


def resumed(folder: Path, steps: int = 10) -> Any:
    stream = ActivationStream(ActivationStore(folder / "store"), 32, 2 * victims.BLOCK)
    trainer = victims.trainer(folder / "run", steps=steps)
    trainer.fit(stream)
    return trainer.sae


def test_a_checkpoint(there, times):
    folder, draw = checkpoint.folders(there / "run")[0], random.Random(1)
    for path in sorted(folder.iterdir()):
        for _ in damage(path, draw, 10 * times):
            assert_told(
                lambda: checkpoint.load(there / "run"),
                rf"checkpoint {folder} cannot be used: .*delete {folder} to go on from step_00000009",
                lambda found: found.state["step"] == 10,  # spaces between values became other spaces
            )
    whole = fastsae.load(there / "run" / "sae")
    (folder / "state.json").write_text("{")
    shutil.rmtree(folder)  # as it says
    assert same(weights(resumed(there)), weights(whole))


def seal(folder: Path) -> None:
    """Whoever changes a checkpoint on purpose can make its checksums fit."""
    kept = [p for p in sorted(folder.iterdir()) if p.name != "checksums.json"]
    files.write_json(folder / "checksums.json", {p.name: files.crc32(p) for p in kept})


def test_a_checkpoint_that_was_changed_on_purpose(there, times):
    folder, draw = checkpoint.folders(there / "run")[0], random.Random(2)
    kept = {p: p.read_bytes() for p in folder.iterdir()}
    state = json.loads(kept[folder / "state.json"])
    for value in values_damaged(state, draw, 60 * times):
        (folder / "state.json").write_text(json.dumps(value))
        seal(folder)
        assert_told(
            lambda: resumed(there), r"state\.json|step_00000010|ActivationStream: .*position|checkpoint was made"
        )
    (folder / "state.json").write_bytes(kept[folder / "state.json"])
    for name in ("optimizer.safetensors", "weights.safetensors"):
        tensors = load_file(folder / name)
        for key, t in tensors.items():
            others = [
                t[..., :-1] if t.dim() else t.expand(3),
                t.unsqueeze(0),
                t.double(),
                t.bool(),
                t[:0] if t.dim() else None,
            ]
            for other in draw.sample(others, 2):
                changed = {k: v.clone() for k, v in tensors.items() if k != key}
                save_file(changed if other is None else changed | {key: other.contiguous()}, folder / name)
                seal(folder)
                assert_told(
                    lambda: resumed(there, steps=12), r"optimizer\.safetensors|step_00000010|another configuration"
                )
        save_file(tensors | {"exp_avg/W_none": torch.zeros(3)}, folder / name)
        seal(folder)
        assert assert_told(lambda: resumed(there), r"optimizer\.safetensors|step_00000010")
        (folder / name).write_bytes(kept[folder / name])


@pytest.mark.parametrize("name", ["epoch", "buffer", "offset"])
@pytest.mark.parametrize("value", [None, "1", -1, 0.0, True, 10**12, 10**30])
def test_a_position_that_is_none(name, value, run_of):
    """Beyond its buffer a stream would look for rows for ever."""
    stream = ActivationStream(ActivationStore(run_of / "store"), 32, 2 * victims.BLOCK, epochs=3)
    position = stream.state_dict()
    with pytest.raises(ValueError, match="ActivationStream: there is no such position"):
        stream.load_state_dict(position | {name: value})
    assert stream.state_dict() == position


# ---- a store --------------------------------------------------------------------------------------------------------


def test_a_store(tmp_path, times):
    draw = random.Random(3)
    victims.harvest_all(tmp_path)
    whole = torch.cat([*ActivationStream(ActivationStore(tmp_path), 40, 80, epochs=1)])

    def rows() -> torch.Tensor:
        return torch.cat([*ActivationStream(ActivationStore(tmp_path), 40, 80, epochs=1)])

    shard = tmp_path / "shard_00002.safetensors"
    for _ in damage(shard, draw, 15 * times):
        assert assert_told(rows, r"shard_00002\.safetensors.*Delete it and run the harvest again")
    for _ in damage(tmp_path / "index.json", draw, 30 * times):
        assert_told(
            rows, r"index\.json|shard_0000|did not finish|batch_size must be", lambda found: torch.equal(found, whole)
        )
        assert_told(lambda: victims.harvest_all(tmp_path), r"index\.json|another harvest|shards of an unknown")
    assert torch.equal(rows(), whole)


# ---- a run and its reports ------------------------------------------------------------------------------------------


def test_the_log(there, times):
    """Nothing in it keeps a run from going on, and what is drawn of it names the line."""
    path, draw = there / "run" / "metrics.jsonl", random.Random(4)
    whole, content = weights(fastsae.load(there / "run" / "sae")), path.read_bytes()
    lines = content.decode().splitlines()
    damaged = list(bytes_damaged(content, draw, 10 * times))
    for value in values_damaged(json.loads(lines[3]), draw, 12 * times):
        damaged.append("\n".join([*lines[:3], json.dumps(value), *lines[4:]]).encode())
    for each in damaged:
        path.write_bytes(each)
        assert_told(lambda: report.read_metrics(there / "run"), r"metrics\.jsonl is damaged: line \d+")
        assert same(weights(resumed(there)), whole)
        kept = [line["step"] for line in report.read_metrics(there / "run")]
        assert set(kept) <= set(range(1, 11))
    for each in damaged[:: max(1, len(damaged) // 10)]:
        path.write_bytes(each)
        assert_told(lambda: report.plot_training({"a": there / "run"}, there / "plot.png"), r"metrics\.jsonl")


@pytest.fixture
def measured(there, monkeypatch) -> Path:
    """A run with all its results."""
    import planted
    import test_factorial
    import test_html_report

    run = there / "run"
    provenance.record(fastsae.config.DataConfig(), run)
    example = test_html_report.features()["features"][0]["examples"][0]
    shares = {"together": 0.1, "together_if_independent": 0.02, "dot": 0.5, "output_change": 0.3}
    secondary = experiment.Trained(test_factorial.secondary(), DataConfig(hook=planted.HOOK), planted.joint())
    options = FactorialConfig(clamped=0, clamp=("pair:0,1",), permutations=99, directions=1, new_tokens=1)
    experiments = run_factorial(secondary, planted.Planted(), planted.stimuli(3), options, lambda *_: None)
    results = {
        "eval": test_html_report.measured(test_html_report.Numbers()),
        "geometry": test_html_report.geometry(),
        "features": test_html_report.features(),
        "pairs": {"pairs": [{"features": [3, 5], "examples": [example], **shares}]},
        "factorial-planted": experiments,
    }
    for name, result in results.items():
        record.write(run, name, result, pool="mean")
    drawn = figures.figure
    # To draw takes most of the time; whatever draws is called all the same, with axes that take anything.
    monkeypatch.setattr(figures, "figure", lambda title, draw, size=None: (draw(MagicMock()), f"<svg>{title}</svg>")[1])
    yield run
    monkeypatch.setattr(figures, "figure", drawn)


def page(run: Path) -> str:
    names = ("eval", "geometry", "features", "pairs", "factorial-planted")
    return report.write_html(run, {name: record.read(run, name) for name in names}).read_text()


@pytest.mark.parametrize("name", ["run", "data", "eval", "geometry", "features", "pairs", "factorial-planted"])
def test_what_a_report_is_made_of(name, measured, times):
    draw = random.Random(name)
    for _ in damage(measured / f"{name}.json", draw, 15 * times):
        assert_told(lambda: page(measured), rf"{name}\.json|trained on|run\.json or data\.json")
        if name == "data":
            assert_told(lambda: provenance.recorded(measured), r"data\.json|was trained on")
    assert "<svg" in page(measured)


# ---- other packages' files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["sae_lens", "dictionary_learning", "sparsify", "openai"])
def test_what_is_converted(form, tmp_path, times):
    fastsae.TopKSAE(6, 20, 3).save_pretrained(tmp_path / "ours")
    target, draw = tmp_path / form, random.Random(form)
    convert.convert(tmp_path / "ours", target, form)
    for path in [target] if target.is_file() else sorted(target.iterdir()):
        for _ in damage(path, draw, 12 * times):
            assert_told(lambda: convert.read(target), form)


# ---- a study --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study_of(tmp_path_factory) -> Path:
    import test_study

    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        test_study.only(patch, "topk", "sequential")
        test_study.started(folder, seeds=1)
    return folder


NOTES = ["config", "choice", "lr", "outcome", "done", "base"]


@pytest.mark.parametrize("name", NOTES)
def test_a_study(name, study_of, monkeypatch, times):
    import test_study

    test_study.only(monkeypatch, "topk", "sequential")
    if name in ("outcome", "done"):  # another rate in one of the others makes other runs
        monkeypatch.setattr(fastsae.Trainer, "fit", lambda *_: pytest.fail("trained again"))
    whole = test_study.started(study_of, seeds=1)
    draw, before = random.Random(name), {p: p.read_bytes() for p in study_of.rglob("*") if p.is_file()}
    for path in [p for p in before if p.name == f"{name}.json" and p.parent.name != "sae"][-2:]:
        for _ in damage(path, draw, 4 * times):
            assert_told(lambda: test_study.started(study_of, seeds=1), rf"{name}\.json|another study|ActivationStream")
            for other, content in before.items():
                other.parent.mkdir(parents=True, exist_ok=True)
                other.write_bytes(content)
    test_study.assert_same(test_study.started(study_of, seeds=1), whole)


def test_a_note_that_a_run_diverged(study_of, tmp_path, monkeypatch, times):
    import test_study

    test_study.only(monkeypatch, "topk", "sequential")
    shutil.copytree(study_of, tmp_path / "study")
    chosen = files.read_json(tmp_path / "study" / "topk" / "lr.json")["lr"]
    (other,) = (p for p in (tmp_path / "study" / "topk").glob("lr_*/seed_0") if p.parent.name != f"lr_{chosen:g}")
    (other / "choice.json").unlink()
    files.write_json(other / "diverged.json", {"error": "the loss is nan at step 3"})
    monkeypatch.setattr(fastsae.Trainer, "fit", lambda *_: pytest.fail("trained again"))

    def started() -> Any:
        return test_study.started(tmp_path / "study", seeds=1)

    noticed = [
        assert_told(started, r"diverged\.json") for _ in damage(other / "diverged.json", random.Random(9), 4 * times)
    ]
    assert sum(noticed) > 0.5 * len(noticed)
    started()
