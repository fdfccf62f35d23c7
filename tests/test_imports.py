"""The arrows of docs/architecture.md: who may import whom, and what `import fastsae` may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom up; a module may import from lower layers, and from its own.
LAYERS = [
    {"code", "config", "extras", "files", "fp64", "gradients", "progress", "quiet", "ranks"},
    {"backends"},
    {"ops"},
    {"normalize", "modules"},
    {"optim", "narrow", "runs", "checkpoint", "train", "planner", "report", "distributed"},
    {"activations", "lm"},
    {"evaluate"},
    {"provenance"},
    {"experiment", "integrations"},
    {"study", "factorial"},
    {"cli"},
]
# Data preparation stands beside the SAEs, not on them.
MAY_ONLY_IMPORT = {
    "activations": {"activations", "extras", "files", "fp64", "progress"},
    "lm": {"lm", "activations", "extras", "quiet"},
    "report": {"report", "extras", "files"},
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
