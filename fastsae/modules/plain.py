"""Checks of the weights of an SAE: each is there, and a tensor of its own that can be trained, saved and loaded."""

from collections.abc import Mapping
from itertools import pairwise

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def check_plain(who: str, kind: str, found: Mapping[str, Tensor], new: Mapping[str, Tensor], *, whole: bool) -> None:
    """Raise ValueError, naming the weight, unless `found` are the weights that a new `kind` has.

    found, new: state dicts, the second one of an SAE of the same config. whole: False where a rank holds some rows.
    """
    if found.keys() != new.keys():
        raise ValueError(f"{who}: {_difference(kind, found, new)}")
    for name, t in found.items():
        if whole and t.shape != new[name].shape:
            raise ValueError(
                f"{who}: {name} is {tuple(t.shape)}, and {tuple(new[name].shape)} by the config of this {kind}, so it "
                "could not be loaded. Make a new one of the size you want, and copy the weights into it"
            )
        if is_traceable_wrapper_subclass(t):
            raise ValueError(
                f"{who}: {name} is a {type(t).__name__}; expected a plain tensor. Several processes share an SAE by "
                "fastsae.distributed (docs/distributed.md)"
            )
        if t.is_meta:
            raise ValueError(
                f"{who}: {name} is on the meta device and holds no numbers; call .to_empty(device=...), then "
                ".reset_parameters()"
            )
    if place := _shared(found):
        raise ValueError(
            f"{who}: two weights of this SAE share their memory, so it could not be saved: {place}. Give each its own: "
            "torch.nn.Parameter(weight.detach().clone())"
        )


def _difference(kind: str, found: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> str:
    """Say which names are too many or too few, and how to undo that."""
    others, missing = ([n for n in a if n not in b] for a, b in ((found, new), (new, found)))
    if missing and others:
        undo = next((undo for (begin, end), undo in _UNDO.items() if _any(others, begin, end)), _MERGE)
        return (
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} replaced by {', '.join(others)}, which a "
            f"saved {kind} has no place for, so it could not be loaded. Make it a plain weight first: "
            f"{undo.format(name=missing[0].rpartition('.')[2])}"
        )
    if missing:
        return (
            f"{', '.join(missing)}, which the config of this {kind} asks for, is missing, so it could not be loaded. "
            "Make the SAE without it (pre_bias=False, linear=False, interaction=False), or put it back"
        )
    return (
        f"{', '.join(others)} is not among the weights of a {kind}, so it could not be loaded. Keep it outside of the "
        "SAE, or as a buffer with persistent=False; or give your class an `architecture` of its own"
    )


def _any(names: list[str], begin: str, end: str) -> bool:
    return any(name.startswith(begin) and name.endswith(end) for name in names)


_MERGE = "merge adapters (LoRA) into it, and take wrappers off"
_UNDO = {
    ("parametrizations.", ""): 'torch.nn.utils.parametrize.remove_parametrizations(sae, "{name}")',
    ("", "_mask"): 'torch.nn.utils.prune.remove(sae, "{name}")',
    ("", "_u"): 'torch.nn.utils.remove_spectral_norm(sae, "{name}")',
    ("", "_g"): 'torch.nn.utils.remove_weight_norm(sae, "{name}")',
}


def _shared(found: Mapping[str, Tensor]) -> str | None:
    """Two names of weights that lie in one place, or overlap; one whose own entries do."""
    in_order = sorted((t.data_ptr(), name) for name, t in found.items() if t.numel())
    for (start, first), (next_start, second) in pairwise(in_order):
        in_rows = found[first].is_contiguous() and found[second].is_contiguous()
        if start == next_start or (in_rows and start + found[first].nbytes > next_start):
            return f"{first} and {second}"
    return next((f"entries of {name}" for name, t in found.items() if _repeats(t)), None)


def _repeats(t: Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(t.stride(), t.shape, strict=True))
