"""SAELens' own trainers with our architectures, beside its stock TopK."""

import copy
import json

import pytest
import torch
from torch import Tensor

pytest.importorskip("sae_lens", reason="SAELens is not installed; `make test` installs it where pip can")

from dense import DenseSpy
from sae_lens import (
    SAE,
    HookedSAETransformer,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TopKSAE,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

from fastsae import JointSAE
from fastsae.integrations import sae_lens as fast

fast.register()
B, D, M, K, STEPS = 96, 24, 200, 6, 30
TOPK = {"d_in": D, "d_sae": M, "k": K}


def batches(n: int = STEPS + 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    mixed = torch.randn(40, D, generator=generator)
    return [torch.rand(B, 40, generator=generator).pow(6) @ mixed for _ in range(n)]


def trainer_of(sae: TrainingSAE, data: list[Tensor], **options) -> SAETrainer:
    defaults = {"lr": 1e-3, "lr_end": 1e-4, "dead_feature_window": 1000, "device": "cpu", "checkpoint_path": None}
    config = SAETrainerConfig(
        total_training_samples=B * STEPS,
        train_batch_size_samples=B,
        autocast=False,
        n_checkpoints=0,
        logger=LoggingConfig(log_to_wandb=False),
        **{**defaults, **options},
    )
    return SAETrainer(cfg=config, sae=sae, data_provider=iter(data))


def trained(config, **options) -> tuple[TrainingSAE, list[dict[str, float]]]:
    torch.manual_seed(3)
    sae = TrainingSAE.from_dict(config.to_dict())
    trainer, losses = trainer_of(sae, batches(), **options), []
    step = trainer._train_step

    def logged(**arguments):
        output = step(**arguments)
        losses.append({name: value.item() for name, value in output.losses.items()})
        return output

    trainer._train_step = logged
    trainer.fit()
    return sae, losses


def assert_alike(ours: TrainingSAE, stock: TrainingSAE) -> None:
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(ours, name), getattr(stock, name), rtol=1e-4, atol=1e-6, msg=name)


# ---- parity with the stock TopK ----


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rescale_acts_by_decoder_norm": False},
        {"apply_b_dec_to_input": False},
        {"decoder_init_norm": None},
        {"normalize_activations": "expected_average_only_in"},
        {"normalize_activations": "layer_norm"},
    ],
    ids=str,
)
def test_losses_and_weights_are_those_of_the_stock_trainer(options):
    window = {"n_batches_for_norm_estimate": 3} if "normalize_activations" in options else {}
    ours, mine = trained(fast.FastTopKTrainingSAEConfig(**TOPK, **options), **window)
    stock, theirs = trained(TopKTrainingSAEConfig(**TOPK, **options), **window)
    assert mine[-1]["mse_loss"] < 0.95 * mine[0]["mse_loss"], "nothing was learned, so nothing is compared"
    for a, b in zip(mine, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert_alike(ours, stock)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("window", [1, 4])
def test_dead_features_are_revived_as_in_the_stock_trainer(rescale, window):
    options = {"rescale_acts_by_decoder_norm": rescale}
    ours, mine = trained(fast.FastTopKTrainingSAEConfig(**TOPK, **options), dead_feature_window=window)
    stock, theirs = trained(TopKTrainingSAEConfig(**TOPK, **options), dead_feature_window=window)
    assert sum(loss["auxiliary_reconstruction_loss"] > 0 for loss in theirs) > 3, "no feature died"
    for a, b in zip(mine, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    assert_alike(ours, stock)


@pytest.mark.parametrize("dead", [0, 5, 150])
@pytest.mark.parametrize("rescale", [True, False])
def test_every_gradient_is_the_stock_one(dead, rescale):
    """From weights whose decoder norms differ much, so that ranking by them shows."""
    torch.manual_seed(0)
    stock = TopKTrainingSAE(TopKTrainingSAEConfig(**TOPK, rescale_acts_by_decoder_norm=rescale))
    ours = fast.FastTopKTrainingSAE(fast.FastTopKTrainingSAEConfig(**TOPK, rescale_acts_by_decoder_norm=rescale))
    with torch.no_grad():
        stock.W_dec *= 10 * torch.rand(M, 1)
        stock.b_enc.normal_(std=0.1)
        stock.b_dec.normal_(std=0.1)
    state = stock.state_dict()
    ours.process_state_dict_for_loading(state)
    ours.load_state_dict(state)
    mask = torch.zeros(M, dtype=torch.bool)
    mask[torch.randperm(M)[:dead]] = True
    (x,) = batches(1)
    outputs = []
    for sae in (ours, stock):
        given = TrainStepInput(
            sae_in=x, coefficients={}, dead_neuron_mask=mask, n_training_steps=0, is_logging_step=False
        )
        outputs.append(sae.training_forward_pass(step_input=given))
        outputs[-1].loss.backward()
    a, b = outputs
    for name in ("mse_loss", "auxiliary_reconstruction_loss"):
        torch.testing.assert_close(a.losses[name], b.losses[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a.feature_acts.bool().to_dense(), b.feature_acts.bool())
    grads = {"W_enc": ours.W_enc_rows.grad.T, "b_enc": ours.b_enc.grad, "W_dec": ours.W_dec.grad}
    for name, grad in {**grads, "b_dec": ours.b_dec.grad}.items():
        theirs = getattr(stock, name).grad
        torch.testing.assert_close(grad, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item(), msg=name)


@pytest.mark.parametrize("kind", [TopKTrainingSAEConfig, fast.FastTopKTrainingSAEConfig])
def test_autocast_with_dead_features(kind):
    trainer = trainer_of(TrainingSAE.from_dict(kind(**TOPK).to_dict()), batches(), dead_feature_window=1)
    trainer.n_forward_passes_since_fired[: M // 2] = 10
    trainer.autocast_if_enabled = torch.autocast("cpu", torch.bfloat16)
    output = trainer.step(batches(1)[0])
    assert output.losses["auxiliary_reconstruction_loss"] > 0


def test_pre_activations_of_dead_features_are_ranked_in_chunks(monkeypatch):
    from fastsae.integrations.sae_lens import topk

    whole = trained(fast.FastTopKTrainingSAEConfig(**TOPK), dead_feature_window=1)[1]
    monkeypatch.setattr(topk, "_DEAD_AT_ONCE", 1000)
    in_chunks = trained(fast.FastTopKTrainingSAEConfig(**TOPK), dead_feature_window=1)[1]
    # A product of fewer rows may sum in another order.
    assert [step.keys() for step in in_chunks] == [step.keys() for step in whole]
    for ours, theirs in zip(in_chunks, whole, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("kind", [fast.FastTopKTrainingSAEConfig, fast.FastJointTrainingSAEConfig])
def test_a_hook_on_activations_gets_them(kind):
    """They are dense then, and what is trained is the same."""
    options = {} if kind is fast.FastTopKTrainingSAEConfig else {"dropout": 0.0}
    torch.manual_seed(0)
    sae, seen = TrainingSAE.from_dict(kind(**TOPK, **options).to_dict()), []
    hooked = copy.deepcopy(sae)
    for hook in (hooked.hook_sae_acts_pre, hooked.hook_sae_acts_post):
        hook.add_hook(lambda acts, hook: seen.append(acts.shape))
    outputs = [trainer_of(each, batches()).step(batches(1)[0]) for each in (hooked, sae)]
    assert seen == [(B, M), (B, M)]
    torch.testing.assert_close(*(output.sae_out for output in outputs))
    for (name, a), b in zip(hooked.named_parameters(), sae.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", [fast.FastTopKTrainingSAEConfig, fast.FastJointTrainingSAEConfig])
def test_a_hook_can_change_activations(kind):
    sae = TrainingSAE.from_dict(kind(**TOPK).to_dict())
    sae.hook_sae_acts_post.add_hook(lambda acts, hook: torch.zeros_like(acts))
    output = trainer_of(sae, batches()).step(batches(1)[0])
    assert not output.feature_acts.bool().any()


# ---- nothing dense ----


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("kind", ["topk", "joint", "stock"])
def test_a_step_holds_nothing_dense(kind, dead):
    made = {
        "topk": fast.FastTopKTrainingSAEConfig,
        "joint": fast.FastJointTrainingSAEConfig,
        "stock": TopKTrainingSAEConfig,
    }[kind]
    trainer = trainer_of(TrainingSAE.from_dict(made(**TOPK).to_dict()), batches(), dead_feature_window=1)
    if dead:
        trainer.n_forward_passes_since_fired[: M // 2] = 10
    with DenseSpy(B, M) as spy:
        trainer.step(batches(1)[0])
    assert (len(spy.seen) > 5) if kind == "stock" else (spy.seen == [])


# ---- files ----


def test_register_is_idempotent():
    for _ in range(3):
        fast.register()


def test_stock_saelens_loads_what_is_exported(tmp_path):
    sae, _ = trained(fast.FastTopKTrainingSAEConfig(**TOPK))
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is TopKSAE
    assert json.loads((tmp_path / "cfg.json").read_text())["architecture"] == "topk"
    (x,) = batches(1)
    torch.testing.assert_close(loaded(x), sae(x), rtol=1e-5, atol=1e-6)


def test_checkpoints_are_laid_out_as_the_stock_ones(tmp_path):
    from safetensors.torch import load_file

    fast.FastTopKTrainingSAE(fast.FastTopKTrainingSAEConfig(**TOPK)).save_model(tmp_path / "ours")
    TopKTrainingSAE(TopKTrainingSAEConfig(**TOPK)).save_model(tmp_path / "stock")
    ours, stock = (load_file(tmp_path / who / "sae_weights.safetensors") for who in ("ours", "stock"))
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in stock.items()}
    as_inference = SAE.load_from_disk(tmp_path / "ours")
    again = TrainingSAE.load_from_disk(tmp_path / "ours")
    (x,) = batches(1)
    torch.testing.assert_close(as_inference(x), again(x))


@pytest.mark.parametrize("kind", [fast.FastTopKTrainingSAEConfig, fast.FastJointTrainingSAEConfig])
def test_training_resumes_where_it_was(kind, tmp_path):
    torch.manual_seed(0)
    options = {} if kind is fast.FastTopKTrainingSAEConfig else {"dropout": 0.0}
    whole = trainer_of(TrainingSAE.from_dict(kind(**TOPK, **options).to_dict()), batches())
    half = trainer_of(copy.deepcopy(whole.sae), batches(), checkpoint_path=str(tmp_path))
    whole.fit()
    for x in batches()[: STEPS // 2]:
        half.step(x)
        half.n_training_steps += 1
    half.save_checkpoint("half")
    torch.manual_seed(1)
    rest = trainer_of(TrainingSAE.from_dict(kind(**TOPK, **options).to_dict()), batches()[STEPS // 2 :])
    rest.load_trainer_state(tmp_path / "half")
    rest.sae.load_weights_from_checkpoint(tmp_path / "half")
    rest.fit()
    for (name, a), b in zip(rest.sae.named_parameters(), whole.sae.parameters(), strict=True):
        assert torch.equal(a, b), name


# ---- the joint architecture ----


def test_a_joint_sae_is_ours():
    """Reconstruction and gradients of fastsae.JointSAE with the same weights; the loss is d_in times its."""
    sae = fast.FastJointTrainingSAE(fast.FastJointTrainingSAEConfig(**TOPK, d_embedding=5, dropout=0.0))
    ours = JointSAE(D, M, K, d_embedding=5, dropout=0.0, pre_bias=True)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for name, parameter in ours.named_parameters():
            parameter.copy_(getattr(sae, "W_enc_rows" if name == "W_enc" else name))
    (x,) = batches(1)
    given = TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False)
    output, expected = sae.training_forward_pass(step_input=given), ours(x)
    torch.testing.assert_close(output.sae_out, expected.reconstruction)
    torch.testing.assert_close(sae(x), expected.reconstruction, msg="decode of a dense code")
    torch.testing.assert_close(output.loss, D * expected.loss)
    output.loss.backward()
    (D * expected.loss).backward()
    for name, parameter in ours.named_parameters():
        grad = getattr(sae, "W_enc_rows" if name == "W_enc" else name).grad
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_joint_sae_trains_and_is_loaded(tmp_path):
    sae, losses = trained(fast.FastJointTrainingSAEConfig(**TOPK, k_integration=4, d_embedding=7))
    assert losses[-1]["mse_loss"] < 0.9 * losses[0]["mse_loss"]
    sae.eval()
    sae.save_inference_model(tmp_path / "inference")
    sae.save_model(tmp_path / "training")
    (x,) = batches(1)
    for loaded in (
        SAE.load_from_disk(tmp_path / "inference"),
        TrainingSAE.load_from_disk(tmp_path / "training").eval(),
    ):
        assert loaded.n == 4
        assert torch.equal(loaded(x), sae(x))
        assert torch.equal(loaded(x.view(8, -1, D)).view(B, D), sae(x)), "leading dimensions"


def test_a_joint_sae_decodes_codes_that_somebody_changed():
    """More than k features, and negative ones: none is dropped, and those outside of the n strongest go to identity."""
    sae = fast.FastJointSAE(fast.FastJointSAEConfig(**TOPK, dtype="float64"))
    code = sae.encode(batches(1)[0])
    small, changed = code[code > 0].min() / 2, code.clone()
    changed[:, : M // 2] += torch.where(code[:, : M // 2] == 0, -small, 0)
    changed[:, M // 2 :] += torch.where(code[:, M // 2 :] == 0, small, 0)
    torch.testing.assert_close(
        sae.decode(changed) - sae.decode(code), (changed - code) @ sae.W_dec, rtol=1e-9, atol=1e-12
    )
    assert sae.decode(code[:0]).shape == (0, D)


@pytest.mark.parametrize("missing", ["linear", "interaction"])
def test_joint_saes_without_a_pathway(missing, tmp_path):
    sae, _ = trained(fast.FastJointTrainingSAEConfig(**TOPK, **{missing: False}))
    sae.eval().save_inference_model(tmp_path)
    (x,) = batches(1)
    assert torch.equal(SAE.load_from_disk(tmp_path)(x), sae(x))


@pytest.mark.parametrize("normalization", ["expected_average_only_in", "covariance_whitening"])
def test_normalisation_is_folded_into_every_pathway(normalization):
    config = fast.FastJointTrainingSAEConfig(**TOPK, normalize_activations=normalization)
    torch.manual_seed(0)
    trainer = trainer_of(TrainingSAE.from_dict(config.to_dict()), batches(40), n_batches_for_norm_estimate=3)
    outputs = {}
    for name in ("fold_activation_norm_scaling_factor", "fold_activation_whitening"):
        fold = getattr(trainer.sae, name)

        def before_and_after(*a, fold=fold, **k):
            (x,) = batches(1)
            with torch.no_grad():
                trainer.sae.eval()
                scaled = trainer.sae(trainer.activation_scaler(x))
                scaler = trainer.activation_scaler
                if scaler.scaling_factor is not None:
                    outputs["before"] = scaled / scaler.scaling_factor
                else:
                    back = scaler.whitening.inverse_matrix
                    outputs["before"] = (scaled.to(back) @ back + scaler.whitening.mean).float()
                fold(*a, **k)
                outputs["after"] = trainer.sae(x)

        setattr(trainer.sae, name, before_and_after)
    trainer.fit()
    torch.testing.assert_close(outputs["after"], outputs["before"], rtol=1e-3, atol=1e-4)


def test_folding_norms_of_a_joint_sae_is_refused():
    with pytest.raises(NotImplementedError, match="leave fold_W_dec_norm off"):
        fast.FastJointSAE(fast.FastJointSAEConfig(**TOPK)).fold_W_dec_norm()


# ---- a language model's runner ----


@pytest.fixture(scope="module")
def language_model():
    from datasets import Dataset
    from transformer_lens import HookedTransformerConfig

    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=2, d_model=D, n_ctx=32, d_head=12, n_heads=2, d_vocab=60, act_fn="relu", seed=0
    )
    tokens = torch.randint(0, 60, (400, 32), generator=torch.Generator().manual_seed(0))
    return HookedSAETransformer(config), Dataset.from_dict({"input_ids": tokens.tolist()})


@pytest.mark.parametrize("kind", [fast.FastTopKTrainingSAEConfig, fast.FastJointTrainingSAEConfig])
def test_the_language_model_runner_trains_checkpoints_and_exports(kind, language_model, tmp_path):
    from sae_lens import ActivationsStore
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    model, dataset = language_model
    config = LanguageModelSAERunnerConfig(
        sae=kind(**TOPK),
        model_name="tiny",
        hook_name="blocks.1.hook_resid_pre",
        dataset_path="",
        streaming=False,
        context_size=32,
        is_dataset_tokenized=True,
        prepend_bos=False,
        training_tokens=2048,
        train_batch_size_tokens=128,
        n_batches_in_buffer=4,
        store_batch_size_prompts=4,
        lr=1e-3,
        n_checkpoints=1,
        checkpoint_path=str(tmp_path / "checkpoints"),
        output_path=str(tmp_path / "out"),
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
    )
    sae = LanguageModelSAETrainingRunner(config, override_model=model, override_dataset=dataset).run().eval()
    saved = sorted((tmp_path / "checkpoints").rglob("cfg.json"))
    assert len(saved) == 1, "the one on the way; the SAE at the end is exported"
    TrainingSAE.load_from_disk(saved[0].parent)
    exported = SAE.load_from_disk(tmp_path / "out")
    x = torch.randn(4, 3, D)
    torch.testing.assert_close(exported(x), sae(x), rtol=1e-4, atol=1e-5)
    store = ActivationsStore.from_sae(
        model,
        exported,
        dataset=dataset,
        streaming=False,
        store_batch_size_prompts=4,
        n_batches_in_buffer=4,
        device="cpu",
    )
    scalars, _ = run_evals(
        sae=exported,
        activation_store=store,
        model=model,
        activation_scaler=ActivationScaler(),
        eval_config=get_eval_everything_config(2, 1, 1),
        exclude_special_tokens=[],
    )
    assert -2 < scalars["reconstruction_quality"]["explained_variance"] <= 1
    assert scalars["sparsity"]["l0"] <= K
