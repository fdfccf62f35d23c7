"""The arms of the study: what is trained, and what each is there for."""

import dataclasses
from dataclasses import dataclass

from fastsae.config import JointSAEConfig, SequentialSAEConfig, StudyConfig, TopKSAEConfig
from fastsae.planner import plan


@dataclass(frozen=True)
class Arm:
    """One architecture and how long it trains."""

    name: str
    meaning: str
    config: TopKSAEConfig
    steps: int
    base: str | None = None
    """The arm whose trained SAE it starts from, frozen."""

    @property
    def parameters(self) -> int:
        return plan(self.config).n_parameters

    def training_flops(self, batch_size: int) -> int:
        """Count the FLOP of this arm's own steps; those of its base come on top."""
        return plan(self.config, batch_size).flops_per_step * self.steps


@dataclass(frozen=True)
class Question:
    """Question that a comparison of two arms answers."""

    text: str
    arm: str
    baseline: str


QUESTIONS = (
    Question("Is integration worth its parameters (joint against a TopK SAE of as many)?", "joint", "topk_wide"),
    Question("Does integration help at equal width and k (joint has more parameters)?", "joint", "topk"),
    Question("Do interactions add to a second decoder (joint has more parameters)?", "joint", "two_decoders"),
    Question("Do interactions help alone (interaction_only has more parameters)?", "interaction_only", "topk"),
    Question("Are interactions alone worth their parameters (topk_wide has more)?", "interaction_only", "topk_wide"),
    Question("Is a second decoder worth its parameters (topk_wide has more)?", "two_decoders", "topk_wide"),
    Question("Is it better to train together (sequential trains twice as long)?", "joint", "sequential"),
    Question(
        "Does sequential beat TopK trained as long (sequential has more parameters)?", "sequential", "topk_longer"
    ),
)


def arms(study: StudyConfig, d_in: int) -> list[Arm]:
    """All arms, each after the one it starts from. b_dec everywhere: an output bias must not be what decides."""
    topk = TopKSAEConfig(d_in, study.d_sae, study.k, pre_bias=True)
    joint = JointSAEConfig(
        d_in,
        study.d_sae,
        study.k,
        pre_bias=True,
        k_integration=study.k_integration,
        d_embedding=study.d_embedding,
        dropout=study.dropout,
    )
    without_interaction = dataclasses.replace(joint, interaction=False)
    without_linear = dataclasses.replace(joint, linear=False)
    sequential = SequentialSAEConfig(**dataclasses.asdict(joint))
    wide = dataclasses.replace(topk, d_sae=_width_of_parameters(topk, plan(joint).n_parameters))
    n, steps = joint.n, study.steps
    return [
        Arm("topk", "TopK SAE at the same width and k", topk, steps),
        Arm("topk_wide", "TopK SAE with as many parameters as joint", wide, steps),
        Arm("topk_longer", "TopK SAE trained twice as long, as sequential is in all", topk, 2 * steps),
        Arm("two_decoders", f"a second, linear decoder on the {n} strongest features", without_interaction, steps),
        Arm(
            "interaction_only", f"pairwise interactions of the {n} strongest, no second decoder", without_linear, steps
        ),
        Arm("joint", "second decoder and interactions, all trained together", joint, steps),
        Arm("sequential", "the topk arm frozen, then second decoder and interactions", sequential, steps, base="topk"),
    ]


def _width_of_parameters(topk: TopKSAEConfig, parameters: int) -> int:
    """The d_sae that gives a TopK SAE so many parameters, to the nearest feature."""
    per_feature = 2 * topk.d_in + 1
    return round((parameters - topk.d_in) / per_feature)
