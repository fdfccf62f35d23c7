"""Tensors of several ranks on disk: a file of each rank's part (torch.distributed.checkpoint), or one whole file."""

import errno
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsae import files, packages
from fastsae.distributed.layout import BY_FEATURE

if TYPE_CHECKING:
    from fastsae.distributed.ranks import Ranks

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
_WRITTEN_AT_ONCE = 1 << 26


def by_feature(name: str) -> bool:
    """Whether a tensor has a row per feature: a weight, its moments (exp_avg/W_enc) but not its step, a counter."""
    kind, _, of = name.rpartition("/")
    return of in BY_FEATURE and kind != "step"


def write(folder: Path, tensors: dict[str, Tensor], ranks: Any) -> None:
    """Every rank writes its own part into `folder`, as safetensors; what all hold is written once. Raises OSError."""
    from torch.distributed.checkpoint.api import CheckpointException  # takes long to import, and one process never does
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    ranks.check_equal(tensors)
    state = {name: _placed(name, t.detach().reshape(t.shape or (1,)), ranks) for name, t in tensors.items()}
    try:
        save(state, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:  # on all ranks, whichever failed
        failed = next(iter(error.failures.values()))[0]
        raise OSError(getattr(failed, "errno", None) or errno.EIO, str(failed)) from error


def read(folder: Path, ranks: Any, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """This rank's part of the `wanted` tensors that ranks of any layout wrote, or one process; for one, all of them.

    Raises OSError, or ValueError where the parts cannot be read or are not the whole.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    state: dict[str, Any] = {}
    for name, stored in _stored(folder, reader).items():
        if not wanted(name):
            continue
        shape = list(stored.size)
        if ranks.count > 1 and by_feature(name):
            shape[0] //= ranks.layout.features
        state[name] = _placed(name, torch.empty(shape, dtype=stored.properties.dtype, device="cpu"), ranks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process reads alone is what was asked for
        try:
            load(state, storage_reader=reader, no_dist=ranks.count == 1)
        except CheckpointException as error:  # no Exception: nobody expects it
            raise ValueError(f"{folder} is damaged: {next(iter(error.failures.values()))[0]}") from error
    return {name: t if type(t) is Tensor else t.to_local() for name, t in state.items()}


def _stored(folder: Path, reader: Any) -> dict[str, Any]:
    """Read from the parts in a folder the description of the whole tensors, by name."""
    packages.need("safetensors", f"reading {folder}")
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or truncated ({error})") from error
    with files.expected_in(folder, "one of its parts does not say of what it is a part"):
        stored = reader.read_metadata().state_dict_metadata
        for name, whole in stored.items():
            if not _is_whole(whole):  # the rest would be whatever lies in memory
                raise ValueError(f"{folder} is damaged: {name} is not whole")
    return stored


def _is_whole(stored: Any) -> bool:
    if not stored.size:  # a number, as one process writes Adam's steps
        return len(stored.chunks) == 1
    end = 0
    for part in sorted(stored.chunks, key=lambda part: part.offsets[0]):
        if part.offsets[0] != end or any(part.offsets[1:]) or part.sizes[1:] != stored.size[1:]:
            return False
        end += part.sizes[0]
    return end == stored.size[0]


def _placed(name: str, t: Tensor, ranks: Any) -> Any:
    if ranks.count == 1 or not by_feature(name):
        return t.contiguous()
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = ranks.mesh
    if mesh.device_type != t.device.type:  # read into host memory
        mesh = DeviceMesh(t.device.type, mesh.mesh, mesh_dim_names=mesh.mesh_dim_names, _init_backend=False)
    return DTensor.from_local(t.contiguous(), mesh, [Replicate(), Shard(0)], run_check=False)


def write_whole(path: Path, tensors: dict[str, Tensor], ranks: "Ranks") -> None:
    """One safetensors file of whole tensors. The first rank makes it, each puts its rows where they belong.

    All ranks must see one file system. No rank holds more than its part.
    """
    features = ranks.layout.features
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        t = tensors[name]
        shape = [len(t) * features, *t.shape[1:]] if name in BY_FEATURE else list(t.shape)
        size = t.numel() * t.itemsize * (features if name in BY_FEATURE else 1)
        header[name] = {"dtype": _DTYPES[t.dtype], "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.tmp")

    def begin() -> None:
        with files.named(path), temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)

    def put() -> None:
        with files.named(path), temporary.open("r+b") as file:
            for name in order:
                split, t = name in BY_FEATURE, tensors[name].detach().contiguous().view(-1)
                if ranks.data_rank or (ranks.feature_rank and not split):
                    continue
                place = ranks.feature_rank * t.numel() * t.itemsize if split else 0
                file.seek(8 + len(text) + header[name]["data_offsets"][0] + place)
                for chunk in t.view(torch.uint8).split(_WRITTEN_AT_ONCE):
                    file.write(chunk.cpu().numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())

    try:
        ranks.first_does(begin)
        ranks.together(put)
        ranks.first_does(lambda: os.replace(temporary, path))
        ranks.first_does(lambda: files.sync(path.parent))
    finally:
        if ranks.first:
            temporary.unlink(missing_ok=True)
