"""Training and evaluation on a device without fp64, pretended: nothing asks it for any, and all comes out the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import no_fp64
import pytest
import torch
from test_features import HOOK, TEXT
from test_train import D, K, M, activations, assert_same, config, weights
from tiny_lm import hooked, tokenizer

import fastsae
from fastsae import evaluate
from fastsae.activations import ModelActivations, tokenize
from fastsae.evaluate.record import plain
from fastsae.factorial.responses import _Pool
from fastsae.integrations import convert


def test_the_device_that_is_pretended_has_no_fp64():
    with no_fp64.device():
        t = torch.ones(3, device="mps")
        assert (t + t).device.type == torch.zeros_like(t).device.type == "mps"
        assert t.cpu().double().dtype == torch.float64
        assert t.to("cpu").device.type == "cpu"
        for fails in (
            t.double,
            lambda: t.sum(dtype=torch.float64),
            lambda: torch.zeros(2, dtype=torch.float64).to(t.device),
        ):
            with pytest.raises(TypeError, match="doesn't support float64"):
                fails()
        with pytest.raises(RuntimeError, match="same device"):
            t + torch.ones(3)


def sae_on(device: str, make: Any = fastsae.JointSAE, d_in: int = 16, **options) -> Any:
    torch.manual_seed(4)
    sae = make(d_in, 24, 4, device=device, backend="reference", **options)
    for p in sae.parameters():
        torch.nn.init.normal_(p)
    return sae


class OfTheCPU(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        return super().__new__(cls)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize": "scale"},
        {"normalize": "none"},
        {"auxk": 4, "dead_after_tokens": 32},
        {"clip_grad_norm": 0.1},
        {"unit_norm_decoder": True},
        {"k_anneal_from": 8, "k_anneal_steps": 5},
        {"adam_in_backward": True},
        {"dtype": torch.bfloat16},
    ],
    ids=lambda o: next(iter(o), "plain"),
)
def test_training(options: dict[str, Any], tmp_path: Path, monkeypatch):
    monkeypatch.setattr(torch, "Generator", OfTheCPU)  # nobody can make one that pretends
    results, options = [], options.copy()
    dtype = options.pop("dtype", torch.float32)
    for device in ("cpu", "mps"):
        with no_fp64.device():
            torch.manual_seed(3)
            sae = fastsae.JointSAE(D, M, K, d_embedding=6, device=device, dtype=dtype, backend="reference")
            for steps in (3, 6):  # and resumed
                run = config(steps=steps, run_dir=tmp_path / device, resume=True, **options)
                metrics = fastsae.Trainer(sae, run).fit(activations()).metrics
            results.append(({n: t.cpu() for n, t in weights(sae).items()}, metrics))
    (on_cpu, metrics), (on_device, same) = results
    assert_same(on_device, on_cpu)
    assert same | {"rows_per_second": 0} == metrics | {"rows_per_second": 0}


def windows() -> Any:
    return tokenize(TEXT, tokenizer(), 8, held_out=None)


def documents(sae: Any) -> Any:
    source = ModelActivations(hooked(), HOOK, windows())
    rows = (source.rows(i) for i in range(len(source.block_rows)))
    return evaluate.reconstruction(sae, rows, windows().names)


def measured_geometry(sae: Any) -> Any:
    pytest.importorskip("diptest")
    return evaluate.geometry(sae, [torch.randn(40, 16, generator=torch.Generator().manual_seed(1))])


def drivers(sae: Any) -> Any:
    secondary = sae_on(sae.W_enc.device.type, fastsae.SecondarySAE, d_in=sae.config.d_embedding)
    return evaluate.drivers(secondary, sae, hooked(), HOOK, windows(), [1, 5])


def pooled(sae: Any) -> Any:
    pool, code = _Pool("mean", sae.d_sae), sae.encode_raw(torch.ones(3, 16))
    pool.add(torch.zeros(3, dtype=torch.int64, device=code.values.device), code.values, code.indices)
    return pool.values.tolist()


def folded(sae: Any) -> Any:
    sae.normalizer.mean.fill_(2.0)
    return [t.tolist() for t in convert.in_raw_space(sae).state_dict().values()]


@pytest.mark.parametrize(
    "measure",
    [
        documents,
        lambda sae: evaluate.behavior(sae, hooked(), HOOK, windows()),
        measured_geometry,
        lambda sae: evaluate.top_features(sae, hooked(), HOOK, windows(), n_features=5),
        lambda sae: evaluate.top_pairs(sae, hooked(), HOOK, windows(), n_pairs=5),
        drivers,
        pooled,
        folded,
        lambda sae: fastsae.modules.HiddenActivations(ModelActivations(hooked(), HOOK, windows()), sae).identity,
    ],
    ids=["reconstruction", "behavior", "geometry", "features", "pairs", "drivers", "pooled", "folded", "identity"],
)
def test_evaluation(measure: Callable):
    found = []
    for device in ("cpu", "mps"):
        with no_fp64.device(), torch.no_grad():
            found.append(plain_of(measure(sae_on(device, d_embedding=5).eval())))
    assert found[1] == found[0]


def plain_of(found: Any) -> Any:
    return (
        [plain(f) for f in found]
        if isinstance(found, list) and found and hasattr(found[0], "__dict__")
        else plain(found)
    )
