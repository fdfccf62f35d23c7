"""Sizes of the two suites: `pytest benchmarks` rehearses in a minute or two, `make bench` fills the results file."""

from dataclasses import dataclass

from benchmarks.cases import Shape


@dataclass(frozen=True)
class Suite:
    """Shapes that each benchmark takes, and its duration."""

    phases: tuple[str, ...]
    """Shapes at which every candidate is measured, phase by phase."""
    steps: tuple[str, ...]
    """Shapes at which whole steps are measured, of candidates neither compiled nor too slow."""
    seconds: float
    """About how long each phase of each candidate is measured."""
    scaled: Shape
    """The shape of which the series change one size."""
    series: dict[str, tuple[int, ...]]
    """Axis (B, D, M or K) to the sizes it takes."""
    trained: Shape
    """The shape of the training runs that compare losses; D is the width of the embedded model."""
    train_steps: int
    trainers: tuple[str, ...]
    """Shapes at which the loops of other packages' trainers are timed."""
    trainer_steps: int
    """Iterations of them, beside the first ones."""
    harvested: int
    """Tokens harvested for a store."""


SUITES = {
    "smoke": Suite(
        phases=("smoke",),
        steps=(),
        seconds=0.05,
        scaled=Shape("scaled", B=64, D=32, M=512, K=8, N=4, E=16),
        series={"M": (256, 512), "K": (4, 8), "B": (32, 64), "D": (16, 32)},
        trained=Shape("trained", B=64, D=256, M=512, K=8, N=4, E=16),
        train_steps=20,
        trainers=("smoke",),
        trainer_steps=3,
        harvested=5_000,
    ),
    "cpu": Suite(
        phases=("modern-small",),
        steps=("bench", "paper-small"),
        seconds=0.6,
        scaled=Shape("scaled", B=512, D=512, M=8192, K=32, N=16, E=64),
        series={
            "M": (2048, 8192, 32768),
            "K": (8, 32, 128),
            "B": (128, 512, 2048),
            "D": (128, 512, 1024),
        },
        trained=Shape("trained", B=256, D=256, M=2048, K=32, N=16, E=64),
        train_steps=80,
        trainers=("laptop",),
        trainer_steps=6,
        harvested=100_000,
    ),
}
