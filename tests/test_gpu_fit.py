"""Constants fitted to a GPU's results, without a GPU: from rows made by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import fit
from csrc_triton import plan


def row(stage: str, case: str, **facts: Any) -> dict[str, Any]:
    return {"stage": stage, "case": case, "status": "ok", **facts}


def ms(median: float) -> dict[str, float]:
    return {"median": median}


def swept(K: int, gather: float, dense: float) -> dict[str, Any]:
    times = {way: {part: ms(t) for part in fit._PARTS.values()} for way, t in (("gather", gather), ("dense", dense))}
    return row("benchmark", f"gather or dense, D=4096 K={K}", B=4096, D=4096, M=32768, K=K, **times)


def encoded(D: int, cublas: float, triton: float) -> dict[str, Any]:
    times = {way: {"ms": {"encode": ms(t)}} for way, t in (("cublas", cublas), ("triton", triton))}
    return row("benchmark", f"encode's GEMM, D={D}", B=8192, D=D, M=32768, K=32, **times)


LAUNCH = {"kernel": "a_kernel", "config": "BLOCK=8", "warps": 4, "stages": 1}
ROWS = [
    row("benchmark", "copy", bytes_per_second=2e12),
    row("benchmark", "GEMM, modern, bfloat16", flops=7e14),
    swept(16, gather=1.0, dense=4.0),
    swept(1024, gather=8.0, dense=4.0),
    encoded(384, cublas=1.0, triton=0.9),
    encoded(4096, cublas=2.0, triton=2.2),
    row("launches", "modern", launches=[LAUNCH | {"ms": ms(2.0), "share": 0.6}, LAUNCH | {"bytes": 0}]),
    row(
        "tune",
        "modern",
        launches=[
            LAUNCH | {"ms": ms(2.0), "variants": [{"config": "BLOCK=16", "warps": 8, "stages": 1, "ms": 1.5}]},
            LAUNCH | {"ms": ms(2.0), "variants": [{"config": "BLOCK=32", "warps": 8, "stages": 1, "ms": 1.99}]},
        ],
    ),
    {"stage": "launches", "case": "paper", "status": "failed"},
]


def test_rates_are_told_beside_those_assumed():
    assert fit.rates(ROWS) == {"BANDWIDTH": (plan.BANDWIDTH, 2e12), "FLOPS[2]": (plan.FLOPS[2], 7e14)}


def test_a_choice_loses_what_the_other_way_would_have_saved():
    choices = {choice.what: choice for choice in fit.decode_choices(ROWS)}
    few, many = (choices[f"gather or dense, D=4096 K={K}, forward"] for K in (16, 1024))
    assert (few.planned, few.fastest, few.lost) == ("gather", "gather", 0)
    assert (many.planned, many.lost) == ("dense", 0)
    wrong = fit.Choice("x", "gather", {"gather": 3.0, "dense": 2.0})
    assert (wrong.fastest, wrong.lost, fit.lost([wrong, few])) == ("dense", 1.0, 1 / 3)
    assert str(wrong).endswith("loses 50%")
    assert [choice.planned for choice in fit.encode_choices(ROWS)] == ["triton", "cublas"]


def test_other_rates_make_another_plan_and_are_taken_back():
    many = swept(1024, 8.0, 4.0)
    with fit.assuming(FLOPS={2: 1e9, 4: 1e9}):
        assert {choice.planned for choice in fit.decode_choices([many])} == {"gather"}
    assert {choice.planned for choice in fit.decode_choices([many])} == {"dense"}


def test_kernels_and_faster_cuts():
    assert fit.kernels(ROWS) == ["    2.000 ms    60% of its roof  modern: a_kernel BLOCK=8"]
    (found,) = fit.better(ROWS)
    assert found == (
        "    0.500 ms of 2.000  modern: a_kernel BLOCK=8 warps=4 stages=1\n      -> BLOCK=16 warps=8 stages=1"
    )


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(fit, "RESULTS", tmp_path)
    with pytest.raises(SystemExit):
        fit.main([])
    assert "there are none in" in capsys.readouterr().err
    (tmp_path / "nvidia-h200.json").write_text(json.dumps({"rows": ROWS}))
    assert fit.main([]) == 0
    printed = capsys.readouterr().out
    assert "gather or dense: the plan loses 0.0%" in printed
    assert "BANDWIDTH  4.3e+12  2e+12" in printed
    (tmp_path / "nvidia-h200.json").write_text(json.dumps({"rows": ROWS[:2]}))
    assert fit.main([]) == 0
    assert "gather or dense: not measured" in capsys.readouterr().out
