"""Is it the same step? Each provider's reconstruction, gradients and update beside the specification's in fp64.

Nothing is timed before it is compared here, with the very dictionary that it is timed with.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Shape
from benchmarks.latest import Latest
from benchmarks.outcomes import WrongAnswer
from benchmarks.place import Place
from benchmarks.providers.base import Candidate, Provider, batch, weights
from benchmarks.timing import wall
from fastsae.backends import reference

# Of the norm: an fp32 product over some thousand terms errs by 1e-6, one wrong row in 2048 by 1e-2.
TOLERANCE = 1e-5
# In bf16 another choice of features is no mistake, so errors are measured in those of plain PyTorch in bf16.
SLACK, FLOOR = 2.0, 1e-3
# Entries of a (rows, K, D) tensor held at once: what stays in a cache, or keeps a GPU at work.
_ENTRIES = {"cpu": 2**21, "cuda": 2**25}
EPS = 1e-8  # Adam's
# Of a first update with that of Adam on the true gradients: roundings turn the signs of a few that are nearly zero.
COSINE = 0.95


@dataclass(frozen=True)
class Truth:
    """Results of the specification in fp64, without dropout."""

    x: Tensor
    reconstruction: Tensor
    gradients: dict[str, Tensor]
    """Gradients of the mean squared error, under fastsae's names."""


@Latest
def truth(shape: Shape, place: Place, joint: bool, without: tuple[str, ...] = ()) -> Truth:
    """The truth for one batch. The last one is kept: candidates of one shape and architecture come together.

    without: gradients left out, where there is no memory for them.
    """
    x, indices = _selected(shape, place, joint)
    w = weights(shape, place, joint)
    gradients = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in w.items() if name not in without}
    parts = []
    rows = max(1, _ENTRIES[place.device.type] // (shape.K * shape.D))
    for some, active in zip(x.double().split(rows), indices.split(rows), strict=True):
        # The specification on a dictionary of the active rows alone: nothing (B, d_sae) is differentiated.
        flat = active.flatten()
        local = {name: (t[flat] if name in DICTIONARIES else t).double().requires_grad_() for name, t in w.items()}
        out = _specified(local, some, shape)
        parts.append(out.detach())
        ((out - some).square().sum() / x.numel()).backward()
        for name, gradient in gradients.items():
            if name in DICTIONARIES:
                gradient.index_add_(0, flat, local[name].grad)  # type: ignore[arg-type]
            else:
                gradient += local[name].grad  # type: ignore[operator]
    return Truth(x, torch.cat(parts), {name: t.float() for name, t in gradients.items()})


DICTIONARIES = ("W_enc", "b_enc", "W_dec", "W_lin", "V")


def _specified(w: dict[str, Tensor], x: Tensor, shape: Shape) -> Tensor:
    """The reconstruction; row b's active features are rows b K to (b + 1) K of the dictionaries in `w`."""
    indices = torch.arange(len(x) * shape.K, device=x.device).view(len(x), shape.K)
    inputs = x - w["b_dec"] if "b_dec" in w else x
    values = torch.relu((inputs.unsqueeze(1) * w["W_enc"][indices]).sum(dim=2) + w["b_enc"][indices])
    out, z = reference.joint_decode(values, indices, w["W_dec"], w.get("W_lin"), w.get("V"), shape.N)
    if "W_lin" in w:
        return out + w["b_lin"] + reference.interaction_mlp(z, w["W1"], w["b1"], w["W2"], w["b2"])
    return out + w["b_dec"]


def _selected(shape: Shape, place: Place, joint: bool) -> tuple[Tensor, Tensor]:
    """A batch and its active features in fp64, (B, D) and (B, K), the strongest first.

    Rows where another pre-activation comes so near to the K-th or the N-th that fp32 could take it for larger are drawn
    anew: either choice is right. In bf16 there would be none left.
    """
    w = weights(shape, place, joint)
    parts = list(zip(w["W_enc"].split(8192), w["b_enc"].split(8192), strict=True))
    boundaries = [b - 1 for b in {shape.K, shape.N} if b < shape.M]
    taken: list[tuple[Tensor, Tensor]] = []
    for number in range(1, 100):
        for x in batch(shape, place, -number).split(256):
            inputs = x.double() - w.get("b_dec", 0.0)
            pre = torch.cat([inputs @ W.double().T + b.double() for W, b in parts], dim=1)
            top = pre.topk(min(shape.K + 1, shape.M), dim=1)
            gaps = (top.values[:, :-1] - top.values[:, 1:]) / top.values[:, :1]
            clear = (gaps[:, boundaries] > 1e-5).all(dim=1) | (place.products is not None)
            taken.append((x[clear], top.indices[clear, : shape.K]))
        if sum(len(x) for x, _ in taken) >= shape.B:
            x, indices = (torch.cat(parts)[: shape.B] for parts in zip(*taken, strict=True))
            return x, indices
    raise RuntimeError(f"no batch of {shape.B} rows without near ties at {shape}")


def errors(
    provider: Provider, candidate: Candidate, shape: Shape, place: Place, without: tuple[str, ...] = ()
) -> dict[str, float]:
    """Relative errors (of the norm) of the reconstruction and of each gradient of the provider but those `without`."""
    right = truth(shape, place, candidate.joint, without)
    provider.train(False)
    with torch.no_grad():
        found = {"reconstruction": relative(provider.decode(provider.encode(right.x)), right.reconstruction)}
    provider.optimizer.zero_grad()
    provider.backward(provider.loss(right.x))
    scale = provider.scale(right.x)
    for name, gradient in provider.gradients().items():
        if name not in without:
            found[f"d {name}"] = relative(gradient, right.gradients[name] * scale)
    provider.optimizer.zero_grad()
    provider.train(True)
    return found


def check(
    provider: Provider,
    candidate: Candidate,
    shape: Shape,
    place: Place,
    eager: dict[str, float] | None = None,
    without: tuple[str, ...] = (),
) -> dict[str, float]:
    """The errors. Raises WrongAnswer if one is more than rounding; `eager`: plain PyTorch's, the scale in bf16."""
    found = errors(provider, candidate, shape, place, without)
    defined = truth(shape, place, candidate.joint, without).gradients.keys()
    expected = {f"d {name}" for name in defined - {*provider.used_up, *without}}
    if absent := sorted(expected - set(found)):
        raise WrongAnswer(f"{candidate.name} at {shape.name}: no gradient ({', '.join(absent)}); not timed")
    for name, error in found.items():
        allowed = TOLERANCE if eager is None else SLACK * eager[name] + FLOOR
        if not error <= allowed:
            raise WrongAnswer(
                f"{candidate.name} at {shape.name}: {name} is off by {error:.1e} of its norm, allowed {allowed:.1e}; "
                "not timed"
            )
    return found


def check_step(provider: Provider, candidate: Candidate, shape: Shape, place: Place) -> float:
    """Make the first whole step; returns its seconds. Raises WrongAnswer if it moves a parameter elsewhere than Adam.

    Adam's first update is nearly the sign of the gradient, whatever its scale: so it is compared by direction.
    """
    right = truth(shape, place, candidate.joint)
    before = {name: w.clone() for name, w in provider.weights().items()}
    provider.train(False)
    seconds = wall(provider.step, right.x)
    provider.train(True)
    for name, w in provider.weights().items():
        wanted = right.gradients[name] * provider.scale(right.x)
        if name == "W_dec" and "unit norm" in candidate.recipe:
            wanted = wanted - (wanted * before[name]).sum(dim=1, keepdim=True) * before[name]
        wanted = -wanted / (wanted.abs() + EPS)
        moved = w - before[name]
        cosine = ((moved * wanted).sum() / (moved.norm() * wanted.norm())).item()
        if not cosine >= COSINE:
            raise WrongAnswer(
                f"{candidate.name} at {shape.name}: a step moves {name} elsewhere than Adam (cosine {cosine:.2f}, at "
                f"least {COSINE}); not timed"
            )
    return seconds


def relative(got: Tensor, exact: Tensor) -> float:
    if got.shape != exact.shape:
        raise WrongAnswer(f"shape {tuple(got.shape)}, want {tuple(exact.shape)}")
    off, size = 0.0, 0.0
    for g, e in zip(got.split(2048), exact.split(2048), strict=True):  # temporaries of whole dictionaries are slow
        off += torch.linalg.vector_norm(g - e).item() ** 2
        size += torch.linalg.vector_norm(e).item() ** 2
    return (off / size) ** 0.5 if size else off**0.5
