"""Every published number of arXiv 2507.00269 beside what is measured in its place on the embedded model.

    python -m benchmarks.paper            # trains, measures; docs/results/paper.json and the table of docs/paper.md
    python -m benchmarks.paper --check    # does the table say what the committed results say?

What was done before is not done again: delete runs/paper to begin anew.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import hardware, versions
from fastsae import files
from fastsae.report import interval, markdown

ROOT = Path(__file__).parents[1]
RESULTS, STUDY, PAGE = (ROOT / "docs" / name for name in ("results/paper.json", "results/study.json", "paper.md"))
SETS = ("formality_emotion", "code_files", "code_failure")
_TRAINING = "--tokens 1000000 --steps 1500 --warmup-steps 75 --decay-steps 300 --store runs/paper/activations"
COMMANDS = {
    "runs/paper/joint/sae/config.json": (
        f"train joint {_TRAINING} --d-sae 4096 --k 32 --d-embedding 64 --lr 4e-3 --run-dir runs/paper/joint"
    ),
    "runs/paper/secondary/sae/config.json": (
        f"train secondary {_TRAINING} --base runs/paper/joint --lr 1e-3 --run-dir runs/paper/secondary"
    ),
    **{f"runs/paper/{run}/eval.json": f"eval runs/paper/{run}" for run in ("joint", "secondary")},
    **{f"runs/paper/{run}/geometry.json": f"analyze runs/paper/{run}" for run in ("joint", "secondary")},
    **{
        f"runs/paper/secondary/factorial-{name.replace('_', '-')}.json": (
            f"factorial runs/paper/secondary {name} --directions 20 --others 5 --new-tokens 12 --clamped 1"
        )
        for name in SETS
    },
}
"""Needed file -> the command line of `fastsae` that makes it."""

Found = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One published number."""

    what: str
    published: str
    ours: Callable[[Found, Found], str]
    """Our figure, from paper.json and study.json."""
    difference: str
    """Difference between the definitions."""


def _arm(study: Found, name: str, metric: str, part: str = "metrics") -> Found:
    return next(arm for arm in study["arms"] if arm["arm"] == name)[part][metric]


def _relative(study: Found, arm: str, baseline: str, metric: str) -> str:
    """The change of `arm` over `baseline`, with its interval."""
    for answer in study["answers"]:
        if (answer["question"]["arm"], answer["question"]["baseline"]) == (arm, baseline):
            found = next(c["relative"] for c in answer["comparisons"] if c["metric"] == metric)
            return "{estimate:+.1%} [{low:+.1%}, {high:+.1%}]".format(**found)
    raise ValueError(f"{STUDY} compares no {arm} with {baseline}; run the study again")


def _percent(value: Found) -> str:
    return "{estimate:.1%} [{low:.1%}, {high:.1%}]".format(**value)


def _null(value: Found) -> str:
    return "{value:.3f} (random baseline {null_mean:.3f})".format(**value)


def _effects(found: Found) -> str:
    """Clamped features of all sets: how many, and how far the largest goes."""
    clamped = [e for one in found["factorial"].values() for e in one["effects"] if e["target"] != "interaction"]
    moved = [e for e in clamped if e["active"] > 0]
    beyond = sum("More than random directions do" in e["verdict"] for e in moved)
    largest = max(abs(level["contrasts"]["interaction"]["estimate"]) for e in moved for level in e["levels"])
    return (
        f"{len(clamped)} chosen features, {len(moved)} of them active on the prompts: at most {largest:.1e} nats at "
        f"any amount; {beyond} beyond random directions over prompts and words"
    )


def _linear(found: Found) -> str:
    moved = [e for one in found["factorial"].values() for e in one["effects"] if e["linear"] and e["active"] > 0]
    pairs = [f"{e['target']} {e['contrasts']['interaction']['estimate']:.1e} and {e['linear']:.1e}" for e in moved[:3]]
    return "interaction per unit of amount, clamped and linear: " + "; ".join(pairs)


def _discovered(found: Found) -> str:
    told = []
    for name, one in found["factorial"].items():
        family = one["families"]["secondary"]
        told.append(f"{name}: {family['discoveries']} of {family['tested']} ({family['small_p']:.0%} with p < 0.05)")
    return "; ".join(told)


def _parameters(found: Found) -> str:
    p = found["joint"]["parameters"]
    pairwise = sum(p[name] for name in ("V", "W1", "b1", "W2", "b2"))
    linear = p["W_lin"] + p["b_lin"]
    every = sum(p.values())
    return f"{every:,}: {linear / every:.1%} linear pathway, {pairwise / every:.1%} pairwise"


ROWS = (
    Row(
        "TopK SAE by itself: variance explained, MSE",
        "0.864 (later 0.884), 0.136 (0.114)",
        lambda p, s: f"FVU {interval(_arm(s, 'topk', 'FVU'))}",
        "held-out documents, FVU = 1 - variance explained; published: tokens of windows that were trained on too",
    ),
    Row(
        "sequential: error less than of its base",
        "23.2 % (4.7 % where k = n = 500)",
        lambda p, s: " against ".join(interval(_arm(s, name, "FVU")) for name in ("sequential", "topk")) + " FVU",
        "k of the base as it was trained (published: a base of k = 1024 run at 250); held-out documents",
    ),
    Row(
        "joint: error less than of its own identity pathway",
        "41.3 %",
        lambda p, s: _percent(p["joint"]["error_reduction"]),
        "the same definition; the identity pathway was never trained to reconstruct alone",
    ),
    Row(
        "joint against a TopK SAE of its own width",
        "(error +18 % or more, from the published numbers)",
        lambda p, s: _relative(s, "joint", "topk", "FVU") + " FVU",
        "a TopK SAE trained by itself, same k, data, steps",
    ),
    Row(
        "joint against a TopK SAE of as many parameters",
        "not measured",
        lambda p, s: _relative(s, "joint", "topk_wide", "FVU") + " FVU",
        "the same, wider",
    ),
    Row(
        "output of the integration by mean absolute value, linear : pairwise",
        "94.0 : 6.0",
        lambda p, s: "{:.1f} : {:.1f}".format(
            100 - 100 * p["joint"]["interaction_share"], 100 * p["joint"]["interaction_share"]
        ),
        "the same definition, biases included; the share of variance that the pairwise pathway explains by itself is "
        "in `fastsae eval`",
    ),
    Row(
        "KL over that of random errors",
        "1.95 (joint), 4.04 (its identity pathway)",
        lambda p, s: ", ".join(f"{interval(p['joint']['kl_over_epsilon'][c])} ({c})" for c in ("full", "identity")),
        "each condition beside random errors of its own size, at the trained hook, normalisation undone, BOS kept; "
        "published: one radius for both, one block after the trained one, raw activations",
    ),
    Row(
        "KL less than of its own identity pathway: joint; linear; pairwise",
        "51.9 %; 50.9 %; 8.6 %",
        lambda p, s: "; ".join(
            _percent(p["joint"]["kl_reduction"][c]) for c in ("full", "identity + linear", "identity + interaction")
        ),
        "the same ratio, on held-out documents, intervals over documents",
    ),
    Row(
        "joint against a TopK SAE of as many parameters, KL",
        "not measured",
        lambda p, s: _relative(s, "joint", "topk_wide", "KL"),
        "published: 1.65 beside 2.21 of the TopK SAE in another run (25 % less)",
    ),
    Row(
        "squared decoder norms have two modes",
        "about 0.05 and 0.37",
        lambda p, s: "dip test p: all {all:.3f}, alive {alive:.3f}".format(**p["joint"]["dip_p"]),
        "beside the same test among features that fire: where two modes become one, the low one is those that do not",
    ),
    Row(
        "Spearman of weight-norm share with squared norm: linear; pairwise; identity",
        "-0.866; -0.922; +0.987",
        lambda p, s: "; ".join(_null(p["joint"]["spearman"][c]) for c in ("linear", "interaction", "identity")),
        "the same definition, beside a random baseline: the same W_dec with random W_lin and V",
    ),
    Row(
        "mean absolute cosine of decoder rows",
        "0.0148 (chance 0.0141)",
        lambda p, s: "{mean_abs_cosine:.4f} (random {mean_abs_cosine_random:.4f})".format(**p["joint"]["directions"]),
        "the same; random rows of the same number and width beside it",
    ),
    Row(
        "parameters",
        "496 M: 32.3 % integration, 3 % pairwise",
        lambda p, s: _parameters(p),
        "32.3 % is W_lin alone; V, W1 and W2 are the pairwise pathway",
    ),
    Row(
        "secondary SAE: variance explained",
        "0.96",
        lambda p, s: f"{1 - p['secondary']['fvu']['estimate']:.3f}",
        "2 % of its features active, in both by construction; hidden layer through the pooling the network was trained "
        "with, held-out documents",
    ),
    Row(
        "KL through the secondary SAE",
        "not measured",
        lambda p, s: ", ".join(f"{interval(value)} ({name})" for name, value in p["secondary"]["kl"].items()),
        "the base with its interaction left out, as trained, and from what the secondary SAE makes of the hidden layer",
    ),
    Row(
        "secondary features that respond to both factors",
        "900 of 5,000 with p < 0.05; F = 26.7 for the one reported (10 texts a cell), 41.6 for another (50)",
        lambda p, s: _discovered(p),
        "interaction of a two-way ANOVA, permutation null, false discoveries at 5 %; published: one-way ANOVA over the "
        "four cells, uncorrected",
    ),
    Row(
        "interaction of a clamped secondary feature",
        "7.3e-4, 1.5e-4, 4.5e-4 logits at -4, 0, 4 (p = 0.03)",
        lambda p, s: _effects(p),
        "per prompt, whole words, all amounts one test, beside changes of equal length; published: F of 40 arbitrary "
        "word pairs against 40, amounts as three tests",
    ),
    Row(
        "linear control",
        "0.000",
        lambda p, s: _linear(p),
        "the same features in the linear pathway, as long at every token; published: other features, not active",
    ),
)


def collect() -> Found:
    """Collect the figures of the table from the results in runs/paper."""
    folder = ROOT / "runs" / "paper"
    joint, secondary = (files.read_json(folder / name / "eval.json") for name in ("joint", "secondary"))
    geometry = files.read_json(folder / "joint" / "geometry.json")
    r, b = joint["reconstruction"], joint["bos_out"]
    from fastsae.modules import load

    sizes = {name: p.numel() for name, p in load(folder / "joint" / "sae").named_parameters()}
    return {
        "joint": {
            "parameters": sizes,
            "fvu": r["fvu"],
            "error_reduction": r["error_reduction_against_own_identity_pathway"],
            "interaction_share": r["interaction_share_of_mean_abs"],
            "kl_reduction": b["kl_reduction_against_own_identity_pathway"],
            "kl_over_epsilon": {name: c["kl_over_epsilon"] for name, c in b["conditions"].items()},
            "dip_p": {name: dip["p"] for name, dip in geometry["dip_W_dec"].items() if dip is not None},
            "spearman": geometry["weight_norm_share"]["spearman"],
            "directions": geometry["directions"],
        },
        "secondary": {
            "fvu": secondary["reconstruction"]["fvu"],
            "kl": {name: c["kl"] for name, c in secondary["bos_out"]["conditions"].items()},
        },
        "factorial": {name: _experiment(folder / "secondary" / _result(name)) for name in SETS},
        "hardware": hardware(),
        "versions": versions(),
    }


def _result(name: str) -> str:
    return f"factorial-{name.replace('_', '-')}.json"


def _experiment(path: Path) -> Found:
    found = files.read_json(path)
    families = {
        name: {key: family[key] for key in ("tested", "discoveries", "small_p", "detectable_d")}
        | {"first": family["features"][:3]}
        for name, family in found["discovery"]["families"].items()
    }
    kept = ("target", "active", "levels", "contrasts", "mixed", "p_random", "verdict")
    effects = [
        {key: effect[key] for key in kept}
        | {"linear": effect["linear"]["interaction"] if effect["linear"] else None}
        | {"random": [control["interaction"] for control in effect["random"]]}
        for effect in found["effects"]
    ]
    return {"options": found["options"], "families": families, "effects": effects}


def table() -> str:
    """The table of docs/paper.md, from the committed results."""
    paper, study = files.read_json(RESULTS), files.read_json(STUDY)
    header = ["published quantity", "published", "here", "how the definitions differ"]
    rows = ([row.what, row.published, row.ours(paper, study), row.difference] for row in ROWS)
    found = paper["hardware"] | paper["versions"]
    told = (
        f"{found['cpu']}, {found['threads']} threads, torch {found['torch']}, commit {found['commit']}, {found['date']}"
    )
    source = f"docs/results/paper.json ({told}) and docs/results/study.json; `python -m benchmarks.paper`."
    return f"{markdown.table(header, rows, words=4)}\n\n{source}"


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        text = PAGE.read_text()
        return int(text != markdown.with_section(text, "paper", table()))
    for there, command in COMMANDS.items():
        if not (ROOT / there).exists():
            subprocess.run([sys.executable, "-m", "fastsae.cli", *command.split()], cwd=ROOT, check=True)
    RESULTS.write_text(json.dumps(collect(), indent=1) + "\n")
    markdown.put_section(PAGE, "paper", table())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
