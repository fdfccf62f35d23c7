"""SequentialSAE: integration on the residual of a frozen TopK SAE, in the module, the Trainer and the command line."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_train import D, K, M, activations, assert_same, config, weights
from torch import Tensor

import fastsae
from fastsae import cli, provenance
from fastsae.config import DataConfig
from fastsae.modules.sequential import FROZEN
from fastsae.planner import plan
from fastsae.train import Trainer

DATA = "--tokens 3000 --context 64 --batch-size 64 --buffer-rows 1000 --steps 3 --no-progress".split()  # noqa: SIM905  # as it is typed
SIZE = ["--d-sae", "128", "--k", "8"]


@pytest.fixture(scope="module")
def base() -> fastsae.TopKSAE:
    torch.manual_seed(3)
    sae = fastsae.TopKSAE(D, M, K)
    Trainer(sae, config(steps=60)).fit(activations())
    return sae


def on(base: fastsae.TopKSAE, **options) -> fastsae.SequentialSAE:
    torch.manual_seed(4)
    return fastsae.SequentialSAE.on(base, **({"d_embedding": 6} | options))


def randomised(base: fastsae.TopKSAE, **options) -> fastsae.SequentialSAE:
    """In fp64, without dropout, its integration far from zero."""
    torch.manual_seed(5)
    sae = on(base, dropout=0.0, **options).double()
    for p in sae.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    return sae


def trained_names(sae: torch.nn.Module) -> set[str]:
    return {name for name, p in sae.named_parameters() if p.requires_grad}


# ---- the module ----


@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_it_keeps_what_the_base_is(pre_bias, dtype):
    base = fastsae.TopKSAE(8, 50, 6, pre_bias=pre_bias, init="unit", backend="reference", dtype=dtype)
    base.normalizer.measure(torch.randn(100, 8) * 3 + 1, "zscore")
    sae = fastsae.SequentialSAE.on(base, k_integration=5, d_embedding=7, dropout=0.3)
    assert (sae.backend, sae.W_enc.dtype, sae.config.init, sae.config.pre_bias) == (
        "reference",
        dtype,
        "unit",
        pre_bias,
    )
    assert (sae.k_integration, sae.config.d_embedding, sae.config.dropout) == (5, 7, 0.3)
    for name, t in base.state_dict().items():
        assert torch.equal(sae.state_dict()[name], t)
        assert sae.state_dict()[name].data_ptr() != t.data_ptr(), f"{name} is shared with the base"
    assert trained_names(sae) == {"W_lin", "b_lin", "V", "W1", "b1", "W2", "b2"}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_identity_is_the_bases_reconstruction(base, backend):
    sae, x = on(base), torch.randn(40, D)
    base.backend = sae.backend = backend
    assert torch.equal(sae.components(x).identity, base(x).reconstruction)
    base.backend = "auto"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("n", [1, 2, K])
def test_loss_and_gradients_are_those_of_the_residual(base, n, backend):
    """The paper's definition, dense: e = x - identity, loss = mean((linear + interaction - e)^2)."""
    sae = randomised(base, k_integration=n)
    sae.backend = backend
    x = torch.randn(30, D, dtype=torch.float64)
    output = sae(x)
    output.loss.backward()
    ours = {name: p.grad for name, p in sae.named_parameters()}
    assert {name for name, grad in ours.items() if grad is not None} == trained_names(sae)

    sae.zero_grad()
    with torch.no_grad():
        a, i = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).topk(K)
        e = x - torch.einsum("bk,bkd->bd", a, sae.W_dec[i]) - sae.b_dec
    linear = torch.einsum("bn,bnd->bd", a[:, :n], sae.W_lin[i[:, :n]]) + sae.b_lin
    terms = a[:, :n, None] * sae.V[i[:, :n]]
    z = sum((terms[:, p] * terms[:, q] for p in range(n) for q in range(p)), terms.sum(dim=1) * 0)
    interaction = torch.relu(z @ sae.W1.T + sae.b1) @ sae.W2.T + sae.b2
    loss = F.mse_loss(linear + interaction, e)
    torch.testing.assert_close(output.loss, loss)
    loss.backward()
    for name in trained_names(sae):
        expected = sae.get_parameter(name).grad
        torch.testing.assert_close(ours[name], expected, msg=lambda m, name=name: f"{name}: {m}")
        assert n == 1 or expected.abs().max() > 1e-6


def test_the_encoders_backward_is_left_out(base, monkeypatch):
    monkeypatch.setattr("fastsae.ops._topk_encode_backward", lambda *_: pytest.fail("nobody asked for it"))
    sae = on(base)
    output = sae(torch.randn(9, D))
    assert not output.code.values.requires_grad
    output.loss.backward()


def test_with_nothing_to_train(base):
    with pytest.raises(ValueError, match="linear and interaction are both off; there is nothing to train"):
        on(base, linear=False, interaction=False)


def test_the_base_is_a_topk_sae(base):
    with pytest.raises(ValueError, match="expected a TopKSAE as the base; got SequentialSAE"):
        on(on(base))


@pytest.mark.parametrize("pathway", [{}, {"linear": False}, {"interaction": False}], ids=str)
def test_round_trip(base, pathway, tmp_path):
    sae = on(base, **pathway).eval()
    sae.save_pretrained(tmp_path)
    for loaded in (fastsae.SequentialSAE.from_pretrained(tmp_path), fastsae.load(tmp_path)):
        assert type(loaded) is fastsae.SequentialSAE
        assert loaded.config == sae.config
        assert_same(weights(loaded), weights(sae))
        assert trained_names(loaded) == trained_names(sae) == {name for name, _ in sae.named_parameters()} - set(FROZEN)
    with pytest.raises(ValueError, match="holds architecture 'sequential', expected 'joint'"):
        fastsae.JointSAE.from_pretrained(tmp_path)


# ---- the Trainer ----


@pytest.mark.parametrize("n", [1, 2, K])
def test_training_leaves_the_base_alone_and_lowers_the_loss(base, n):
    sae, before = on(base, k_integration=n, dropout=0.0), weights(base)
    start = weights(sae)
    Trainer(sae, config(steps=200)).fit(activations())
    assert_same({name: t for name, t in weights(sae).items() if name in before}, before)
    assert not any(torch.equal(sae.state_dict()[name], start[name]) for name in ("W_lin", "b_lin", "b2"))
    x = base.normalizer(next(activations(seed=7, batch=500)))
    with torch.no_grad():
        assert sae(x).loss < 0.97 * base(x).loss


def test_interaction_reduces_the_residual_of_planted_pairs():
    """A third direction appears where two meet: a TopK SAE that is given both cannot explain it by one of them."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    features, extra = directions[:6], directions[6:]

    def sample(rows: int) -> Tensor:
        on = torch.rand(rows, 6, generator=generator) < 0.4
        a = on * (0.5 + torch.rand(rows, 6, generator=generator))
        pairs = torch.stack([a[:, 0] * a[:, 1], a[:, 2] * a[:, 3], a[:, 4] * a[:, 5]], dim=1)
        return a @ features + 2 * pairs @ extra[:3]

    base = fastsae.TopKSAE(16, 6, 6, pre_bias=False)
    with torch.no_grad():
        base.W_enc.copy_(features)
        base.W_dec.copy_(features)
    losses = {}
    x = sample(2000)
    for pathways in ({"linear": True, "interaction": False}, {"linear": True, "interaction": True}):
        torch.manual_seed(0)
        sae = fastsae.SequentialSAE.on(base, k_integration=6, d_embedding=16, dropout=0.0, **pathways)
        data = (sample(256) for _ in range(600))
        Trainer(sae, config(steps=600, normalize="none", log_every=100)).fit(data)
        with torch.no_grad():
            losses[pathways["interaction"]] = sae(x).loss.item() / base(x).loss.item()
    assert losses[True] < 0.3 * losses[False] < 0.3


def test_resume_is_bitwise(base, tmp_path, monkeypatch):
    whole = on(base)
    uninterrupted = Trainer(whole, config(run_dir=tmp_path / "a")).fit(activations())
    cut = Trainer(on(base), config(run_dir=tmp_path / "b", checkpoint_every=3))
    step = cut._train_step
    monkeypatch.setattr(cut, "_train_step", lambda x: pytest.fail("killed") if cut.steps == 8 else step(x))
    with pytest.raises(pytest.fail.Exception):
        cut.fit(activations())
    again = on(base)
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()  # everything must come from the checkpoint, the frozen weights too
    resumed = Trainer(again, config(run_dir=tmp_path / "b", checkpoint_every=3, resume=True)).fit(activations())
    assert_same(weights(again), weights(whole))
    assert resumed.metrics | {"rows_per_second": 0} == uninterrupted.metrics | {"rows_per_second": 0}
    assert_same(weights(fastsae.load(tmp_path / "b" / "sae")), weights(whole))


def test_frozen_rows_cannot_be_kept_at_norm_one(base):
    with pytest.raises(ValueError, match=r"unit_norm_decoder: W_dec is frozen \(requires_grad is False\)"):
        Trainer(on(base), config(unit_norm_decoder=True))


def test_what_frozen_weights_cannot_do_is_refused(base):
    with pytest.raises(ValueError, match=r"auxk: W_enc is frozen"):
        Trainer(on(base), config(auxk=4))
    base = fastsae.TopKSAE(D, M, K)
    base.normalizer.measure(torch.randn(50, D) + 1, "zscore")
    for kind in ("scale", "none"):
        with pytest.raises(ValueError, match=f"normalize: '{kind}', but this SAE has stored statistics"):
            Trainer(on(base), config(normalize=kind)).fit([torch.randn(8, D)])


# ---- the plan ----


def test_plan_counts_the_frozen_apart():
    shape = {"pre_bias": True, "k_integration": 24}
    p = plan(fastsae.SequentialSAEConfig(1024, 65536, 64, **shape), batch_size=2048)
    sae = fastsae.SequentialSAE(1024, 65536, 64, **shape, device="meta", backend="reference")
    assert p.parameters == {name: q.numel() for name, q in sae.named_parameters()}
    assert set(p.trained) == trained_names(sae)
    trained = sum(q.numel() for q in sae.parameters() if q.requires_grad)
    assert (p.weights_bytes, p.gradients_bytes, p.optimizer_bytes) == (4 * p.n_parameters, 4 * trained, 8 * trained)
    B, D, M, K, N, E = 2048, 1024, 65536, 64, 24, 128
    linear, interaction = 2 * 2 * B * N * D, 4 * 2 * B * N * E + 3 * 2 * B * E * (E + D)
    assert p.flops_per_step == 2 * B * D * M + 2 * B * K * D + linear + interaction


# ---- the command line ----


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["fastsae", *arguments])
        cli.main()
        return capsys.readouterr().out

    return call


def test_train_sequential(run):
    run("train", "topk", "--run-dir", "base", *SIZE, *DATA)
    sequential = ["train", "sequential", "--base", "base", "--k-integration", "3", "--d-embedding", "8", *DATA]
    run(*sequential, "--run-dir", "r")
    sae, of = fastsae.load("r/sae"), fastsae.load("base/sae")
    assert (sae.architecture, sae.d_sae, sae.k, sae.config.n) == ("sequential", 128, 8, 3)
    assert_same({name: t for name, t in weights(sae).items() if name in of.state_dict()}, weights(of))
    assert "identity + linear" in run("eval", "r", "--tokens", "300")

    with pytest.raises(
        SystemExit, match=r"base was trained on blocks\.2\.hook_resid_post of model 'embedded' .* on blocks\.1\."
    ):
        run(*sequential, "--run-dir", "other", "--hook", "blocks.1.hook_resid_post")
    Path("texts").mkdir()
    for i in range(60):
        Path("texts", f"{i}.txt").write_text("other words " * 200)
    with pytest.raises(SystemExit, match="or documents it was trained on would be held out"):
        run(*sequential, "--run-dir", "other", "--text", "texts")
    assert not Path("other/data.json").exists()
    seen = json.loads(Path("base/data.json").read_text())
    Path("base/data.json").write_text(json.dumps(seen | {"model": "gpt2"}))
    with pytest.raises(SystemExit, match=r"of model 'gpt2' on .*, this run is on .* of model 'embedded'"):
        run(*sequential, "--run-dir", "other")
    Path("base/data.json").write_text(json.dumps(seen))
    with pytest.raises(SystemExit, match="expected a TopKSAE as the base; got SequentialSAE"):
        run("train", "sequential", "--base", "r", "--run-dir", "other", *DATA)
    with pytest.raises(SystemExit, match="nowhere is no run of `fastsae train`"):
        run("train", "sequential", "--base", "nowhere", "--run-dir", "other", *DATA)
    with pytest.raises(SystemExit, match="nothing to train"):
        run(*sequential, "--no-linear", "--no-interaction", "--run-dir", "other")


def test_a_run_goes_on_on_its_own_base_only(base, tmp_path):
    data = DataConfig()
    for name, sae in (("a", base), ("b", fastsae.TopKSAE(D, M, K))):
        sae.save_pretrained(tmp_path / name / "sae")
    provenance.record(data, tmp_path / "r", tmp_path / "a")
    (tmp_path / "r" / "metrics.jsonl").touch()
    provenance.record(data, tmp_path / "r", tmp_path / "a")
    with pytest.raises(ValueError, match=r"base was '.*a', is '.*b'.*Choose another --run-dir"):
        provenance.record(data, tmp_path / "r", tmp_path / "b")
    fastsae.TopKSAE(D, M, K).save_pretrained(tmp_path / "a" / "sae")
    with pytest.raises(ValueError, match=r"base_crc32 was"):
        provenance.record(data, tmp_path / "r", tmp_path / "a")


def test_the_base_has_the_flags_of_its_shape(run, capsys):
    with pytest.raises(SystemExit):
        run("train", "sequential", "--help")
    told = capsys.readouterr().out
    assert all(flag in told for flag in ("--base", "--k-integration", "--d-embedding", "--dropout", "--steps"))
    assert not any(flag in told for flag in ("--d-sae", "--k ", "--pre-bias", "--init", "--d-in"))
