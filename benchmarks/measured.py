"""A candidate made ready to be timed: warmed up, compared with the specification, its memory watched."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import correct
from benchmarks.cases import SHAPES, Shape
from benchmarks.latest import Latest
from benchmarks.memory import Gauge, available_bytes
from benchmarks.outcomes import Missing
from benchmarks.place import Place
from benchmarks.providers.base import Candidate, Provider, batch
from benchmarks.providers.roofs import BareGemm
from benchmarks.timing import wall

# Whole batches up to so many pre-activations are compared (that is `laptop`), of larger shapes the first rows.
COMPARED = 2**25
# Of such shapes a step that takes longer, in seconds, is not warmed up: what is cold in it is little beside it.
LONG = 4.0


@dataclass
class Measured:
    """A provider that computes the right function, or the reason why it is not there."""

    row: dict[str, Any]
    """The provider's facts in a row of results, without times."""
    provider: Provider | None = None
    gauge: Gauge | None = None
    compiled: bool = False
    once: float = 0.0
    """Seconds of a step, roughly."""


def ready(shape: Shape, candidate: Candidate, place: Place) -> Measured:
    """Raises correct.WrongAnswer if the candidate computes another function."""
    about = {"provider": candidate.name, "architecture": candidate.architecture, "recipe": candidate.recipe}
    made = Measured(about, compiled=candidate.compiled)
    if too_large := why_too_large(shape, candidate.joint):
        return Measured(about | {"missing": too_large})
    compared = replace(shape, B=min(shape.B, max(1, COMPARED // shape.M)))
    gemm(shape, place)  # now, like the truth: what they hold is not the provider's
    correct.truth(compared, place, candidate.joint)
    try:
        if not candidate.compiled:  # imports, and what libraries reserve at first use, are not the step's
            small = SHAPES["smoke"]
            with suppress(Missing):  # it may be missing at this shape alone
                candidate.make(small, place).step(batch(small, place, 0))
        torch.compiler.reset()
        made.gauge = Gauge(place)
        made.provider = candidate.make(shape, place)
        found = correct.check(made.provider, candidate, compared, place)
        made.once = correct.check_step(made.provider, candidate, compared, place) * shape.B / compared.B
    except Missing as reason:
        return Measured(made.row | {"missing": str(reason)})
    made.row |= {"version": made.provider.version, "errors": {name: float(f"{e:.1e}") for name, e in found.items()}}
    made.row["compared_rows"] = compared.B
    if candidate.compiled or (compared.B < shape.B and made.once < LONG):
        made.once = wall(made.provider.step, batch(shape, place, 0))
    return made


def why_too_large(shape: Shape, joint: bool) -> str | None:
    """Why this shape cannot be measured here, None if it can: without this the system would kill the process.

    Counted are a training state in fp32, three dense (B, d_sae) tensors, the truth in fp64 and its copy, and the roof.
    """
    dense = shape.B * shape.M
    needed = 4 * (4 * shape.parameters(joint) + 3 * dense + 3 * shape.parameters(joint) + dense)
    if needed <= available_bytes():
        return None
    return f"needs about {needed / 2**30:.0f} GiB, {available_bytes() / 2**30:.0f} are available"


@Latest
def gemm(shape: Shape, place: Place) -> BareGemm:
    """The roof of this shape; made before a Gauge, which then does not count it."""
    return BareGemm(shape, place)


class BesideGemm:
    """Times the bare GEMM before each round of something else: this machine's speed drifts."""

    def __init__(self, shape: Shape, place: Place) -> None:
        self.roof, self.x = gemm(shape, place), batch(shape, place, 0)
        self.seconds: list[float] = []

    def before(self, setup: Callable[[], Any]) -> Callable[[], Any]:
        """`setup` of a round, and the product."""

        def both() -> Any:
            made = setup()
            self.seconds.append(round(wall(self.roof.step, self.x), 6))
            return made

        return both
