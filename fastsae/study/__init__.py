"""Does integration help? Every arm on the same activations, seeds and steps; a verdict that can come out either way."""

from fastsae.evaluate.metrics import Metric
from fastsae.study.arms import QUESTIONS, Arm, arms
from fastsae.study.compare import METRICS, Answer, answers, arm_mean
from fastsae.study.results import run_study
from fastsae.study.run import Outcome, run_arms

__all__ = [
    "METRICS",
    "QUESTIONS",
    "Answer",
    "Arm",
    "Metric",
    "Outcome",
    "answers",
    "arm_mean",
    "arms",
    "run_arms",
    "run_study",
]
