"""Offsets past 2^31: tensors of more numbers than a 32-bit integer counts, looked at on sampled rows and features."""

import importlib
from dataclasses import dataclass

import torch
from helpers import assert_matches
from torch import Tensor

from benchmarks.gpu.exact import check_encode
from benchmarks.gpu.stage import Stage
from benchmarks.outcomes import Missing
from benchmarks.place import Place, place
from fastsae import ops
from fastsae.backends import reference

DTYPE = torch.bfloat16
SAMPLES = 12


@dataclass(frozen=True)
class Large:
    """A shape, and which of its products passes 2^31."""

    name: str
    B: int
    D: int
    M: int
    K: int
    past: tuple[str, ...]


SHAPES = [
    Large("M * D and B * M past 2^31", B=4096, D=4096, M=600_000, K=32, past=("MD", "BM")),
    Large("B * D past 2^31", B=600_000, D=4096, M=4096, K=8, past=("BD", "BM")),
]
SMOKE = [Large("many features, tiny", B=6, D=16, M=500, K=4, past=())]


def run(stage: Stage) -> None:
    where = place(stage.smoke)
    for shape in SMOKE if stage.smoke else SHAPES:
        for joint in (False, True):
            name = f"{'joint' if joint else 'topk'}, {shape.name}"
            stage.attempt(name, lambda s=shape, j=joint: check_at_once(s, j, where), limit=60, needs=10)


def check_at_once(shape: Large, joint: bool, where: Place) -> dict[str, object]:
    """With all pre-activations in one chunk: in chunks of the usual size no offset into them would pass 2^31."""
    if where.backend != "cuda":
        return check(shape, joint, where)
    cuda = importlib.import_module("fastsae.backends.cuda")
    cuda.set_pre_activation_bytes(2 * shape.B * (shape.M + 4096))
    try:
        return check(shape, joint, where)
    finally:
        cuda.set_pre_activation_bytes(None)


def check(shape: Large, joint: bool, where: Place) -> dict[str, object]:
    """Encode, decode and all their gradients in bf16."""
    sizes = {"B": shape.B, "D": shape.D, "M": shape.M}
    for a, b in shape.past:
        if sizes[a] * sizes[b] <= 2**31:
            raise ValueError(f"{shape.name}: {a} * {b} = {sizes[a] * sizes[b]} is not past 2^31")
    matrices = 3 if joint else 2
    needed = int(2 * (2 * matrices * shape.M * shape.D + 5 * shape.B * shape.D + shape.B * shape.M) * 1.2)
    if where.free_bytes() < needed:
        raise Missing(f"needs {needed / 2**30:.0f} GiB, {where.free_bytes() / 2**30:.0f} are free")
    g = where.generator(0)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=g, device=where.device, dtype=DTYPE).mul_(scale).requires_grad_()

    x, W_enc, b_enc = random(shape.B, shape.D), random(shape.M, shape.D, scale=shape.D**-0.5), random(shape.M)
    W_dec = random(shape.M, shape.D)
    W_lin, V = (random(shape.M, shape.D), random(shape.M, 48)) if joint else (None, None)
    N = shape.K // 2
    values, indices = ops.topk_encode(x, W_enc, b_enc, shape.K, backend=where.backend)
    code = values.detach().requires_grad_()
    out, z = ops.joint_decode(code, indices, W_dec, W_lin, V, N, backend=where.backend)
    # The pattern of a gradient that autograd broadcasts costs no memory, and is no less a test of offsets.
    g_out = random(1, shape.D).detach().expand_as(out)
    g_z = torch.ones_like(z)
    leaves = [t for t in (code, W_dec, W_lin, V) if t is not None]
    d_code, *d_weights = torch.autograd.grad([out, z] if joint else [out], leaves, [g_out, g_z] if joint else [g_out])
    rows = _sample(shape.B, where)
    features = torch.unique(indices[rows].flatten())
    features = torch.cat([features[:SAMPLES], features[-SAMPLES:]])
    with torch.no_grad():
        error = check_encode(x[rows], W_enc, b_enc, values[rows], indices[rows])
        _check_rows(shape, N, values, indices, (W_dec, W_lin, V), rows, (out, z), (g_out, g_z), d_code)
        names = [n for n, t in (("W_dec", W_dec), ("W_lin", W_lin), ("V", V)) if t is not None]
        if "V" in names:  # its gradient needs s of every row of a feature; W_dec and W_lin show the offsets
            names.remove("V")
        for name, grad in zip(names, d_weights, strict=False):
            a = values if name == "W_dec" else values[:, :N]
            _check_features(f"gradient of {name}", a, indices[:, : a.shape[1]], g_out, features, grad)
    del out, z, d_code, d_weights, W_dec, W_lin, V
    d_x, d_W = torch.autograd.grad(values, [x, W_enc], d_values := torch.ones_like(values))
    with torch.no_grad():
        _check_features("gradient of W_enc", d_values * (values > 0), indices, x, features, d_W)
        exact = (W_enc[indices[rows]].double() * (values[rows] > 0)[..., None]).sum(dim=1)
        eager = (W_enc[indices[rows]] * (values[rows] > 0)[..., None]).sum(dim=1)
        assert_matches("gradient of x", d_x[rows], exact, eager)
    return {"B": shape.B, "D": shape.D, "M": shape.M, "K": shape.K, "value_error": error, "rows": len(rows)}


def _sample(B: int, where: Place) -> Tensor:
    """First, last, and some in between."""
    between = torch.randint(B, (SAMPLES,), generator=where.generator(1), device=where.device)
    return torch.cat([between, torch.tensor([0, B - 1], device=where.device)]).unique()


def _check_rows(
    shape: Large,
    N: int,
    values: Tensor,
    indices: Tensor,
    weights: tuple[Tensor, Tensor | None, Tensor | None],
    rows: Tensor,
    got: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
    d_code: Tensor,
) -> None:
    """The decoder's outputs and the gradient of the code, on `rows`, from the weights that these rows use."""
    used, local = torch.unique(indices[rows], return_inverse=True)

    def reconstruct(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        code = values[rows].to(dtype).requires_grad_()
        W_dec, W_lin, V = (None if W is None else W[used].to(dtype) for W in weights)
        with torch.enable_grad():
            out, z = reference.joint_decode(code, local, W_dec, W_lin, V, N)  # type: ignore[arg-type]  # W_dec is there
            loss = (out * gradients[0][rows].to(dtype)).sum() + (z * gradients[1][rows].to(dtype)).sum()
        return out.detach(), z.detach(), torch.autograd.grad(loss, code)[0]

    exact, eager = reconstruct(torch.float64), reconstruct(DTYPE)
    for name, ours, truth, scale in zip(
        ("reconstruction", "z", "gradient of values"),
        (*(t[rows] for t in got), d_code[rows]),
        exact,
        eager,
        strict=True,
    ):
        assert_matches(name, ours, truth, scale)


def _check_features(name: str, a: Tensor, indices: Tensor, g: Tensor, features: Tensor, grad: Tensor) -> None:
    """grad[f] = the sum over entries of feature f of a * g, for some features."""
    for f in features.tolist():
        row, place_in_row = (indices == f).nonzero(as_tuple=True)
        terms = a[row, place_in_row][:, None].double() * g[row].double()
        # In the same dtype: products and sum each rounded once at the least.
        assert_matches(f"{name}, feature {f}", grad[f], terms.sum(dim=0), terms.sum(dim=0).to(grad.dtype), slack=4.0)
