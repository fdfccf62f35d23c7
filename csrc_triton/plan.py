"""Choice of the kernels for a shape, by counted bytes and operations. Pure: no tensors, no device, no clock.

The rates are estimates for one H200 until a results file of a GPU replaces them; a comparison of two ways depends on
their ratio only.
"""

from dataclasses import dataclass
from typing import Literal, TypeVar

Way = TypeVar("Way", bound=str)

# Estimates: what a large copy moves and what a large matrix product does, per second.
BANDWIDTH = 4.3e12
FLOPS = {2: 790e12, 4: 50e12}
"""By bytes per number: 16-bit tensor cores, and IEEE fp32."""
TF32_FLOPS = 395e12
"""fp32 where the user allowed TF32."""

# A group-max epilogue costs a GEMM of ours nothing, but cuBLAS is faster by about this share. Read from machine code,
# not measured: our tile of 128 x 128 makes 64 operations of a byte from L2, one of 128 x 256 makes 85.
_CUBLAS_ADVANTAGE = 0.40
# Tokens of one feature that one program adds up; longer lists are split.
SEGMENT = 256
# Of a device's memory, what one chunk of rows of pre-activations takes at most.
PRE_ACTIVATIONS = 0.03
# Features whose rows of W_enc are copied at a time.
_MOST_COPIED = 16384
# The largest k that is ranked in one program's registers.
_MOST_RANKED = 2048


@dataclass(frozen=True)
class EncodePlan:
    """Plan of one topk_encode call."""

    rows: int
    """Rows whose pre-activations are held at once."""
    width: int
    """Columns a row of them takes: M, padded to whole blocks of columns."""
    columns: int
    """Features whose pre-activations lie side by side: whole groups and whole 128-byte lines (odd strides make scalar
    stores). All features where W_enc is multiplied as it lies in memory, else blocks of them, which are copied."""
    gemm: Literal["cublas", "triton"]
    """The product's kernel: cuBLAS, then a pass for the group maxima; or ours, which takes them on the way."""
    select: Literal["groups", "stream", "topk"]
    """Rank groups first; or stream each row once per bit (dictionaries small for k); or torch.topk on 64-bit keys."""
    group: int
    """Features per group."""
    bytes: int
    """Memory of the pre-activations held."""
    reason: str


@dataclass(frozen=True)
class DecodePlan:
    """Plan of joint_decode and of the weight gradients."""

    forward: Literal["gather", "dense"]
    backward: Literal["gather", "dense"]
    encoder_backward: Literal["gather", "dense"]
    shared: bool
    """Gather rows of W_dec + W_lin, summed beforehand (the linear pathway sees the whole code)."""
    reason: str


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def rate(itemsize: int, tf32: bool = False) -> float:
    """Operations per second of a matrix product."""
    return TF32_FLOPS if tf32 and itemsize == 4 else FLOPS[itemsize]


def encode(
    B: int, D: int, M: int, K: int, itemsize: int, budget: int, tf32: bool = False, copied: bool = False
) -> EncodePlan:
    """The plan for topk_encode of B rows; `budget` bytes of pre-activations may be held at once.

    copied: W_enc has to be copied, into another dtype or because only some features compete.
    """
    group = group_size(M, K)
    if K > _MOST_RANKED:
        select, why = "topk", f"k above {_MOST_RANKED}: 64-bit keys and torch.topk"
    elif group == 0:
        select, why = "stream", f"{M} features make too few groups for k = {K}: a row is read once per bit of a number"
    else:
        select, why = "groups", f"maxima of groups of {group}, then the members of the {K} best groups"
    # Taking the maxima in a pass of its own reads the pre-activations once more.
    extra, product = M * itemsize / BANDWIDTH, 2 * M * D / rate(itemsize, tf32)  # seconds a row
    can = select == "groups" and itemsize == 2 and 16 <= group <= 128 and not copied
    ours = can and extra > _CUBLAS_ADVANTAGE * product
    gemm = "triton" if ours else "cublas"
    width, columns = _columns(M, max(64, group), ours, copied)
    # Keys of 8 bytes for every feature, and four temporaries of their size.
    each = itemsize + 40 if K > _MOST_RANKED else itemsize
    rows = _chunk(B, budget // (width * each))
    if select == "groups":
        share = extra / product
        why += f"; a pass for the maxima is {share:.1%} of the product: " + (
            "they are taken in our GEMM" if ours else "cuBLAS multiplies"
        )
    return EncodePlan(rows, width, columns, gemm, select, group, rows * width * itemsize, why)


def _columns(M: int, unit: int, ours: bool, copied: bool) -> tuple[int, int]:
    """The width of a row, and the columns of a block of it, both multiples of `unit`.

    cuBLAS adds a bias on the way into a result without gaps only; into another it is given the bias as a matrix, which
    is written and read once more. So rows end where a block ends, and the last block of W_enc is padded. Our product
    writes where it is told to.
    """
    blocks = 1 if ours or not (copied or M % unit) else -(-M // _MOST_COPIED)
    columns = -(-M // (blocks * unit)) * unit
    return blocks * columns, columns


def _chunk(rows: int, most: int) -> int:
    """Rows at a time, at most `most`: chunks of one size, of whole tiles where that fits."""
    if most >= rows:
        return max(1, rows)
    even = -(-rows // -(-rows // max(1, most)))
    tiles = -(-even // 128) * 128
    return tiles if tiles <= most else even


def group_size(M: int, K: int) -> int:
    """Features per group: ranking the maxima then costs about what reading the members does. 0: no groups."""
    group = 8
    while group < 256 and group * group * K < 8 * M:
        group *= 2
    while -(-M // group) > 4096:  # the maxima of a row lie in one program's registers
        group *= 2
    while group > 8 and -(-M // group) < 2 * K and -(-M // (group // 2)) <= 4096:
        group //= 2
    # With 1.5 k groups about 1.65 k features reach the k-th largest maximum, and 2 k have room.
    return group if 3 * K <= 2 * -(-M // group) <= 2 * 4096 else 0


def gather_seconds(B: int, D: int, K: int, itemsize: int) -> float:
    """Reading K rows of width D for each of B tokens."""
    return B * K * D * itemsize / BANDWIDTH


def dense_seconds(B: int, D: int, M: int, itemsize: int, products: int, passes: int, tf32: bool = False) -> float:
    """`products` matrix products of sizes B, M, D and `passes` over a dense (B, M) code."""
    return products * 2 * B * M * D / rate(itemsize, tf32) + (passes * B + D) * M * itemsize / BANDWIDTH


def decode(
    B: int, D: int, M: int, K: int, N: int, linear: bool, itemsize: int, weight_itemsize: int, budget: int, tf32: bool
) -> DecodePlan:
    """The plan for joint_decode over W_dec and, if `linear`, W_lin for the N strongest; and for all their gradients.

    itemsize is that of the code and of what is computed in, weight_itemsize that of the weights (fp32 under autocast).
    """
    shared = linear and N == K and 3 * M < B * K and M * D * weight_itemsize <= budget
    gathered = K + (N if linear and not shared else 0)
    pathways = 1 + int(linear and not shared)
    # The dense code is cleared, written and read.
    ways = {
        "forward": (
            gather_seconds(B, D, gathered, weight_itemsize),
            dense_seconds(B, D, M, itemsize, pathways, 3 * pathways, tf32),
        ),
        # Gradients of values and weights: one more dense (B, M) is written and read.
        "backward": (
            gather_seconds(B, D, K, itemsize),
            dense_seconds(B, D, M, itemsize, 2 * (1 + int(linear)), 5 * (1 + int(linear)), tf32),
        ),
        "encoder_backward": (gather_seconds(B, D, K, itemsize), dense_seconds(B, D, M, itemsize, 1, 3, tf32)),
    }
    chosen: dict[str, Literal["gather", "dense"]] = {
        name: "dense" if dense < gather else "gather" for name, (gather, dense) in ways.items()
    }
    words = (f"{n}: gather {g * 1e3:.2g} ms, dense {d * 1e3:.2g} ms" for n, (g, d) in ways.items())
    return DecodePlan(**chosen, shared=shared, reason="; ".join(words).replace("_", " ") + " (counted)")


def cheapest(costs: dict[Way, tuple[int, int]], itemsize: int, tf32: bool = False) -> tuple[Way, str]:
    """The way of the least time by (bytes, operations), and the reason in words."""
    speed = rate(itemsize, tf32)
    seconds = {way: max(moved / BANDWIDTH, operations / speed) for way, (moved, operations) in costs.items()}
    words = (f"{way} {moved / 2**20:.0f} MiB, {seconds[way] * 1e3:.2g} ms" for way, (moved, _) in costs.items())
    return min(seconds, key=lambda way: seconds[way]), ", ".join(words) + " (counted)"
