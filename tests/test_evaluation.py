"""`fastsae eval`, from its announcement to runs side by side, and what an interruption leaves."""

import json
import logging
import re
import sys
from math import isnan
from pathlib import Path
from typing import Any

import pytest
import tiny_lm
import torch

from fastsae import cli, evaluation, experiment, progress
from fastsae.evaluate import DocumentSums
from fastsae.evaluate.parts import Parts
from fastsae.evaluate.pathways import conditions

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts and with two runs on one of them, a third at another hook, of a model of two layers."""
    folder = tmp_path_factory.mktemp("evaluation")
    tiny_lm.saved(folder / "lm", "gpt2")
    for name, step in (("text", 1), ("other", 3)):
        (folder / name).mkdir()
        for i in range(200 if name == "text" else 7):
            words = " ".join(tiny_lm.WORDS[1 + (i * j * step) % 15] for j in range(1, 40))
            (folder / name / f"{i}.txt").write_text(words)
    small = ["--tokens", "1000", "--context", "16", "--batch-size", "32", "--d-sae", "32", "--k", "4", "--no-progress"]
    small += ["--model", str(folder / "lm"), "--text", str(folder / "text"), "--steps", "3"]
    for name, architecture, hook in (("a", "topk", HOOK), ("b", "joint", HOOK), ("c", "topk", "blocks.0.hook_mlp_out")):
        more = ["--d-embedding", "4"] if architecture == "joint" else []
        call("train", architecture, "--run-dir", str(folder / name), "--hook", hook, *small, *more)
    return folder


def call(*arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fastsae", *arguments])
        patch.setattr(logging.getLogger("fastsae"), "level", logging.NOTSET)
        cli.main()


@pytest.fixture
def runs(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of `trained` as the working directory, with nothing measured yet."""
    monkeypatch.chdir(trained)
    for left in [*trained.glob("*/eval*.json"), *trained.glob("*/eval.parts/*")]:
        left.unlink()
    return trained


def result(name: str) -> dict[str, Any]:
    return json.loads(Path(name).read_text())


def stop_in(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Ctrl-C in the middle of a stage."""
    over = progress.over

    def stopping(what: str, *rest: Any) -> Any:
        for number, item in enumerate(over(what, *rest)):
            if what == stage and number == 1:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(progress, "over", stopping)


def test_it_says_what_will_be_measured(runs, caplog):
    caplog.set_level(logging.INFO, "fastsae")
    call("eval", "b", "--tokens", "300")
    (said,) = (message for message in caplog.messages if message.startswith("b: joint SAE"))
    measured = result("b/eval.json")
    assert measured["reconstruction"]["rows"] == 300
    documents = measured["reconstruction"]["documents"]
    told = f"{HOOK} of model {runs}/lm, measured on 300 tokens of {documents} held-out documents of {runs}/text"
    assert said.startswith(f"b: joint SAE of {told}")
    for line in (
        "1. reconstruction: FVU, cosine, L0",
        "2. KL: KL and cross-entropy of the model with the full reconstruction in their place, and of parts of it "
        "(identity; identity + linear; identity + interaction), each beside random errors of its size",
        "3. KL with BOS: the same with BOS replaced too",
        "A few seconds on cpu. Interrupted, the same command goes on with the next stage.",
    ):
        assert f"\n  {line}" in said
    assert "from before" not in said


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(4, "A few seconds"), (42, "About 42 seconds"), (200, "About 3.3 minutes"), (9000, "About 2.5 hours")],
)
def test_a_duration_in_words(seconds, words):
    assert evaluation._in_words(seconds) == words


@pytest.mark.parametrize("stage", ["reconstruction", "KL", "KL with BOS"])
def test_what_was_interrupted_goes_on_with_the_next_stage(runs, stage, monkeypatch, caplog):
    monkeypatch.setattr(experiment.evaluate, "behavior", in_small_batches(experiment.evaluate.behavior))
    monkeypatch.setattr(experiment, "ModelActivations", in_small_batches(experiment.ModelActivations))
    call("eval", "b", "--tokens", "300")
    whole = Path("b/eval.json").read_text()
    Path("b/eval.json").unlink()
    stages = ["reconstruction", "KL", "KL with BOS"]
    done = stages[: stages.index(stage)]
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, stage)
        with pytest.raises(SystemExit) as stop:
            call("eval", "b", "--tokens", "300")
    kept = f"{', '.join(done)} of b is kept" if done else "no stage of b was finished"
    assert str(stop.value) == f"\neval: stopped; {kept}. Run the same command again, it goes on with: {stage}"
    assert {p.stem for p in Path("b/eval.parts").glob("*")} == set(done)
    measured, over = [], progress.over
    monkeypatch.setattr(progress, "over", lambda what, *rest: (measured.append(what), over(what, *rest))[1])
    caplog.set_level(logging.INFO, "fastsae")
    call("eval", "b", "--tokens", "300")
    assert measured == stages[len(done) :]
    assert (f"There from before: {', '.join(done)}." in caplog.text) == bool(done)
    assert Path("b/eval.json").read_text() == whole
    assert not Path("b/eval.parts").exists()


def in_small_batches(measure: Any) -> Any:
    return lambda *a, **options: measure(*a, **options, batch_windows=2)


@pytest.mark.parametrize("other", [["--tokens", "290"], ["--tokens", "300", "--text", "other"]])
def test_stages_of_another_measurement_are_not_taken(runs, other, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment.evaluate, "behavior", in_small_batches(experiment.evaluate.behavior))
        stop_in(patch, "KL")
        with pytest.raises(SystemExit):
            call("eval", "a", "--tokens", "300")
    assert Path("a/eval.parts/reconstruction.json").exists()
    measured, over = [], progress.over
    monkeypatch.setattr(progress, "over", lambda what, *rest: (measured.append(what), over(what, *rest))[1])
    call("eval", "a", *other)
    assert measured == ["reconstruction", "KL", "KL with BOS"]


def test_a_damaged_stage_is_measured_again(tmp_path):
    sums = DocumentSums(("a", "\udc80"), {"x": torch.tensor([0.1, float("nan")], dtype=torch.float64)})

    def stage(parts: Parts, *found: DocumentSums) -> tuple[DocumentSums, dict[str, float]]:
        measured = iter(found)
        return parts.stage("one", lambda: (next(measured), {"n": 0.3}), lambda both: both, lambda *both: both)

    stage(Parts(tmp_path, {"sae": 1}), sums)
    kept, numbers = stage(Parts(tmp_path, {"sae": 1}))
    assert (kept.names, kept.sums["x"].tolist()[0], numbers) == (sums.names, 0.1, {"n": 0.3})
    assert isnan(kept.sums["x"][1])
    path = tmp_path / "eval.parts" / "one.json"
    good = path.read_text()
    for damaged in ("", good[:-20], "[]", good.replace("0.1", "null"), good.replace('"a",', ""), "{}"):
        path.write_text(damaged)
        with pytest.warns(UserWarning, match=r"one\.json is damaged"):
            assert stage(Parts(tmp_path, {"sae": 1}), sums)[0] is sums
        assert path.read_text() == good
    assert stage(Parts(tmp_path, {"sae": 2}), sums)[0] is sums, "of another SAE"
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="one is not kept, and would be measured again"):
        assert stage(Parts(tmp_path / "file", {"sae": 1}), sums)[0] is sums


def test_other_text_is_held_out_whole_and_named(runs, capsys):
    call("eval", "a", "--tokens", "300")
    own = Path("a/eval.json").read_text()
    capsys.readouterr()
    call("eval", "a", "--tokens", "300", "--text", "other")
    found = result("a/eval-other.json")
    assert found["reconstruction"]["documents"] == 7, "all that there are"
    assert found["options"] == {"tokens": 300, "text": f"{runs}/other"}
    said = f"over 7 documents of {runs}/other (not the run's text: all of it counts as held out)"
    assert said in capsys.readouterr().out
    assert Path("a/eval.json").read_text() == own, "the report is of the run's own text"
    call("eval", "a", "--tokens", "300", "--text", "text")  # its own: what it was trained on is no held-out text
    assert Path("a/eval.json").read_text() == own


def test_text_that_is_gone_is_not_needed_for_other_text(runs, capsys):
    data = Path("a/data.json")
    recorded = data.read_text()
    try:
        data.write_text(json.dumps(json.loads(recorded) | {"text": "gone.txt", "text_crc32": 1}))
        with pytest.raises(SystemExit, match=r"gone\.txt, which a was trained on, does not exist any more"):
            call("eval", "a")
        call("eval", "a", "--tokens", "100", "--text", "other")
    finally:
        data.write_text(recorded)


def test_few_documents_have_no_intervals_and_it_is_said(runs, capsys):
    for name in list("0123456")[4:]:
        (runs / "few").mkdir(exist_ok=True)
        (runs / "few" / f"{name}.txt").write_text((runs / "other" / f"{name}.txt").read_text())
    call("eval", "a", "b", "--tokens", "300", "--text", "few")
    out = capsys.readouterr().out
    assert "predictions, 3 documents of" in out
    assert "all of it counts as held out): no intervals, which take 5 documents or more" in out
    assert "[0" not in out
    assert result("a/eval-few.json")["reconstruction"]["fvu"]["low"] is None


def test_runs_side_by_side(runs, capsys, monkeypatch):
    measured, shown = [], []
    measure, bar = evaluation.measure, progress.bar

    def keeping(*a: Any, **options: Any) -> Any:
        found = measure(*a, **options)
        measured.append(found[0])
        return found

    def showing(what: str, *a: Any, **options: Any) -> Any:
        shown.append(progress.named(what))
        return bar(what, *a, **options)

    monkeypatch.setattr(evaluation, "measure", keeping)
    monkeypatch.setattr(progress, "bar", showing)
    call("eval", "a", "b", "--tokens", "300")
    assert [name for name in shown if name != "tokens"] == [
        f"{run}: {stage}" for run in "ab" for stage in ("reconstruction", "KL", "KL with BOS")
    ]
    for name in "ab":
        assert result(f"{name}/eval.json")["options"] == {"tokens": 300}
        assert not Path(name, "eval.parts").exists()
    header, _, *rows, last = capsys.readouterr().out.split("\n\n")[-1].strip().splitlines()[-6:]
    columns = re.split(r"  +", header)
    table = [dict(zip(columns, re.split(r"  +", row), strict=True)) for row in rows]
    assert [row["run"] for row in table] == ["a", "b", "b less a"]
    assert "paired by document" in last
    a, b = measured
    assert table[1]["FVU"] == f"{b.reconstruction.fvu:.4f}"
    less = evaluation.differences(b, a)
    kl = less["KL"]
    assert table[2]["KL"] == f"{kl:+.4f}"
    assert kl.estimate == pytest.approx(b.bos_out.full.kl.estimate - a.bos_out.full.kl.estimate)
    fvu, recovered = less["FVU"].estimate, less["loss recovered"].estimate
    assert fvu == pytest.approx(b.reconstruction.fvu.estimate - a.reconstruction.fvu.estimate, abs=1e-6)
    assert recovered == pytest.approx(b.bos_out.full.loss_recovered.estimate - a.bos_out.full.loss_recovered.estimate)
    by_document = [m.bos_out.sums.sums["kl full"] for m in (b, a)]
    rows_of = b.bos_out.sums.sums["rows"]
    assert vars(kl) == pytest.approx(vars(b.bos_out.sums.ratio(by_document[0] - by_document[1], rows_of)))
    half = (kl.high - kl.low) / 2
    own = [m.bos_out.full.kl for m in (a, b)]
    assert half < sum(i.high - i.low for i in own) / 2, "pairing takes out what documents have in common"


def test_what_cannot_stand_side_by_side_is_refused_before_a_model_is_loaded(runs, monkeypatch):
    monkeypatch.setattr(experiment, "language_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit, match=r"eval: a has hook '.*resid_post', c has '.*mlp_out': only runs of one model"):
        call("eval", "a", "c")
    for name, value in (("model", "gpt2"), ("text", f"{runs}/other"), ("context", 12), ("prepend_bos", False)):
        data = runs / "b" / "data.json"
        recorded = data.read_text()
        try:
            data.write_text(json.dumps(json.loads(recorded) | {name: value}))
            for more in ((), ("--text", "other")):
                with pytest.raises(SystemExit, match=f"eval: a has {name} .*, b has .*Measure them one by one"):
                    call("eval", "a", "b", *more)
        finally:
            data.write_text(recorded)
    with pytest.raises(SystemExit, match="nowhere is no run of `fastsae train`"):
        call("eval", "a", "nowhere")


@pytest.mark.parametrize("device", ["meta", "nonsense", "cuda:99"])
def test_a_device_that_is_not_there(runs, device):
    with pytest.raises(SystemExit, match=f"--device: '{device}' cannot be used here .*; leave it out for '"):
        call("eval", "a", "--device", device)


def test_a_device_that_is_asked_for(runs, monkeypatch):
    asked: list[str | None] = []
    monkeypatch.setattr(experiment, "device", lambda on=None: (asked.append(on), "cpu")[1])
    call("eval", "a", "--tokens", "100", "--device", "cpu")
    assert set(asked) == {"cpu"}, "None is the default"


def test_the_conditions_that_are_announced_are_those_that_are_measured(runs):
    for name, expected in (("a", 1), ("b", 4)):
        call("eval", name, "--tokens", "100")
        assert len(conditions(experiment.trained(Path(name)).sae)) == expected
        assert tuple(result(f"{name}/eval.json")["bos_out"]["conditions"]) == conditions(
            experiment.trained(Path(name)).sae
        )
