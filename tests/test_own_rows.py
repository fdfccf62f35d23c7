"""Runs on activations of one's own: trained, measured and shown without a language model."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastsae
from fastsae import cli, lm, own_rows, provenance
from fastsae.activations import ArrayActivations, is_held_out
from fastsae.evaluate import strongest_rows

D = 12


def planted(rows: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    code = generator.random((rows, 30)) * (generator.random((rows, 30)) < 0.1)
    return (code @ np.random.default_rng(7).normal(size=(30, D))).astype(np.float32)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lm, "load", lambda *_: pytest.fail("no language model is needed here"))


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["fastsae", *arguments])
        cli.main()
        return capsys.readouterr().out

    return run


def train(command, *arguments: str, kind: str = "topk", run: str = "runs/a") -> None:
    options = ("--steps", "30", "--batch-size", "128", "--no-progress", "--run-dir", run)
    command("train", kind, "--activations", "rows.npy", *arguments, *options)


SIZES = ("--d-sae", "60", "--k", "4")


def test_a_run_from_training_to_report(command):
    np.save("rows.npy", planted(4000, 0))
    train(command, *SIZES, kind="joint")
    said = command("eval", "runs/a")
    assert "held-out groups of rows of" in said
    groups = [name for name in ArrayActivations([planted(4000, 0)]).names if is_held_out(name)]
    assert f"{10 * len(groups):,} rows in {len(groups)} documents or groups, with 95 % intervals" in said
    measured = json.loads(Path("runs/a/eval.json").read_text())
    assert measured["reconstruction"]["documents"] == len(groups)
    assert measured["bos_out"] is None
    command("analyze", "runs/a")
    features = json.loads(Path("runs/a/features.json").read_text())["features"]
    example = features[0]["examples"][0]
    assert example["group"] in groups
    assert example["row"] // 10 == int(example["group"])
    assert example["activation"] == features[0]["max_activation"]
    command("report", "runs/a")
    page = Path("runs/a/report.html").read_text()
    for words in ("Activations in", "held-out groups of", "<th>group</th>", "Geometry"):
        assert words in page
    assert "KL" not in page
    assert fastsae.load("runs/a").reads["activations"] == str(Path("rows.npy").resolve())


def test_a_tree_that_was_moved_is_measured_as_before(command):
    np.save("rows.npy", planted(4000, 0))
    train(command, *SIZES)
    before = command("eval", "runs/a")
    Path("elsewhere").mkdir()
    for name in ("rows.npy", "runs"):
        shutil.move(name, "elsewhere")
    after = command("eval", "elsewhere/runs/a")
    assert before.splitlines()[1:] == after.splitlines()[1:]
    assert "elsewhere/rows.npy" in after
    np.save("elsewhere/rows.npy", planted(4000, 1))
    with pytest.raises(SystemExit, match="does not hold what elsewhere/runs/a was trained on"):
        command("eval", "elsewhere/runs/a")
    Path("elsewhere/rows.npy").unlink()
    with pytest.raises(SystemExit, match="which elsewhere/runs/a was trained on, does not exist any more"):
        command("eval", "elsewhere/runs/a")


def test_a_run_of_a_trainer_in_python(command):
    x = planted(3000, 0)
    config = fastsae.TrainerConfig(steps=20, run_dir=Path("runs/py"), progress=False)
    fastsae.Trainer(fastsae.TopKSAE(D, 60, 4), config).fit(fastsae.batches(x, 100))
    with pytest.raises(SystemExit, match="one of a Trainer in Python, say what to measure it on: --activations FILE"):
        command("eval", "runs/py")
    torch.save(torch.from_numpy(x), "x.pt")
    assert "groups of rows of x.pt (all of them" in command("eval", "runs/py", "--activations", "x.pt")
    assert json.loads(Path("runs/py/eval.json").read_text())["reconstruction"]["rows"] == 3000
    command("report", "runs/py", "--activations", "x.pt")
    assert "Activations that a Trainer was given in Python" in Path("runs/py/report.html").read_text()
    np.save("wide.npy", np.ones((500, D + 1), np.float32))
    with pytest.raises(SystemExit, match=rf"wide.npy holds rows of width {D + 1}; the SAE of runs/py reads .* {D}"):
        command("analyze", "runs/py", "--activations", "wide.npy")


@pytest.mark.parametrize("kind", ["sequential", "secondary"])
def test_runs_on_the_sae_of_another(kind, command):
    np.save("rows.npy", planted(4000, 0))
    train(
        command,
        *SIZES,
        *(("--d-embedding", "6") if kind == "secondary" else ()),
        kind={"sequential": "topk"}.get(kind, "joint"),
    )
    options = ("--d-sae", "30", "--k", "3") if kind == "secondary" else ("--d-embedding", "6")
    train(command, "--base", "runs/a", *options, kind=kind, run="runs/b")
    reads = fastsae.load("runs/b").reads
    assert ("hidden_layer_of" in reads) == (kind == "secondary") != ("activations" in reads)
    command("eval", "runs/b")
    command("analyze", "runs/b")
    np.save("other.npy", planted(4000, 1))
    with pytest.raises(SystemExit, match=r"runs/a was trained on activations in .*rows.npy, this run is on those in"):
        command("train", kind, "--base", "runs/a", "--activations", "other.npy", "--run-dir", "runs/c")


def test_what_makes_no_sense_is_said(command):
    np.save("rows.npy", planted(4000, 0))
    with pytest.raises(ValueError, match="expected no options of a model or text beside it; got 'hook'"):
        fastsae.config.DataConfig(activations=Path("rows.npy"), hook="blocks.0.hook_resid_pre")
    train(command, *SIZES)
    with pytest.raises(SystemExit, match="not of a language model, which is needed here"):
        command("factorial", "runs/a", "code_files")
    Path("store").mkdir()
    Path("store/index.json").write_text("{}")
    with pytest.raises(SystemExit, match="is a store, whose rows were chosen when it was harvested"):
        command("train", "topk", "--activations", "store", "--run-dir", "runs/d")
    with pytest.raises(SystemExit, match="holds no activations: expected a file, or a folder"):
        command("train", "topk", "--activations", "nowhere.npy", "--run-dir", "runs/d")


def test_few_groups_are_trained_on_with_a_warning(command):
    np.save("rows.npy", planted(3, 0))
    with pytest.warns(UserWarning, match="`fastsae eval` will have nothing to measure on"):
        command(
            "train",
            "topk",
            "--activations",
            "rows.npy",
            *SIZES,
            "--steps",
            "2",
            "--batch-size",
            "2",
            "--run-dir",
            "runs/a",
        )


def test_the_strongest_rows_are_each_of_another_group():
    sae = fastsae.TopKSAE(D, 20, 3)
    x = torch.from_numpy(planted(300, 0))
    source = ArrayActivations([x], torch.arange(300) // 6)
    found = strongest_rows(sae, source, source.names, n_features=4, n_examples=5)
    code = sae.encode_raw(x).to_dense()
    assert len(found) == 4
    for feature in found:
        values = code[:, feature.feature].view(50, 6).amax(dim=1)
        best = values[values > 0].sort(descending=True).values[:5]
        shown = [example.activation for example in feature.examples]
        np.testing.assert_allclose(shown, best.detach().numpy(), rtol=1e-6)
        assert len({example.group for example in feature.examples}) == len(shown)
        for example in feature.examples:
            assert code[example.row, feature.feature].item() == pytest.approx(example.activation)
            assert example.group == str(example.row // 6)


def test_what_is_asked_for():
    assert own_rows.are_asked_for(Path("nowhere"), Path("x.npy"))
    assert not own_rows.are_asked_for(Path("nowhere"), None)


def test_rows_that_were_renamed_are_split_as_in_training(command):
    np.save("rows.npy", planted(4000, 0))
    train(command, *SIZES)
    before = command("eval", "runs/a").splitlines()
    Path("rows.npy").rename("renamed.npy")
    with pytest.raises(SystemExit, match=r"If it lies elsewhere now, say where: --activations FILE"):
        command("eval", "runs/a")
    after = command("eval", "runs/a", "--activations", "renamed.npy").splitlines()
    assert after == [before[0].replace(str(Path("rows.npy").resolve()), "renamed.npy"), *before[1:]]


def test_groups_belong_to_the_rows():
    x, groups = torch.randn(50, 3), torch.arange(50) // 5
    same, other = (ArrayActivations([x], g).identity for g in (groups.clone(), groups.flip(0)))
    assert same == ArrayActivations([x], groups).identity != other
    assert ArrayActivations([x.view(10, 5, 3)]).identity != ArrayActivations([x.view(5, 10, 3)]).identity


def test_results_on_other_rows_stand_beside_the_run_s_own(command):
    for name, seed in (("rows", 0), ("other", 1)):
        np.save(f"{name}.npy", planted(4000, seed))
    train(command, *SIZES)
    command("report", "runs/a")
    kept = {path: path.read_text() for path in Path("runs/a").glob("*.json")}
    command("report", "runs/a", "--activations", "other.npy")
    assert "4,000 rows in 400 groups of" in Path("runs/a/report.html").read_text()
    assert all(path.read_text() == text for path, text in kept.items())
    assert json.loads(Path("runs/a/features-other.npy.json").read_text())["options"]["held_out"] is False
    Path("rows.npy").unlink()
    assert command("report", "runs/a").startswith("Open "), "all that it shows was measured"
    assert "held-out groups of" in Path("runs/a/report.html").read_text()


def test_a_report_is_of_the_rows_it_is_asked_for(command):
    config = fastsae.TrainerConfig(steps=5, run_dir=Path("py"), progress=False)
    fastsae.Trainer(fastsae.TopKSAE(D, 60, 4), config).fit(fastsae.batches(planted(1000, 0), 100))
    for rows in (900, 800):
        np.save(f"{rows}.npy", planted(rows, 1))
    command("eval", "py", "--activations", "900.npy")
    command("report", "py", "--activations", "800.npy")
    assert "800 rows in" in Path("py/report.html").read_text()


def test_runs_on_rows_and_on_text_are_not_mixed(command):
    np.save("rows.npy", planted(4000, 0))
    train(command, *SIZES)
    shutil.copytree("runs/a", "runs/lm")
    data = json.loads(Path("runs/lm/data.json").read_text()) | {"activations": None, "relative_to_run": {}}
    del data["activations_crc32"]
    Path("runs/lm/data.json").write_text(json.dumps(data))
    with pytest.raises(SystemExit, match="runs/lm was trained on a language model's activations, and is not measured"):
        command("eval", "runs/a", "runs/lm")
    with pytest.raises(SystemExit, match="runs/lm has activations None, runs/a has"):
        command("eval", "runs/lm", "runs/a")
    with pytest.raises(SystemExit, match="--text is for runs on a language model; runs/a is measured on activations"):
        command("eval", "runs/a", "--text", "stdlib")


def test_a_base_in_another_folder_moves_with_its_run(command):
    np.save("rows.npy", planted(4000, 0))
    train(command, *SIZES, run="runs/bases/a")
    train(command, "--base", "runs/bases/a", "--d-embedding", "6", kind="sequential", run="runs/on/b")
    Path("runs").rename("moved")
    assert provenance.recorded_base(Path("moved/on/b")) == Path("moved/bases/a").resolve()
