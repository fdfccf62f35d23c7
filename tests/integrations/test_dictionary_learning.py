"""dictionary_learning's trainSAE with our trainers, beside its stock TopKTrainer."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("dictionary_learning", reason="dictionary_learning is not installed; `make test` installs it")

from dense import DenseSpy
from dictionary_learning.evaluation import evaluate
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE

from fastsae.integrations import dictionary_learning as fast

B, D, M, K, STEPS = 96, 24, 200, 6, 30


def batches(n: int = STEPS + 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    mixed = torch.randn(40, D, generator=generator)
    return [torch.rand(B, 40, generator=generator).pow(6) @ mixed for _ in range(n)]


def options(trainer: type, **more) -> dict:
    common = {"activation_dim": D, "dict_size": M, "k": K, "steps": STEPS, "warmup_steps": 5, "layer": 0}
    of_topk = {"threshold_start_step": 10} if issubclass(trainer, TopKTrainer) else {}
    return common | of_topk | {"lm_name": "none", "device": "cpu", "seed": 0, "lr": 1e-3} | more


def trained(trainer: type, folder: Path, dead_after: int = 10**7, train: dict | None = None, **more) -> list[float]:
    losses = []

    class Logged(trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.dead_feature_threshold = dead_after

        def update(self, step, x):
            losses.append(super().update(step, x))
            return losses[-1]

    config = {"trainer": Logged} | options(trainer, **more)
    data = batches(200)
    trainSAE(iter(data), [config], steps=STEPS, save_dir=str(folder), device="cpu", **(train or {}))
    return losses


def saved(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "trainer_0" / "ae.pt", weights_only=True)


@pytest.mark.parametrize(
    ("dead_after", "more"),
    [(10**7, {}), (10**7, {"decay_start": 20}), (150, {}), (150, {"auxk_alpha": 1.0}), (150, {"auxk_alpha": 0})],
    ids=str,
)
def test_losses_and_files_are_those_of_the_stock_trainer(dead_after, more, tmp_path):
    mine = trained(fast.TopKTrainer, tmp_path / "ours", dead_after, **more)
    theirs = trained(TopKTrainer, tmp_path / "stock", dead_after, **more)
    assert mine[-1] < 0.9 * mine[0], "nothing was learned, so nothing is compared"
    assert mine == pytest.approx(theirs, rel=1e-4)
    ours, stock = saved(tmp_path / "ours"), saved(tmp_path / "stock")
    assert set(ours) == set(stock)
    for name, expected in stock.items():
        assert (ours[name].dtype, ours[name].is_contiguous()) == (expected.dtype, True), name
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5, msg=name)
    configs = [json.loads((tmp_path / who / "trainer_0/config.json").read_text()) for who in ("ours", "stock")]
    assert configs[0] == configs[1]


def test_features_die_in_this_data(tmp_path):
    with_auxk = trained(TopKTrainer, tmp_path / "a", 150, auxk_alpha=1.0)
    assert with_auxk != trained(TopKTrainer, tmp_path / "b", 150, auxk_alpha=0)


def test_the_stock_class_loads_what_is_saved(tmp_path):
    trained(fast.TopKTrainer, tmp_path, train={"save_steps": [10]})
    stock = AutoEncoderTopK.from_pretrained(tmp_path / "trainer_0" / "ae.pt")
    ours = fast.AutoEncoderTopK(D, M, K)
    ours.load_state_dict(saved(tmp_path), assign=True)
    assert ours.decoder.rows.is_contiguous()
    (x,) = batches(1)
    torch.testing.assert_close(ours(x), stock(x))
    AutoEncoderTopK.from_pretrained(tmp_path / "trainer_0" / "checkpoints" / "ae_10.pt")
    with pytest.raises(RuntimeError, match="decoder"):
        ours.load_state_dict({name: t for name, t in saved(tmp_path).items() if name != "decoder.weight"})


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("trainer", [fast.TopKTrainer, fast.JointTrainer, TopKTrainer])
def test_an_update_holds_nothing_dense(trainer, dead):
    made = trainer(**options(trainer))
    if dead and trainer is not fast.JointTrainer:
        made.num_tokens_since_fired[: M // 2] = 10**8
    with DenseSpy(B, M) as spy:
        made.update(1, batches(1)[0])
    assert (len(spy.seen) > 5) if trainer is TopKTrainer else (spy.seen == [])


@pytest.mark.parametrize("trainer", [fast.TopKTrainer, fast.JointTrainer])
def test_logging_and_evaluation(trainer, tmp_path, capsys):
    trained(trainer, tmp_path, train={"verbose": True, "log_steps": 10})
    assert f"Step 20: L0 = {float(K)}" in capsys.readouterr().out
    made = trainer(**options(trainer))
    made.update(1, batches(1)[0])
    assert torch.equal(*(made.ae(batches(1)[0]) for _ in range(2))), "no dropout outside of updates"
    found = evaluate(made.ae, iter(batches()), device="cpu", n_batches=3)
    assert found["l0"] == K
    assert found["frac_variance_explained"] < 1


def test_normalised_activations(tmp_path):
    """trainSAE divides activations by a factor and scales biases back before it saves."""
    torch.manual_seed(0)
    train = {"normalize_activations": True}
    trained(fast.JointTrainer, tmp_path, train=train, dropout=0.0)
    found = fast.JointDictionary.from_pretrained(tmp_path / "trainer_0" / "ae.pt")
    (x,) = batches(1)
    before = found(x)
    found.scale_biases(3.0)
    torch.testing.assert_close(found(3 * x), 3 * before, rtol=1e-4, atol=1e-4)


def test_a_joint_dictionary_trains_and_is_loaded(tmp_path):
    losses = trained(fast.JointTrainer, tmp_path, k_integration=4, d_embedding=7, train={"save_steps": [10]})
    assert losses[-1] < 0.9 * losses[0]
    found = fast.JointDictionary.from_pretrained(tmp_path / "trainer_0" / "ae.pt")
    fast.JointDictionary.from_pretrained(tmp_path / "trainer_0" / "checkpoints" / "ae_10.pt")
    assert (found.sae.k_integration, found.sae.V.shape) == (4, (M, 7))
    (x,) = batches(1)
    torch.testing.assert_close(found.decode(found.encode(x)), found(x))
    changed = found.encode(x)
    changed[:, 3] = -0.5
    expected = (changed - found.encode(x)) @ found.sae.W_dec
    few = changed.count_nonzero(1) > K  # of the k features none was the one that is set
    n_strongest = changed.abs().topk(4).indices
    outside = few & (n_strongest != 3).all(1)
    assert outside.any()
    torch.testing.assert_close((found.decode(changed) - found(x))[outside], expected[outside])
    features = found(x, output_features=True)[1]
    assert features.shape == (B, M)
    assert ((features != 0).sum(1) <= K).all()


@pytest.mark.parametrize("name", ["config.json", "ae.pt"])
def test_a_damaged_joint_dictionary_is_named(tmp_path, name):
    trained(fast.JointTrainer, tmp_path)
    path = tmp_path / "trainer_0" / "ae.pt"
    content = (path.parent / name).read_bytes()
    cases = [b"", content[:-9], content[: len(content) // 2], b"[]", b'{"trainer": 3}', b'{"trainer": {}}']
    if name == "config.json":
        recorded = json.loads(content)
        for change in ({"sae": None}, {"sae": {}}, {"sae": recorded["trainer"]["sae"] | {"d_sae": 10**12}}):
            cases.append(json.dumps({"trainer": recorded["trainer"] | change}).encode())
    for damaged in cases:
        (path.parent / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            fast.JointDictionary.from_pretrained(path)


def test_a_device_that_is_none_is_no_damage(tmp_path):
    trained(fast.JointTrainer, tmp_path)
    with pytest.raises(RuntimeError, match="nowhere"):
        fast.JointDictionary.from_pretrained(tmp_path / "trainer_0" / "ae.pt", device="nowhere")


def test_what_cannot_be_is_said(tmp_path):
    with pytest.raises(TypeError, match="dict_class is its own AutoEncoderTopK"):
        fast.TopKTrainer(**options(TopKTrainer), dict_class=AutoEncoderTopK)
    with pytest.raises(FileNotFoundError, match=r"no config\.json beside it"):
        fast.JointDictionary.from_pretrained(tmp_path / "ae.pt")
    with pytest.raises(TypeError, match="unexpected keyword argument 'dtype'"):
        fast.JointDictionary.from_pretrained(tmp_path / "ae.pt", dtype=torch.bfloat16)
    trained(TopKTrainer, tmp_path)
    with pytest.raises(ValueError, match=r"is of a AutoEncoderTopK, not of a fastsae\.JointSAE"):
        fast.JointDictionary.from_pretrained(tmp_path / "trainer_0" / "ae.pt")
