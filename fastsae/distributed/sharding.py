"""An SAE over several ranks, and back into one folder."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastsae import modules
from fastsae.config import TopKSAEConfig, from_dict, to_dict
from fastsae.distributed.layout import BY_FEATURE
from fastsae.distributed.ops import ShardedOps
from fastsae.distributed.ranks import Ranks
from fastsae.modules import ARCHITECTURES, SparseAutoencoder

# Numbers drawn at once: a whole weight need not fit any memory.
_DRAWN_AT_ONCE = 1 << 24


def shard(sae: SparseAutoencoder, ranks: Ranks) -> SparseAutoencoder:
    """This rank's part of `sae`, which must be the same on all ranks: its rows of W_enc, b_enc, W_dec, W_lin and V.

    A new SAE of the same class on the device of this rank; encode, decode, forward and save_pretrained then take all
    ranks of the group together, and give on each what `sae` would have given. Of the first rank's `sae` the whole
    tensors (b_dec, W1, ...) are taken, and of the first group's the rows.
    A new SAE too large for one process is made by `new`.
    """
    sae = modules.uncompiled(sae)
    if sae.ranks.count > 1:
        raise ValueError(f"distributed.shard: this SAE is spread over {sae.ranks.count} ranks already; use it as it is")
    each = ranks.holding(sae.d_sae)
    own = slice(ranks.first_feature, ranks.first_feature + each)
    tensors = {name: t.detach()[own] if name in BY_FEATURE else t.detach() for name, t in sae.state_dict().items()}
    part = _part(sae, {name: t.to(ranks.device, copy=True).contiguous() for name, t in tensors.items()}, ranks)
    return part.train(sae.training)


@torch.no_grad()
def new(
    config: TopKSAEConfig, ranks: Ranks, dtype: torch.dtype = torch.float32, backend: str = "auto"
) -> SparseAutoencoder:
    """This rank's part of an untrained SAE: bit for bit that of the whole one, made on the CPU with the same seed.

        torch.manual_seed(0)                # the same on all ranks
        sae = fastsae.distributed.new(fastsae.TopKSAEConfig(d_in=4096, d_sae=2**24, k=64), ranks)

    Every rank draws all numbers, a part at a time, and keeps its own: no more than its part is ever held.
    """
    whole = modules.new(config, device="meta").to(dtype)
    whole.backend = backend
    each = ranks.holding(config.d_sae)
    tensors = {}
    for name, t in whole.state_dict().items():
        shape = (each, *t.shape[1:]) if name in BY_FEATURE else t.shape
        tensors[name] = torch.zeros(shape, dtype=t.dtype, device=ranks.device)
    tensors["normalizer.scale"].fill_(1)
    for name, law in whole.laws().items():
        first = ranks.first_feature if name in BY_FEATURE else 0
        _draw(tensors[name], law, first, whole.get_parameter(name).shape)
    tensors["W_enc"].copy_(tensors["W_dec"])
    return _part(whole, tensors, ranks)


def _draw(own: Tensor, law: Callable[[Tensor], object], first: int, shape: torch.Size) -> None:
    """Rows from `first` on of a tensor of `shape`, as `law` draws the whole of it."""
    count, width = shape[0], shape[1:].numel()
    # torch draws sixteen numbers at a time, and what is left over with the sixteen last ones.
    rows = max(16, _DRAWN_AT_ONCE // width // 16 * 16)
    starts = list(range(0, count, rows))
    if len(starts) > 1 and count - starts[-1] < 16:
        del starts[-1]
    for lo, hi in zip(starts, [*starts[1:], count], strict=True):
        drawn = torch.empty(hi - lo, *shape[1:], dtype=own.dtype, device="cpu")
        law(drawn)
        kept = slice(max(lo, first), min(hi, first + len(own)))
        if kept.start < kept.stop:
            own[kept.start - first : kept.stop - first] = drawn[kept.start - lo : kept.stop - lo]


def _part(whole: SparseAutoencoder, tensors: dict[str, Tensor], ranks: Ranks) -> SparseAutoencoder:
    """An SAE like `whole` that holds `tensors` in place of its own."""
    part = type(whole)(**to_dict(whole.config), device="meta", dtype=whole.W_enc.dtype)
    trained = {name: p.requires_grad for name, p in whole.named_parameters()}
    for name, t in tensors.items():
        module_name, _, own_name = name.rpartition(".")
        module = part.get_submodule(module_name)
        setattr(module, own_name, nn.Parameter(t, requires_grad=trained[name]) if name in trained else t)
    ranks.equalise(*(t for name, t in tensors.items() if name not in BY_FEATURE))
    ranks.equalise_parts(*(t for name, t in tensors.items() if name in BY_FEATURE))
    part.backend, part.reads = whole.backend, whole.reads
    part.ops, part.ranks = ShardedOps(ranks), ranks
    return part


def consolidate(checkpoint: str | Path, folder: str | Path) -> Path:
    """Write the SAE of a training checkpoint (run_dir/checkpoints/step_...), of any layout, for fastsae.load to read.

    One process, without torchrun. The SAE must fit its memory.
    """
    from fastsae.checkpoint import read

    found = read(Path(checkpoint), weights_only=True)
    described = dict(found.state["sae"])
    architecture, dtype = ARCHITECTURES[described.pop("architecture")], getattr(torch, described.pop("dtype"))
    del described["trained"]
    sae = architecture(**to_dict(from_dict(architecture.config_class, described)), device="meta", dtype=dtype)
    sae.load_state_dict(found.weights, assign=True)
    return sae.save_pretrained(folder)
