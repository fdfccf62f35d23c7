"""Whether the study says what is so: planted truth, simulated replicates, interruptions, and what an arm is."""

import dataclasses
import functools
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from math import nan
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastsae
from fastsae import cli, provenance
from fastsae.activations.store import Rows
from fastsae.config import DataConfig, StudyConfig
from fastsae.evaluate import DocumentSums, intervals, reconstruction
from fastsae.evaluate.intervals import Interval
from fastsae.files import read_json
from fastsae.modules import SparseAutoencoder
from fastsae.report import png
from fastsae.study import METRICS, QUESTIONS, Answer, Outcome, answers, arm_mean, arms, run, run_arms
from fastsae.study import compare as study_compare
from fastsae.study import page as study_page
from fastsae.study.arms import Question
from fastsae.study.compare import FVU, SHOWN, Comparison, compare, mean_over_seeds, verdict
from fastsae.study.results import results
from fastsae.train import Trainer

DOCUMENTS, ROWS = 24, 40


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch):
    """Skip flushing: its use cannot be seen here, and it takes much of the time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


class Source:
    """Activations in memory; `fails` is raised when block number `at` of all is asked for."""

    def __init__(self, rows: Tensor, block: int, fails: BaseException | None = None, at: int = 0) -> None:
        self.blocks, self.d_in = rows.split(block), rows.shape[1]
        self.block_rows = [len(b) for b in self.blocks]
        self.fails, self.left = fails, at

    def block(self, i: int) -> Tensor:
        self.left -= 1
        if self.fails is not None and self.left == 0:
            raise self.fails
        return self.blocks[i].clone()


class Measure:
    """Measures on held-out rows in documents of one length; `fails` is raised by call number `at`."""

    def __init__(self, rows: Tensor, fails: BaseException | None = None, at: int = 0) -> None:
        documents = torch.arange(len(rows), dtype=torch.int32) // ROWS
        self.rows = Rows(rows, documents, torch.zeros_like(documents))
        self.names = tuple(f"document {i}" for i in range(len(rows) // ROWS))
        self.fails, self.at = fails, at
        self.seen: list[SparseAutoencoder] = []

    def __call__(self, sae: SparseAutoencoder) -> DocumentSums:
        self.seen.append(sae)
        if self.fails is not None and len(self.seen) == self.at:
            raise self.fails
        return reconstruction(sae, [self.rows], self.names).sums


def only(patch: pytest.MonkeyPatch, *names: str) -> None:
    """Leave the other arms out."""
    patch.setattr(run, "arms", lambda *a: [arm for arm in arms(*a) if arm.name in names])


def quiet(_: str) -> None:
    pass


# ---- planted truth --------------------------------------------------------------------------------------------------


def planted(seed: int, size: float) -> tuple[Tensor, Tensor]:
    """Rows to train on and held-out ones: two of ten features, and for each pair a direction of its own."""
    generator = torch.Generator().manual_seed(seed)
    d_in, features, active, n = 16, 10, 2, 8192 + DOCUMENTS * ROWS
    directions = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator))[0][:features]
    of_pairs = torch.randn(features, features, d_in, generator=generator)
    of_pairs = size * of_pairs / of_pairs.norm(dim=-1, keepdim=True)
    which = torch.rand(n, features, generator=generator).topk(active).indices.sort(dim=1).values
    strengths = 0.5 + torch.rand(n, active, generator=generator)
    rows = (strengths.unsqueeze(2) * directions[which]).sum(1)
    rows += strengths.prod(1, keepdim=True) * of_pairs[which[:, 0], which[:, 1]]
    rows += 0.02 * torch.randn(n, d_in, generator=generator)
    return rows[:8192], rows[8192:]


@pytest.fixture(scope="module")
def found_in(tmp_path_factory) -> Callable[[float], dict[tuple[str, str], Answer]]:
    """Size of what is planted -> the study's answers to those of its questions that need no more than three arms.

    k = 4 leaves a TopK SAE two places for features that stand for pairs, and the integration sees n = 2: a second
    decoder on the strongest could do something too.
    """
    arms_of = ("topk", "two_decoders", "interaction_only")

    @functools.cache
    def of(size: float) -> dict[tuple[str, str], Answer]:
        train, held_out = planted(1, size)
        folder = tmp_path_factory.mktemp("planted")
        study = StudyConfig(
            folder, 24, 4, k_integration=2, d_embedding=16, dropout=0.0, steps=400, lrs=(1e-2,), seeds=3
        )
        questions = [*QUESTIONS, Question("Does a second decoder do it?", "two_decoders", "topk")]
        with pytest.MonkeyPatch.context() as patch:
            only(patch, *arms_of)
            patch.setattr(os, "fsync", lambda _: None)
            outcomes = run_arms(study, DataConfig(batch_size=128), Source(train, 1024), Measure(held_out), "", quiet)
            patch.setattr(study_compare, "QUESTIONS", [q for q in questions if {q.arm, q.baseline} <= set(arms_of)])
            return {(a.question.arm, a.question.baseline): a for a in answers(outcomes, [FVU])}

    return of


def test_planted_interactions_are_found_and_not_by_the_linear_control(found_in):
    found = found_in(1.0)
    alone, linear = found["interaction_only", "topk"], found["two_decoders", "topk"]
    assert alone.verdict.startswith("Yes: interaction_only is better than topk (FVU -")
    assert alone.comparisons[0].relative.high < -0.2
    assert abs(linear.comparisons[0].relative.estimate) < 0.4 * abs(alone.comparisons[0].relative.estimate)


def test_where_there_are_none_the_study_says_so(found_in):
    alone = found_in(0.0)["interaction_only", "topk"]
    assert alone.verdict.startswith("Not shown: no difference between interaction_only and topk is beyond chance")
    there = found_in(1.0)["interaction_only", "topk"].comparisons[0].relative
    assert abs(alone.comparisons[0].relative.estimate) < 0.4 * abs(there.estimate), "a tie, not a defeat"


# ---- intervals ------------------------------------------------------------------------------------------------------

REPLICATES = 400
TRUTH, DIFFERENCE = 3.0, -0.5


def simulated(seeds: int, of_seed: float, generator: torch.Generator) -> tuple[list[Outcome], list[Outcome], int]:
    """An arm and its baseline: seeds crossed with documents of 20 to 200 tokens, and their number. What a document adds
    is partly the same in both."""
    n = DOCUMENTS
    rows = torch.randint(20, 200, (n,), generator=generator).double()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    common, sides = normal(n), []
    for mean in (TRUTH + DIFFERENCE, TRUTH):
        of_document, by_seed = common + normal(n), of_seed * normal(seeds)
        outcomes = []
        for seed in range(seeds):
            over = rows * (mean + by_seed[seed] + of_document) + normal(n) * rows.sqrt()
            names = tuple(map(str, range(n)))
            outcomes.append(Outcome(seed, 1e-3, 0.0, DocumentSums(names, {"error full": over, "variance x": rows})))
        sides.append(outcomes)
    return sides[0], sides[1], seeds * int(rows.sum())


@pytest.mark.parametrize(("seeds", "of_seed"), [(4, 0.0), (4, 0.3), (3, 0.3), (3, 3.0)])
def test_intervals_cover_at_their_nominal_rate(seeds, of_seed, monkeypatch):
    monkeypatch.setattr(intervals, "_RESAMPLES", 400)
    generator = torch.Generator().manual_seed(seeds)
    covered = Counter()
    for _ in range(REPLICATES):
        arm, baseline, tokens = simulated(seeds, of_seed, generator)
        mean, difference = arm_mean(baseline, FVU), compare(arm, baseline, FVU).difference
        covered["mean"] += mean.low <= TRUTH <= mean.high
        covered["difference"] += difference.low <= DIFFERENCE <= difference.high
        # One variance of all tokens: within a document 1, between documents 2 in a side and 2 between sides.
        half = 1.96 * ((3 + of_seed**2) / tokens) ** 0.5
        covered["tokens, mean"] += abs(mean.estimate - TRUTH) <= half
        half = 1.96 * ((4 + 2 * of_seed**2) / tokens) ** 0.5
        covered["tokens, difference"] += abs(difference.estimate - DIFFERENCE) <= half
    share = {name: n / REPLICATES for name, n in covered.items()}
    # 95 %, give or take three standard errors of a share of 400.
    assert 0.917 <= share["mean"] <= 0.983
    assert 0.917 <= share["difference"] <= 0.983
    assert max(share["tokens, mean"], share["tokens, difference"]) < 0.5


def test_neither_seeds_nor_documents_alone_would_do(monkeypatch):
    monkeypatch.setattr(intervals, "_RESAMPLES", 400)
    generator = torch.Generator().manual_seed(0)
    _, baseline, _ = simulated(4, 0.0, generator)
    of_documents = baseline[0].sums.ratio("error full", "variance x")
    mean = arm_mean(baseline, FVU)
    assert mean.high - mean.low == pytest.approx(of_documents.high - of_documents.low, rel=0.1)
    shifted = [(over + 9.0 * seed * under, under) for seed, (over, under) in enumerate(map(FVU.of, baseline))]
    wide = mean_over_seeds(shifted)
    estimates = torch.stack([over.sum() / under.sum() for over, under in shifted])
    by_seed = intervals.student_t(3) * float(estimates.std()) / 2
    assert wide.high - wide.estimate == pytest.approx(by_seed, rel=0.05)


def test_one_seed_or_one_document_has_no_interval():
    arm, baseline, _ = simulated(2, 0.3, torch.Generator().manual_seed(0))
    one_document = [
        [dataclasses.replace(o, sums=DocumentSums(("0",), {k: v[:1] for k, v in o.sums.sums.items()})) for o in side]
        for side in (arm, baseline)
    ]
    for few in ((arm[:1], baseline[:1]), tuple(one_document)):
        found = compare(*few, FVU)
        assert found.difference.low != found.difference.low
        assert found.shown == 0
        assert verdict(QUESTIONS[0], [found]).startswith("Undecided")


def test_the_intervals_of_one_question_hold_together():
    arm, baseline, _ = simulated(4, 0.3, torch.Generator().manual_seed(0))
    outcomes = {q.baseline: baseline for q in QUESTIONS} | {q.arm: arm for q in QUESTIONS}
    single = compare(arm, baseline, FVU).difference
    (alone,) = answers(outcomes, [FVU])[0].comparisons
    together = answers(outcomes, [FVU, FVU, FVU])[0].comparisons
    assert alone.difference == single
    assert {c.difference for c in together} == {compare(arm, baseline, FVU, 1 - 0.05 / 3).difference}
    assert together[0].difference.low < single.low < single.high < together[0].difference.high


# ---- what is said ---------------------------------------------------------------------------------------------------

BETTER, WORSE, NEITHER, UNKNOWN = (-2.0, -1.0), (1.0, 2.0), (-1.0, 1.0), (nan, nan)


@pytest.mark.parametrize(
    ("differences", "begins"),
    [
        ([BETTER], "Yes: joint is better than topk_wide"),
        ([BETTER, BETTER, BETTER], "Yes: joint is better than topk_wide"),
        ([WORSE, WORSE, WORSE], "No: joint is worse than topk_wide"),
        ([NEITHER, NEITHER, NEITHER], "Not shown: "),
        ([(-1.0, 0.0), (0.0, 1.0)], "Not shown: "),
        ([BETTER, NEITHER, NEITHER], "In part better: "),
        ([NEITHER, WORSE, WORSE], "In part worse: "),
        ([BETTER, WORSE], "Mixed: "),
        ([BETTER, WORSE, NEITHER], "Mixed: "),
        ([UNKNOWN, UNKNOWN], "Undecided: "),
        ([BETTER, UNKNOWN], "Undecided: "),
    ],
)
def test_verdicts_can_come_out_either_way(differences, begins):
    comparisons = []
    for low, high in differences:
        difference = Interval((low + high) / 2, low, high)
        relative = Interval(difference.estimate / 10, low / 10, high / 10)
        comparisons.append(Comparison("FVU", difference, relative))
    said = verdict(QUESTIONS[0], comparisons)
    assert said.startswith(begins)
    if differences == [BETTER]:
        assert said.endswith("(FVU -15.0% [-20.0%, -10.0%]).")


def test_lower_is_better():
    arm, baseline, _ = simulated(3, 0.0, torch.Generator().manual_seed(0))
    for outcome in arm:
        outcome.sums.sums["error full"] -= 10 * outcome.sums.sums["variance x"]
    assert compare(arm, baseline, FVU).shown == -1
    assert compare(baseline, arm, FVU).shown == 1
    assert compare(arm, arm, FVU).difference == Interval(0.0, 0.0, 0.0)
    assert compare(arm, arm, FVU).shown == 0


def test_each_metric_by_definition():
    sums = {"error full": 2.0, "variance x": 8.0, "kl full": 3.0, "predictions": 6.0, "ce full": 9.0, "ce clean": 3.0}
    made = DocumentSums(("a",), {name: torch.tensor([value]).double() for name, value in sums.items()})
    outcome = Outcome(0, 1e-3, 0.0, made)
    assert {m.name: arm_mean([outcome], m).estimate for m in METRICS} == {"FVU": 0.25, "KL": 0.5, "CE increase": 1.0}


def test_what_is_shown_by_definition():
    sums = {"ce ablated": 9.0, "ce full": 4.0, "ce clean": 3.0, "kl full": 2.0, "epsilon full": 4.0}
    sums |= {"error identity": 8.0, "error full": 2.0, "kl identity": 5.0}
    made = DocumentSums(("a",), {name: torch.tensor([value]).double() for name, value in sums.items()})
    outcome = Outcome(0, 1e-3, 0.0, made)
    assert [m.known(outcome) for m in SHOWN] == [True] * 4
    assert [arm_mean([outcome], m).estimate for m in SHOWN] == pytest.approx([5 / 6, 0.5, 0.75, 0.6])
    del made.sums["error identity"]
    assert [m.known(outcome) for m in SHOWN] == [True, True, False, True]


def test_what_was_not_measured_on_the_same_is_not_compared():
    arm, baseline, _ = simulated(2, 0.0, torch.Generator().manual_seed(0))
    names = baseline[0].sums.names
    renamed = dataclasses.replace(baseline[0], sums=dataclasses.replace(baseline[0].sums, names=names[::-1]))
    with pytest.raises(ValueError, match="different seeds or documents"):
        compare(arm, [renamed, baseline[1]], FVU)
    with pytest.raises(ValueError, match="different seeds or documents"):
        compare(arm, baseline[::-1], FVU)
    with pytest.raises(ValueError, match="shorter"):
        compare(arm, baseline[:1], FVU)


# ---- arms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d_in", "n"), [(24, None), (7, 3)])
def test_arms_are_what_they_are_said_to_be(d_in, n):
    study = StudyConfig(d_sae=50, k=6, k_integration=n, d_embedding=9, dropout=0.25, steps=11)
    found = {arm.name: arm for arm in arms(study, d_in)}
    assert {q.arm for q in QUESTIONS} | {q.baseline for q in QUESTIONS} <= set(found)
    for arm in found.values():
        made_by = {c.config_class: c for c in (fastsae.TopKSAE, fastsae.JointSAE, fastsae.SequentialSAE)}
        sae = made_by[type(arm.config)](**dataclasses.asdict(arm.config))
        assert arm.parameters == sum(p.numel() for p in sae.parameters()), arm.name
        assert (sae.k, sae.b_dec is not None, sae.config.init) == (6, True, "paper"), arm.name
        assert arm.config.d_sae == 50 or arm.name == "topk_wide"
        assert arm.steps == (22 if arm.name == "topk_longer" else 11)
        assert (arm.base is None) == (arm.name != "sequential")
    assert abs(found["topk_wide"].parameters - found["joint"].parameters) <= d_in + 0.5
    joint, linear, pairs = (found[name].config for name in ("joint", "two_decoders", "interaction_only"))
    assert (joint.n, joint.d_embedding, joint.dropout) == (n or 3, 9, 0.25)
    assert (linear.linear, linear.interaction, pairs.linear, pairs.interaction) == (True, False, False, True)
    names = list(found)
    assert names.index(found["sequential"].base) < names.index("sequential")


# ---- runs -----------------------------------------------------------------------------------------------------------

SEEDS, LRS, STEPS = 2, (1e-3, 1e-2), 8
DATA = DataConfig(batch_size=16, buffer_rows=32)
SOME = ("topk", "joint", "sequential")
FITS, MEASURED = len(SOME) * (SEEDS + len(LRS) - 1), len(SOME) * SEEDS


def rows() -> Tensor:
    return torch.randn(256 + 3 * ROWS, 6, generator=torch.Generator().manual_seed(0))


def config(folder: Path, **options) -> StudyConfig:
    return StudyConfig(folder, **{"d_sae": 12, "k": 2, "steps": STEPS, "lrs": LRS, "seeds": SEEDS, **options})


class Counts:
    """Counts of training: calls of fit by folder, and optimizer steps."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.fits, self.steps = Counter(), 0
        fit, step = Trainer.fit, Trainer._train_step

        def counted_fit(trainer: Trainer, activations):
            self.fits[str(trainer.config.run_dir.relative_to(folder))] += 1
            return fit(trainer, activations)

        def counted_step(trainer: Trainer, x: Tensor):
            self.steps += 1
            return step(trainer, x)

        patch.setattr(Trainer, "fit", counted_fit)
        patch.setattr(Trainer, "_train_step", counted_step)


def started(
    folder: Path, source: Source | None = None, measure: Measure | None = None, held_out: str = "a", **options
) -> dict[str, list[Outcome]]:
    source, measure = source or Source(rows()[:256], 32), measure or Measure(rows()[256:])
    return run_arms(config(folder, **options), DATA, source, measure, held_out, quiet)


def assert_same(found: dict[str, list[Outcome]], expected: dict[str, list[Outcome]]) -> None:
    assert list(found) == list(expected)
    for a, b in zip(itertools.chain(*found.values()), itertools.chain(*expected.values()), strict=True):
        assert (a.seed, a.lr, a.dead_share, a.sums.names) == (b.seed, b.lr, b.dead_share, b.sums.names)
        assert a.sums.sums.keys() == b.sums.sums.keys()
        assert all(torch.equal(values, b.sums.sums[name]) for name, values in a.sums.sums.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict[str, list[Outcome]], Counts, Measure]:
    """A study of some arms that nothing interrupted."""
    folder, measure = tmp_path_factory.mktemp("whole"), Measure(rows()[256:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        only(patch, *SOME)
        counts = Counts(patch, folder)
        return folder, started(folder, measure=measure), counts, measure


def test_every_arm_is_trained_once_with_every_seed_and_rate(whole):
    folder, outcomes, counts, _ = whole
    assert tuple(outcomes) == SOME
    assert set(counts.fits.values()) == {1}
    assert len(counts.fits) == FITS
    assert counts.steps == FITS * STEPS
    for name, runs in outcomes.items():
        assert [r.seed for r in runs] == list(range(SEEDS)), name
        assert not torch.equal(runs[0].sums.sums["error full"], runs[1].sums.sums["error full"]), name
    assert not list(folder.rglob("checkpoints"))


def test_rates_are_chosen_by_training_documents_alone(whole):
    folder, outcomes, _, measure = whole
    training = rows()[:256]
    for name, runs in outcomes.items():
        fvu = {
            lr: reconstruction(fastsae.load(folder / name / f"lr_{lr:g}/seed_0/sae"), [training]).fvu.estimate
            for lr in LRS
        }
        assert {r.lr for r in runs} == {min(fvu, key=fvu.__getitem__)}, name
        chosen = json.loads((folder / name / "lr.json").read_text())
        assert chosen["lr"] == runs[0].lr
        assert chosen["fvu_on_training_documents"] == pytest.approx({f"{lr:g}": value for lr, value in fvu.items()})
    # What lost was never measured on held-out rows.
    assert len(measure.seen) == MEASURED
    for name, runs in outcomes.items():
        there = {path.parent.parent.name for path in (folder / name).glob("*/seed_*/outcome.json")}
        assert there == {f"lr_{runs[0].lr:g}"}


def test_the_rows_a_rate_is_chosen_by_are_from_everywhere(tmp_path):
    numbers = torch.arange(200 * 500.0).unsqueeze(1)
    runs = run._Runs(config(tmp_path), DATA, Source(numbers, 500), Measure(rows()[256:]), "a", quiet)
    seen = torch.cat(list(runs._choice_rows())).squeeze(1)
    assert 0.8 * 16_384 <= len(seen) <= 2 * 16_384
    assert len(seen.unique()) == len(seen)
    per_tenth = torch.histc(seen, 10, 0, len(numbers))
    assert per_tenth.min() > 0.8 * per_tenth.mean()


def test_rates_are_chosen_per_arm_and_a_diverged_one_loses(tmp_path, monkeypatch):
    only(monkeypatch, *SOME)
    prefers = {"topk": LRS[1], "joint": LRS[0], "sequential": LRS[0]}
    fit = run._Runs._fit

    def known(runs, arm, lr):
        fit(runs, arm, lr)
        return {prefers[arm.name]: 0.5}.get(lr, 0.6 if arm.name == "topk" else None)

    monkeypatch.setattr(run._Runs, "_fit", known)
    outcomes = started(tmp_path, seeds=1)
    assert {name: runs[0].lr for name, runs in outcomes.items()} == prefers
    base, on_base = (
        fastsae.load(tmp_path / name / f"lr_{prefers[name]:g}/seed_0/sae") for name in ("topk", "sequential")
    )
    assert torch.equal(base.W_enc, on_base.W_enc)
    assert torch.equal(base.W_dec, on_base.W_dec)
    assert torch.equal(base.normalizer.mean, on_base.normalizer.mean)


def test_training_that_diverges_is_no_end_of_the_study(tmp_path, monkeypatch):
    only(monkeypatch, "topk")
    counts = Counts(monkeypatch, tmp_path)
    for _ in range(2):
        (outcome,) = started(tmp_path / "a", seeds=1, lrs=(1e30, 1e-3))["topk"]
        assert outcome.lr == 1e-3
    assert sum(counts.fits.values()) == 2, "what diverged is known"
    with pytest.raises(ValueError, match="topk diverged at every learning rate"):
        started(tmp_path / "b", seeds=1, lrs=(1e30,))


def test_a_later_seed_that_diverges_leaves_the_next_rate(tmp_path, monkeypatch):
    only(monkeypatch, "topk", "sequential")
    fit = Trainer.fit

    def diverging(trainer: Trainer, activations):
        if trainer.sae.architecture == "topk" and trainer.config.seed == 1 and trainer.config.lr == preferred:
            raise FloatingPointError("NaN at step 3")
        return fit(trainer, activations)

    preferred = started(tmp_path / "whole", seeds=1)["topk"][0].lr
    (other,) = {*LRS} - {preferred}
    monkeypatch.setattr(Trainer, "fit", diverging)
    outcomes = started(tmp_path / "a")
    assert [r.lr for r in outcomes["topk"]] == [other] * SEEDS
    assert json.loads((tmp_path / "a/topk/lr.json").read_text())["lr"] == other
    monkeypatch.setattr(Trainer, "fit", fit)
    counts = Counts(monkeypatch, tmp_path / "a")
    assert_same(started(tmp_path / "a"), outcomes)
    assert not counts.fits, "what diverged is not tried again"


def test_integration_never_stands_on_a_base_that_was_given_up(tmp_path, monkeypatch):
    """A further seed of the base diverges, and with it the rate that the finished seeds were trained at."""
    only(monkeypatch, "topk", "sequential")
    fit, first = Trainer.fit, started(tmp_path, seeds=1)
    preferred = first["topk"][0].lr

    def diverging(trainer: Trainer, activations):
        if trainer.sae.architecture == "topk" and trainer.config.seed == 1 and trainer.config.lr == preferred:
            raise FloatingPointError("NaN at step 3")
        return fit(trainer, activations)

    monkeypatch.setattr(Trainer, "fit", diverging)
    second = started(tmp_path, seeds=2)
    given_up, chosen = preferred, second["topk"][0].lr
    assert chosen != given_up
    for seed, outcome in enumerate(second["sequential"]):
        base = fastsae.load(tmp_path / f"topk/lr_{chosen:g}/seed_{seed}/sae")
        on_base = fastsae.load(tmp_path / f"sequential/lr_{outcome.lr:g}/seed_{seed}/sae")
        assert torch.equal(base.W_dec, on_base.W_dec)


@pytest.mark.parametrize("lrs", [(1e-3, nan), (float("inf"),), (0.0,), (1e-3, 1e-3), (0.001, 0.0010000001)])
def test_rates_that_are_none_are_refused(lrs):
    with pytest.raises(ValueError, match=r"StudyConfig\.lrs: expected different rates above 0"):
        StudyConfig(lrs=lrs)


def test_the_sequential_arm_goes_on_where_its_base_ended(tmp_path, monkeypatch):
    """8 steps see half of 256 rows in batches of 16: together base and integration see every row once."""
    only(monkeypatch, "topk", "sequential")
    seen: dict[str, list[Tensor]] = {"topk": [], "sequential": []}
    step = Trainer._train_step

    def watched(trainer: Trainer, x: Tensor):
        seen[trainer.sae.architecture].append(trainer.sae.normalizer.invert(x))
        return step(trainer, x)

    monkeypatch.setattr(Trainer, "_train_step", watched)
    started(tmp_path, seeds=1, lrs=(1e-3,))
    both = torch.cat([*seen["topk"], *seen["sequential"]])
    order = both[:, 0].argsort()
    expected = rows()[:256]
    torch.testing.assert_close(both[order], expected[expected[:, 0].argsort()])


def test_runs_of_a_study_are_runs(whole):
    folder, outcomes, _, _ = whole
    for name, runs in outcomes.items():
        run_dir = folder / name / f"lr_{runs[0].lr:g}" / "seed_0"
        assert provenance.recorded(run_dir) == DATA
        assert runs[0].dead_share == json.loads((run_dir / "done.json").read_text())["metrics"]["dead_share"]


@pytest.mark.parametrize(
    ("where", "fails"),
    [
        ("measure", KeyboardInterrupt()),
        ("train", KeyboardInterrupt()),
        ("train", OSError("disk gone")),
    ],
)
def test_an_interrupted_study_goes_on_to_the_same_bits(whole, where, fails, tmp_path, monkeypatch):
    _, expected, uninterrupted, _ = whole
    only(monkeypatch, *SOME)
    counts = Counts(monkeypatch, tmp_path)
    at = {"measure": 3, "train": 101}[where]  # of measurements; of blocks, in the middle of a run
    source = Source(rows()[:256], 32, fails if where == "train" else None, at)
    failing = Measure(rows()[256:], fails if where == "measure" else None, at)
    with pytest.raises(type(fails)):
        started(tmp_path, source, failing)
    assert 0 < len(counts.fits) < FITS
    going_on = Measure(rows()[256:])
    assert_same(started(tmp_path, measure=going_on), expected)
    assert len(failing.seen) + len(going_on.seen) == MEASURED + (where == "measure")
    assert counts.fits.keys() == uninterrupted.fits.keys()
    again = [name for name, n in counts.fits.items() if n > 1]
    assert len(again) == (1 if where == "train" else 0)
    lost = counts.steps - uninterrupted.steps
    assert lost == 0 if where == "measure" or isinstance(fails, OSError) else 0 <= lost < STEPS


def test_a_finished_study_does_nothing_again(whole, monkeypatch):
    folder, outcomes, _, _ = whole
    only(monkeypatch, *SOME)
    counts, measure = Counts(monkeypatch, folder), Measure(rows()[256:])
    assert_same(started(folder, measure=measure), outcomes)
    assert not counts.fits
    assert not measure.seen


def test_more_seeds_train_only_those(tmp_path, monkeypatch):
    only(monkeypatch, "topk", "sequential")
    first = started(tmp_path, seeds=1)
    counts = Counts(monkeypatch, tmp_path)
    more = started(tmp_path, seeds=2)
    assert {name.rsplit("/")[-1] for name in counts.fits} == {"seed_1"}
    assert len(counts.fits) == 2
    assert_same({name: runs[:1] for name, runs in more.items()}, first)


def test_other_held_out_documents_are_measured_on_again(tmp_path, monkeypatch):
    only(monkeypatch, "topk")
    started(tmp_path, held_out="a")
    counts = Counts(monkeypatch, tmp_path)
    measure = Measure(rows()[256:] + 1)
    found = started(tmp_path, measure=measure, held_out="b")["topk"]
    assert (len(measure.seen), len(counts.fits)) == (SEEDS, 0)
    assert torch.equal(
        found[0].sums.sums["error full"], Measure(measure.rows.activations)(measure.seen[0]).sums["error full"]
    )


def test_another_study_in_the_folder_is_refused(whole, monkeypatch):
    folder, outcomes, _, _ = whole
    only(monkeypatch, *SOME)
    counts = Counts(monkeypatch, folder)
    with pytest.raises(ValueError, match=r"holds another study: steps was 8, is 9.*Choose another --folder"):
        started(folder, steps=9)
    with pytest.raises(ValueError, match=r"lrs was \[0.001, 0.01\], is \[0.01\]"):
        started(folder, lrs=(1e-2,))
    with pytest.raises(ValueError, match="batch_size was 16, is 8"):
        run_arms(
            config(folder),
            dataclasses.replace(DATA, batch_size=8),
            Source(rows()[:256], 32),
            Measure(rows()[256:]),
            "a",
            quiet,
        )
    assert_same(started(folder), outcomes)
    assert not counts.fits


@pytest.mark.parametrize("options", ["--context 2 --held-out-tokens 99", "--held-out-tokens 1"])
def test_a_study_without_a_prediction_is_refused_at_once(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = "--folder s --seeds 1 --lrs 0.001 --steps 2 --tokens 300 --context 64 --batch-size 64 --d-sae 64 --k 4"
    monkeypatch.setattr(sys, "argv", ["fastsae", "study", *small.split(), *options.split()])
    with pytest.raises(SystemExit, match=r"none is predicted from another one.*a longer --context or more --held-out"):
        cli.main()
    assert not Path("s").exists()


def test_a_damaged_note_is_named(tmp_path):
    for damaged in ("[]", '{"study": 1}', "{"):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"config\.json is damaged"):
            started(tmp_path)


def test_a_study_of_before_the_option_of_bos_goes_on(tmp_path):
    with_bos = dataclasses.replace(DATA, prepend_bos=True)
    run.claim(config(tmp_path), with_bos)
    note = tmp_path / "config.json"
    known = json.loads(note.read_text())
    del known["data"]["prepend_bos"]
    note.write_text(json.dumps(known))
    with pytest.raises(ValueError, match=r"prepend_bos was True, is False"):
        run.claim(config(tmp_path), dataclasses.replace(DATA, prepend_bos=False))
    run.claim(config(tmp_path), with_bos)


def test_results_count_the_base_of_an_arm(tmp_path):
    trained = arms(config(tmp_path), 6)
    made, _, _ = simulated(SEEDS, 0.3, torch.Generator().manual_seed(0))
    found = results(config(tmp_path), DATA, trained, {arm.name: made for arm in trained}, [FVU])
    by_name, said = {arm.name: arm for arm in trained}, {arm["arm"]: arm for arm in found["arms"]}
    own = {name: arm.training_flops(DATA.batch_size) for name, arm in by_name.items()}
    assert own["topk_longer"] == 2 * own["topk"] > 0
    for name, arm in said.items():
        assert arm["training_flops"] == own[name] + (own["topk"] if name == "sequential" else 0)
        assert arm["steps"] == (2 * STEPS if name in ("sequential", "topk_longer") else STEPS)
        assert arm["parameters"] == by_name[name].parameters
        assert arm["metrics"]["FVU"]["estimate"] == pytest.approx(sum(s["FVU"] for s in arm["by_seed"]) / SEEDS)
    last = found["answers"][-1]
    assert last["cost"]["training_flops"] == said["sequential"]["training_flops"] / own["topk_longer"]
    assert json.loads(json.dumps(found, allow_nan=False))["held_out_documents"] == DOCUMENTS


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = "--folder s --seeds 1 --lrs 0.001 --steps 2 --windows-per-document 1 --held-out-tokens 400 --tokens 3000"
    options += " --context 64 --batch-size 64 --buffer-rows 1000 --d-sae 64 --k 4 --d-embedding 8"
    monkeypatch.setattr(sys, "argv", ["fastsae", "study", *options.split()])
    counts = Counts(monkeypatch, Path("s"))
    cli.main()
    out = capsys.readouterr().out
    assert "[1 of 7] topk" in out
    assert "Undecided: one seed" in out
    found = json.loads(Path("s/study.json").read_text())
    assert [arm["arm"] for arm in found["arms"]] == [arm.name for arm in arms(StudyConfig(), 256)]
    assert set(found["arms"][0]["metrics"]) == {"FVU", "KL", "CE increase"}
    assert found["held_out_documents"] > 1
    assert len(found["answers"]) == len(QUESTIONS)
    assert counts.steps == 2 * (7 + 1)
    page = Path("s/study.md").read_text()
    assert all(Path("s", plot).stat().st_size > 1000 and plot in page for plot in ("differences.png", "sizes.png"))
    assert "Undecided" in page
    cli.main()
    assert counts.steps == 2 * (7 + 1)
    assert json.loads(Path("s/study.json").read_text()) == found


# ---- the committed study --------------------------------------------------------------------------------------------


def test_the_page_in_docs_says_what_its_results_say(tmp_path):

    docs = Path(__file__).parents[1] / "docs"
    found = read_json(docs / "results/study.json")
    assert study_page.markdown(found, "study/") in (docs / "study.md").read_text(), "run page.publish"
    for name in study_page.PLOTS:
        assert png.description(docs / "study" / name) == png.told("results", found)


def test_publishing_keeps_what_is_written_by_hand(tmp_path):
    source = Path(__file__).parents[1] / "docs/results/study.json"
    by_hand = tmp_path / "answer.md"
    by_hand.write_text("before\n<!-- results -->\nof last year\n<!-- /results -->\nafter\n")
    for _ in range(2):
        study_page.publish(source, by_hand)
    text = by_hand.read_text()
    assert text.startswith("before\n<!-- results -->\n**")
    assert text.endswith("<!-- /results -->\nafter\n")
    assert "of last year" not in text
    assert "answer/sizes.png" in text
    assert (tmp_path / "answer/sizes.png").exists()
    by_hand.write_text("no marks")
    with pytest.raises(ValueError, match="one <!-- results --> and one"):
        study_page.publish(source, by_hand)
