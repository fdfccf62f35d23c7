"""Tables, plots, and the README's agreement with the committed results."""

import json
from pathlib import Path

import pytest

from benchmarks import report as benchmark_report
from fastsae import report

ROOT = Path(__file__).parents[1]


def test_table_aligns():
    text = report.table([{"SAE": "topk", "KL": "0.5"}, {"SAE": "joint", "KL": "0.25"}])
    assert text.splitlines() == ["SAE      KL", "-----------", "topk    0.5", "joint  0.25"]


def test_plot(tmp_path):
    for name in ("a", "b"):
        lines = [json.dumps({"rows": r, "fvu": 1 / r, "dead_share": 0.5}) for r in (1, 2, 3)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines))
    report.plot_training({n: tmp_path / n for n in ("a", "b")}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_readme_says_what_was_measured():
    readme = (ROOT / "README.md").read_text()
    found = [json.loads(file.read_text()) for file in (ROOT / "benchmarks" / "results").glob("*.json")]
    of_cpus = [results for results in found if "stages" not in results]  # those of GPUs come in stages
    assert any(benchmark_report.render(readme, results) == readme for results in of_cpus)


def test_a_readme_without_the_section():
    with pytest.raises(ValueError, match="must hold a section"):
        benchmark_report.render("# fastsae", {"hardware": {}, "versions": {}, "rows": []})
