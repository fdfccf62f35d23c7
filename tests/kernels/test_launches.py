"""Launches that `make gpu` times and sweeps: handed over one by one, and variants that compute the same."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks.gpu.measures import launches, variants
from benchmarks.place import Place
from csrc_triton.cases import Part, Shape
from csrc_triton.launch import Launch

# Rows of several blocks; features enough for rows of weights to be gathered, and few.
FEW = Shape(B=70, D=1100, M=16, K=5, N=3, E=24)
MANY = replace(FEW, B=4, M=1024)
SHAPES = {
    "encode": replace(MANY, D=40),
    "decode": MANY,
    "integrate": replace(FEW, D=200),
    "gradients": replace(FEW, B=30),
}


@pytest.fixture
def where(device: str) -> Place:
    return Place(torch.device(device), "cuda")


def part(case: str) -> Part:
    return Part("tiny", SHAPES[case], torch.float32, case)


def tensors(launch: Launch) -> dict[str, Tensor]:
    return {name: t for name, t in launch.arguments.items() if isinstance(t, Tensor)}


@pytest.mark.parametrize("case", SHAPES)
def test_variants_compute_the_same(case: str, where: Place):
    def about(launch: Launch) -> dict[str, Any]:
        before = {name: t.clone() for name, t in tensors(launch).items()}
        launch.start()
        expected = {name: t.clone() for name, t in tensors(launch).items()}
        others = variants.variants(launch)
        started = 0
        for other in others[:: max(1, len(others) // 2)]:
            for name, t in tensors(launch).items():
                t.copy_(before[name])
            try:
                other.start()
            except OutOfResources:  # more shared memory than a GPU has: the sweep compiles first, and leaves it out
                continue
            started += 1
            for name in before.keys() - {"error_ptr", "candidates_ptr", "groups_ptr"}:  # scratch; a number per program
                got = other.arguments[name]
                said = f"{launch.name} {name}, {other.config} instead of {launch.config}"
                same = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5, equal_nan=True)  # scratch is unwritten
                same(got, expected[name], msg=lambda m, s=said: f"{s}: {m}")
            if "error_ptr" in before:
                torch.testing.assert_close(other.arguments["error_ptr"].sum(), expected["error_ptr"].sum())
        return {"kernel": launch.name, "variants": started}

    swept = {found["kernel"] for found in launches.of(part(case), where, about) if found["variants"]}
    launched = {launch.name for launch in part(case).launches()} & variants.AXES.keys()
    assert swept == launched
    assert swept


def test_every_kernel_that_is_swept_is_launched():
    bf16 = Part("narrow", Shape(B=256, D=384, M=32768, K=32, N=16, E=128), torch.bfloat16, "encode")
    launched = {launch.name for p in (*map(part, SHAPES), bf16) for launch in p.launches()}
    assert variants.AXES.keys() <= launched


def test_each_launch_is_timed_beside_its_roof(where: Place):
    rows = launches.timed(part("decode"), where, launches.Roofs(1e9, {4: 1e9}))
    noted = part("decode").launches()
    assert [(row["kernel"], row["config"]) for row in rows] == [(n.name, n.config) for n in noted]
    for row, launch in zip(rows, noted, strict=True):
        assert (row["bytes"], row["flops"]) == (launch.bytes_moved, launch.flops)
        if all(launch.grid):
            assert row["roof_ms"] == pytest.approx(1e3 * max(launch.bytes_moved, launch.flops) / 1e9, abs=1e-4)
            assert row["ms"]["median"] > 0


def test_the_fastest_variant_comes_first(where: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(variants.AXES, "feature_sums_kernel", {"FEATURES": (8, 16, 32), "num_warps": (4,)})
    refused = []

    def fits(launch: Launch) -> bool:
        refused.append(launch.config)
        return launch.arguments.get("FEATURES") == 8

    rows = variants.swept(part("gradients"), where, fits)
    (row,) = [row for row in rows if row["kernel"] == "feature_sums_kernel"]
    assert [variant["config"] for variant in row["variants"]] == ["FEATURES=8 ENTRIES=32"]
    assert row["best / chosen"] > 0
    assert any("FEATURES=32" in config for config in refused)
    assert len(rows) == 1
