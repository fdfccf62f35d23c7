"""The k largest of relu(pre) of each row, exactly, from pre-activations that lie in memory one chunk of rows at a time.

Pre-activations of R rows lie in blocks of features, [blocks, R, columns]: one block, or several one after another.

    groupmax      the largest of each group of features, one read of the pre-activations
    select        per row: the groups that can hold one of the k largest, their members, and these sorted
    select_slow   finishes the rows that select leaves: too many candidates for its lists, or too few positive ones

Why groups are enough: before a feature of any group outside the k with the largest maxima there are k, one in each of
these. select takes every group whose maximum reaches the k-th largest one, so ties are decided among members.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.encode_gemm import encode_gemm
from csrc_triton.keys import NOTHING, index_of, kth_key, ranked_key, sort_key, value_of
from csrc_triton.launch import launch
from csrc_triton.plan import EncodePlan, power_of_two


@triton.jit
def _place(row, feature, R, width, COLUMNS: tl.constexpr):
    """The offset of a row's pre-activation; COLUMNS is 0 where there is one block."""
    if COLUMNS == 0:
        offset = row * width + feature
    else:
        offset = ((feature // COLUMNS).to(tl.int64) * R + row) * COLUMNS + feature % COLUMNS
    return offset


@triton.jit(do_not_specialize=["R"])
def groupmax_kernel(
    y_ptr,  # [blocks, R, columns] pre-activations
    maxima_ptr,  # [R, NG] int16 or int32: sort keys
    R,
    NG,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """maxima[r, g] = the largest sort key of features g * GROUP ... of row r. Grid (R, cdiv(NG, BLOCK_G))."""
    row = tl.program_id(0).to(tl.int64)
    offs_g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    offs = _place(row, offs_g * GROUP, R, NG * GROUP, COLUMNS)[:, None] + tl.arange(0, GROUP)[None, :]
    y = tl.load(y_ptr + offs, mask=(offs_g < NG)[:, None], other=0.0)
    maxima = tl.max(sort_key(y), axis=1)
    tl.store(maxima_ptr + row * NG + offs_g, maxima.to(maxima_ptr.dtype.element_ty), mask=offs_g < NG)


@triton.jit(do_not_specialize=["R"])
def select_kernel(
    y_ptr,  # [blocks, R, columns] pre-activations
    maxima_ptr,  # [R, NG] sort keys of groups
    groups_ptr,  # [R, MAX_GROUPS] int32, scratch
    candidates_ptr,  # [R, MAX_CANDIDATES] int64, scratch; left for select_slow where the row is not finished
    count_ptr,  # [R] int32: K where the row is finished, the number of positive ones below K, -1 where lists overflow
    values_ptr,  # [R, K] in the dtype of y
    indices_ptr,  # [R, K] int64
    R,
    NG,
    K,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    N_BITS: tl.constexpr,
    MAX_GROUPS: tl.constexpr,
    MAX_CANDIDATES: tl.constexpr,
    BLOCK_NG: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """The k largest of one row, sorted: value descending, index ascending. Grid (R,)."""
    row = tl.program_id(0).to(tl.int64)
    groups, candidates = groups_ptr + row * MAX_GROUPS, candidates_ptr + row * MAX_CANDIDATES

    offs_ng = tl.arange(0, BLOCK_NG)
    maxima = tl.load(maxima_ptr + row * NG + offs_ng, mask=offs_ng < NG, other=-1).to(tl.int32)
    threshold = tl.maximum(kth_key(maxima, K, N_BITS), 1)  # at least 1: what is not positive is no candidate
    better = (maxima >= threshold).to(tl.int32)
    n_groups = tl.sum(better, axis=0)
    place_g = tl.cumsum(better, axis=0) - 1
    tl.store(groups + place_g, offs_ng, mask=(better != 0) & (place_g < MAX_GROUPS))
    tl.debug_barrier()

    fits = n_groups <= MAX_GROUPS
    n = tl.zeros((), tl.int32)
    offs_g = tl.arange(0, BLOCK_G)
    for start in range(0, tl.where(fits, n_groups, 0), BLOCK_G):
        listed = start + offs_g < n_groups
        group = tl.load(groups + start + offs_g, mask=listed, other=0)
        member = tl.arange(0, GROUP)[None, :]
        offs = _place(row, group * GROUP, R, NG * GROUP, COLUMNS)[:, None] + member
        key = sort_key(tl.load(y_ptr + offs, mask=listed[:, None], other=0.0))
        key = tl.reshape(key, (BLOCK_G * GROUP,))
        hit = (key >= threshold).to(tl.int32)
        place = n + tl.cumsum(hit, axis=0) - 1
        ranked = ranked_key(key, tl.reshape(group[:, None] * GROUP + member, (BLOCK_G * GROUP,)))
        tl.store(candidates + place, ranked, mask=(hit != 0) & (place < MAX_CANDIDATES))
        n += tl.sum(hit, axis=0)
    tl.debug_barrier()

    fits = fits & (n <= MAX_CANDIDATES)
    if fits & (n >= K):
        offs_c = tl.arange(0, MAX_CANDIDATES)
        ranked = tl.load(candidates + offs_c, mask=offs_c < n, other=NOTHING)
        ranked = tl.sort(ranked, descending=True)
        tl.store(values_ptr + row * K + offs_c, value_of(ranked, values_ptr.dtype.element_ty), mask=offs_c < K)
        tl.store(indices_ptr + row * K + offs_c, index_of(ranked), mask=offs_c < K)
        n = n * 0 + K
    tl.store(count_ptr + row, tl.where(fits, n, -1))


@triton.jit(do_not_specialize=["R"])
def select_slow_kernel(
    y_ptr,  # [blocks, R, columns] pre-activations
    candidates_ptr,  # [R, MAX_CANDIDATES] int64, at least K wide: what select found where 0 <= count < K
    count_ptr,  # [R] int32, see select
    values_ptr,  # [R, K] in the dtype of y
    indices_ptr,  # [R, K] int64
    R,
    M,
    width,
    K,
    COLUMNS: tl.constexpr,
    N_BITS: tl.constexpr,
    MAX_CANDIDATES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """select without limits for rows of count -1, and fillers for rows with fewer than k positives. Grid (R,).

    Reads the row once per bit of its keys and once more. Fillers are the lowest features that are not positive, with
    value 0, so that the indices of a row are distinct. Rows that are finished cost one load.
    """
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(count_ptr + row)
    if n < K:
        candidates = candidates_ptr + row * MAX_CANDIDATES
        offs_m = tl.arange(0, BLOCK_M)
        if n < 0:
            threshold, above = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
            for i in range(N_BITS):
                candidate = threshold | (1 << (N_BITS - 1 - i))
                counts = tl.zeros((BLOCK_M,), tl.int32)
                for start in range(0, width, BLOCK_M):
                    place = _place(row, start + offs_m, R, width, COLUMNS)
                    key = sort_key(tl.load(y_ptr + place, mask=start + offs_m < width, other=0.0))
                    counts += (key >= candidate).to(tl.int32)
                reached = tl.sum(counts, axis=0)
                # What the last refused candidate counts is what lies above the final threshold.
                above = tl.where(reached >= K, above, reached)
                threshold = tl.where(reached >= K, candidate, threshold)
            above = tl.where(threshold == 0, 0, above)
            threshold = tl.maximum(threshold, 1)
            n, equals = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
            for start in range(0, width, BLOCK_M):
                offs = start + offs_m
                place = _place(row, offs, R, width, COLUMNS)
                key = sort_key(tl.load(y_ptr + place, mask=offs < width, other=0.0))
                equal = (key == threshold).to(tl.int32)
                rank = equals + tl.cumsum(equal, axis=0)
                keep = ((key > threshold) | ((equal != 0) & (rank <= K - above))).to(tl.int32)
                place = n + tl.cumsum(keep, axis=0) - 1
                tl.store(candidates + place, ranked_key(key, offs), mask=keep != 0)
                n += tl.sum(keep, axis=0)
                equals += tl.sum(equal, axis=0)
        # Among the first 2 k features at least k are not one of the n < k positive ones.
        offs_k = tl.arange(0, 2 * BLOCK_K)
        key = sort_key(tl.load(y_ptr + _place(row, offs_k, R, width, COLUMNS), mask=offs_k < M, other=0.0))
        filler = ((key == 0) & (offs_k < M)).to(tl.int32)
        place = n + tl.cumsum(filler, axis=0) - 1
        tl.store(candidates + place, ranked_key(offs_k * 0, offs_k), mask=(filler != 0) & (place < K))
        tl.debug_barrier()
        offs_k = tl.arange(0, BLOCK_K)
        ranked = tl.load(candidates + offs_k, mask=offs_k < K, other=NOTHING)
        ranked = tl.sort(ranked, descending=True)
        tl.store(values_ptr + row * K + offs_k, value_of(ranked, values_ptr.dtype.element_ty), mask=offs_k < K)
        tl.store(indices_ptr + row * K + offs_k, index_of(ranked), mask=offs_k < K)


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    features: Tensor | None,
    plan: EncodePlan,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """values (B, k) in the dtype of x and indices (B, k) int64, strongest first, ties to the lower index.

    x (B, D); W_enc (M, D) and b_enc (M), multiplied in the dtype of x; features int64 ascending or None: only these
    compete. scale (M) or None: features are ranked by scale * pre-activation, values come without it.
    """
    x = x.contiguous()
    M = len(W_enc) if features is None else len(features)
    values = x.new_empty(len(x), k)
    indices = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    if len(x) == 0:
        return values, indices
    blocks = plan.width // plan.columns
    y = x.new_empty(blocks, plan.rows, plan.columns)
    if scale is not None:
        scale = scale.to(x.dtype)
    b_enc = b_enc.to(x.dtype)
    bias, ranking = (None if t is None else _padded(t, features, plan.width) for t in (b_enc, scale))
    # Our product takes the maxima itself, before anything could be scaled.
    ours = plan.gemm == "triton" and scale is None
    if ours:
        y[:, :, M:] = 0  # not positive: never among the largest
    for start in range(0, len(x), plan.rows):
        chunk = slice(start, min(start + plan.rows, len(x)))
        n = len(x[chunk])
        pre, maxima = y.view(-1)[: n * plan.width].view(blocks, n, plan.columns), None
        if ours:
            maxima = encode_gemm(x[chunk], W_enc, b_enc, pre[0], plan.group)
        else:
            _multiply(x[chunk], W_enc, bias, features, pre)
        if ranking is not None:
            pre *= ranking.view(blocks, 1, -1)
        _select(pre, maxima, M, k, plan, values[chunk], indices[chunk])
    if features is not None:
        indices = features[indices]
    if scale is not None:
        values = torch.where(values == 0, values, values / scale[indices])
    return values, indices


def _padded(t: Tensor, features: Tensor | None, width: int) -> Tensor:
    """A number for each column of the pre-activations, from one for each feature: (width,), 0 past the end."""
    t = t if features is None else t[features]
    return t if len(t) == width else torch.nn.functional.pad(t, (0, width - len(t)))


def _multiply(x: Tensor, W_enc: Tensor, bias: Tensor, features: Tensor | None, y: Tensor) -> None:
    """Fill y [blocks, R, columns], which is contiguous: cuBLAS then adds the bias on the way. Pads become 0."""
    M, columns = len(W_enc) if features is None else len(features), y.shape[2]
    copy = None
    for number, (block, b) in enumerate(zip(y, bias.split(columns), strict=True)):
        some = slice(number * columns, min((number + 1) * columns, M))
        W = W_enc[some] if features is None else W_enc[features[some]]
        if len(W) < columns or W.dtype != x.dtype:
            copy = x.new_empty(columns, x.shape[1]) if copy is None else copy
            copy[: len(W)] = W
            copy[len(W) :] = 0
            W = copy
        torch.addmm(b, x, W.T, out=block)


def _select(
    y: Tensor, maxima: Tensor | None, M: int, k: int, plan: EncodePlan, values: Tensor, indices: Tensor
) -> None:
    """The k largest of the first M of each row of y [blocks, R, columns] into values and indices."""
    rows, itemsize = y.shape[1], y.element_size()
    if plan.select == "topk":
        _select_by_topk(y.transpose(0, 1).reshape(rows, -1)[:, :M], k, values, indices)
        return
    n_bits = 8 * itemsize - 1
    block_k = power_of_two(k)
    max_candidates = block_k * (4 if block_k <= 256 else 2)
    candidates = torch.empty(rows, max_candidates, dtype=torch.int64, device=y.device)
    layout = {"y_ptr": y, "R": rows, "COLUMNS": 0 if len(y) == 1 else plan.columns}
    if plan.select == "groups":
        NG, key_dtype = plan.width // plan.group, torch.int16 if itemsize == 2 else torch.int32
        if maxima is None:
            maxima = torch.empty(rows, NG, dtype=key_dtype, device=y.device)
            block_g = max(1, min(power_of_two(NG), 4096 // plan.group))
            launch(
                groupmax_kernel,
                (rows, triton.cdiv(NG, block_g)),
                {**layout, "maxima_ptr": maxima, "NG": NG, "GROUP": plan.group, "BLOCK_G": block_g},
                num_warps=4,
                bytes_moved=rows * (plan.width + NG) * itemsize,
            )
        count = torch.empty(rows, dtype=torch.int32, device=y.device)
        max_groups = 2 * block_k
        launch(
            select_kernel,
            (rows,),
            {
                **layout,
                "maxima_ptr": maxima,
                "groups_ptr": torch.empty(rows, max_groups, dtype=torch.int32, device=y.device),
                "candidates_ptr": candidates,
                "count_ptr": count,
                "values_ptr": values,
                "indices_ptr": indices,
                "NG": NG,
                "K": k,
                "GROUP": plan.group,
                "N_BITS": n_bits,
                "MAX_GROUPS": max_groups,
                "MAX_CANDIDATES": max_candidates,
                "BLOCK_NG": power_of_two(NG),
                "BLOCK_G": max(1, 1024 // plan.group),
            },
            num_warps=8 if max_candidates > 1024 or NG > 2048 else 4,
            bytes_moved=rows * (NG * itemsize + k * (plan.group * itemsize + 4 + 2 * 8 + itemsize + 8)),
        )
    else:
        count = torch.full((rows,), -1, dtype=torch.int32, device=y.device)
    launch(
        select_slow_kernel,
        (rows,),
        {
            **layout,
            "candidates_ptr": candidates,
            "count_ptr": count,
            "values_ptr": values,
            "indices_ptr": indices,
            "M": M,
            "width": plan.width,
            "K": k,
            "N_BITS": n_bits,
            "MAX_CANDIDATES": max_candidates,
            "BLOCK_K": block_k,
            # Where rows lie in several blocks, more would not fit into registers.
            "BLOCK_M": min(max(power_of_two(M), 1024), 4096 if len(y) == 1 else 2048),
        },
        num_warps=8,
        # Nothing but the counts where no row is left; else a row's pre-activations once per bit.
        bytes_moved=rows * 4 if plan.select == "groups" else rows * ((n_bits + 1) * plan.width + k * 13) * itemsize,
    )


def _select_by_topk(y: Tensor, k: int, values: Tensor, indices: Tensor) -> None:
    narrow = torch.int16 if y.element_size() == 2 else torch.int32
    bits = y.view(narrow).to(torch.int64) & (0x7FFF if narrow == torch.int16 else 0x7FFFFFFF)
    key = torch.where((y > 0) | y.isnan(), bits, 0)
    ranked = (key << 32) + (0xFFFFFFFF - torch.arange(y.shape[1], device=y.device))
    ranked = ranked.topk(k, dim=1, sorted=True).values
    values.copy_((ranked >> 32).to(narrow).view(y.dtype))
    indices.copy_(0xFFFFFFFF - (ranked & 0xFFFFFFFF))
