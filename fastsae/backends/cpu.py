"""The fast CPU backend: fp32, fp64 and bf16.

Its rule is to allocate nothing large: pre-activations live in one reused buffer of PRE_ACTIVATION_BYTES, and weight
gradients can be written into buffers that the caller owns. docs/decisions.md says what was measured.
"""

import itertools
import threading
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsae.code import FeatureOrder, feature_order

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
PRE_ACTIVATION_BYTES = 256 * 2**20
# A block of pre-activations this wide is still in cache when its group maxima are taken, and MKL writes it faster.
BLOCK = 1024

Destination = tuple[Tensor, bool]  # a gradient buffer, and whether to add to what it holds

_thread = threading.local()


def _workspace(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of uninitialised memory that the next call with this name and dtype gets again."""
    pool: dict[tuple[str, torch.dtype], Tensor] = _thread.__dict__.setdefault("pool", {})
    size = torch.Size(shape).numel()
    if (name, dtype) not in pool or pool[name, dtype].numel() < size:
        with torch.inference_mode(False):  # memory first used in inference mode must serve training later
            pool[name, dtype] = torch.empty(size, dtype=dtype)
    return pool[name, dtype][:size].view(shape)


# ---- encode ---------------------------------------------------------------------------------------------------------


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, features: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See reference.topk_encode. Holds one chunk of rows of pre-activations at a time."""
    x = x.contiguous()
    d_sae = len(W_enc) if features is None else len(features)
    values = x.new_empty(len(x), k)
    indices = torch.empty(len(x), k, dtype=torch.int64)
    group = _group_size(d_sae, k, x.dtype)
    rows = rows_per_chunk(len(x), d_sae, k, x.dtype)
    for lo in range(0, len(x), rows):
        chunk = slice(lo, lo + rows)
        blocks, maxima = _pre_activations(x[chunk], W_enc, b_enc, features, group)
        values[chunk], indices[chunk] = _select(blocks, maxima, k, group)
    return values, indices if features is None else features[indices]


def rows_per_chunk(rows: int, d_sae: int, k: int, dtype: torch.dtype) -> int:
    """How many rows of pre-activations are held at once."""
    # Without groups the selection ranks every feature, which takes two 8-byte copies beside the pre-activations.
    per_feature = dtype.itemsize if _group_size(d_sae, k, dtype) > 1 else dtype.itemsize + 16
    return max(1, min(rows, PRE_ACTIVATION_BYTES // (per_feature * _padded(d_sae))))


def _padded(d_sae: int) -> int:
    block = _block_width(d_sae)
    return -(-d_sae // block) * block


def _block_width(d_sae: int) -> int:
    return BLOCK if d_sae > BLOCK else -(-d_sae // 64) * 64


def _group_size(d_sae: int, k: int, dtype: torch.dtype) -> int:
    """About twice the square root of d_sae / k: ranking the group maxima then costs what ranking the members does."""
    if dtype == torch.float64 or d_sae < 16 * k:
        return 1
    group = 8
    while group < 64 and group * group * k < 2 * d_sae:
        group *= 2
    return group


def _pre_activations(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, features: Tensor | None, group: int
) -> tuple[Tensor, Tensor]:
    """x @ W_enc.T + b_enc by blocks of features: (n_blocks, B, block), and the maximum of each group of features."""
    rows, d_sae = len(x), len(W_enc) if features is None else len(features)
    width = _block_width(d_sae)
    n_blocks = -(-d_sae // width)
    blocks = _workspace("pre", (n_blocks, rows, width), x.dtype)
    maxima = x.new_empty(rows, n_blocks, width // group)
    for i in range(n_blocks):
        part = slice(i * width, min((i + 1) * width, d_sae))
        weight, bias = (
            (W_enc[part], b_enc[part]) if features is None else (W_enc[features[part]], b_enc[features[part]])
        )
        torch.addmm(bias, x, weight.T, out=blocks[i, :, : len(bias)])
        blocks[i, :, len(bias) :] = -torch.inf  # past d_sae: ranked after every real feature
        torch.amax(blocks[i].view(rows, -1, group), dim=2, out=maxima[:, i])
    return blocks, maxima.view(rows, -1)


def _select(blocks: Tensor, maxima: Tensor, k: int, group: int) -> tuple[Tensor, Tensor]:
    """The k strongest of each row, exactly: rank groups, then the parts of the kept groups, then their features.

    The k groups that come first by (maximum descending, id ascending) hold all k features that come first by
    (value descending, index ascending): before a feature of any other group there are k, one in each of these.
    """
    rows, width = blocks.shape[1:]
    if group == 1:
        return _strongest(blocks.transpose(0, 1).reshape(rows, -1), None, k)
    row = torch.arange(rows).unsqueeze(1)
    candidates, ids = maxima, None
    sizes = (group, 8, 1) if group > 16 else (group, 1)
    for size, part in itertools.pairwise(sizes):
        _, kept = _strongest(candidates, ids, k)
        per_block = width // size
        place = (kept // per_block * rows + row) * per_block + kept % per_block
        members = blocks.view(-1, size).index_select(0, place.view(-1)).view(rows, k * size)
        ids = (kept.unsqueeze(-1) * (size // part) + torch.arange(size // part)).flatten(1)
        candidates = members.view(rows, -1, part).amax(dim=2) if part > 1 else members
    return _strongest(candidates, ids, k)


def _strongest(candidates: Tensor, ids: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of relu(candidates) (rows, c) with their ids, strongest first, ties to the lower id.

    ids (rows, c) int64 below 2**32; None numbers the columns.
    """
    activations = candidates.relu()
    if candidates.dtype == torch.float64:
        values, columns = activations.sort(dim=1, descending=True, stable=True)
        return values[:, :k], columns[:, :k]
    # One int64 key per candidate: the bits of a non-negative float order like the float, the lower half breaks ties.
    # The mask drops the sign of -0.0 and of NaN, so that NaN ranks first and reaches the loss.
    if ids is None:
        ids = torch.arange(candidates.shape[1])
    bits = activations.float().view(torch.int32).bitwise_and_(0x7FFFFFFF)
    keys = bits.to(torch.int64).bitwise_left_shift_(32).add_(0xFFFFFFFF - ids)
    keys = keys.topk(k, dim=1, sorted=True).values
    values = (keys >> 32).to(torch.int32).view(torch.float32).to(candidates.dtype)
    return values, 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def topk_encode_backward(
    d_values: Tensor,
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    W_enc: Tensor,
    need_x: bool,
    need_W: bool,
    out: Destination | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """d_x (B, d_in), d_W_enc (d_sae, d_in), d_b_enc (d_sae); entries of value 0 receive nothing."""
    d_pre = d_values.masked_fill(values <= 0, 0)
    d_x = sparse_decode(d_pre, indices, W_enc) if need_x else None
    d_W_enc = None
    if need_W:
        d_W_enc = _weight_gradient(feature_order(indices, len(W_enc)), d_pre, x, out)
    # bf16 would lose the small terms of a long sum.
    sums = torch.promote_types(x.dtype, torch.float32)
    d_b_enc = torch.zeros(len(W_enc), dtype=sums).index_add_(0, indices.reshape(-1), d_pre.reshape(-1).to(sums))
    return d_x, d_W_enc, d_b_enc.to(x.dtype)


# ---- decode ---------------------------------------------------------------------------------------------------------


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """See reference.sparse_decode."""
    return F.embedding_bag(indices.contiguous(), W_dec, per_sample_weights=values.contiguous(), mode="sum")


def sparse_decode_backward(
    d_out: Tensor,
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    need_W: bool,
    out: Destination | None = None,
) -> tuple[Tensor, Tensor | None]:
    """d_values (B, k), d_W_dec (d_sae, d_in)."""
    d_values = _gathered_dot(d_out, W_dec, indices)
    if not need_W:
        return d_values, None
    return d_values, _weight_gradient(feature_order(indices, len(W_dec)), values, d_out, out)


def pairwise_interaction(values: Tensor, indices: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """See reference.pairwise_interaction. Also returns s (B, E), which the backward needs."""
    s = sparse_decode(values, indices, V)
    q = sparse_decode(values.square(), indices, _squared(V))
    return torch.addcmul(q.neg_(), s, s).div_(2), s


def pairwise_interaction_backward(
    d_z: Tensor, s: Tensor, values: Tensor, indices: Tensor, V: Tensor, out: Destination | None = None
) -> tuple[Tensor, Tensor]:
    """d_values (B, k): t . V_i - a d_z . V_i^2, and d_V (d_sae, E): sum a t - (sum a^2 d_z) V_i, with t = d_z * s."""
    t = d_z * s
    d_values = _gathered_dot(t, V, indices) - values * _gathered_dot(d_z, _squared(V), indices)
    order = feature_order(indices, len(V))
    d_V = _weight_gradient(order, values, t, out)
    square_terms = _workspace("square_terms", tuple(V.shape), V.dtype)
    _weight_gradient(order, values.square(), d_z, (square_terms, False))
    return d_values, d_V.addcmul_(square_terms, V, value=-1)


def joint_decode(
    values: Tensor, indices: Tensor, W_dec: Tensor, W_lin: Tensor | None, V: Tensor | None, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.joint_decode. Also returns s (B, E), which the backward needs."""
    out = sparse_decode(values, indices, W_dec)
    strongest, their_indices = values[:, :n].contiguous(), indices[:, :n].contiguous()
    if W_lin is not None:
        out += sparse_decode(strongest, their_indices, W_lin)
    if V is None:
        return out, out.new_empty(len(out), 0), out.new_empty(len(out), 0)
    return out, *pairwise_interaction(strongest, their_indices, V)


def joint_decode_backward(
    d_out: Tensor,
    d_z: Tensor,
    s: Tensor,
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    W_lin: Tensor | None,
    V: Tensor | None,
    n: int,
    out: tuple[Destination | None, Destination | None, Destination | None] = (None, None, None),
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """d_values (B, k), d_W_dec, d_W_lin (d_sae, d_in), d_V (d_sae, E)."""
    strongest, their_indices = values[:, :n].contiguous(), indices[:, :n].contiguous()
    d_out = d_out.contiguous()
    d_values, d_W_dec = sparse_decode_backward(d_out, values, indices, W_dec, True, out[0])
    d_W_lin = d_V = None
    if W_lin is not None:
        d_strongest, d_W_lin = sparse_decode_backward(d_out, strongest, their_indices, W_lin, True, out[1])
        d_values[:, :n] += d_strongest
    if V is not None:
        d_strongest, d_V = pairwise_interaction_backward(d_z, s, strongest, their_indices, V, out[2])
        d_values[:, :n] += d_strongest
    assert d_W_dec is not None
    return d_values, d_W_dec, d_W_lin, d_V


def _squared(V: Tensor) -> Tensor:
    return torch.mul(V, V, out=_workspace("squared", tuple(V.shape), V.dtype))


def _gathered_dot(rows: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    """rows[b] . weight[indices[b, j]] for every entry: (B, k)."""
    n, k = indices.shape
    if indices.numel() == 0:
        return rows.new_empty(n, k)
    offsets = torch.arange(0, n * k, k)
    bags = torch.arange(n).repeat_interleave(k)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows.contiguous(), weight, indices.reshape(-1).contiguous(), offsets, bags, 0
    ).view(n, k)


def _weight_gradient(order: FeatureOrder, coefficients: Tensor, rows: Tensor, out: Destination | None) -> Tensor:
    """sum over a feature's entries of coefficient * rows[token]: (d_sae, width), in `out` if given."""
    d_sae = len(order.offsets) - 1
    weights = coefficients.reshape(-1)[order.entries]
    rows = rows.contiguous()
    if rows.dtype == torch.bfloat16:  # MKL's sparse product has no bf16; embedding_bag sums it in fp32
        grad = F.embedding_bag(order.tokens, rows, order.offsets[:-1], per_sample_weights=weights, mode="sum")
        if out is None:
            return grad
        buffer, add = out
        return buffer.add_(grad) if add else buffer.copy_(grad)
    buffer, add = out or (rows.new_empty(d_sae, rows.shape[1]), False)
    if weights.numel() == 0:
        return buffer if add else buffer.zero_()
    return torch.addmm(buffer, _csr(order, weights, len(rows)), rows, beta=int(add), out=buffer)


def _csr(order: FeatureOrder, weights: Tensor, n_tokens: int) -> Tensor:
    with warnings.catch_warnings():  # torch announces once per process that CSR tensors are in beta
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            order.offsets, order.tokens, weights, (len(order.offsets) - 1, n_tokens), check_invariants=False
        )
