"""The benchmarks' own promises: work is counted right, and nothing that computes another function is timed."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastsae
from benchmarks import correct, measured
from benchmarks.cases import SHAPES, Shape, floor_seconds, work
from benchmarks.memory import Gauge
from benchmarks.outcomes import Missing
from benchmarks.place import CPU
from benchmarks.providers import CANDIDATES, ours, pytorch
from benchmarks.providers.base import Candidate, Provider, batch, weights
from fastsae.backends import reference

ROOT = Path(__file__).parents[1]
SMALL = Shape("small", B=24, D=16, M=96, K=6, N=3, E=8)


@pytest.fixture(autouse=True)
def forget() -> None:
    correct.truth.forget()


@pytest.mark.parametrize("joint", [False, True])
def test_parameters_are_counted(joint):
    if joint:
        sae = fastsae.JointSAE(SMALL.D, SMALL.M, SMALL.K, k_integration=SMALL.N, d_embedding=SMALL.E)
    else:
        sae = fastsae.TopKSAE(SMALL.D, SMALL.M, SMALL.K)
    assert SMALL.parameters(joint) == sum(p.numel() for p in sae.parameters())


def test_operations_are_counted_as_torch_counts_them():
    """torch counts dense products over the active features alone, which equal the sums of a code."""
    B, D, M, K, N, E = dataclasses.astuple(SMALL)[1:]
    zeros = torch.zeros
    with FlopCounterMode(display=False) as counter:
        F.linear(zeros(B, D), zeros(M, D))
    assert work(SMALL, joint=False)["encode"].flops == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        torch.bmm(zeros(B, 1, K), zeros(B, K, D))  # identity
        for width in (D, E, E):  # linear, s, q
            torch.bmm(zeros(B, 1, N), zeros(B, N, width))
        F.linear(F.linear(zeros(B, E), zeros(E, E)), zeros(D, E))
    assert work(SMALL, joint=True)["decode"].flops == counter.get_total_flops()


def test_bytes_are_those_of_the_arrays():
    B, D, M, K = SMALL.B, SMALL.D, SMALL.M, SMALL.K
    counted = work(SMALL, joint=False)
    encoded = 4 * (B * D + M * D + M) + B * K * (4 + 8)
    assert counted["encode"].bytes == encoded
    assert counted["optimizer"].bytes == 7 * 4 * SMALL.parameters(joint=False)
    # Of many features nearly as many are used as there are entries, and of few all.
    rest = B * K * (4 + 8) + 4 * B * D
    many, few = (work(dataclasses.replace(SMALL, M=m), joint=False)["decode"].bytes - rest for m in (10**8, K))
    assert many == pytest.approx(4 * B * K * D, rel=1e-3)
    assert few == 4 * K * D


def test_the_floor_takes_the_slower_of_operations_and_bytes():
    counted = work(SMALL, joint=False).values()
    assert floor_seconds(SMALL, False, 1e3, float("inf")) == pytest.approx(sum(w.flops for w in counted) / 1e3)
    assert floor_seconds(SMALL, False, float("inf"), 1e3) == pytest.approx(sum(w.bytes for w in counted) / 1e3)


@pytest.mark.parametrize("joint", [False, True])
def test_the_truth_is_the_specification(joint):
    """Though it differentiates a dictionary of the active rows alone."""
    right = correct.truth(SMALL, CPU, joint)
    x = right.x.double()
    w = {name: t.double().requires_grad_() for name, t in weights(SMALL, CPU, joint).items()}
    values, indices = reference.topk_encode(x, w["W_enc"], w["b_enc"], SMALL.K, b_dec=w.get("b_dec"))
    out, z = reference.joint_decode(values, indices, w["W_dec"], w.get("W_lin"), w.get("V"), SMALL.N)
    if joint:
        out = out + w["b_lin"] + reference.interaction_mlp(z, w["W1"], w["b1"], w["W2"], w["b2"])
    else:
        out = out + w["b_dec"]
    F.mse_loss(out, x).backward()
    torch.testing.assert_close(right.reconstruction, out.detach(), rtol=1e-12, atol=1e-12)
    assert set(right.gradients) == set(w)
    for name, gradient in right.gradients.items():
        torch.testing.assert_close(gradient.double(), w[name].grad, rtol=1e-6, atol=1e-9)


def test_no_rounding_decides_which_features_are_active():
    x, w = correct.truth(SMALL, CPU, joint=True).x, weights(SMALL, CPU, joint=True)
    assert x.shape == (SMALL.B, SMALL.D)
    top = F.linear(x.double(), w["W_enc"].double(), w["b_enc"].double()).topk(SMALL.K + 1, dim=1).values
    for boundary in (SMALL.K, SMALL.N):
        assert ((top[:, boundary - 1] - top[:, boundary]) / top[:, 0]).min() > 1e-5


@pytest.mark.parametrize("candidate", [c for c in CANDIDATES if not c.compiled], ids=lambda c: c.name)
def test_candidates_compute_the_same(candidate):
    try:
        provider = candidate.make(SMALL, CPU)
    except Missing as reason:
        pytest.skip(f"{reason}; measured where it is there (make bench, make gpu)")
    found = correct.check(provider, candidate, SMALL, CPU)
    assert {"reconstruction", "d W_enc", "d b_enc", "d W_dec"} <= set(found)
    assert ("d V" in found) == candidate.joint
    correct.check_step(provider, candidate, SMALL, CPU)


class _NoEncoderGradient(pytorch.SparseTopK):
    def gradients(self) -> dict[str, Tensor]:
        found = super().gradients()
        return found | {"W_enc": torch.zeros_like(found["W_enc"])}


class _NoBiasGradient(pytorch.SparseTopK):
    def gradients(self) -> dict[str, Tensor]:
        return {name: g for name, g in super().gradients().items() if name != "b_enc"}


class _OneFeatureLess(pytorch.SparseTopK):
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = super().encode(x)
        return values[:, :-1], indices[:, :-1]


class _NoLinear(pytorch.DenseJoint):
    def decode(self, code, training: bool = False) -> Tensor:
        return super().decode(code, training) - code[1] @ self.w["W_lin"]


class _AnotherLoss(pytorch.DenseTopK):
    def loss(self, x: Tensor) -> Tensor:
        return 1.001 * super().loss(x)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (_NoEncoderGradient, "d W_enc is off by"),
        (_NoBiasGradient, r"no gradient \(d b_enc\)"),
        (_OneFeatureLess, "reconstruction is off by"),
        (_NoLinear, "reconstruction is off by"),
        (_AnotherLoss, "d W_enc is off by"),
    ],
)
def test_another_function_is_not_timed(wrong: type[Provider], what: str):
    candidate = Candidate("wrong", "joint" if wrong is _NoLinear else "topk", wrong)
    with pytest.raises(correct.WrongAnswer, match=rf"wrong at small: {what}.* not timed"):
        correct.check(candidate.make(SMALL, CPU), candidate, SMALL, CPU)


class _FrozenPairs(pytorch.DenseJoint):
    def update(self) -> None:
        self.w["V"].grad = None
        super().update()


class _Uphill(pytorch.DenseTopK):
    def update(self) -> None:
        self.w["b_enc"].grad.neg_()
        super().update()


@pytest.mark.parametrize(("wrong", "what"), [(_FrozenPairs, "V"), (_Uphill, "b_enc")])
def test_a_step_that_goes_elsewhere_is_not_timed(wrong: type[Provider], what: str):
    candidate = Candidate("wrong", "joint" if wrong is _FrozenPairs else "topk", wrong)
    provider = candidate.make(SMALL, CPU)
    correct.check(provider, candidate, SMALL, CPU)
    with pytest.raises(correct.WrongAnswer, match=f"a step moves {what} elsewhere"):
        correct.check_step(provider, candidate, SMALL, CPU)


def test_what_needs_a_gpu_says_so():
    with pytest.raises(Missing, match="make gpu"):
        ours.on_cuda(SMALL, CPU, joint=True)


def test_phases_of_our_trainer_make_its_step():
    """Clipping and unit norm too, which an optimizer alone would leave out."""
    whole, parts = (ours.TrainerStep(SMALL, CPU, joint=False, trained="clipped, unit norm") for _ in range(2))
    for number in range(3):
        x = 10 * batch(SMALL, CPU, number)
        whole.step(x)
        parts.backward(parts.loss(x))
        parts.update()
    for name, w in whole.weights().items():
        assert torch.equal(w, parts.weights()[name]), name
    torch.testing.assert_close(parts.sae.W_dec.norm(dim=1), torch.ones(SMALL.M))


def test_shapes_too_large_for_this_machine_are_missing(monkeypatch):
    monkeypatch.setattr(measured, "available_bytes", lambda: 0)
    assert "are available" in measured.ready(SMALL, CANDIDATES[0], CPU).row["missing"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell; rows have no peak there")
def test_the_gauge_sees_a_peak_that_is_gone():
    gauge = Gauge(CPU)
    gauge.reset()
    idle = gauge.peak()
    del_me = torch.ones(2**25)  # 128 MiB
    del del_me
    peak = gauge.peak()
    gauge.reset()
    after = gauge.peak()
    assert idle is not None
    assert peak is not None
    assert after is not None
    assert peak - idle > 100 * 2**20
    assert peak - after > 100 * 2**20


def test_every_shape_of_a_suite_exists():
    from benchmarks.suites import SUITES

    assert all(name in SHAPES for suite in SUITES.values() for name in (*suite.phases, *suite.steps))


def test_pytest_benchmarks_runs():
    """A few of each kind, as a user starts them."""
    chosen = [
        "benchmarks/test_roofs.py",
        "benchmarks/test_ops.py::test_op[smoke-sparse_decode-forward-fastsae]",
        "benchmarks/test_scaling.py::test_scaling[M=256-fastsae TopKSAE, Trainer]",
        "benchmarks/test_step.py::test_phase[smoke-fastsae JointSAE, Trainer-optimizer]",
        "benchmarks/test_step.py::test_phase[smoke-fastsae JointSAE, Trainer-step]",
    ]
    environment = {
        name: value for name, value in os.environ.items() if "XDIST" not in name
    }  # beside it nothing is timed
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *chosen, "-p", "no:cacheprovider"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "smoke: fastsae JointSAE, Trainer" in done.stdout
