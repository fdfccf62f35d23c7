"""Other ways to cut the work of a kernel: what the constants in csrc_triton's launchers are chosen from."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import triton

from benchmarks.gpu.measures.launches import identity, of
from benchmarks.gpu.timing import measure_start
from benchmarks.place import Place
from csrc_triton.adam import ADAM_UNIT
from csrc_triton.cases import Part
from csrc_triton.launch import Launch
from csrc_triton.plan import power_of_two

Arguments = dict[str, Any]

_PRODUCT = {"BLOCK_DEPTH": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)}
AXES: dict[str, dict[str, Sequence[int]]] = {
    "groupmax_kernel": {"BLOCK_G": (8, 16, 32, 64, 512), "num_warps": (2, 4, 8)},
    "select_kernel": {"BLOCK_G": (4, 8, 16, 128), "num_warps": (2, 4, 8)},
    "encode_gemm_kernel": {
        "BLOCK_R": (64, 128, 256),
        "BLOCK_M": (128, 256),
        "num_warps": (4, 8),
        "num_stages": (3, 4),
    },
    "joint_decode_kernel": {"BLOCK_D": (1024, 2048), "ROWS": (2, 4, 8), "STAGES": (2, 3, 4), "num_warps": (4, 8)},
    "decode_backward_kernel": {"TOKENS": (1, 2, 4), "STAGES": (1, 2), "num_warps": (4, 8, 16)},
    "weight_gradient_kernel": {
        "BLOCK_D": (1024, 2048, 4096),
        "TOKENS": (1, 2, 4),
        "STAGES": (2, 3, 4),
        "num_warps": (4, 8),
    },
    "hidden_kernel": _PRODUCT,
    "output_kernel": _PRODUCT,
    "d_hidden_kernel": _PRODUCT,
    "d_pooled_kernel": _PRODUCT,
    "d_weight_kernel": _PRODUCT,
}
"""By kernel, the constants that may be changed without another result."""

# How many programs there are, where that hangs on a constant of AXES.
_GRIDS: dict[str, Callable[[Launch, Arguments], tuple[int, ...]]] = {
    "groupmax_kernel": lambda n, a: (n.grid[0], triton.cdiv(a["NG"], a["BLOCK_G"])),
    "encode_gemm_kernel": lambda n, a: (triton.cdiv(a["R"], a["BLOCK_R"]) * triton.cdiv(a["M"], a["BLOCK_M"]),),
    "joint_decode_kernel": lambda n, a: (n.grid[0], max(1, triton.cdiv(a["D"], a["BLOCK_D"]))),
    "weight_gradient_kernel": lambda n, a: (n.grid[0], triton.cdiv(a["D"], a["BLOCK_D"])),
}


def variants(launch: Launch) -> list[Launch]:
    """The launch in every other way of AXES that gives the same result; none where there are none."""
    if launch.name not in AXES:
        return []
    axes = AXES[launch.name]
    found = [_variant(launch, dict(zip(axes, chosen, strict=True))) for chosen in itertools.product(*axes.values())]
    own = identity(launch)
    return [other for other in found if other is not None and identity(other) != own]


def _variant(launch: Launch, chosen: dict[str, int]) -> Launch | None:
    """None where the choice is not another cut of the same work."""
    warps, stages = chosen.pop("num_warps"), chosen.pop("num_stages", launch.num_stages)
    arguments = launch.arguments | chosen
    if arguments.get("BLOCK_G", 0) * arguments.get("GROUP", 0) > 16384:  # spills, and compiles for half a minute
        return None
    if arguments.get("BLOCK_D", 0) > power_of_two(max(16, arguments.get("D", 0))):
        return None
    # A norm is taken of a whole row.
    if arguments.get("W_MODE") == ADAM_UNIT.value and arguments["BLOCK_D"] < arguments["D"]:
        return None
    # d_weight's programs sum over their own segment of the tokens, in whole steps.
    if arguments.get("segment", 0) % arguments.get("BLOCK_DEPTH", 1):
        return None
    if launch.name == "encode_gemm_kernel" and arguments["BLOCK_M"] % arguments["GROUP"]:
        return None
    grid = _GRIDS.get(launch.name, lambda n, a: n.grid)(launch, arguments)
    if arguments.get("error_ptr") is not None:  # a number for each program
        arguments["error_ptr"] = torch.empty(grid, dtype=torch.float32, device=arguments["error_ptr"].device)
    return replace(launch, grid=grid, arguments=arguments, num_warps=warps, num_stages=stages)


def swept(part: Part, place: Place, fits: Callable[[Launch], bool]) -> list[dict[str, Any]]:
    """Time each launch that has variants: its own time, and theirs, the fastest first.

    fits: whether a variant may be started; variants that spill registers or lack shared memory need not be.
    """

    seen = set()

    def about(launch: Launch) -> dict[str, Any]:
        same = (*identity(launch).values(), launch.grid, launch.bytes_moved)
        others = [other for other in variants(launch) if all(launch.grid) and fits(other)]
        if not others or same in seen:  # another chunk of the same work
            return {}
        seen.add(same)
        found = [(measure_start(other.start, place, 0.1)["median"], other) for other in others]
        found.sort(key=lambda timed: timed[0])
        # The first one again, next to ours: the least of many short times is partly luck.
        own, first = measure_start(launch.start, place), found[0][1]
        found[0] = (measure_start(first.start, place)["median"], first)
        told = [identity(other) | {"ms": ms} for ms, other in found]
        return identity(launch) | {"ms": own, "best / chosen": round(found[0][0] / own["median"], 3), "variants": told}

    return [facts for facts in of(part, place, about) if facts]
