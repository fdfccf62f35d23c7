"""Numbers as sort keys: integers that order like relu(value), with NaN first, and with ties to the lower index."""

import triton
import triton.language as tl

# Sorted instead of a key where there is no candidate.
NOTHING = tl.constexpr(-1)


@triton.jit
def sort_key(v):
    """int32 >= 0 that orders like relu(v): 15 bits for fp16 and bf16, 31 for fp32. NaN comes first, -0.0 is 0."""
    if v.dtype == tl.float32:
        bits = v.to(tl.int32, bitcast=True)
        size, infinity = bits & 0x7FFFFFFF, 0x7F800000
    else:
        bits = v.to(tl.int16, bitcast=True).to(tl.int32)
        size, infinity = bits & 0x7FFF, 0x7F80 if v.dtype == tl.bfloat16 else 0x7C00
    return tl.where((bits >= 0) | (size > infinity), size, 0)


@triton.jit
def ranked_key(key, index):
    """int64 that orders by key, and among equal keys puts the lower index first."""
    return (key.to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def index_of(ranked):
    return 0xFFFFFFFF - (ranked & 0xFFFFFFFF)


@triton.jit
def value_of(ranked, dtype: tl.constexpr):
    """The number a ranked key was made of, in the dtype it had."""
    key = (ranked >> 32).to(tl.int32)
    if dtype == tl.float32:
        value = key.to(tl.float32, bitcast=True)
    else:
        value = key.to(tl.int16).to(dtype, bitcast=True)
    return value


@triton.jit
def kth_key(keys, k, N_BITS: tl.constexpr):
    """The largest t with at least k of `keys` >= t (0 if there is none), bit by bit from the highest."""
    t = tl.zeros((), tl.int32)
    for i in range(N_BITS):
        candidate = t | (1 << (N_BITS - 1 - i))
        t = tl.where(tl.sum((keys >= candidate).to(tl.int32), axis=0) >= k, candidate, t)
    return t
