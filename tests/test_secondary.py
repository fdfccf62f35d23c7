"""SecondarySAE and pairs: the module, its activations, against definitions, and the whole command line."""

import itertools
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_lm import hooked, tokenizer

import fastsae
import fastsae.factorial
from fastsae import cli, experiment, files, provenance
from fastsae.activations import Document, ModelActivations, harvest, tokenize
from fastsae.evaluate import drivers, pairs, top_features, top_pairs
from fastsae.evaluate.pathways import through_secondary
from fastsae.modules import HiddenActivations

HOOK = "blocks.1.hook_resid_post"
TEXT = [
    Document("a", "the cat sat on the mat . the dog ran under a tree and then sat"),
    Document("b", "a dog , a cat ."),
    Document("c", "the tree ran quickly and then slowly . a mat sat"),
]


@pytest.fixture
def base() -> fastsae.JointSAE:
    torch.manual_seed(1)
    sae = fastsae.JointSAE(16, 24, 5, k_integration=4, d_embedding=6, dropout=0.5)
    for name, p in sae.named_parameters():
        torch.nn.init.normal_(p, std=1.0 if name != "b_enc" else 0.1)
    sae.normalizer.measure(3 * torch.randn(100, 16) + 2, "zscore")
    return sae.eval()


@pytest.fixture
def windows():
    return tokenize(TEXT, tokenizer(), 8, held_out=None)


@pytest.fixture
def secondary(base, windows) -> fastsae.SecondarySAE:
    torch.manual_seed(2)
    sae = fastsae.SecondarySAE.on(base, 12, 3)
    for p in sae.parameters():
        torch.nn.init.normal_(p)
    source = HiddenActivations(ModelActivations(hooked(), HOOK, windows, len(windows)), base)
    sae.normalizer.measure(source.block(0), "zscore")
    return sae.eval()


# ---- the module ----


@torch.no_grad()
def test_hidden_is_what_the_network_holds_before_its_relu(base):
    base.train()  # dropout is off in hidden, whatever the mode
    x = torch.randn(3, 7, 16)
    code = base.encode(x)
    a = code.to_dense().scatter(-1, code.indices[..., 4:], 0.0)
    z = ((a @ base.V).square() - a.square() @ base.V.square()) / 2
    torch.testing.assert_close(base.hidden(code), F.linear(z, base.W1, base.b1), rtol=1e-4, atol=1e-5)
    base.eval()
    through = base.interaction_from(base.hidden(code))
    torch.testing.assert_close(through, base.components(x).interaction, rtol=1e-4, atol=1e-5)


def test_sizes_are_the_papers():
    sae = fastsae.SecondarySAE.on(fastsae.JointSAE(8, 30, 4, d_embedding=10))
    assert (sae.d_in, sae.d_sae, sae.k, sae.b_dec) == (10, 250, 5, None)
    assert fastsae.SecondarySAE.on(fastsae.JointSAE(8, 30, 4, d_embedding=1)).k == 1


@pytest.mark.parametrize(
    ("sae", "got"),
    [
        (fastsae.TopKSAE(8, 30, 4), "TopKSAE"),
        (fastsae.JointSAE(8, 30, 4, interaction=False), "JointSAE without interaction"),
    ],
)
def test_it_needs_an_integration_network(sae, got):
    with pytest.raises(ValueError, match=f"expected a JointSAE with its pairwise pathway as the base; got {got}"):
        fastsae.SecondarySAE.on(sae)
    if got.startswith("JointSAE"):
        with pytest.raises(RuntimeError, match="there is no pairwise pathway"):
            sae.hidden(sae.encode(torch.randn(2, 8)))


def test_it_is_saved_and_loaded(secondary, tmp_path):
    secondary.save_pretrained(tmp_path)
    sae = fastsae.load(tmp_path)
    assert isinstance(sae, fastsae.SecondarySAE)
    x = torch.randn(4, 6)
    torch.testing.assert_close(sae.reconstruct(x), secondary.reconstruct(x), rtol=0, atol=0)


def test_hidden_activations_from_a_store_are_those_on_the_fly(base, windows, tmp_path):
    source = ModelActivations(hooked(), HOOK, windows, batch_windows=2)
    store = harvest(source, tmp_path / "acts")
    fly, stored = HiddenActivations(source, base), HiddenActivations(store, base)
    assert (fly.d_in, fly.block_rows, fly.identity) == (6, source.block_rows, stored.identity)
    for i in range(len(fly.block_rows)):
        raw = source.rows(i)
        expected = base.hidden(base.encode(base.normalizer(raw.activations)))
        for one in (fly, stored):
            rows = one.rows(i)
            torch.testing.assert_close(rows.activations, expected)
            torch.testing.assert_close(one.block(i), expected)
            assert not rows.activations.requires_grad
            assert rows.documents.tolist() == raw.documents.tolist()
            assert rows.positions.tolist() == raw.positions.tolist()
    base.normalizer.mean[0] += 1
    assert HiddenActivations(source, base).identity != fly.identity
    base.normalizer.mean[0] -= 1
    with torch.no_grad():
        base.W1[0, 0] += 1
    assert HiddenActivations(source, base).identity != fly.identity


@torch.no_grad()
def test_the_pathway_through_a_secondary_sae(base, secondary):
    code = base.encode(torch.randn(9, 16))
    found, parts = through_secondary(base, secondary, code), base.summands(code)
    torch.testing.assert_close(found["no interaction"], parts.identity + parts.linear)
    torch.testing.assert_close(found["own hidden layer"], base.decode(code), rtol=1e-4, atol=1e-4)
    interaction = base.interaction_from(secondary.reconstruct(base.hidden(code)))
    torch.testing.assert_close(found["full"], parts.identity + parts.linear + interaction)


# ---- pairs ----


@torch.no_grad()
def dense(base, windows) -> tuple[torch.Tensor, torch.Tensor]:
    """The strongest features of all rows, and the hidden layer."""
    rows = ModelActivations(hooked(), HOOK, windows, len(windows)).block(0)
    code = base.encode(base.normalizer(rows))
    return base.strongest(code).to_dense().double(), base.hidden(code)


@torch.no_grad()
def test_pairs_by_definition(base, windows):
    a, hidden = dense(base, windows)
    found = top_pairs(base, hooked(), HOOK, windows, n_pairs=6, n_examples=2, context=2)
    every = list(itertools.combinations(range(24), 2))
    products = torch.stack([a[:, i] * a[:, j] for i, j in every], dim=1)
    vectors = torch.stack([base.V[i] * base.V[j] for i, j in every]).double()
    contribution = products.square().mean(dim=0) * vectors.square().sum(dim=1)
    order = contribution.argsort(descending=True)[:6].tolist()
    assert [pair.features for pair in found] == [every[p] for p in order]
    interaction = base.interaction_from(hidden)
    variance = (interaction - interaction.mean(dim=0)).square().sum()
    for pair, p in zip(found, order, strict=True):
        i, j = every[p]
        assert pair.contribution == pytest.approx(float(contribution[p]), rel=1e-4)
        assert pair.dot == pytest.approx(float(base.V[i] @ base.V[j]), rel=1e-5)
        assert pair.together == pytest.approx(float((products[:, p] > 0).double().mean()))
        apart = float((a[:, i] > 0).double().mean() * (a[:, j] > 0).double().mean())
        assert pair.together_if_independent == pytest.approx(apart)
        there = products[:, p][products[:, p] > 0]
        assert pair.mean_product == pytest.approx(float(there.mean()), rel=1e-5)
        without = hidden - products[:, p, None].float() * (base.W1 @ vectors[p].float())
        change = (interaction - base.interaction_from(without)).square().sum() / variance
        assert pair.output_change == pytest.approx(float(change), rel=1e-3)
        assert pair.examples[0].activations[pair.examples[0].peak] == pytest.approx(float(there.max()), rel=1e-5)


def test_sums_drop_the_smallest_pairs():
    a = torch.tensor([[3.0, 2.0, 1.0]])
    sums = pairs.PairSums(10, "cpu", capacity=2)
    sums.add(fastsae.SparseCode(a, torch.tensor([[7, 2, 5]]), 10))
    assert sums.pairs.tolist() == [[2, 7], [5, 7]]
    assert sums.sums.tolist() == [[6, 36], [3, 9]]
    sums.add(fastsae.SparseCode(a, torch.tensor([[2, 7, 1]]), 10))
    assert sums.pairs.tolist() == [[2, 7], [5, 7]]
    assert sums.sums.tolist() == [[12, 72], [3, 9]]


@torch.no_grad()
def test_pairs_are_measured_among_all_that_integration_sees(base, secondary, windows, monkeypatch):
    """Nominated among the strongest two of a row, they count wherever both are seen."""
    monkeypatch.setattr(pairs, "PER_ROW", 2)
    a, hidden = dense(base, windows)
    for pair in top_pairs(base, hooked(), HOOK, windows, n_pairs=3):
        products = a[:, pair.features[0]] * a[:, pair.features[1]]
        assert pair.together == pytest.approx(float((products > 0).double().mean()))
    active = secondary.encode(secondary.normalizer(hidden)).to_dense() > 0
    feature = int(active.sum(dim=0).argmax())
    (found,) = drivers(secondary, base, hooked(), HOOK, windows, [feature], n_pairs=3)
    for driver in found.pairs:
        i, j = driver.features
        assert driver.together == pytest.approx(float((a[:, i] * a[:, j] > 0)[active[:, feature]].double().mean()))


@torch.no_grad()
def test_shares_of_all_pairs_add_up_to_one(base, secondary, windows):
    a, hidden = dense(base, windows)
    active = secondary.encode(secondary.normalizer(hidden)).to_dense() > 0
    feature = int(active.sum(dim=0).argmax())
    (found,) = drivers(secondary, base, hooked(), HOOK, windows, [feature], n_pairs=1000)
    assert found.rows == int(active[:, feature].sum())
    assert sum(pair.share for pair in found.pairs) == pytest.approx(1.0, rel=1e-4)
    pre = (secondary.normalizer(hidden) @ secondary.W_enc[feature])[active[:, feature]].mean()
    constants = secondary.normalizer(base.b1.detach()) @ secondary.W_enc[feature]
    first = found.pairs[0]
    i, j = first.features
    weight = (secondary.W_enc[feature] / secondary.normalizer.scale) @ base.W1 @ (base.V[i] * base.V[j])
    part = float((a[:, i] * a[:, j])[active[:, feature]].mean() * weight)
    assert first.share == pytest.approx(part / float(pre - constants), rel=1e-3)
    assert [abs(p.share) for p in found.pairs] == sorted((abs(p.share) for p in found.pairs), reverse=True)


def test_top_features_of_a_secondary_sae(base, secondary, windows):
    found = top_features(secondary, hooked(), HOOK, windows, n_features=3, n_examples=1, base=base)
    with torch.no_grad():
        _, hidden = dense(base, windows)
        activations = secondary.encode(secondary.normalizer(hidden)).to_dense()
    for feature in found:
        assert feature.max_activation == pytest.approx(float(activations[:, feature.feature].max()), rel=1e-4)
        assert feature.examples[0].tokens[0] in tokenizer().get_vocab()


def test_an_sae_without_pairs_says_so(windows):
    sae = fastsae.JointSAE(16, 24, 4, interaction=False)
    with pytest.raises(ValueError, match="interaction=False, so it has no pairs"):
        top_pairs(sae, hooked(), HOOK, windows)


# ---- the command line ----

SIZE = "--tokens 3000 --context 64 --batch-size 64 --buffer-rows 1000 --steps 4 --no-progress".split()  # noqa: SIM905  # as it is typed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("secondary")


@pytest.fixture
def run(monkeypatch, capsys, folder):
    monkeypatch.chdir(folder)

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["fastsae", *arguments])
        cli.main()
        return capsys.readouterr().out

    return call


def test_from_training_to_the_report(run):
    run("train", "joint", "--d-sae", "128", "--k", "8", "--d-embedding", "8", "--run-dir", "joint", *SIZE)
    out = run("train", "secondary", "--base", "joint", "--run-dir", "second", "--store", "acts", *SIZE)
    assert "fastsae eval second" in out
    sae = fastsae.load("second/sae")
    assert (sae.architecture, sae.d_in, sae.d_sae, sae.k) == ("secondary", 8, 200, 4)
    assert sae.normalizer.measured
    out = run("eval", "second", "--tokens", "500")
    for condition in ("no interaction", "own hidden layer", "full "):
        assert f"\n{condition}" in out
    run("analyze", "second", "--tokens", "500")
    assert "drivers" in json.loads(Path("second/pairs.json").read_text())
    out = run("analyze", "joint", "--tokens", "500")
    assert "Pairs of features that put most into z" in out
    clamping = "--new-tokens 2 --directions 2 --others 1 --permutations 99 --clamped 1".split()  # noqa: SIM905  # as it is typed
    found = json.loads((Path(fastsae.factorial.__file__).parent / "sets" / "code_files.json").read_text())
    for cell in found["cells"].values():
        cell["texts"], cell["words"] = cell["texts"][:6], cell["words"][:3]
    Path("few.json").write_text(json.dumps(found | {"prompts": found["prompts"][:3]}))
    out = run("factorial", "second", "few.json", *clamping)
    assert re.search(r"pair: \d+ discoveries among \d+ features", out)
    found = json.loads(Path("second/factorial-code-files.json").read_text())
    assert found["options"]["directions"] == 2
    assert {e["target"].split(":")[0] for e in found["effects"]} <= {"pair", "secondary", "interaction"}
    assert "== interaction ==" in Path("second/factorial-code-files.txt").read_text()
    page = Path("second/report.html").read_text()
    for part in ("2x2: code-files", "Family: secondary", "Clamping", "Drivers", "text written under clamps"):
        assert part in page
    Path("second/report.html").unlink()
    run("report", "second")
    assert Path("second/report.html").read_text() == page


def test_another_base_is_refused(run, folder):
    run("train", "joint", "--d-sae", "64", "--k", "8", "--d-embedding", "8", "--run-dir", "other", *SIZE)
    with pytest.raises(SystemExit, match=r"second is a run on other activations: .*base was '.*joint', is '.*other'"):
        run("train", "secondary", "--base", "other", "--run-dir", "second", "--resume", *SIZE)
    with pytest.raises(SystemExit, match="must be those of the base"):
        run("train", "secondary", "--base", "joint", "--run-dir", "x", "--hook", "blocks.1.hook_resid_post", *SIZE)
    with pytest.raises(SystemExit, match="expected a JointSAE with its pairwise pathway as the base; got SecondarySAE"):
        run("train", "secondary", "--base", "second", "--run-dir", "y", *SIZE)


@pytest.mark.parametrize("base", [None, 5, ["joint"]])
def test_a_base_that_is_no_path_is_damage(base, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps({"base": base}))
    with pytest.raises(ValueError, match=r"data.json is damaged: it names no base; train the run again"):
        provenance.recorded_base(tmp_path)


def test_results_that_cannot_be_written_are_told(run, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli.record, "write", full)
    with pytest.raises(SystemExit, match="No space left on device"):
        run("factorial", "second", "few.json", "--clamped", "0", "--permutations", "99")
    assert "pair: the features with the least p of an interaction" in capsys.readouterr().out


def test_what_is_known_when_it_is_stopped_is_kept(run, monkeypatch, capsys):
    from fastsae.factorial import run as experiments

    first = experiments.effect

    def stopped(*arguments):
        monkeypatch.setattr(experiments, "effect", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        return first(*arguments)

    monkeypatch.setattr(experiments, "effect", stopped)
    options = "--directions 1 --others 0 --new-tokens 0 --permutations 99 --clamped 1 --pool max".split()  # noqa: SIM905  # as it is typed
    with pytest.raises(SystemExit):
        run("factorial", "second", "few.json", *options)
    found = json.loads(Path("second/factorial-code-files.json").read_text())
    assert (len(found["effects"]), found["options"]["pool"]) == (1, "max")
    assert f"\n{found['effects'][0]['target']}: " in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_noticed_before_anything_is_computed(run, monkeypatch):
    """Root can write everywhere, so the lock is held by another."""
    monkeypatch.setattr(cli, "run_factorial", lambda *_: pytest.fail("it was begun"))
    with files.locked(Path("second"), "test"), pytest.raises(SystemExit, match="factorial: another process is writing"):
        run("factorial", "second", "few.json")


def test_runs_that_were_moved_together_find_each_other(folder, tmp_path):
    for name in ("joint", "second"):
        shutil.copytree(folder / name, tmp_path / name)
    data = tmp_path / "second" / "data.json"
    files.write_json(data, files.read_json(data) | {"base": "/gone/joint"})
    assert experiment.trained(tmp_path / "second").base is not None
    provenance.record(provenance.recorded(tmp_path / "second"), tmp_path / "second", tmp_path / "joint")
    assert files.read_json(data)["base"] == str(tmp_path / "joint")  # it may be resumed there
    other = tmp_path / "retrained" / "joint"
    shutil.copytree(tmp_path / "joint", other)
    description = files.read_json(other / "sae" / "config.json")
    files.write_json(other / "sae" / "config.json", description | {"weights_crc32": 1})
    files.write_json(data, files.read_json(data) | {"base": str(other)})
    assert provenance.recorded_base(tmp_path / "second") == tmp_path / "joint"  # the one it was trained on
    files.write_json(data, files.read_json(data) | {"base": "/gone/joint"})
    (tmp_path / "joint" / "sae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="the SAE of /gone/joint, which is neither there nor beside it"):
        experiment.trained(tmp_path / "second")


def test_a_base_that_changed_is_noticed(run, folder):
    moved = folder / "joint"
    description = json.loads((moved / "sae" / "config.json").read_text())
    (moved / "sae" / "config.json").write_text(json.dumps(description | {"weights_crc32": 1}))
    with pytest.raises(SystemExit, match="joint was trained again since second was trained on its SAE"):
        run("eval", "second", "--tokens", "500")
    (moved / "sae" / "config.json").unlink()
    with pytest.raises(
        SystemExit, match=r"second stands on the SAE of .*joint, which is neither there nor beside it any more"
    ):
        run("eval", "second", "--tokens", "500")
