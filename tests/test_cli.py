"""The command line, as a newcomer types it."""

import json
import re
import sys
from pathlib import Path

import pytest

import fastsae
from fastsae import cli
from fastsae.config import JointSAEConfig
from fastsae.planner import plan

SMALL = "--tokens 3000 --context 64 --batch-size 64 --buffer-rows 1000 --d-sae 128 --k 8 --no-progress".split()  # noqa: SIM905  # as it is typed


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["fastsae", *arguments])
        cli.main()
        return capsys.readouterr().out

    return call


def test_train_eval_and_load(run):
    out = run("train", "joint", "--d-embedding", "8", "--steps", "6", "--run-dir", "r", *SMALL)
    assert "fastsae eval r" in out
    sae = fastsae.load("r/sae")
    assert (sae.architecture, sae.d_in, sae.d_sae, sae.k) == ("joint", 256, 128, 8)
    table = run("eval", "r", "--tokens", "500").splitlines()
    header, row = table[0].split(), table[2].split()
    assert header[:5] == ["SAE", "MSE", "FVU", "L0", "dead"]
    assert row[0] == "r"
    assert 0 < float(row[2]) < 2
    assert "KL" in header


def test_resume_and_another_run(run):
    train = ["train", "topk", "--run-dir", "r", "--store", "acts", "--checkpoint-every", "2", *SMALL]
    run(*train, "--steps", "4")
    with pytest.raises(SystemExit, match="already holds a run"):
        run(*train, "--steps", "4")
    run(*train, "--steps", "4", "--resume")
    with pytest.raises(SystemExit, match="trained on other activations"):
        run(*train, "--steps", "4", "--hook", "blocks.1.hook_resid_post")
    assert json.loads(Path("r/data.json").read_text())["hook"] == "blocks.2.hook_resid_post"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "topk", "--hook", "blocks.2.hook_resid_pots", *SMALL],
            "error: .*Near ones: blocks.2.hook_resid_post",
        ),
        (["train", "topk", "--text", "missing.txt", *SMALL], "error: .*neither 'stdlib', nor a file"),
        (["train", "topk", *SMALL, "--k", "200"], "k: expected between 1 and d_sae = 128; got 200"),
        (["eval", "nowhere"], "error: nowhere is no run of `fastsae train`"),
    ],
)
def test_errors_are_one_line_and_say_what_to_do(run, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    said = str(stop.value) + "".join(capsys.readouterr())
    assert re.search(message, re.sub(r"[\s│]+", " ", said))


def test_demo(run):
    out = run("demo", "--tokens", "6000", "--steps", "4", "--d-sae", "256", "--held-out-tokens", "600")
    for name in ("topk", "joint"):
        assert fastsae.load(f"runs/demo/{name}/sae").architecture == name
    assert Path("runs/demo/training.png").stat().st_size > 1000
    table = [line for line in out.splitlines() if line.startswith(("SAE", "topk ", "joint "))]
    assert [line.split()[0] for line in table] == ["SAE", "topk", "joint"]
    assert all(word in table[0] for word in ("FVU", "KL", "loss recovered", "dead", "rows/s", "parameters"))
    Path("other").mkdir()
    Path("other/precious").touch()
    with pytest.raises(SystemExit, match="holds something else"):
        run("demo", "--folder", "other")
    assert Path("other/precious").exists()


def test_plan(run):
    out = run("plan", "joint", "--d-in", "1024", "--d-sae", "65536", "--k", "64")
    sae = fastsae.JointSAE(1024, 65536, 64, device="meta", backend="reference")
    assert f"{sum(p.numel() for p in sae.parameters()):,}" in out


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("interaction", [True, False])
@pytest.mark.parametrize("pre_bias", [True, False])
def test_planned_parameters_are_the_real_ones(linear, interaction, pre_bias):
    config = JointSAEConfig(16, 100, 6, pre_bias=pre_bias, linear=linear, interaction=interaction, d_embedding=7)
    sae = fastsae.JointSAE(16, 100, 6, pre_bias=pre_bias, linear=linear, interaction=interaction, d_embedding=7)
    assert plan(config).parameters == {name: p.numel() for name, p in sae.named_parameters()}


def test_plan_counts():
    p = plan(fastsae.TopKSAEConfig(1024, 65536, 64), batch_size=2048, tokens=10_000)
    assert p.weights_bytes == 4 * p.n_parameters
    assert p.optimizer_bytes == 2 * p.weights_bytes
    assert p.pre_activations_bytes == 256 * 2**20
    assert p.steps == 5
    assert p.flops_per_step > 2 * 2048 * 1024 * 65536
    with pytest.raises(ValueError, match="batch_size and tokens of at least 1"):
        plan(fastsae.TopKSAEConfig(8, 16, 2), batch_size=0)
