"""torch.set_default_device is the user's: what belongs on the host stays there, whatever new tensors are made on."""

import ast
from pathlib import Path

import pytest
import tiny_lm
import torch

import fastsae
from fastsae.activations import ActivationStream, Document, ModelActivations, harvest, tokenize
from fastsae.evaluate import behavior, reconstruction
from fastsae.evaluate.geometry import geometry

ROOT = Path(__file__).parents[1]
# Functions of torch that make a tensor on the default device unless they are told another one.
MAKERS = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm"}
MAKERS |= {"tensor", "zeros"}


def undecided(source: str) -> list[str]:
    """The calls in `source` that leave the device open."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    made = [c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr in MAKERS]
    made = [c for c in made if ast.unparse(c.func).startswith("torch.")]
    told = [{keyword.arg for keyword in c.keywords} & {"device", "out", None} for c in made]  # None: **options
    return [ast.unparse(c) for c, names in zip(made, told, strict=True) if not names]


def test_calls_that_leave_the_device_open_are_found():
    assert undecided("torch.zeros(3); torch.zeros(3, device=d); x.zeros(3); torch.full(size, 0, **to)") == [
        "torch.zeros(3)"
    ]


@pytest.mark.parametrize("package", ["fastsae", "csrc_triton"])
def test_every_new_tensor_is_told_its_device(package: str):
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 10
    assert {str(f.relative_to(ROOT)): found for f in files if (found := undecided(f.read_text()))} == {}


@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")
def test_from_a_model_to_an_evaluated_sae(tmp_path: Path):
    model, tokenizer, hook = tiny_lm.hooked(), tiny_lm.tokenizer(), "blocks.1.hook_resid_post"
    text = "the cat sat on the mat . the dog ran under a tree and then sat"
    documents = [Document(f"document {i}", text) for i in range(40)]
    rows = torch.randn(50, 16)
    with torch.device("meta"):
        assert torch.zeros(1).is_meta
        store = harvest(ModelActivations(model, hook, tokenize(documents, tokenizer, 12)), tmp_path / "store")
        stream = ActivationStream(store, batch_size=16, buffer_rows=64)
        for make, more in ((fastsae.TopKSAE, {}), (fastsae.JointSAE, {"d_embedding": 8})):
            sae = make(16, 64, 4, device="cpu", **more)
            options = {"auxk": 8, "normalize": "zscore", "unit_norm_decoder": True, "progress": False}
            fastsae.Trainer(sae, fastsae.TrainerConfig(steps=4, **options)).fit(stream)
            assert reconstruction(sae, rows.split(10)).rows == 50
            assert behavior(sae, model, hook, tokenize(documents, tokenizer, 12, held_out=True)).tokens
            assert geometry(sae, rows.split(10)).rows == 50
            sae.save_pretrained(tmp_path / make.__name__)
            loaded = make.from_pretrained(tmp_path / make.__name__)
            assert not any(t.is_meta for t in (*sae.state_dict().values(), *loaded.state_dict().values()))
