"""The command line, as a newcomer types it."""

import json
import logging
import re
import sys
from pathlib import Path

import pytest
import tiny_lm
import torch

import fastsae
from fastsae import activations, cli, experiment, planner, provenance, report
from fastsae.backends import cpu
from fastsae.config import JointSAEConfig
from fastsae.evaluate import record
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
    last = report.read_metrics(Path("r"))[-1]
    assert f"Trained 6 steps: FVU {last['fvu']:.4f} of the last batch, L0 8.0, dead features" in out
    sae = fastsae.load("r/sae")
    assert (sae.architecture, sae.d_in, sae.d_sae, sae.k) == ("joint", 256, 128, 8)
    out = run("eval", "r", "--tokens", "500")
    for line in ("reconstruction", "identity ", "identity + linear", "identity + interaction", "full "):
        assert f"\n{line}" in out
    assert "Against its own identity pathway, as in the paper (no comparison with a TopK SAE)" in out
    assert 0 < json.loads(Path("r/eval.json").read_text())["reconstruction"]["fvu"]["estimate"] < 2


def test_resume_and_another_run(run):
    train = ["train", "topk", "--run-dir", "r", "--store", "acts", "--checkpoint-every", "2", *SMALL]
    run(*train, "--steps", "4")
    with pytest.raises(SystemExit, match="already holds a run"):
        run(*train, "--steps", "4")
    run(*train, "--steps", "4", "--resume")
    with pytest.raises(SystemExit, match=r"is a run on other activations: hook was .*blocks\.2.* is .*blocks\.1"):
        run(*train, "--steps", "4", "--resume", "--hook", "blocks.1.hook_resid_post")
    assert json.loads(Path("r/data.json").read_text())["hook"] == "blocks.2.hook_resid_post"


def test_a_taken_folder_is_noticed_before_a_model_is_loaded(run, monkeypatch):
    for taken in ("r", "runs/train", "runs/train-2"):
        Path(taken).mkdir(parents=True)
        Path(taken, "metrics.jsonl").touch()
    monkeypatch.setattr(experiment, "language_model", lambda data: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit, match=r"train: r already holds a run\. Continue it with --resume, or"):
        run("train", "topk", "--run-dir", "r", *SMALL)
    begun = []
    monkeypatch.setattr(experiment, "language_model", lambda data: None)

    def train(*arguments: object) -> None:
        begun.append(arguments[3].run_dir)
        begun[-1].mkdir(exist_ok=True)
        (begun[-1] / "metrics.jsonl").touch()

    monkeypatch.setattr(experiment, "train", train)
    for resume, expected in (("--no-resume", "runs/train-3"), ("--resume", "runs/train")):
        run("train", "topk", resume, *SMALL)
        assert begun.pop() == Path(expected)


@pytest.mark.parametrize(
    ("fvu", "dead", "said"),
    [(0.2, 0.1, []), (6e16, 0.1, ["training diverged"]), (None, 0.6, ["training diverged", "features were inactive"])],
)
def test_a_training_that_failed_is_called_so(fvu, dead, said):
    doubts = cli._doubts({"fvu": fvu, "dead_share": dead, "lr": 1e-3})
    assert len(doubts) == len(said)
    for doubt, words in zip(doubts, said, strict=True):
        assert doubt.startswith("Warning: ")
        assert words in doubt


def test_a_model_without_bos_is_trained_and_measured_without(run, tmp_path):
    model = tiny_lm.saved(tmp_path / "lm", "qwen")
    text = tmp_path / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i}.txt").write_text(" ".join(tiny_lm.WORDS[1 + (i * j) % 15] for j in range(1, 40)))
    small = ["--tokens", "1000", "--context", "16", "--batch-size", "32", "--d-sae", "32", "--k", "4", "--no-progress"]
    small += ["--model", str(model), "--text", str(text), "--hook", "blocks.1.hook_resid_post", "--steps", "3"]
    train = ["train", "topk", "--run-dir", "r", *small]
    run(*train)
    data = Path("r/data.json")
    recorded = json.loads(data.read_text())
    assert recorded["prepend_bos"] is False

    def begins_with_bos() -> bool:
        there = provenance.recorded(Path("r"))
        return experiment.held_out_windows(experiment.language_model(there), there, 100).has_bos

    assert not begins_with_bos()
    run("eval", "r", "--tokens", "50")
    assert json.loads(Path("r/eval.json").read_text())["bos_in"] is None
    with pytest.raises(SystemExit, match=r"prepend_bos was False, is True"):
        run(*train, "--prepend-bos", "True", "--resume")
    del recorded["prepend_bos"]  # a run from before there was the option: its windows began with BOS
    data.write_text(json.dumps(recorded))
    assert begins_with_bos()
    with pytest.raises(SystemExit, match=r"prepend_bos was True, is False"):
        run(*train, "--resume")
    with pytest.raises(SystemExit, match=r"r was trained with prepend_bos = True, this run has False; --prepend-bos"):
        run("train", "sequential", "--base", "r", "--run-dir", "s", "--d-embedding", "4", *small[:6], *small[10:])


def test_a_run_of_before_the_option_of_bos_goes_on(run):
    train = ["train", "topk", "--run-dir", "r", "--checkpoint-every", "2", *SMALL]
    run(*train, "--steps", "2")
    data = json.loads(Path("r/data.json").read_text())
    assert data.pop("prepend_bos") is True
    Path("r/data.json").write_text(json.dumps(data))
    run(*train, "--steps", "4", "--resume")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "topk", "--hook", "blocks.2.hook_resid_pots", *SMALL],
            "error: .*Near ones: blocks.2.hook_resid_post",
        ),
        (["train", "topk", "--text", "missing.txt", *SMALL], "error: .*neither 'stdlib', nor a file"),
        (["train", "topk", *SMALL, "--k", "200"], "k: expected between 1 and d_sae = 128; got 200"),
        (["train", "topk", *SMALL, "--run-dir", "None"], "--run-dir says where the SAE is written"),
        (["train", "topk", *SMALL, "--buffer-rows", "0"], "buffer_rows: expected at least 1; got 0"),
        (
            ["train", "topk", *SMALL, "--context", "1000000000"],
            "context: expected at most 256, what the model reads at",
        ),
        (["train", "topk", *SMALL, "--run-dir", "/proc/r"], "train: cannot write into /proc/r"),
        (["eval", "nowhere"], "error: nowhere is no run of `fastsae train`"),
    ],
)
def test_errors_are_one_line_and_say_what_to_do(run, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    said = str(stop.value) + "".join(capsys.readouterr())
    assert re.search(message, re.sub(r"[\s│]+", " ", said))


def test_a_failed_attempt_does_not_block_its_folder(run):
    train = ["train", "topk", "--run-dir", "r", "--steps", "2", *SMALL]
    with pytest.raises(SystemExit, match="Near ones"):
        run(*train, "--hook", "blocks.2.hook_resid_pots")
    run(*train)


def test_training_and_measuring_see_different_documents(run, monkeypatch):
    """The split, end to end: what train reads and what eval reads."""
    seen: list[set[str]] = []
    tokenize = experiment.tokenize
    monkeypatch.setattr(
        experiment, "tokenize", lambda *a, **b: (seen.append(set((w := tokenize(*a, **b)).names)), w)[1]
    )
    run("train", "topk", "--steps", "2", "--run-dir", "r", *SMALL)
    trained = seen[0]
    seen.clear()
    run("eval", "r", "--tokens", "500")
    (measured,) = seen
    assert not any(map(activations.is_held_out, trained))
    assert all(map(activations.is_held_out, measured))


def test_seeds_reach_the_weights_and_the_order(run):
    losses, starts = [], []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        run("train", "topk", "--steps", "2", "--run-dir", name, "--log-every", "1", *SMALL, "--seed", seed)
        losses.append([json.loads(line)["loss"] for line in Path(name, "metrics.jsonl").read_text().splitlines()])
        starts.append(fastsae.load(f"{name}/sae").W_enc)
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(starts[0], starts[1])
    assert (starts[0] - starts[2]).abs().mean() > 1e-3  # two steps move a weight by 2e-3 at most, mostly much less


def test_eval_shows_what_was_measured(run, monkeypatch, capsys):
    run("train", "topk", "--steps", "2", "--run-dir", "r", *SMALL)
    measured = []
    measure = experiment.measure
    monkeypatch.setattr(experiment, "measure", lambda *a: (measured.append(measure(*a)), measured[-1])[1])
    out = run("eval", "r", "--tokens", "3000").splitlines()
    r, b = measured[0].reconstruction, measured[0].bos_out
    assert b.documents > 1
    header, _, row = out[3:6]
    shown = dict(zip(re.split(r"  +", header), re.split(r"  +", row), strict=True))
    assert shown["reconstruction"] == "full"
    assert shown["FVU"] == f"{r.fvu:.4f}" != f"{r.fvu_raw:.4f}"
    assert (shown["KL"], shown["loss recovered"]) == (f"{b.full.kl:.4f}", f"{b.full.loss_recovered:.4f}")
    assert f"MSE {r.mse:.4f}" in out[1]
    assert f"KL {measured[0].bos_in.full.kl:.4f}" in out[7]
    assert len(out) == 8, "figures of pathways that a TopK SAE does not have"
    kept = json.loads(Path("r/eval.json").read_text())
    assert kept["options"] == {"tokens": 3000}
    assert kept["bos_out"]["conditions"]["full"]["kl"] == vars(b.full.kl)
    assert "sums" not in kept["bos_out"]
    Path("r/eval.json").unlink()
    Path("r/eval.json").mkdir()
    with pytest.raises(SystemExit, match=r"error: .*r/eval\.json"):
        run("eval", "r", "--tokens", "300")
    assert "\nfull " in capsys.readouterr().out, "what was measured is said where it cannot be written, too"


def test_analyze(run):
    run("train", "joint", "--d-embedding", "8", "--steps", "3", "--run-dir", "r", *SMALL)
    out = run("analyze", "r", "--tokens", "2000")
    for word in ("dead", "rare", "common", "p (unimodal)", "random baseline", "integration", "r/features.json"):
        assert word in out
    geometry, features = (record.read(Path("r"), name) for name in ("geometry", "features"))
    assert geometry["rows"] == 2000
    example = features["features"][0]["examples"][0]
    assert max(example["activations"]) == example["activations"][example["peak"]] > 0
    run("eval", "r", "--tokens", "500")
    assert "Open " in run("report", "r")  # nothing is left to be measured
    assert f"Feature {features['features'][0]['feature']}" in Path("r/report.html").read_text()
    run("train", "joint", "--d-embedding", "8", "--steps", "4", "--run-dir", "s", *SMALL)
    for name in ("sae/config.json", "sae/weights.safetensors"):
        Path("s", name).replace(Path("r", name))
    assert record.read(Path("r"), "geometry") is None, "a result of another SAE"
    Path("r/geometry.json").write_text("[]")
    with pytest.raises(ValueError, match=r"geometry\.json is damaged"):
        record.read(Path("r"), "geometry")


def test_eval_of_what_is_not_there(run):
    run("train", "topk", "--steps", "2", "--run-dir", "r", *SMALL)
    Path("r/sae/config.json").rename("r/kept.json")
    with pytest.raises(SystemExit, match="did not finish; run the same `fastsae train` with --resume"):
        run("eval", "r")
    Path("r/kept.json").rename("r/sae/config.json")
    for damaged in ("[]", "null", '{"tokens": "abc"}'):
        Path("r/data.json").write_text(damaged)
        with pytest.raises(SystemExit, match=r"data\.json is damaged"):
            run("eval", "r")


def test_an_edited_text_file_is_not_measured_on(run):
    text = Path("text.txt")
    text.write_text("\n\n".join(f"paragraph {i} " + "word " * 300 for i in range(200)))
    run("train", "topk", "--steps", "2", "--run-dir", "r", "--text", "text.txt", *SMALL)
    Path("elsewhere").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir("elsewhere")
        run("eval", "../r", "--tokens", "300")
    text.write_text("new\n\n" + text.read_text())
    with pytest.raises(SystemExit, match=r"text\.txt is not the text that r was trained on"):
        run("eval", "r")


def test_text_of_which_nothing_is_held_out_is_noticed_before_training(run):
    Path("small.txt").write_text("a short text " * 500)
    with pytest.warns(UserWarning, match="eval` will have nothing to measure on.*no held-out documents"):
        run("train", "topk", "--text", "small.txt", "--run-dir", "r", "--steps", "2", *SMALL)
    with pytest.raises(SystemExit, match="no held-out documents"):
        run("eval", "r")


def test_which_text_was_read_is_said(run, caplog):
    Path("texts").mkdir()
    for part in range(2):
        lines = (f"This is document {i} of part {part}, with some words in it to read." for i in range(1000))
        Path(f"texts/{part}.txt").write_text("\n".join(lines))
    Path("texts/plot.png").write_bytes(b"no text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("fastsae"), "level", logging.NOTSET)  # as in a new process
        run("train", "topk", "--text", "texts", "--run-dir", "r", "--steps", "2", *SMALL)
    assert caplog.text.count("read below texts: 2 .txt. Left out: 1 .png of kinds that are not read.") == 1
    run("eval", "r", "--tokens", "300")


def test_version(run):
    assert run("--version").strip() == run("-V").strip() == f"fastsae {fastsae.__version__}"


def test_demo(run):
    out = run("demo", "--tokens", "6000", "--steps", "4", "--d-sae", "256", "--held-out-tokens", "600")
    for name in ("topk", "joint"):
        assert fastsae.load(f"runs/demo/{name}/sae").architecture == name
    assert Path("runs/demo/training.png").stat().st_size > 1000
    table = [line for line in out.splitlines() if line.startswith(("SAE", "topk ", "joint "))]
    assert [line.split()[0] for line in table] == ["SAE", "topk", "joint"]
    assert all(word in table[0] for word in ("FVU", "KL", "loss recovered", "dead", "rows/s", "parameters"))


def test_a_demo_deletes_only_what_a_demo_made(run):
    for folder in ("other", "runs"):
        Path(folder, "demo").mkdir(parents=True)
        Path(folder, "precious").touch()
        with pytest.raises(SystemExit, match="holds something else"):
            run("demo", "--folder", folder)
        assert Path(folder, "precious").exists()
    Path("d/topk").mkdir(parents=True)
    for name in (".fastsae-demo", "topk/old", "precious"):
        Path("d", name).touch()
    with pytest.raises(SystemExit, match="k: expected between 1 and d_sae"):
        run("demo", "--folder", "d", "--k", "0")
    assert Path("d/topk/old").exists(), "deleted before the options were checked"
    run("demo", "--folder", "d", "--tokens", "6000", "--steps", "2", "--d-sae", "256", "--held-out-tokens", "600")
    assert Path("d/precious").exists()
    assert not Path("d/topk/old").exists()


def test_plan(run, monkeypatch):
    monkeypatch.setattr(planner, "product_rate", lambda: 1e11)
    out = run("plan", "joint", "--d-in", "1024", "--d-sae", "65536", "--k", "64")
    ratio = {True: 0.5, False: 1.35}[cpu.plan(2048, 1024, 65536, 64, torch.float32).screened]
    seconds = ratio * 2 * 2048 * 1024 * 65536 / 1e11
    assert f"fp32 products were just measured at 100 GFLOP/s, the language model not counted: {seconds:.2g} sec" in out
    assert f"seconds a step, {planner.duration(seconds * 48829)} for all steps" in out
    assert " GB a GPU" not in out
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
    B, D, M, K, N, E = 2048, 1024, 65536, 64, 32, 128
    assert p.flops_per_step == 2 * B * D * M + 4 * 2 * B * K * D
    joint = plan(fastsae.JointSAEConfig(1024, 65536, 64), batch_size=2048)
    linear, interaction = 3 * 2 * B * N * D, 6 * 2 * B * N * E + 3 * 2 * B * E * (E + D)
    assert joint.flops_per_step == p.flops_per_step + linear + interaction
    with pytest.raises(ValueError, match="batch_size and tokens of at least 1"):
        plan(fastsae.TopKSAEConfig(8, 16, 2), batch_size=0)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.5, "0.5 seconds"),
        (119, "119 seconds"),
        (125, "2.1 minutes"),
        (7300, "2 hours"),
        (86400, "24 hours"),
        (1e6, "12 days"),
        (5e7, "579 days"),
    ],
)
def test_durations_are_said_in_words(seconds, said):
    assert planner.duration(seconds) == said


def test_a_product_is_measured():
    assert planner.product_rate() > 1e8
