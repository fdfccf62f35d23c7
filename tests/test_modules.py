"""The modules: names, shapes, initialisation, pathways, saving and loading."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fastsae
from fastsae import backends, files
from fastsae.config import JointSAEConfig, TopKSAEConfig, from_dict, to_dict
from fastsae.normalize import Normalizer

BOTH = pytest.mark.parametrize("make", [fastsae.TopKSAE, fastsae.JointSAE], ids=["topk", "joint"])


def shapes(sae) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in sae.named_parameters()}


def test_parameters_of_topk():
    expected = {"W_enc": (30, 8), "b_enc": (30,), "W_dec": (30, 8), "b_dec": (8,)}
    assert shapes(fastsae.TopKSAE(8, 30, 4)) == expected
    del expected["b_dec"]
    assert shapes(fastsae.TopKSAE(8, 30, 4, pre_bias=False)) == expected


def test_parameters_of_joint():
    plain = {"W_enc": (30, 8), "b_enc": (30,), "W_dec": (30, 8)}
    linear = {"W_lin": (30, 8), "b_lin": (8,)}
    interaction = {"V": (30, 5), "W1": (5, 5), "b1": (5,), "W2": (8, 5), "b2": (8,)}
    assert shapes(fastsae.JointSAE(8, 30, 4, d_embedding=5)) == plain | linear | interaction
    assert shapes(fastsae.JointSAE(8, 30, 4, interaction=False)) == plain | linear
    assert shapes(fastsae.JointSAE(8, 30, 4, d_embedding=5, linear=False)) == plain | interaction
    assert "b_dec" in shapes(fastsae.JointSAE(8, 30, 4, pre_bias=True))


def test_the_papers_initialisation():
    sae = fastsae.JointSAE(64, 10_000, 4)
    bound = 10_000**-0.5
    assert sae.W_dec.abs().max() <= bound
    assert sae.W_dec.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    for name, std in {"W_lin": 0.01, "V": 0.05, "W1": 0.01, "W2": 0.01}.items():
        assert sae.get_parameter(name).std().item() == pytest.approx(std, rel=0.05)
    for name in ("b_enc", "b_lin", "b1", "b2"):
        assert (sae.get_parameter(name) == 0).all()


@BOTH
def test_unit_initialisation(make):
    sae = make(16, 100, 4, init="unit")
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(100))
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()


@BOTH
@pytest.mark.parametrize("leading", [(), (7,), (2, 3), (2, 1, 3, 2), (0,)], ids=str)
def test_any_leading_dimensions(make, leading):
    sae = make(8, 50, 4).eval()
    x = torch.randn(*leading, 8)
    output = sae(x)
    assert output.reconstruction.shape == x.shape
    assert output.code.values.shape == (*leading, 4)
    assert output.loss.shape == ()
    flat = sae(x.reshape(-1, 8))
    torch.testing.assert_close(output.reconstruction.reshape(-1, 8), flat.reconstruction)
    torch.testing.assert_close(sae.components(x).identity.shape, x.shape)


@BOTH
def test_wrong_width(make):
    with pytest.raises(ValueError, match=r"x must end in d_in = 8; got shape \(3, 9\)"):
        make(8, 50, 4)(torch.randn(3, 9))
    with pytest.raises(ValueError, match=r"d_in = 8"):
        make(8, 50, 4)(torch.tensor(1.0))


@BOTH
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("pre_bias", [True, False])
def test_components_add_up(make, backend, pre_bias):
    sae = make(8, 50, 6, pre_bias=pre_bias, backend=backend).eval()
    for p in sae.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(11, 8)
    parts = sae.components(x)
    torch.testing.assert_close(parts.identity + parts.linear + parts.interaction, sae(x).reconstruction)
    if make is fastsae.JointSAE:
        assert parts.linear.abs().min() > 0
        assert parts.interaction.abs().min() > 0


@pytest.mark.parametrize("n", [1, 2, 6])
def test_components_have_the_gradients_of_the_whole(n):
    sae = fastsae.JointSAE(8, 50, 6, k_integration=n, d_embedding=5, dtype=torch.float64, dropout=0.0)
    for p in sae.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(11, 8, dtype=torch.float64)
    parts = sae.components(x)
    torch.nn.functional.mse_loss(parts.identity + parts.linear + parts.interaction, x).backward()
    grads = {name: p.grad for name, p in sae.named_parameters()}
    sae.zero_grad()
    sae(x).loss.backward()
    for name, p in sae.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_reconstruction_by_the_equations():
    sae = fastsae.JointSAE(8, 50, 6, k_integration=4, d_embedding=5).double().eval()
    for p in sae.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(3, 8, dtype=torch.float64)
    a, i = torch.relu(x @ sae.W_enc.T + sae.b_enc).topk(6)
    identity = torch.einsum("bk,bkd->bd", a, sae.W_dec[i])
    linear = torch.einsum("bk,bkd->bd", a[:, :4], sae.W_lin[i[:, :4]]) + sae.b_lin
    terms = a[:, :4, None] * sae.V[i[:, :4]]
    z = sum(terms[:, p] * terms[:, q] for p in range(4) for q in range(p))
    interaction = torch.relu(z @ sae.W1.T + sae.b1) @ sae.W2.T + sae.b2
    output = sae(x)
    torch.testing.assert_close(output.reconstruction, identity + linear + interaction)
    torch.testing.assert_close(output.loss, (identity + linear + interaction - x).square().mean())


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("joint", [False, True])
def test_the_loss_of_narrow_numbers_is_precise(joint, dtype, backend):
    """Rounded to bf16 it would be off by up to 0.4 %, and a curve of it a staircase."""
    sae = fastsae.JointSAE(64, 100, 6) if joint else fastsae.TopKSAE(64, 100, 6)
    sae = sae.to(dtype).eval()
    sae.backend = backend
    for seed in range(3):
        x = torch.randn(50, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)
        output = sae(x)
        assert output.loss.dtype == torch.promote_types(dtype, torch.float32)
        expected = (output.reconstruction.double() - x.double()).square().mean()
        torch.testing.assert_close(output.loss.double(), expected, rtol=1e-6, atol=0)


def test_with_one_active_feature_the_interaction_is_constant():
    sae = fastsae.JointSAE(8, 50, 6, k_integration=1, dtype=torch.float64).eval()
    for p in sae.parameters():
        torch.nn.init.normal_(p)
    constant = sae.W2 @ torch.relu(sae.b1) + sae.b2
    torch.testing.assert_close(sae.components(torch.randn(5, 8).double()).interaction, constant.expand(5, 8))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_an_interaction_without_pairs_is_warned_of(k, tmp_path):
    with pytest.warns(UserWarning, match=rf"JointSAE: k_integration is 1 \(half of k = {k}.*one feature makes no pair"):
        sae = fastsae.JointSAE(8, 50, k)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastsae.load(sae.save_pretrained(tmp_path))
        fastsae.JointSAE(8, 50, k, device=torch.device("meta"))
        fastsae.JointSAE(8, 50, k, interaction=False)
        fastsae.JointSAE(8, 50, 4)


def test_with_n_equal_to_k_the_linear_pathway_is_a_second_decoder():
    sae = fastsae.JointSAE(8, 50, 6, k_integration=6)
    sae(torch.randn(20, 8)).loss.backward()
    assert torch.equal(sae.W_lin.grad, sae.W_dec.grad)


def test_k_integration_is_half_of_k_unless_said():
    assert fastsae.JointSAE(8, 50, 7).k_integration == 3
    assert fastsae.JointSAE(8, 50, 1).k_integration == 1
    assert fastsae.JointSAE(8, 50, 7, k_integration=5).k_integration == 5


def test_dropout_only_while_training():
    sae = fastsae.JointSAE(8, 50, 6, dropout=0.5)
    for p in sae.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(9, 8)
    assert not torch.equal(sae(x).reconstruction, sae(x).reconstruction)
    sae.eval()
    assert torch.equal(sae(x).reconstruction, sae(x).reconstruction)


# ---- saving ----


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_round_trip(make, dtype, tmp_path):
    sae = make(8, 50, 6, dtype=dtype).eval()
    sae.normalizer.measure(torch.randn(100, 8) * 3 + 1, "zscore")
    sae.save_pretrained(tmp_path)
    for loaded in (make.from_pretrained(tmp_path), fastsae.load(tmp_path)):
        assert type(loaded) is make
        assert not loaded.training
        assert loaded.config == sae.config
        assert loaded.normalizer.measured
        assert loaded.state_dict().keys() == sae.state_dict().keys()
        for name, t in loaded.state_dict().items():
            assert t.dtype == (torch.promote_types(dtype, torch.float32) if "normalizer" in name else dtype)
            assert torch.equal(t, sae.state_dict()[name])
        raw = torch.randn(4, 8, dtype=dtype)
        assert torch.equal(loaded.reconstruct(raw), sae.reconstruct(raw))


def test_reconstruct_takes_and_returns_raw_activations():
    sae = fastsae.TopKSAE(8, 50, 6).eval()
    raw = torch.randn(200, 8) * torch.arange(1.0, 9.0) + 100
    sae.normalizer.measure(raw, "zscore")
    normalised = (raw - raw.mean(0)) / raw.std(0)
    torch.testing.assert_close(sae.normalizer(raw), normalised, rtol=1e-4, atol=1e-4)
    expected = sae(normalised).reconstruction * raw.std(0) + raw.mean(0)
    torch.testing.assert_close(sae.reconstruct(raw), expected, rtol=1e-3, atol=1e-3)


def test_another_architecture(tmp_path):
    fastsae.TopKSAE(8, 50, 6).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds architecture 'topk', expected 'joint'"):
        fastsae.JointSAE.from_pretrained(tmp_path)


def test_an_unknown_option_names_the_nearest(tmp_path):
    folder = fastsae.TopKSAE(8, 50, 6).save_pretrained(tmp_path)
    change(folder, lambda d: d["config"].update(d_sea=3))
    with pytest.raises(ValueError, match=r"unknown option 'd_sea'. Did you mean 'd_sae'"):
        fastsae.load(folder)


def change(folder: Path, how: Callable[[dict], object]) -> None:
    description = json.loads((folder / "config.json").read_text())
    how(description)
    (folder / "config.json").write_text(json.dumps(description))


def flip_one_bit(folder: Path) -> None:
    content = bytearray((folder / "weights.safetensors").read_bytes())
    content[-100] ^= 4
    (folder / "weights.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "there is no config.json"),
        (lambda f: (f / "config.json").write_text("{"), ValueError, r"config.json is damaged: not valid JSON"),
        (lambda f: (f / "config.json").write_text("{}"), ValueError, "is no fastsae config"),
        (lambda f: (f / "weights.safetensors").unlink(), FileNotFoundError, "weights.safetensors does not exist"),
        (
            lambda f: (f / "weights.safetensors").write_bytes((f / "weights.safetensors").read_bytes()[:-9]),
            ValueError,
            "weights.safetensors is damaged or truncated",
        ),
        (
            lambda f: change(f, lambda d: d["config"].update(d_sae=60)),
            ValueError,
            "weights.safetensors does not fit",
        ),
        (
            lambda f: change(f, lambda d: d["config"].update(d_sae="50")),
            ValueError,
            "config.json: TopKSAEConfig.d_sae: expected int; got '50'",
        ),
        (lambda f: change(f, lambda d: d.update(config=None)), ValueError, "is no fastsae config"),
        (lambda f: change(f, lambda d: d.update(architecture=["topk"])), ValueError, "is no fastsae config"),
        (flip_one_bit, ValueError, "weights.safetensors is not the file that .*config.json was written with"),
        (
            lambda f: change(f, lambda d: d.update(format=2)),
            ValueError,
            "has format 2, this fastsae reads format 1",
        ),
        (
            lambda f: change(f, lambda d: d["config"].pop("k")),
            ValueError,
            r"config.json: TopKSAEConfig: option 'k' is missing",
        ),
        (
            lambda f: (
                save_file({"weight": torch.zeros(3)}, f / "weights.safetensors"),
                change(f, lambda d: d.update(weights_crc32=files.crc32(f / "weights.safetensors"))),
            ),
            ValueError,
            "weights.safetensors holds no W_enc",
        ),
    ],
)
def test_damaged_folders(damage, error, message, tmp_path):
    folder = fastsae.TopKSAE(8, 50, 6).save_pretrained(tmp_path)
    damage(folder)
    with pytest.raises(error, match=message):
        fastsae.load(folder)


def test_a_folder_of_an_unknown_architecture(tmp_path):
    folder = fastsae.TopKSAE(8, 50, 6).save_pretrained(tmp_path)
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"topk"', '"gated"'))
    with pytest.raises(ValueError, match="holds architecture 'gated'; known here: topk, joint"):
        fastsae.load(folder)


# ---- config, normalizer, code ----


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fastsae.TopKSAE(8, 50, 51), r"TopKSAEConfig.k: expected between 1 and d_sae = 50; got 51"),
        (lambda: fastsae.TopKSAE(0, 50, 5), "TopKSAEConfig.d_in"),
        (lambda: fastsae.TopKSAE(8, 50, 5, init="xavier"), "expected 'paper' or 'unit'; got 'xavier'"),
        (
            lambda: fastsae.JointSAE(8, 50, 5, k_integration=6),
            r"k_integration: expected None, or between 1 and k = 5; got 6",
        ),
        (lambda: fastsae.JointSAE(8, 50, 5, dropout=1.0), r"dropout: expected in \[0, 1\); got 1.0"),
        (lambda: fastsae.JointSAE(8, 50, 5, d_embedding=0), "d_embedding"),
    ],
)
def test_impossible_configs(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_forced_backend_that_cannot_serve_says_so_at_once():
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot serve this call: it serves CUDA tensors"):
        fastsae.TopKSAE(8, 50, 5, backend="cuda")


def test_rocm_is_refused_with_its_reason(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "on ROCm" in backends.refusal("cuda", torch.device("cuda"), torch.float32)
    assert backends.choose("auto", torch.device("cuda"), torch.float32) == "reference"


@pytest.mark.parametrize("config", [TopKSAEConfig(8, 50, 5), JointSAEConfig(8, 50, 5, k_integration=2, linear=False)])
def test_configs_survive_json(config):
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("kind", ["zscore", "scale", "none"])
def test_normalizer_inverts(kind):
    normalizer = Normalizer(6)
    sample = torch.randn(500, 6) * torch.arange(1.0, 7.0) - 20
    normalizer.measure(sample, kind)
    torch.testing.assert_close(normalizer.invert(normalizer(sample)), sample)
    normalised = normalizer(sample)
    if kind == "zscore":
        torch.testing.assert_close(normalised.std(0), torch.ones(6))
        torch.testing.assert_close(normalised.mean(0), torch.zeros(6), rtol=0, atol=1e-4)
    elif kind == "scale":
        torch.testing.assert_close(normalised.square().mean(), torch.tensor(1.0))
    else:
        assert torch.equal(normalised, sample)
    assert normalizer.measured == (kind != "none")


def test_normalizer_leaves_a_constant_dimension_finite():
    sample = torch.randn(50, 3)
    sample[:, 1] = 7.0
    normalizer = Normalizer(3)
    normalizer.measure(sample, "zscore")
    assert (normalizer(sample)[:, 1] == 0).all()


@pytest.mark.parametrize("offset", [0.0, 50.0])
@pytest.mark.parametrize("kind", ["zscore", "scale"])
def test_normalizer_leaves_rows_far_larger_than_others_out(kind, offset):
    ordinary = torch.randn(995, 6) + offset
    sample = torch.cat([ordinary, torch.randn(5, 6)])
    sample[-5:, :2] += torch.tensor([900.0, -700.0])
    normalizer, plain = Normalizer(6), Normalizer(6)
    with pytest.warns(UserWarning, match=r"5 of 1000 rows \(0.50%\) are up to [\d,]+ times as large"):
        assert normalizer.measure(sample, kind) == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plain.measure(ordinary, kind) == 0
    x = ordinary.double().numpy()
    mean, scale = (x.mean(0), x.std(0, ddof=1)) if kind == "zscore" else (0 * x[0], 0 * x[0] + (x**2).mean() ** 0.5)
    for n in (normalizer, plain):
        np.testing.assert_allclose(n.mean.numpy(), mean, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(n.scale.numpy(), scale, rtol=1e-6)


@pytest.mark.parametrize(
    "sample",
    [
        torch.zeros(1000, 6).index_fill_(0, torch.arange(0, 1000, 3), 1.0),  # most rows are silent
        torch.cat([torch.randn(700, 6), 30 * torch.randn(300, 6)]),
        torch.randn(1000, 6).exp(),
    ],
    ids=["sparse", "two kinds", "heavy tail"],
)
def test_normalizer_keeps_rows_that_are_no_exception(sample):
    normalizer = Normalizer(6)
    assert normalizer.measure(sample, "zscore") == 0
    np.testing.assert_allclose(normalizer.scale.numpy(), sample.double().numpy().std(0, ddof=1), rtol=1e-6)


def test_normalizer_does_not_enlarge_rounding():
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1000, 5, generator=generator)
    sample[:, 0] = 100 + 8e-6 * sample[:, 0].sign()  # one fp32 number and the next
    sample[:, 1] *= 1e-6
    sample[:, 2] *= 0.01  # small, but no rounding
    normalizer = Normalizer(5)
    normalizer.measure(sample, "zscore")
    assert normalizer.scale[:2].tolist() == [1.0, 1.0]
    np.testing.assert_allclose(normalizer.scale[2:].numpy(), sample[:, 2:].double().numpy().std(0, ddof=1), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_normalizer_does_not_enlarge_the_rounding_of_narrow_dtypes(dtype):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1000, 3, generator=generator).to(dtype)
    sample[:, 0] = 3.0
    sample[7, 0] = torch.nextafter(torch.tensor(3.0, dtype=dtype), torch.tensor(4.0, dtype=dtype))
    sample[:, 1] += 100  # rounded coarsely, and no constant
    normalizer = Normalizer(3)
    normalizer.measure(sample, "zscore")
    assert normalizer.scale[0] == 1.0
    np.testing.assert_allclose(normalizer.scale[1:].numpy(), sample[:, 1:].double().numpy().std(0, ddof=1), rtol=1e-6)


def test_normalizer_refuses_bad_samples():
    sample = torch.randn(50, 3)
    sample[4, 2] = torch.inf
    with pytest.raises(ValueError, match="first at row 4, dimension 2"):
        Normalizer(3).measure(sample, "zscore")
    with pytest.raises(ValueError, match="at least 2 rows of width 3"):
        Normalizer(3).measure(torch.randn(1, 3), "zscore")
    with pytest.raises(ValueError, match="expected 'zscore', 'scale' or 'none'; got 'minmax'"):
        Normalizer(3).measure(torch.randn(9, 3), "minmax")


def test_sparse_code():
    code = fastsae.SparseCode(torch.tensor([[2.0, 1.0], [3.0, 0.0]]), torch.tensor([[4, 1], [1, 0]]), 5)
    assert code.to_dense().tolist() == [[0, 1, 0, 0, 2], [0, 3, 0, 0, 0]]
    assert code.firing_counts().tolist() == [0, 2, 0, 0, 1]
    order = code.feature_order()
    assert order.offsets.tolist() == [0, 1, 3, 3, 3, 4]
    assert order.tokens.tolist() == [1, 0, 1, 0]
    assert order.entries.tolist() == [3, 1, 2, 0]
    with pytest.raises(ValueError, match="must have one shape"):
        fastsae.SparseCode(torch.zeros(2, 3), torch.zeros(2, 2), 5)


def test_statistics_keep_their_precision_beside_bf16_weights():
    """Activations far from zero: rounded to bf16 before the mean is taken off, they would have 9 different values."""
    raw = torch.randn(500, 8) * 0.5 + 100
    sae = fastsae.TopKSAE(8, 50, 4).eval()
    sae.normalizer.measure(raw, "zscore")
    expected = sae.normalizer(raw)
    for low in (sae.bfloat16(), sae.to(torch.bfloat16)):
        assert low.normalizer.mean.dtype == torch.float32
        normalised = low.normalizer(raw)
        assert normalised.dtype == torch.bfloat16
        torch.testing.assert_close(normalised.float(), expected, rtol=2**-8, atol=1e-5)
    assert sae.double().normalizer.mean.dtype == torch.float64


def test_a_state_dict_carries_the_normalisation():
    trained, fresh = fastsae.TopKSAE(8, 50, 4).eval(), fastsae.TopKSAE(8, 50, 4).eval()
    raw = torch.randn(30, 8) * 3 + 20
    trained.normalizer.measure(raw, "zscore")
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.reconstruct(raw), trained.reconstruct(raw))


def test_loading_draws_no_random_numbers(tmp_path):
    fastsae.TopKSAE(8, 50, 6).save_pretrained(tmp_path)
    state = torch.get_rng_state()
    fastsae.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_code_narrower_than_k_integration():
    sae, x = fastsae.JointSAE(8, 50, 6, k_integration=3).eval(), torch.randn(4, 8)
    narrow = fastsae.JointSAE(8, 50, 2, k_integration=2).eval()
    narrow.load_state_dict(sae.state_dict())
    assert torch.equal(sae(x, k=2).reconstruction, narrow(x).reconstruction)


def test_what_a_bf16_layer_gives_under_autocast_is_taken():
    sae, x = fastsae.JointSAE(8, 50, 4).eval(), torch.randn(3, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = sae(x)
    torch.testing.assert_close(got.code.values, sae(x.float()).code.values)


def test_without_a_pair_there_is_no_interaction_and_no_gradient():
    values = (torch.rand(9, 1) * 10).requires_grad_()
    V, indices = torch.randn(50, 6).requires_grad_(), torch.randint(50, (9, 1))
    z = fastsae.ops.pairwise_interaction(values, indices, V, backend="cpu")
    z.backward(torch.randn_like(z))
    assert not z.any()
    assert V.grad is not None
    assert values.grad is not None
    assert not V.grad.any()
    assert not values.grad.any()


def test_loaded_weights_are_not_the_file(tmp_path):
    """Writing into the file under a running process must not change the results of that process."""
    fastsae.TopKSAE(8, 50, 6).save_pretrained(tmp_path)
    before, sae = (fastsae.load(tmp_path) for _ in range(2))
    before = {name: t.clone() for name, t in before.state_dict().items()}
    file = tmp_path / "weights.safetensors"
    with file.open("r+b") as content:
        content.write(b"\xff" * file.stat().st_size)
    for name, t in sae.state_dict().items():
        assert torch.equal(t, before[name]), f"{name} lies in the file"


def test_whole_numbers_are_no_activations():
    with pytest.raises(TypeError, match=r"x must be a float tensor; got torch\.int64"):
        fastsae.TopKSAE(8, 50, 6).reconstruct(torch.ones(4, 8, dtype=torch.int64))


def test_sizes_from_numpy_are_saved_too(tmp_path):
    sae = fastsae.TopKSAE(np.int64(8), np.int32(50), np.uint8(3))
    assert fastsae.load(sae.save_pretrained(tmp_path)).config == fastsae.TopKSAE(8, 50, 3).config


def test_weights_of_another_dtype_bring_it_to_raw_activations_too():
    sae, raw = fastsae.TopKSAE(8, 50, 3), torch.randn(5, 8)
    sae.load_state_dict(fastsae.TopKSAE(8, 50, 3, dtype=torch.bfloat16).state_dict(), assign=True)
    assert sae.encode_raw(raw).values.dtype == torch.bfloat16
    assert sae.reconstruct(raw).dtype == torch.float32


def test_a_code_gives_the_columns_of_one_feature_or_several():
    code = fastsae.TopKSAE(8, 50, 3).encode(torch.randn(2, 5, 8))
    dense, feature = code.to_dense(), code.indices[0, 0, 0]
    for one in (int(feature), feature):
        torch.testing.assert_close(code.columns(one), dense[..., feature : feature + 1])
    torch.testing.assert_close(code.columns([3, int(feature)]), dense[..., [3, int(feature)]])


@pytest.mark.parametrize("make", [fastsae.TopKSAE, fastsae.JointSAE, fastsae.SequentialSAE])
def test_parameters_are_drawn_again_as_a_new_one_has_them(make):
    with torch.device("meta"):
        sae = make(8, 50, 4, pre_bias=True)
    sae.to_empty(device="cpu")
    for t in sae.state_dict().values():
        t.fill_(torch.nan)
    torch.manual_seed(5)
    sae.reset_parameters()
    torch.manual_seed(5)
    new = make(8, 50, 4, pre_bias=True)
    for name, t in new.state_dict().items():
        assert torch.equal(sae.state_dict()[name], t), name


def test_a_part_of_an_sae_is_not_drawn_by_itself():
    sae = fastsae.TopKSAE(8, 50, 4)
    sae.ranks = object()
    with pytest.raises(RuntimeError, match=r"draw it anew with fastsae\.distributed\.new"):
        sae.reset_parameters()


def test_columns_are_numbers_of_features():
    code = fastsae.TopKSAE(8, 50, 3).encode(torch.randn(5, 8))
    assert code.columns([]).shape == (5, 0)
    with pytest.raises(TypeError, match=r"expected int64 numbers of features; got torch\.bool"):
        code.columns(torch.ones(50, dtype=torch.bool))
