"""The arrows of docs/architecture.md: who may import whom, and what `import fastsae` may cost."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom up; a module may import from lower layers, and from its own.
LAYERS = [
    {"code", "config", "extras", "files", "fp64", "gradients", "habits", "packages", "progress", "quiet", "ranks"},
    {"backends"},
    {"ops"},
    {"normalize", "modules"},
    {"optim", "narrow", "runs", "checkpoint", "train", "planner", "report", "distributed"},
    {"activations", "lm"},
    {"evaluate"},
    {"provenance"},
    {"experiment", "integrations"},
    {"evaluation", "own_rows", "study", "factorial"},
    {"cli"},
]
# Data preparation stands beside the SAEs, not on them.
MAY_ONLY_IMPORT = {
    "activations": {"activations", "extras", "files", "fp64", "packages", "progress", "quiet"},
    "lm": {"lm", "activations", "extras", "packages", "quiet"},
    "report": {"report", "extras", "files", "packages"},
}


def room(module: str) -> str | None:
    """The part of the house a module lies in: fastsae.backends.cpu -> backends."""
    parts = module.split(".")
    return parts[1] if parts[0] == "fastsae" and len(parts) > 1 and parts[1] != "__version__" else None


def imports(tree: ast.AST) -> set[str]:
    """Everything imported anywhere in a file, names of `from fastsae import x` resolved."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide their direction"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def upward(name: str, source: str) -> list[str]:
    """Imports in the file of module `name` that point up or sideways."""
    if name.startswith("csrc_triton"):  # the kernels know nothing of ours
        return [f"{name} imports {i}" for i in sorted(imports(ast.parse(source))) if i.startswith("fastsae")]
    own = room(name)
    if own is None:
        return []
    level = {member: number for number, layer in enumerate(LAYERS) for member in layer}
    assert own in level, f"fastsae/{own} is in no layer of this test; add it where it belongs"
    wrong = []
    for imported in sorted(imports(ast.parse(source))):
        other = room(imported)
        if other is None or other == own:
            continue
        if level[other] > level[own] or (own in MAY_ONLY_IMPORT and other not in MAY_ONLY_IMPORT[own]):
            wrong.append(f"{name} imports {imported}")
    return wrong


FILES = sorted((ROOT / "fastsae").rglob("*.py")) + sorted((ROOT / "csrc_triton").rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path):
    wrong = upward(module_name(path), path.read_text())
    assert not wrong, (
        f"{'; '.join(wrong)}: a file imports from layers below its own only (LAYERS, docs/architecture.md)"
    )


def test_an_upward_import_is_found():
    assert upward("fastsae.ops", "from fastsae.modules import TopKSAE") == [
        "fastsae.ops imports fastsae.modules.TopKSAE"
    ]
    assert upward("csrc_triton.plan", "import fastsae.code") == ["csrc_triton.plan imports fastsae.code"]
    assert upward("fastsae.lm.train", "def f():\n    from fastsae import ops") == [
        "fastsae.lm.train imports fastsae.ops"
    ]


def test_import_is_light_and_silent():
    heavy = [
        "transformer_lens",
        "transformers",
        "datasets",
        "tokenizers",
        "matplotlib",
        "triton",
        "wandb",
        "scipy",
        "torchao",
    ]
    # torch brings some of these by itself where they are installed; only what fastsae adds counts.
    script = (
        "import sys, torch; before = set(sys.modules); import fastsae; "
        f"added = (set(sys.modules) - before) & set({heavy}); assert not added, added"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_training_needs_torch_and_numpy_only():
    """On a machine where nothing can be installed: `make gpu` runs there."""
    script = (
        "import sys; sys.modules |= dict.fromkeys(('safetensors', 'tqdm', 'tyro', 'transformer_lens', 'tokenizers')); "
        "import importlib.util as u; find = u.find_spec; u.find_spec = lambda n, *a: n != 'tyro' and find(n, *a); "
        "import torch, fastsae; config = fastsae.TrainerConfig(steps=1, progress=False); "
        "print(fastsae.Trainer(fastsae.TopKSAE(4, 20, 2), config).fit([torch.randn(8, 4)]).steps)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


# What other libraries and test suites put in the place of a package.
STAND_INS = {
    "stub": "types.ModuleType(name)",
    "mock": "mock.MagicMock()",
    "stub with a spec": "with_spec(types.ModuleType(name))",
}
# After torch, which fails at some of these by itself.
STOOD_IN = """
import importlib, sys, types
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest import mock
import torch, torch._dynamo

def with_spec(module):
    module.__spec__ = ModuleSpec(module.__name__, None)
    return module

def said(call):
    try:
        call()
    except (ImportError, RuntimeError) as error:
        return str(error)

taken = {}
for name in ("triton", "tyro", "safetensors", "tqdm", "transformer_lens", "datasets", "matplotlib"):
    for loaded in [n for n in sys.modules if n.split(".")[0] == name]:
        del sys.modules[loaded]
    taken[name] = sys.modules[name] = STAND_IN
import fastsae, fastsae.lm
from fastsae import files, report
from fastsae.report import png, svg
from fastsae.activations import text

sae, x = fastsae.TopKSAE(4, 20, 2), torch.randn(8, 4)
with mock.patch("warnings.warn") as warn:
    fastsae.Trainer(sae, fastsae.TrainerConfig(steps=1)).fit([x])
needed = {
    "triton": [lambda: fastsae.TopKSAE(4, 20, 2, backend="cuda"), lambda: fastsae.backends.implementation("cuda")],
    "tyro": [lambda: importlib.import_module("fastsae.cli")],
    "safetensors": [lambda: sae.save_pretrained(FOLDER), lambda: files.read_tensors(Path(__file__))],
    "tqdm": [],
    "transformer_lens": [fastsae.lm.load],
    "datasets": [lambda: list(text.read_documents("no_such_thing"))],
    "matplotlib": [lambda: svg.figure("", print), lambda: png.save(Path("nowhere.png"), (1, 1), print)],
}
answers = {name: [said(call) for call in calls] for name, calls in needed.items()}
answers["tqdm"] = [str(call.args[0]) for call in warn.call_args_list]
for name, instead in taken.items():
    assert answers[name], name
    for answer in answers[name]:
        assert f"sys.modules[{name!r}] is {instead!r}, which is not the package" in str(answer), (name, answer)
print("ok")
"""


@pytest.mark.parametrize("kind", STAND_INS)
def test_a_stand_in_for_a_package_is_told_from_it(kind: str, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(STOOD_IN.replace("STAND_IN", STAND_INS[kind]).replace("FOLDER", repr(str(tmp_path / "sae"))))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


# What a notebook does: importlib.reload, IPython's autoreload, or the package taken out of sys.modules. Objects and
# graphs of before go on.
AGAIN = """
import importlib, pkgutil, random, sys
import torch, fastsae, csrc_triton

def made():
    saes = [fastsae.TopKSAE(8, 50, 4), fastsae.JointSAE(8, 50, 4, d_embedding=3)]
    options = {"steps": 3, "progress": False, "unit_norm_decoder": True}
    ways = ({}, {"adam_in_backward": True}, {"optimizer_state": "8bit"} if torchao else {"auxk": 2})
    trainers = [fastsae.Trainer(s, fastsae.TrainerConfig(**options, **way)) for s in saes for way in ways]
    return saes, trainers, saes[1].eval()(x[0]).loss

def used(saes, trainers, loss):
    loss.backward()
    for trainer in trainers:
        before = trainer.sae.W_dec.detach().clone()
        trainer.fit(x)
        assert not torch.equal(trainer.sae.W_dec, before)
    for sae in saes:
        grads = {}
        for backend in ("cpu", "reference"):
            sae.zero_grad()
            sae.backend = backend
            sae.eval()(x[0]).loss.backward()
            grads[backend] = [p.grad for p in sae.parameters()]
        torch.testing.assert_close(grads["cpu"], grads["reference"])
        sae.reset_parameters()
    # Through the kernels too, in Triton's interpreter.
    W, values, indices = torch.ones(9, 6, requires_grad=True), torch.ones(2, 2), torch.tensor([[0, 1], [3, 1]])
    optimizer = fastsae.optim.AdamInBackward([W], lr=0.5)
    with optimizer.in_backward():
        fastsae.ops.sparse_decode(values, indices, W, "cuda").sum().backward()
    assert W.grad is None
    torch.testing.assert_close(W[:4, 0], torch.tensor([0.5, 0.5, 1, 0.5]))

x = torch.randn(3, 16, 8)
torchao = importlib.util.find_spec("torchao")
for package in (csrc_triton, fastsae):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if "integrations." not in found.name:
            importlib.import_module(found.name)
before = made()
everything = [name for name in sys.modules if name.split(".")[0] in ("fastsae", "csrc_triton")]
alone = "csrc_triton.adam", "csrc_triton.weight_gradients", "fastsae.backends.cuda", "fastsae.ops", "fastsae.optim"
for name in alone:
    importlib.reload(sys.modules[name])
    used([], [], torch.ones(1, requires_grad=True).sum())
for name in everything + random.Random(0).sample(everything, len(everything)):
    importlib.reload(sys.modules[name])
used(*made())
used(*before)
before = made()
for name in everything:
    del sys.modules[name]
import fastsae, fastsae.optim
used(*made())
used(*before)
print("ok")
"""


def test_the_package_can_be_reloaded_and_imported_anew():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", AGAIN], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["ok"]), done.stderr
