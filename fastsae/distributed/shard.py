"""An SAE over several ranks, and back into one folder."""

from pathlib import Path

import torch
from torch import nn

from fastsae.config import from_dict, to_dict
from fastsae.distributed.layout import BY_FEATURE
from fastsae.distributed.ops import ShardedOps
from fastsae.distributed.ranks import Ranks
from fastsae.modules import ARCHITECTURES, SparseAutoencoder


def shard(sae: SparseAutoencoder, ranks: Ranks) -> SparseAutoencoder:
    """This rank's part of `sae`, which must be the same on all ranks: its rows of W_enc, b_enc, W_dec, W_lin and V.

    A new SAE of the same class on the device of this rank; encode, decode, forward and save_pretrained then take all
    ranks of the group together, and give on each what `sae` would have given. Of the first rank's `sae` the whole
    tensors (b_dec, W1, ...) are taken. Make `sae` on the CPU where it would not fit a GPU, with one seed on all ranks.
    """
    each = ranks.layout.features_each(sae.d_sae)
    if ranks.features_each not in (0, each):
        raise ValueError(f"shard: these ranks hold {ranks.features_each} features each, of another SAE; start() again")
    ranks.features_each = each
    own = slice(ranks.first_feature, ranks.first_feature + each)
    part = type(sae)(**to_dict(sae.config), device="meta", dtype=sae.W_enc.dtype)
    for module_name, module in sae.named_modules():
        target = part.get_submodule(module_name)
        for name, p in module.named_parameters(recurse=False):
            t = p.detach()[own] if name in BY_FEATURE else p.detach()
            t = t.to(ranks.device, copy=True).contiguous()
            setattr(target, name, nn.Parameter(t, requires_grad=p.requires_grad))
        for name, b in module.named_buffers(recurse=False):
            setattr(target, name, b.detach().to(ranks.device, copy=True))
    with torch.no_grad():
        ranks.equalise(*(t for name, t in part.state_dict().items() if name not in BY_FEATURE))
    part.backend = sae.backend
    part.ops, part.ranks = ShardedOps(ranks), ranks
    return part.train(sae.training)


def consolidate(checkpoint: str | Path, folder: str | Path) -> Path:
    """Write the SAE of a training checkpoint (run_dir/checkpoints/step_...), of any layout, for fastsae.load to read.

    One process, without torchrun. The SAE must fit its memory.
    """
    from fastsae.checkpoint import read

    found = read(Path(checkpoint))
    described = dict(found.state["sae"])
    architecture, dtype = ARCHITECTURES[described.pop("architecture")], getattr(torch, described.pop("dtype"))
    del described["trained"]
    sae = architecture(**to_dict(from_dict(architecture.config_class, described)), device="meta", dtype=dtype)
    sae.load_state_dict(found.weights, assign=True)
    return sae.save_pretrained(folder)
