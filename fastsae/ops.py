"""The operations as torch.library ops with autograd and fakes, and the functions users call.

Each public function checks its arguments, picks a backend, and calls the op (or, for "reference", the specification,
which autograd differentiates by itself). Each op's backward is an op of its own; in graphs built while a claimant is
active (`GradientBuffers`, `AdamInBackward`) weight gradients go where it says, and autograd gets None for them.
Gradients of gradients exist on the reference backend only, and are refused elsewhere; under torch.func and in forward
mode "auto" is the reference. Gradients of many outputs at once are made one by one.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsae import gradients
from fastsae.backends import choose, implementation, reference

__all__ = ["interaction_mlp", "joint_decode", "pairwise_interaction", "reconstruct", "sparse_decode", "topk_encode"]


def _free_namespace() -> str:
    """Find a namespace for the operations: "fastsae", or "fastsae_2" and so on if that is taken.

    It is taken after the module is reloaded or the package imported anew: torch takes a name once, and older graphs and
    compiled code go on with the operations they know.
    """
    names = itertools.chain(["fastsae"], (f"fastsae_{n}" for n in itertools.count(2)))
    return next(name for name in names if not hasattr(getattr(torch.ops, name), "topk_encode"))


_namespace = _free_namespace()
_library = torch.library.Library(_namespace, "FRAGMENT")
_operations = getattr(torch.ops, _namespace)
# Operations live as long as their library, and a reload takes its name away.
_libraries = [*globals().get("_libraries", []), _library]


# ---- public functions -----------------------------------------------------------------------------------------------


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    backend: str = "auto",
    features: Tensor | None = None,
    b_dec: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest of relu((x - b_dec) @ W_enc.T + b_enc) per row, without ever holding all of it.

    x         float (B, d_in)       gets a gradient
    W_enc     float (d_sae, d_in)   gets a gradient
    b_enc     float (d_sae)         gets a gradient
    features  int64 (n,) ascending, optional: only these features compete
    b_dec     float (d_in), optional: subtracted from x; gets a gradient, which costs less than that of x would
    scale     float (d_sae) of 0 or more, optional: features are ranked by scale * relu(...), and those of scale 0
              take no part; values come without it (two roundings more), so nothing depends on it that could have a
              gradient
    Returns values (B, k) in the dtype of x (on the CUDA backend in autocast's, where that is on), indices (B, k) int64:
    strongest first, distinct, ties to the lower index. Rows with fewer than k positive pre-activations are filled with
    entries of value 0, which pass no gradient. NaN ranks first, so it is seen and not lost. Exact and deterministic.
    """
    where = "topk_encode"
    _check_floats(where, x=x, W_enc=W_enc, b_enc=b_enc, b_dec=b_dec, scale=scale)
    _check_shape(where, "W_enc", W_enc, (None, None), "(d_sae, d_in)")
    _check_shape(where, "x", x, (None, W_enc.shape[-1]), "(B, d_in) with d_in of W_enc")
    _check_shape(where, "b_enc", b_enc, (len(W_enc),), "(d_sae,) of W_enc")
    if b_dec is not None:
        _check_shape(where, "b_dec", b_dec, (W_enc.shape[1],), "(d_in,) of W_enc")
    if scale is not None:
        _check_shape(where, "scale", scale, (len(W_enc),), "(d_sae,) of W_enc")
        scale = scale.detach()
    if features is not None:
        _check_strided(where, features=features)
        _check_shape(where, "features", features, (None,), "(n,)")
        if features.dtype != torch.int64:
            raise TypeError(
                f"{where}: features must be int64 indices; got {features.dtype}. For a mask use "
                "mask.nonzero().squeeze(1)."
            )
        if features.device != x.device:
            raise ValueError(f"{where}: x is on {x.device} but features on {features.device}; move them to one device.")
        if features.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere a look would be a wait
            inside = len(features) == 0 or (features[0] >= 0 and features[-1] < len(W_enc))
            if not (inside and (features.diff() > 0).all()):
                raise ValueError(f"{where}: features must be ascending, without repeats, in [0, {len(W_enc)})")
    competing, what = (len(W_enc), "d_sae") if features is None else (len(features), "the number of features")
    if not 1 <= k <= competing:
        raise ValueError(f"{where}: k must be between 1 and {what} = {competing}; got {k}")
    name = choose(backend, x.device, x.dtype)
    if name == "reference":
        return reference.topk_encode(x, W_enc, b_enc, k, features, b_dec, scale)
    compute = _autocast_dtype(backend, x.device, x.dtype)
    return _operations.topk_encode(x, W_enc, b_enc, b_dec, k, features, scale, compute, name)


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor, backend: str = "auto") -> Tensor:
    """identity[b] = sum_j values[b, j] * W_dec[indices[b, j]].

    values   float (B, k)          gets a gradient
    indices  int64 (B, k) in [0, d_sae), which is not checked on a GPU; may repeat within a row
    W_dec    float (d_sae, d_in)   gets a gradient
    Returns (B, d_in). The backward sums over each feature's tokens in one fixed order: the same bits every run.
    """
    name = _choose_for_code("sparse_decode", backend, values, indices, W_dec=W_dec)
    if name == "reference":
        return reference.sparse_decode(values, indices, W_dec)
    return _operations.joint_decode(values, indices, W_dec, None, None, None, None, values.shape[1], name)[0]


def pairwise_interaction(values: Tensor, indices: Tensor, V: Tensor, backend: str = "auto") -> Tensor:
    """z = (s^2 - q) / 2 with s = sum_j a_j V[i_j], q = sum_j (a_j V[i_j])^2: all pairwise products of active features.

    values (B, k) and V (d_sae, E) float, both get gradients; indices (B, k) int64. Returns z (B, E).
    """
    name = _choose_for_code("pairwise_interaction", backend, values, indices, V=V)
    if name == "reference":
        return reference.pairwise_interaction(values, indices, V)
    _, s, q, _ = _operations.joint_decode(values, indices, None, None, V, None, None, values.shape[1], name)
    return pooled(s, q).to(V.dtype)


def joint_decode(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    W_lin: Tensor | None,
    V: Tensor | None,
    n: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """identity + linear sum (B, d_in), and z (B, E), in one pass over the code.

    values (B, k), indices (B, k) int64, strongest first as topk_encode returns them; W_dec and W_lin (d_sae, d_in),
    V (d_sae, E). The linear sum and z see the first n entries only. W_lin = None leaves the linear sum out; V = None
    makes z (B, 0). Biases are the caller's. All float arguments get gradients.
    """
    where = "joint_decode"
    name = _choose_for_code(where, backend, values, indices, W_dec=W_dec, W_lin=W_lin, V=V)
    _check_n(where, n, values)
    if name == "reference":
        return reference.joint_decode(values, indices, W_dec, W_lin, V, n)
    out, s, q, _ = _operations.joint_decode(values, indices, W_dec, W_lin, V, None, None, n, name)
    return out, pooled(s, q).to(W_dec.dtype)


def reconstruct(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    W_lin: Tensor | None,
    V: Tensor | None,
    n: int,
    *,
    bias: Tensor | None = None,
    mlp: tuple[Tensor, Tensor, Tensor] | None = None,
    dropout: float = 0.0,
    target: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The whole decoder and its loss: joint_decode + bias + W2 relu(W1 dropout(z) + b1), and its error against target.

    The first six arguments as in joint_decode. bias (d_in): all biases of the output, summed. mlp: W1 (E, E), b1 (E),
    W2 (d_in, E), given exactly when V is. dropout: share of z dropped; 0 in evaluation. target (B, d_in).
    Returns the reconstruction (B, d_in) and mean((reconstruction - target)^2), 0 without a target, in fp32 if the code
    is narrower. All float tensors get gradients.
    """
    where = "reconstruct"
    name = _choose_for_code(where, backend, values, indices, W_dec=W_dec, W_lin=W_lin, V=V)
    _check_n(where, n, values)
    if (mlp is None) != (V is None):
        raise ValueError(f"{where}: V and mlp belong together; got {'V' if mlp is None else 'mlp'} alone")
    rows, d_in = values.shape[0], W_dec.shape[1]  # len() would fix the number of rows of what is exported
    if not 0 <= dropout < 1:
        raise ValueError(f"{where}: dropout must be in [0, 1); got {dropout}")
    if mlp is not None and V is not None:
        W1, b1, W2 = mlp
        _check_floats(where, W_dec=W_dec, W1=W1, b1=b1, W2=W2)
        E = V.shape[1]
        _check_shape(where, "W1", W1, (E, E), "(E, E) of V")
        _check_shape(where, "b1", b1, (E,), "(E,) of V")
        _check_shape(where, "W2", W2, (d_in, E), "(d_in, E) of W_dec and V")
    _check_floats(where, W_dec=W_dec, bias=bias)
    _check_strided(where, target=target)
    is_float = target is None or (target.is_floating_point() and target.dtype.itemsize > 1)  # no float8
    if target is not None and (target.device != values.device or not is_float):
        raise TypeError(
            f"{where}: target must be a float tensor on {values.device}; got {target.dtype} on {target.device}"
        )
    if bias is not None:
        _check_shape(where, "bias", bias, (d_in,), "(d_in,) of W_dec")
    if target is not None:
        _check_shape(where, "target", target, (rows, d_in), "(B, d_in) of values and W_dec")
    if name != "reference" and mlp is None:
        out, _, _, loss = _operations.joint_decode(values, indices, W_dec, W_lin, V, bias, target, n, name)
        return out, loss
    sums = decode_sums(values, indices, W_dec, W_lin, V, n, name)
    return finish(*sums, bias=bias, mlp=mlp, dropout=dropout, target=target, compute=values.dtype, backend=name)


def interaction_mlp(
    z: Tensor, W1: Tensor, b1: Tensor, W2: Tensor, b2: Tensor | None, dropout: float = 0.0, training: bool = False
) -> Tensor:
    """interaction = W2 relu(W1 dropout(z) + b1) + b2, without b2 where it is None.

    z (B, E), W1 (E, E), b1 (E), W2 (d_in, E), b2 (d_in): float, all get gradients. dropout: share of z dropped in
    training, in [0, 1). Returns (B, d_in).
    """
    where = "interaction_mlp"
    if not 0 <= dropout < 1:
        raise ValueError(f"{where}: dropout must be in [0, 1); got {dropout}")
    _check_floats(where, z=z, W1=W1, b1=b1, W2=W2, b2=b2)
    _check_shape(where, "z", z, (None, None), "(B, E)")
    E = z.shape[1]
    _check_shape(where, "W1", W1, (E, E), "(E, E) of z")
    _check_shape(where, "b1", b1, (E,), "(E,) of z")
    _check_shape(where, "W2", W2, (None, E), "(d_in, E) with E of z")
    if b2 is not None:
        _check_shape(where, "b2", b2, (len(W2),), "(d_in,) of W2")
    return reference.interaction_mlp(z, W1, b1, W2, b2, dropout, training)


# ---- the two halves of reconstruct: sums over entries, which entries of several ranks make together, and the rest ---


def decode_sums(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor | None,
    W_lin: Tensor | None,
    V: Tensor | None,
    n: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """identity + linear sum (B, d_in), and s and q (B, E) of the n first entries. A weight that is None: (B, 0)."""
    name = choose(backend, values.device, values.dtype)
    if name == "reference":
        return reference.decode_sums(values, indices, W_dec, W_lin, V, n)
    return _operations.joint_decode(values, indices, W_dec, W_lin, V, None, None, n, name)[:3]


def finish(
    base: Tensor,
    s: Tensor,
    q: Tensor,
    *,
    bias: Tensor | None,
    mlp: tuple[Tensor, Tensor, Tensor] | None,
    dropout: float,
    target: Tensor | None,
    compute: torch.dtype,
    backend: str,
    drawn: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Turn the sums into the result of reconstruct, which has checked all arguments.

    compute: the dtype of the code. drawn: dropout's random numbers, if they are not to be drawn here: the factors of z,
    (B, E); on the CUDA backend the seed, (1,).
    """
    name = choose(backend, base.device, compute)
    if name == "cuda" and mlp is not None:
        if bias is None:
            bias = base.new_zeros(base.shape[1])
        if dropout and drawn is None:
            # Drawn on the device: the mask follows torch's generator there, and nobody waits for it.
            drawn = torch.randint(2**31 - 1, (1,), device=base.device)
        return _operations.integrate(base, s, q, *mlp, bias, target, drawn, dropout, compute, name)
    out = base if bias is None else base + bias
    if mlp is not None:
        W1, b1, W2 = mlp
        z = pooled(s, q).to(W1.dtype)
        if drawn is not None:
            z, dropout = z * drawn, 0.0
        out = out + reference.interaction_mlp(z, W1, b1, W2, None, dropout, training=True)
    if target is None:
        return out, out.new_zeros((), dtype=torch.promote_types(out.dtype, torch.float32))
    narrow = name != "reference" and out.dtype.itemsize < 4
    return out, _SquaredError.apply(out, target) if narrow else reference.squared_error(out, target)


def pooled(s: Tensor, q: Tensor) -> Tensor:
    """z, from the sums."""
    return (s.square() - q) / 2


# ---- topk_encode ----------------------------------------------------------------------------------------------------

_library.define(
    "topk_encode(Tensor x, Tensor W_enc, Tensor b_enc, Tensor? b_dec, int k, Tensor? features, Tensor? scale, "
    "ScalarType compute, str backend) -> (Tensor, Tensor)"
)
_library.define(
    "topk_encode_backward(Tensor d_values, Tensor values, Tensor indices, Tensor x, Tensor W_enc, Tensor? b_dec, "
    "bool need_x, bool need_W, bool need_b_dec, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    k: int,
    features: Tensor | None,
    scale: Tensor | None,
    compute: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return implementation(backend).topk_encode(_centred(x, b_dec, compute), W_enc, b_enc, k, features, scale)


def _topk_encode_backward(
    d_values: Tensor,
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    W_enc: Tensor,
    b_dec: Tensor | None,
    need_x: bool,
    need_W: bool,
    need_b_dec: bool,
    backend: str,
    out: Any = None,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    rows = _centred(x, b_dec, values.dtype)
    backward = implementation(backend).topk_encode_backward
    d_x, *others = backward(d_values, values, indices, rows, W_enc, need_x, need_W, need_b_dec, out)
    return d_x if d_x is None else d_x.to(x.dtype), *others


def _centred(x: Tensor, b_dec: Tensor | None, compute: torch.dtype) -> Tensor:
    """Form the encoder's input, x - b_dec in dtype `compute`. The backward forms it again: cheaper than keeping it."""
    return (x if b_dec is None else x - b_dec).to(compute)


def _topk_encode_fake(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    k: int,
    features: Tensor | None,
    scale: Tensor | None,
    compute: torch.dtype,
    backend: str,
) -> Any:
    return x.new_empty(x.shape[0], k, dtype=compute), x.new_empty(x.shape[0], k, dtype=torch.int64)


def _topk_encode_save(ctx: Any, inputs: Any, output: Any) -> None:
    x, W_enc, _, b_dec, _, _, _, _, ctx.backend = inputs
    values, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(values, indices, x, W_enc, b_dec)


def _topk_encode_grad(ctx: Any, saved: Any, d_values: Tensor, d_indices: Any) -> Any:
    values, indices, x, W_enc, b_dec = saved
    need_x, need_W, _, need_b_dec = _needs(ctx)[:4]
    arguments = (d_values, values, indices, x, W_enc, b_dec, need_x, need_W, need_b_dec, ctx.backend)
    out = _claim(ctx, 1) if need_W else None
    grads = topk_encode_backward(*arguments) if out is None else _topk_encode_backward(*arguments, out)
    return *grads, None, None, None, None, None


def topk_encode_backward(
    d_values: Tensor,
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    W_enc: Tensor,
    b_dec: Tensor | None,
    need_x: bool,
    need_W: bool,
    need_b_dec: bool,
    backend: str,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, W_enc, b_enc and b_dec on a fast backend; entries of value 0 or less receive none."""
    grads = _operations.topk_encode_backward(
        d_values, values, indices, x, W_enc, b_dec, need_x, need_W, need_b_dec, backend
    )
    return _without_fillers(grads, (need_x, need_W, True, need_b_dec))


def _topk_encode_backward_fake(
    d_values: Tensor,
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    W_enc: Tensor,
    b_dec: Tensor | None,
    need_x: bool,
    need_W: bool,
    need_b_dec: bool,
    backend: str,
) -> Any:
    d_x = x.new_empty(x.shape) if need_x else None
    d_W = W_enc.new_empty(W_enc.shape) if need_W else None
    d_b_dec = W_enc.new_empty(W_enc.shape[1]) if need_b_dec else None
    return d_x, d_W, W_enc.new_empty(W_enc.shape[0]), d_b_dec


# ---- joint_decode ---------------------------------------------------------------------------------------------------
# One op serves sparse_decode, pairwise_interaction and joint_decode: a weight that is None leaves its sum out, (B, 0).

_library.define(
    "joint_decode(Tensor values, Tensor indices, Tensor? W_dec, Tensor? W_lin, Tensor? V, Tensor? bias, "
    "Tensor? target, int n, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "joint_decode_backward(Tensor? d_out, Tensor? d_s, Tensor? d_q, Tensor values, Tensor indices, Tensor? W_dec, "
    "Tensor? W_lin, Tensor? V, int n, bool need_W_dec, bool need_W_lin, bool need_V, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


def _joint_decode_fake(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor | None,
    W_lin: Tensor | None,
    V: Tensor | None,
    bias: Tensor | None,
    target: Tensor | None,
    n: int,
    backend: str,
) -> Any:
    rows, sums = values.shape[0], torch.promote_types(values.dtype, torch.float32)
    out = values.new_empty(rows, 0) if W_dec is None else W_dec.new_empty(rows, W_dec.shape[1])
    width = 0 if V is None else V.shape[1]
    s, q = (values.new_empty(rows, width, dtype=sums) for _ in range(2))
    return out, s, q, values.new_empty((), dtype=sums)


def _joint_decode_save(ctx: Any, inputs: Any, output: Any) -> None:
    values, indices, W_dec, W_lin, V, _, target, ctx.n, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    out = output[0] if target is not None else None
    ctx.save_for_backward(values, indices, W_dec, W_lin, V, target, out)


def _joint_decode_grad(
    ctx: Any, saved: Any, d_out: Tensor | None, d_s: Tensor | None, d_q: Tensor | None, d_loss: Any
) -> Any:
    values, indices, W_dec, W_lin, V, target, out = saved
    needs = _needs(ctx)
    d_out, d_target = _with_loss(d_out, d_loss, out, target, needs[6])
    if d_out is None and d_s is None and d_q is None:
        return (None,) * 9
    d_bias = None if d_out is None or not needs[5] else d_out.sum(dim=0)
    need_W_dec, need_W_lin, need_V = needs[2:5]
    # What the loss does not reach gets no gradient, rather than one of zeros that moves Adam.
    reached, paired = d_out is not None, d_s is not None or d_q is not None
    need = (need_W_dec and reached, need_W_lin and reached, need_V and paired)
    if d_out is not None:
        d_out = d_out.to(values.dtype)  # under autocast the rows that are gathered are narrower than the weights
    arguments = (d_out, d_s, d_q, values, indices, W_dec, W_lin, V, ctx.n, *need)
    out_of = tuple(_claim(ctx, i) if needed else None for i, needed in zip((2, 3, 4), need, strict=True))
    if any(claim is not None for claim in out_of):
        d_values, *d_weights = implementation(ctx.backend).joint_decode_backward(*arguments, out_of)
    else:
        grads = _operations.joint_decode_backward(*arguments, ctx.backend)
        d_values, *d_weights = _without_fillers(grads, (True, *need))
    return d_values, None, *d_weights, d_bias, d_target, None, None


def _joint_decode_backward_fake(
    d_out: Tensor | None,
    d_s: Tensor | None,
    d_q: Tensor | None,
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor | None,
    W_lin: Tensor | None,
    V: Tensor | None,
    n: int,
    need_W_dec: bool,
    need_W_lin: bool,
    need_V: bool,
    backend: str,
) -> Any:
    weights = zip((W_dec, W_lin, V), (need_W_dec, need_W_lin, need_V), strict=True)
    return values.new_empty(values.shape), *(
        w.new_empty(w.shape) if w is not None and needed else None for w, needed in weights
    )


# ---- integrate (CUDA) -----------------------------------------------------------------------------------------------
# base + W2 relu(W1 dropout((s^2 - q) / 2) + b1) + bias and its loss, computed in `compute`. On other backends plain
# PyTorch does the same.

_library.define(
    "integrate(Tensor base, Tensor s, Tensor q, Tensor W1, Tensor b1, Tensor W2, Tensor bias, Tensor? target, "
    "Tensor? seed, float dropout, ScalarType compute, str backend) -> (Tensor, Tensor)"
)
_library.define(
    "integrate_backward(Tensor d_out, Tensor s, Tensor q, Tensor W1, Tensor b1, Tensor W2, Tensor? seed, "
    "float dropout, ScalarType compute, bool need_weights, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _integrate_fake(
    base: Tensor,
    s: Tensor,
    q: Tensor,
    W1: Tensor,
    b1: Tensor,
    W2: Tensor,
    bias: Tensor,
    target: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    compute: torch.dtype,
    backend: str,
) -> Any:
    return base.new_empty(base.shape), base.new_empty((), dtype=torch.float32)


def _integrate_save(ctx: Any, inputs: Any, output: Any) -> None:
    _, s, q, W1, b1, W2, _, target, seed, ctx.dropout, ctx.compute, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(s, q, W1, b1, W2, seed, target, output[0] if target is not None else None)


def _integrate_grad(ctx: Any, saved: Any, d_out: Tensor | None, d_loss: Tensor | None) -> Any:
    s, q, W1, b1, W2, seed, target, out = saved
    needs = _needs(ctx)
    d_out, d_target = _with_loss(d_out, d_loss, out, target, needs[7])
    if d_out is None:
        return (None,) * 12
    need_weights = any(needs[3:7])
    grads = _operations.integrate_backward(
        d_out, s, q, W1, b1, W2, seed, ctx.dropout, ctx.compute, need_weights, ctx.backend
    )
    d_s, d_q, *d_weights = _without_fillers(grads, (True, True) + 4 * (need_weights,))
    return d_out, d_s, d_q, *d_weights, d_target, None, None, None, None


def _integrate_backward_fake(
    d_out: Tensor,
    s: Tensor,
    q: Tensor,
    W1: Tensor,
    b1: Tensor,
    W2: Tensor,
    seed: Tensor | None,
    dropout: float,
    compute: torch.dtype,
    need_weights: bool,
    backend: str,
) -> Any:
    shapes = (W1.shape, b1.shape, W2.shape, W2.shape[:1])
    d_weights = (W1.new_empty(shape) if need_weights else None for shape in shapes)
    return s.new_empty(s.shape), q.new_empty(q.shape), *d_weights


# ---- what both decoders' gradients share ----------------------------------------------------------------------------


def _with_loss(
    d_out: Tensor | None, d_loss: Tensor | None, out: Tensor | None, target: Tensor | None, need_target: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of the output with that of loss = mean((out - target)^2) added, and that of the target."""
    if d_loss is None or out is None or target is None:
        return d_out, None
    # In fp32: fp16 holds neither 2 / numel nor a loss's scale of 65536. One-dimensional, since a number without
    # dimensions would be rounded to what it multiplies.
    scale = (2 * d_loss / out.numel()).view(1)
    of_loss = torch.sub(out, target, out=torch.empty_like(out))
    of_loss = (of_loss * scale).to(out.dtype) if _is_batched(d_loss) else of_loss.mul_(scale)
    return of_loss if d_out is None else d_out + of_loss, -of_loss if need_target else None


def _is_batched(t: Tensor) -> bool:
    """Whether t stands for many tensors, by which nothing can be multiplied in place."""
    functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
    return functorch.is_batchedtensor(t) or functorch.is_legacy_batchedtensor(t)


_ADVICE = (
    "fastsae: the gradients of the fast backends cannot be differentiated again. Make the SAE, or call the operation, "
    "with backend='reference'."
)


class _Refused(torch.autograd.Function):
    """Gradients as they are, which cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, n: int, *tensors: Any) -> Any:
        return tensors[:n]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(_ADVICE)


def _once(grad: Any) -> Any:
    """A backward that is written by hand, made to refuse gradients of its gradients: PyTorch would take them for 0.

    It is given what was saved, which checkpointing lets nobody unpack twice.
    """

    @functools.wraps(grad)
    def backward(ctx: Any, *d_outputs: Any) -> Any:
        saved = ctx.saved_tensors
        with torch.no_grad():
            found = grad(ctx, saved, *d_outputs)
        if not torch.is_grad_enabled():
            return found
        found = found if isinstance(found, tuple) else (found,)
        sources = [t for t in (*d_outputs, *saved) if t is not None and t.requires_grad]
        if sources and any(_is_batched(d) for d in d_outputs if d is not None):
            raise RuntimeError(_ADVICE)  # now: of many gradients at once, torch would record nothing, or refuse to
        return _Refused.apply(len(found), *found, *sources) if sources else found

    return backward


class _SquaredError(torch.autograd.Function):
    """reference.squared_error of narrow tensors, of which autograd would keep copies in fp32."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(out, target)
        return reference.squared_error(out, target)

    @staticmethod
    @_once
    def backward(ctx: Any, saved: Any, *d_loss: Any) -> Any:
        out, target = saved
        return _with_loss(None, d_loss[0], out, target, ctx.needs_input_grad[1])


# ---- registration ---------------------------------------------------------------------------------------------------


def _dispatch(op: str) -> Any:
    """Every op's last argument names the backend, whose function of the same name takes the rest."""
    return lambda *arguments: getattr(implementation(arguments[-1]), op)(*arguments[:-1])


def _with_fillers(function: Any) -> Any:
    """A backward that returns tensors alone, as torch needs them to run it for many gradients at once."""

    def backward(*arguments: Any) -> Any:
        grads = function(*arguments)
        filler = next(g for g in grads if g is not None)
        return tuple(filler.new_empty(0) if g is None else g for g in grads)

    return backward


def _without_fillers(grads: Any, needs: Any) -> tuple[Tensor | None, ...]:
    return tuple(g if needed else None for g, needed in zip(grads, needs, strict=True))


def _one_by_one(op: str) -> Any:
    """The rule for many gradients at once in torch.func.vmap. is_grads_batched and jacobian(vectorize=True) have such a
    loop of their own."""

    def rule(info: Any, in_dims: Any, *arguments: Any) -> Any:
        given = list(zip(arguments, in_dims, strict=True))
        each = [
            getattr(_operations, op)(*(a if dim is None else a.select(dim, i) for a, dim in given))
            for i in range(info.batch_size)
        ]
        found = tuple(torch.stack(grads) for grads in zip(*each, strict=True))
        return found, (0,) * len(found)

    return rule


def _noting(save: Any) -> Any:
    """Extend `save`: also keep for the backward the step the forward is part of and the places of its tensor inputs."""

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.step = gradients.active()
        ctx.tensors = [i for i, t in enumerate(inputs) if isinstance(t, Tensor)]
        save(ctx, inputs, output)

    return setup_context


def _register(name: str, implementations: Any, fakes: Any, save: Any, grad: Any) -> None:
    backward = f"{name}_backward"
    functions = implementations[0], _with_fillers(implementations[1])
    fakes = fakes[0], _with_fillers(fakes[1])
    for op, function, fake in zip((name, backward), functions, fakes, strict=True):
        _library.impl(op, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{_namespace}::{op}", fake, lib=_library)
    torch.library.register_autograd(f"{_namespace}::{name}", _once(grad), setup_context=_noting(save), lib=_library)
    torch.library.register_vmap(f"{_namespace}::{backward}", _one_by_one(backward), lib=_library)


_register(
    "topk_encode",
    (_topk_encode, _topk_encode_backward),
    (_topk_encode_fake, _topk_encode_backward_fake),
    _topk_encode_save,
    _topk_encode_grad,
)
_register(
    "joint_decode",
    (_dispatch("joint_decode"), _dispatch("joint_decode_backward")),
    (_joint_decode_fake, _joint_decode_backward_fake),
    _joint_decode_save,
    _joint_decode_grad,
)
_register(
    "integrate",
    (_dispatch("integrate"), _dispatch("integrate_backward")),
    (_integrate_fake, _integrate_backward_fake),
    _integrate_save,
    _integrate_grad,
)


def _needs(ctx: Any) -> Sequence[bool]:
    """Say for each input whether it needs a gradient: not if torch.autograd.grad was not asked for it."""
    needs = list(ctx.needs_input_grad)
    if not torch.compiler.is_compiling():
        for i, (node, _) in zip(ctx.tensors, ctx.next_functions, strict=True):
            needs[i] = gradients.fate(node) is not gradients.Fate.DROPPED
    return needs


def _claim(ctx: Any, i: int) -> Any:
    """Ask the step for the destination of the gradient of input i, a weight; None: return it to autograd."""
    if ctx.step is None or torch.compiler.is_compiling():  # a weight that is being traced is not the parameter
        return None
    return ctx.step.claim(ctx.next_functions[ctx.tensors.index(i)][0], ctx.backend)


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check_strided(where: str, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and (not isinstance(t, Tensor) or t.layout != torch.strided):
            got = t.layout if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{where}: {name} must be a tensor with strides; got {got}")


def _check_floats(where: str, **tensors: Tensor | None) -> None:
    _check_strided(where, **tensors)
    given = {name: t for name, t in tensors.items() if t is not None}
    first_name, first = next(iter(given.items()))
    for name, t in given.items():
        if not t.is_floating_point():
            raise TypeError(f"{where}: {name} must be a float tensor; got {t.dtype}. Convert it with .float().")
        if t.device.type == "meta":
            raise TypeError(
                f"{where}: {name} is on the meta device and holds no numbers; materialise it with .to_empty()."
            )
        if t.device != first.device:
            raise ValueError(
                f"{where}: {first_name} is on {first.device} but {name} on {t.device}; move them to one device."
            )
        if t.dtype != first.dtype:
            raise TypeError(
                f"{where}: {first_name} is {first.dtype} but {name} is {t.dtype}; convert one of them with .to()."
            )


def _check_shape(where: str, name: str, tensor: Tensor, expected: tuple[int | None, ...], meaning: str) -> None:
    fits = len(tensor.shape) == len(expected) and all(
        e is None or e == s for e, s in zip(expected, tensor.shape, strict=True)
    )
    if not fits:
        shape = ", ".join("*" if e is None else str(e) for e in expected)
        raise ValueError(f"{where}: {name} must have shape ({shape}), {meaning}; got {tuple(tensor.shape)}")


def _check_n(where: str, n: int, values: Tensor) -> None:
    if not 1 <= n <= values.shape[1]:
        raise ValueError(f"{where}: n must be between 1 and k = {values.shape[1]}; got {n}")


def _choose_for_code(where: str, backend: str, values: Tensor, indices: Tensor, **weights: Tensor | None) -> str:
    """Check a code and the weights it is decoded with, and choose the backend."""
    _check_strided(where, values=values, indices=indices, **weights)
    if values.dim() != 2 or values.shape != indices.shape:
        raise ValueError(
            f"{where}: values and indices must both be (B, k); got {tuple(values.shape)} and {tuple(indices.shape)}. "
            "Pass the pair that topk_encode returns."
        )
    if indices.dtype != torch.int64 or indices.device != values.device:
        raise TypeError(f"{where}: indices must be int64 on {values.device}; got {indices.dtype} on {indices.device}")
    given = {name: t for name, t in weights.items() if t is not None}
    first = next(iter(given.values()))
    # Under autocast the code comes in the narrower dtype, and the CUDA kernels read weights as they are.
    narrow = values.dtype != first.dtype and _autocast_dtype(backend, values.device, first.dtype) == values.dtype
    _check_floats(where, **({} if narrow else {"values": values}), **given)
    for name, weight in given.items():
        if name == "W_lin":
            _check_shape(where, name, weight, tuple(first.shape), "that of W_dec")
        elif name == "V":
            d_sae = None if first is weight else len(first)
            _check_shape(where, name, weight, (d_sae, None), "(d_sae, E)" + (" with d_sae of W_dec" if d_sae else ""))
        else:
            _check_shape(where, name, weight, (None, None), "(d_sae, d_in)")
    return choose(backend, values.device, values.dtype)


def _autocast_dtype(backend: str, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Choose the dtype in which operands are computed: autocast's for fp32, if it is on and the CUDA backend serves."""
    on = dtype == torch.float32 and torch.is_autocast_enabled(device.type)
    if not on or choose(backend, device, dtype) != "cuda":
        return dtype
    return torch.get_autocast_dtype(device.type)
