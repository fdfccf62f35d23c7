"""The results for people: tables and sentences, all from study.json."""

from typing import Any


def arm_rows(found: dict[str, Any]) -> list[dict[str, str]]:
    """One row an arm: its size, its cost, and each metric's mean with its 95 % interval."""
    rows = []
    for arm in found["arms"]:
        row = {
            "arm": arm["arm"],
            "d_sae": f"{arm['d_sae']:,}",
            "parameters": f"{arm['parameters'] / 1e6:.2f} M",
            "steps": f"{arm['steps']:,}",
            "training TFLOP": f"{arm['training_flops'] / 1e12:.1f}",
            "lr": f"{arm['lr']:g}",
            "dead": f"{arm['dead_share']:.1%}",
        }
        rows.append(row | {name: interval(value) for name, value in arm["metrics"].items()})
    return rows


def verdicts(found: dict[str, Any]) -> list[str]:
    """The questions and their answers in plain words."""
    return [f"{answer['question']['text']}\n  {answer['verdict']}" for answer in found["answers"]]


def interval(value: dict[str, float | None]) -> str:
    """An interval of study.json: "0.1234 [0.1200, 0.1268]"."""
    if value["low"] is None:
        return f"{value['estimate']:.4f}"
    return f"{value['estimate']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"
