"""Files and folders that no form reads, told in words: published SAEs of other kinds, and what is no SAE at all."""

import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

_ONLY = "Only TopK SAEs and fastsae's own are converted."
LOAD_THERE = "Load it with the package that wrote it, and save the SAE in that package's own form."
_NUMPY = {"npz": "an .npz archive of NumPy arrays", "npy": "a single array of NumPy"}
_BEGINNINGS = {
    b"\x93NUMPY": "npy",
    b"version https://git-lfs": "lfs",
    b"GGUF": "gguf",
    b"\x89HDF\r\n": "hdf5",
    b"\x1f\x8b": "archive",
    b"BZh": "archive",
    b"\xfd7zXZ": "archive",
    b"7z\xbc\xaf": "archive",
}
# What torch.save wrote before it wrote zip archives: the pickle of a number.
_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

# By the names of their tensors, the first that are all there.
_BY_NAMES = (
    ({"encoder_linear.weight", "decoder_linear.weight"}, "a ReLU SAE in the layout of Goodfire"),
    ({"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}, "a JumpReLU SAE in the layout of Gemma Scope"),
    ({"w_enc", "w_dec", "threshold"}, "a JumpReLU SAE in the layout of Gemma Scope 2"),
    ({"W_enc", "W_dec", "b_gate", "b_mag"}, "a gated SAE"),
    (
        {"W_enc", "W_dec", "b_enc", "b_dec"},
        "an SAE of which the file says neither the activation nor k, as Qwen-Scope's",
    ),
    ({"W", "b_enc", "b_dec"}, "an SAE of tied weights"),
    ({"decoder_bias", "gate_bias"}, "a GatedAutoEncoder of dictionary_learning"),
    ({"bias", "encoder.weight", "decoder.weight"}, "an AutoEncoder (ReLU) of dictionary_learning"),
    ({"encoder.weight", "decoder.weight", "decoder.bias"}, "a ReLU SAE, an AutoEncoderNew of dictionary_learning say"),
)
_CHECKPOINT = {"state_dict", "model_state_dict", "optimizer_state_dict", "pytorch-lightning_version"}

# By the names of their files.
_BY_FILES = (
    ("params.npz", "a JumpReLU SAE of Gemma Scope (params.npz)"),
    ("params.safetensors", "an SAE or transcoder of Gemma Scope 2 (params.safetensors)"),
    ("params_layer_*.safetensors", "a crosscoder or transcoder over layers of Gemma Scope 2"),
    ("hyperparams.json", "an SAE of Llama Scope (hyperparams.json)"),
    ("layer_*.safetensors", "a set of transcoders of circuit-tracer"),
    ("W_enc_*.safetensors", "a transcoder over layers of circuit-tracer"),
    ("*.sae.pt", "SAEs of Qwen-Scope (*.sae.pt)"),
    ("sae.pt", "an SAE of saev (sae.pt)"),
    ("weights.pt", "an SAE of ViT-Prisma (weights.pt)"),
    ("ae_normalized.pt", "an SAE of InterPLM (ae_normalized.pt)"),
    ("model.safetensors", "a model of transformers, or an SAE saved by the mixin of huggingface_hub"),
    ("pytorch_model.bin", "a model of transformers"),
)
_INCOMPLETE = {
    "cfg.json": "sae_weights.safetensors (SAELens) or sae.safetensors (sparsify)",
    "sae_weights.safetensors": "cfg.json (SAELens)",
    "sae.safetensors": "cfg.json (sparsify)",
    "config.json": "weights.safetensors (fastsae) or ae.pt (dictionary_learning)",
}
_WEIGHTS = ("weights.safetensors", "sae_weights.safetensors", "sae.safetensors")
# What zipfile raises of damaged bytes: offsets out of the file, flags of encryption, names that are none.
_BAD_ZIP = (zipfile.BadZipFile, RuntimeError, ValueError, OverflowError, OSError)
_SINGLE = (".pt", ".pth", ".bin", ".ckpt", ".npz", ".npy", ".pkl", ".pickle")
_DEPTH, _FOLDERS, _LISTED = 6, 2000, 8


def refuse(path: Path, expected: str) -> None:
    """Raises ValueError saying what the file is, if it is known and not `expected`: "torch" or "safetensors"."""
    kind = _kind(path) if path.is_file() else None
    if kind not in (None, expected):
        raise ValueError(f"{path} {_said(path, kind)}")


def by_names(names: Iterable[str]) -> str | None:
    """Say what a dict of tensors with these names is, if that is known."""
    plain = {str(name).removeprefix("_orig_mod.").removeprefix("module.") for name in names}
    if plain & _CHECKPOINT:
        return f"is a checkpoint of a trainer (of Lightning, say), not an SAE in a form of its own. {LOAD_THERE}"
    known = next((what for mark, what in _BY_NAMES if mark <= plain), None)
    return known and f"is {known}. {_ONLY}"


def folder(source: Path, written: Callable[[Path], bool]) -> str | None:
    """Say what a folder is that holds no SAE itself: the SAEs below it, or what it looks like.

    written: whether a folder holds an SAE in a known form.
    """
    below = [str(found.relative_to(source)) for found in _folders_below(source, written) if written(found)]
    if below:
        more = f", and {len(below) - _LISTED} more" if len(below) > _LISTED else ""
        return f"Below it there are SAEs; give the folder of one: {', '.join(below[:_LISTED])}{more}."
    if known := _by_files(source):
        return f"It looks like {known}. {_ONLY}"
    if broken := sorted(path.name for path in source.iterdir() if path.is_symlink() and not path.exists()):
        return f"{', '.join(broken[:_LISTED])}: a link to what is not there; download or copy it anew."
    if single := sorted(path for path in source.iterdir() if path.suffix in _SINGLE and path.is_file()):
        kind = _kind(single[0])
        fits = kind in (None, "torch")
        return f"Give a file itself, such as {single[0]}." if fits else f"Its {single[0].name} {_said(single[0], kind)}"
    for found in _folders_below(source, written):
        if known := _by_files(found):
            return f"Its {found.relative_to(source)} looks like {known}. {_ONLY}"
    present = next((name for name in _INCOMPLETE if (source / name).is_file()), None)
    return present and f"It holds {present}, and lacks {_INCOMPLETE[present]}: was all of it downloaded or copied?"


def is_whole(path: Path) -> bool:
    """Whether the names and plain values of a torch.save archive are as they were written."""
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(name) as file:  # which compares the checksum at its end
                while file.read(2**20):
                    pass
    except (*_BAD_ZIP, EOFError, zlib.error):
        return False
    return True


def _kind(path: Path) -> str | None:
    """Kind of a file by its first bytes; None if they tell nothing."""
    with path.open("rb") as file:
        head = file.read(4096)
    if not head:
        return "empty"
    for beginning, kind in _BEGINNINGS.items():
        if head.startswith(beginning):
            return kind
    if head.startswith(b"PK"):
        return _kind_of_zip(path)
    if head.startswith(_OLD_TORCH):
        return "torch"
    if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or path.suffix in (".pkl", ".pickle"):
        return "pickle"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8:
        return "safetensors"
    if head[257:262] == b"ustar":
        return "archive"
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html")):
        return "html"
    if text.startswith((b"{", b"[")):
        return "saev" if _is_line_before_torch(path) else "json"
    return None


def _kind_of_zip(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except _BAD_ZIP:
        return None
    if any(name.endswith(".npy") for name in names):
        return "npz"
    if any("/code/" in name for name in names):
        return "torchscript"
    return "torch" if any(name.endswith("data.pkl") for name in names) else "archive"


def _is_line_before_torch(path: Path) -> bool:
    with path.open("rb") as file:
        file.readline(2**20)
        return file.read(2) in (b"PK", b"\x80\x02")


def _said(path: Path, kind: str | None) -> str:
    give_folder = f"Give the folder that it is in: {path.parent}"
    if kind in _NUMPY:
        return f"is {_NUMPY[kind]}{_arrays(path, kind)}. {_ONLY}"
    if kind == "json":
        return f"is JSON, not weights. {give_folder}"
    if kind == "safetensors":
        what = None if path.name in _WEIGHTS else by_names(_names_in_safetensors(path))
        return what or f"is weights alone; the config is beside them. {give_folder}"
    return {
        "lfs": "is a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`, or download it",
        "empty": "is empty: a download or a copy was cut off",
        "gguf": f"is a language model in GGUF. {_ONLY}",
        "hdf5": f"is a file of HDF5. {_ONLY}",
        "archive": "is an archive: unpack it, and give what is in it",
        "torchscript": f"is a TorchScript archive, which holds code, which is not run. {LOAD_THERE}",
        "pickle": f"cannot be read as tensors: it is a pickle, which holds code, which is not run. {LOAD_THERE}",
        "html": "is a web page, not the file: download the file itself (of the Hugging Face Hub, under /resolve/)",
        "saev": f"is an SAE of saev: one line of JSON, then its weights. {_ONLY}",
        "torch": "is a file of torch.save, where one of safetensors is expected",
    }[kind or ""]


def _arrays(path: Path, kind: str) -> str:
    if kind == "npy":
        return ""
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
    known = next((f": {what}" for mark, what in _BY_NAMES if mark <= set(names)), "")
    return f" ({', '.join(sorted(names)[:_LISTED])}){known}"


def _names_in_safetensors(path: Path) -> list[str]:
    with path.open("rb") as file:
        length = min(int.from_bytes(file.read(8), "little"), 10**8)  # safetensors' own limit
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            return []
    return list(header) if isinstance(header, dict) else []


def _by_files(source: Path) -> str | None:
    return next((what for pattern, what in _BY_FILES if any(source.glob(pattern))), None)


def _folders_below(source: Path, written: Callable[[Path], bool]) -> Iterator[Path]:
    """Nearest first, not below a folder with an SAE, not behind links (which may lead round), and not without end."""
    level, seen = [source], 0
    for _ in range(_DEPTH):
        children = [child for one in level for child in _children(one)]
        level = []
        for child in children:
            seen += 1
            if seen > _FOLDERS:
                return
            yield child
            if not child.is_symlink() and not written(child):
                level.append(child)


def _children(one: Path) -> list[Path]:
    try:
        return sorted(child for child in one.iterdir() if child.is_dir())
    except PermissionError:  # it cannot be looked into, so nothing is said of it
        return []
