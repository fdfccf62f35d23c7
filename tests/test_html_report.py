"""A run's HTML page, from result files made up here."""

import json
import re
from pathlib import Path

import pytest

from fastsae.files import read_json, write_json
from fastsae.report import write_html

CONDITIONS = ("identity", "identity + linear", "identity + interaction", "full")


class Numbers:
    """Numbers that each come once, so that one shown in a wrong place is missed in its own."""

    def __init__(self) -> None:
        self.given = 0.1

    def __call__(self) -> float:
        self.given += 0.00137
        return round(self.given, 4)

    def interval(self) -> dict[str, float]:
        value = self()
        return {"estimate": value, "low": round(value - 0.01, 4), "high": round(value + 0.01, 4)}


def measured(number: Numbers) -> dict:
    def spliced() -> dict:
        names = ("kl", "ce", "ce_increase", "loss_recovered", "epsilon_kl", "kl_over_epsilon")
        return {name: number.interval() for name in names}

    def behavior() -> dict:
        return {
            "ce_clean": number.interval(),
            "ce_ablated": number.interval(),
            "conditions": {name: spliced() for name in CONDITIONS},
            "kl_reduction_against_own_identity_pathway": {name: number.interval() for name in CONDITIONS[1:]},
            "ce_reduction_against_own_identity_pathway": {name: number.interval() for name in CONDITIONS[1:]},
        }

    shares = ("identity", "linear", "interaction")
    return {
        "reconstruction": {
            "rows": 4321,
            "documents": 17,
            "dead_share": number(),
            **{name: number.interval() for name in ("mse", "fvu_raw", "cosine", "l0")},
            "conditions": {name: number.interval() for name in CONDITIONS},
            "pathways": {
                name: {"variance_share": number.interval(), "unique_share": number.interval()} for name in shares
            },
            "error_reduction_against_own_identity_pathway": number.interval(),
        },
        "bos_out": behavior(),
        "bos_in": behavior(),
    }


def geometry() -> dict:
    group = {"mean": 0.3, "median": 0.3, "share": 0.5, "histogram": [3, 5, 1]}
    norms = {
        "at_init_histogram": [9, 0, 0],
        "edges": [0.0, 0.1, 0.2, 0.3],
        "groups": {"all": group, "rare": group, "dead": None},
    }
    null = {"value": -0.5, "null_mean": -0.6, "null_min": -0.7, "null_max": -0.55}
    return {
        "squared_norms": {"W_dec": norms, "V": norms},
        "weight_norm_share": {"spearman": {"linear": null, "interaction": None}},
        "contribution": {"spearman": {"all": null}},
        "dip_W_dec": {"all": {"dip": 0.0421, "p": 0.123}, "dead": None},
    }


def features() -> dict:
    example = {"document": 'a "b".py', "tokens": ["<script>", "\n", "x"], "activations": [0.0, 1.25, 2.5], "peak": 2}
    return {
        "features": [{"feature": 77, "firing_rate": 0.0123, "max_activation": 2.5, "examples": [example]}],
    }


@pytest.fixture
def run(tmp_path) -> Path:
    sae = {"architecture": "joint", "d_in": 16, "d_sae": 4096, "k": 8}
    write_json(tmp_path / "run.json", {"sae": sae, "trainer": {"steps": 20, "lr": 0.001, "seed": 3}})
    data = {"hook": "blocks.2.hook_resid_post", "model": "a<b", "text": "stdlib", "tokens": 1000, "batch_size": 64}
    write_json(tmp_path / "data.json", data)
    lines = [
        {"rows": i, "loss": 1 / i, "fvu": None if i == 2 else 1 / i, "l0": 8, "dead_share": 0.0, "rows_per_second": 9}
        for i in (1, 2, 3)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(tmp_path / "eval.json", measured(Numbers()))
    write_json(tmp_path / "geometry.json", geometry())
    write_json(tmp_path / "features.json", features())
    return tmp_path


def page(run: Path) -> str:
    names = ("eval", "geometry", "features")
    results = {name: read_json(run / f"{name}.json") if (run / f"{name}.json").exists() else None for name in names}
    return write_html(run, results).read_text()


def test_it_needs_nothing_but_itself(run):
    text = page(run)
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)|@import|url\((?!#)""", text)
    assert "<script" not in text
    assert text.count("<svg") == text.count('role="img"') == 5 + 3 + 2 + 2


def test_every_number_of_the_tables_is_the_result_s(run):
    text, found = page(run), json.loads((run / "eval.json").read_text())
    shown = [found["reconstruction"][name] for name in ("mse", "fvu_raw", "cosine", "l0")]
    shown += found["reconstruction"]["conditions"].values()
    shown.append(found["reconstruction"]["error_reduction_against_own_identity_pathway"])
    for metric in ("kl", "ce"):
        shown += found["bos_out"][f"{metric}_reduction_against_own_identity_pathway"].values()
    for condition in found["bos_out"]["conditions"].values():
        shown += [condition[name] for name in ("kl", "ce_increase", "loss_recovered", "kl_over_epsilon")]
    for value in shown:
        assert f"<td>{value['estimate']:.4f} [{value['low']:.4f}, {value['high']:.4f}]</td>" in text
    for said in ("4,321 rows of 17 held-out documents", "0.0421", "0.123", "Feature 77", "fires on 1.23% of tokens"):
        assert said in text


def test_text_is_escaped_and_shaded(run):
    text = page(run)
    assert "<span>&lt;script&gt;</span>" in text
    assert 'style="background: rgba(var(--mark), 0.38)" title="1.25">↵</span>' in text
    assert 'style="background: rgba(var(--mark), 0.75)" title="2.5">x</span>' in text
    assert 'title="a &quot;b&quot;.py"' in text
    assert "a&lt;b" in text


def test_every_color_is_known_in_light_and_dark(run):
    text = page(run)
    light, dark = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    used = set(re.findall(r"var\((--\w+)\)", text))
    assert len(used) >= 8
    for scheme in (light, dark):
        assert used <= set(re.findall(r"(--\w+):", scheme))
    assert not re.findall(r"#0[1-9]0[1-9]0[1-9]", text), "a colour of matplotlib's was not replaced"


def test_a_topk_sae_has_no_figures_of_pathways(run):
    found = measured(Numbers())
    found["reconstruction"]["error_reduction_against_own_identity_pathway"] = None
    write_json(run / "eval.json", found)
    write_json(run / "geometry.json", geometry() | {"weight_norm_share": None, "contribution": None})
    text = page(run)
    assert "own identity pathway" not in text
    assert text.count("<svg") == 5 + 3 + 2


def test_a_model_without_bos(run):
    write_json(run / "eval.json", measured(Numbers()) | {"bos_in": None})
    assert "BOS replaced" not in page(run)


def test_what_was_not_measured_names_its_command(run):
    for name in ("eval", "geometry", "features"):
        (run / f"{name}.json").unlink()
    text = page(run)
    assert f"Not measured yet: <code>fastsae eval {run}</code>" in text
    assert text.count(f"Not measured yet: <code>fastsae analyze {run}</code>") == 2


def test_damaged_files_are_named(run):
    write_json(run / "geometry.json", {"squared_norms": {}})
    with pytest.raises(ValueError, match=r"geometry\.json is damaged: 'weight_norm_share' is missing"):
        page(run)
    (run / "metrics.jsonl").write_text('{"rows": 1')
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged: line 1"):
        page(run)
    write_json(run / "run.json", {"sae": {}})
    with pytest.raises(ValueError, match=r"run\.json or data\.json beside it is damaged: 'd_in' is missing"):
        page(run)
    assert not (run / "report.html").exists()
