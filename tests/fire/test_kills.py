"""SIGKILL at random moments: what is begun again ends at the same bits as what nothing disturbed.

A real process dies: after a random time, before a random operation on the disk, or at a random byte of a file that is
being written. `pytest --long` kills ten times as often.
"""

import json
import random
import signal
from collections import Counter
from pathlib import Path

import pytest
import victims
from victims import Kill, contents, random_kill, same, weights

import fastsae
from fastsae import checkpoint
from fastsae.activations import ActivationStore

TRAINING, HARVESTING, SAVING, MEASURING = 32, 24, 24, 9


def kinds(kills: list[Kill]) -> Counter[str]:
    return Counter("time" if k.seconds is not None else "operation" if k.operation else "byte" for k in kills)


def largest(folder: Path) -> int:
    return max(map(len, contents(folder).values()))


def test_training_is_killed(tmp_path, times):
    store = tmp_path / "store"
    victims.harvest_all(store)
    took = victims.finish(victims.train, tmp_path)
    expected, size = weights(fastsae.load(tmp_path / "run" / "sae")), largest(tmp_path / "run")
    draw, kills = random.Random(20), []
    for round in range(times * TRAINING):
        folder = tmp_path / str(round)
        folder.mkdir()
        (folder / "store").symlink_to(store)
        for _ in range(draw.choice((1, 1, 2))):  # now and then while it goes on after a kill
            kill = random_kill(draw, round, took, size)
            if victims.die(victims.train, folder, kill):
                kills.append(kill)
        victims.finish(victims.train, folder)
        assert same(weights(fastsae.load(folder / "run" / "sae")), expected), kill
        assert [*victims.steps(folder / "run")] == list(range(1, 11)), kill
        assert [p.name for p in checkpoint.folders(folder / "run")] == ["step_00000010", "step_00000009"]
        assert not list((folder / "run").rglob("*.tmp")), kill
    assert len(kills) >= times * 25
    assert min(kinds(kills).values()) >= times * 5


def test_harvesting_is_killed(tmp_path, times):
    took = victims.finish(victims.harvest_all, tmp_path / "whole")
    expected, size = contents(tmp_path / "whole"), largest(tmp_path / "whole")
    draw, kills = random.Random(21), []
    for round in range(times * HARVESTING):
        folder = tmp_path / str(round)
        kill = random_kill(draw, round, took, size)
        if victims.die(victims.harvest_all, folder, kill):
            kills.append(kill)
            if (folder / "index.json").exists() and json.loads((folder / "index.json").read_text())["shards"] is None:
                with pytest.raises(ValueError, match="did not finish; run it again"):
                    ActivationStore(folder)
        victims.finish(victims.harvest_all, folder)
        assert contents(folder) == expected, kill
    assert len(kills) >= times * 15
    assert min(kinds(kills).values()) >= times * 2


def test_saving_is_killed(tmp_path, times):
    """Over an SAE that lies there: it is the old one or the new one, and never none."""
    ours = {seed: weights(victims.joint(seed)) for seed in (1, 2)}
    draw, kills, found = random.Random(22), [], Counter()
    took = victims.finish(victims.save_again_and_again, tmp_path / "whole")
    whole, size = contents(tmp_path / "whole"), largest(tmp_path / "whole")
    for round in range(times * SAVING):
        folder = tmp_path / str(round)
        victims.joint(2).save_pretrained(folder)
        kill = random_kill(draw, round, took, size)
        if victims.die(victims.save_again_and_again, folder, kill):
            kills.append(kill)
        there = weights(fastsae.load(folder))
        found[next(seed for seed, then in ours.items() if same(there, then))] += 1
        victims.finish(victims.save_again_and_again, folder)
        assert contents(folder) == whole, kill
    assert len(kills) >= times * 15
    assert min(kinds(kills).values()) >= times * 2
    assert min(found.values()) >= times * 2


def test_measuring_is_killed(tmp_path, times):
    """Finished stages that `fastsae eval` keeps are whole or absent, and the result is the same to the byte."""
    took = victims.finish(victims.measure, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    assert list(expected) == ["eval.json"], "the stages are gone"
    draw, kills, kept = random.Random(23), [], 0
    for round in range(times * MEASURING):
        folder = tmp_path / str(round)
        kill = random_kill(draw, round, took, largest(tmp_path / "whole"))
        if victims.die(victims.measure, folder, kill):
            kills.append(kill)
            kept += bool(list(folder.glob("eval.parts/*.json")))
        victims.finish(victims.measure, folder)
        assert contents(folder) == expected, kill
    assert len(kills) >= times * 5
    assert min(kinds(kills).values()) >= times
    assert kept >= times * 2


def test_the_victims_die_as_they_should(tmp_path):
    """By a signal, at that byte, before that operation: kills that never happened would prove nothing."""
    process = victims.start(victims.harvest_all, tmp_path / "a", Kill(byte=100))
    process.join()
    assert process.exitcode == -signal.SIGXFSZ
    assert {name: len(content) for name, content in contents(tmp_path / "a").items()} == {".index.json.tmp": 100}
    process = victims.start(victims.harvest_all, tmp_path / "b", Kill(operation=1))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "b").exists()
    process = victims.start(victims.harvest_all, tmp_path / "c")
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
