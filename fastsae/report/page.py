"""A run as one HTML page that needs nothing but itself: no network, no scripts, light and dark."""

import html
import json
from collections.abc import Mapping
from pathlib import Path

from fastsae import files
from fastsae.report import elements, factorial, figures, pairs
from fastsae.report.elements import Json
from fastsae.report.text import interval
from fastsae.report.training import read_metrics

# What drawing and formatting raise on values of other kinds than were written.
_OTHER_FORM = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def write_html(run: Path, results: Mapping[str, Json | None]) -> Path:
    """Write RUN/report.html from what training left in RUN, and the results "eval", "geometry", "features", "pairs" and
    "factorial-...".

    What is None was not measured, and the command that measures it is named; pairs, which not every SAE has, are left
    out. Raises ValueError naming what is damaged.
    """
    described = files.read_object(run / "run.json")
    data = files.read_object(run / "data.json") if (run / "data.json").is_file() else {}
    made_by = {
        "eval": (f"fastsae eval {run}", _measured),
        "geometry": (f"fastsae analyze {run}", _geometry),
        "features": (f"fastsae analyze {run}", _features),
    }
    made_by |= {"pairs": (f"fastsae analyze {run}", pairs.section)} if results.get("pairs") is not None else {}
    experiments = sorted(name for name in results if name.startswith("factorial-"))
    made_by |= {name: (f"fastsae factorial {run} STIMULI", factorial.section) for name in experiments}
    try:
        head = _head(run, described, data)
    except _OTHER_FORM as error:
        raise ValueError(
            f"{run / 'run.json'} or data.json beside it is damaged: {error} is missing or wrong; train the run again"
        ) from error
    sections = [head, _training(run)]
    for name, (command, section) in made_by.items():
        result = results[name]
        if result is None:
            sections.append(
                f"<h2>{name.capitalize()}</h2>{elements.note('Not measured yet: ' + elements.code(command))}"
            )
            continue
        try:
            sections.append(section(result))
        except _OTHER_FORM as error:
            damaged = f"{run / name}.json is damaged: {error} is missing or wrong; run `{command}` again"
            raise ValueError(damaged) from error
    style = Path(__file__).with_name("style.css").read_text()
    title = html.escape(f"fastsae: {run.name}")
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>\n{style}</style></head><body>\n" + "\n".join(sections) + "\n</body></html>\n"
    )
    out = run / "report.html"
    # Names of files need not be UTF-8.
    files.write_atomically(out, lambda p: p.write_text(page, encoding="utf-8", errors="backslashreplace"))
    return out


def _head(run: Path, described: Json, data: Json) -> str:
    sae = described["sae"]
    shape = f"d_in {sae['d_in']:,}, d_sae {sae['d_sae']:,}, k {sae['k']}"
    trainer = described["trainer"]
    batches = f" of {data['batch_size']:,} activations" if data else ""
    said = f"{sae['architecture']} SAE, {shape}; {trainer['steps']:,} steps{batches}, lr {trainer['lr']:g}, "
    said += f"seed {trainer['seed']}."
    if not data:
        where = "Activations that a Trainer was given in Python."
    elif data.get("activations"):
        where = f"Activations in {data['activations']}."
    else:
        where = f"{data['hook']} of model {data['model']} on {data['text']}, {data['tokens']:,} tokens of text."
    options = elements.rows(
        [{"option": name, "value": json.dumps(value)} for part in (sae, trainer) for name, value in part.items()]
    )
    return (
        f"<h1>{html.escape(run.name)}</h1><p>{html.escape(said)}</p><p>{html.escape(where)}</p>"
        f"<details><summary>all options</summary>{options}</details>"
    )


def _training(run: Path) -> str:
    lines = read_metrics(run)
    drawn = [
        (figures.curve(lines, "fvu", "fraction of variance unexplained", log=True), "Of the batch just trained on."),
        (figures.curve(lines, "loss", "loss", log=True), "Mean squared error, normalised activations; dropout on."),
        (
            figures.curve(lines, "dead_share", "dead share"),
            "Share of features inactive for the last dead_after_tokens tokens.",
        ),
        (figures.curve(lines, "l0", "L0"), "Active features a token; fewer than k where pre-activations are negative."),
        (
            figures.curve(lines, "rows_per_second", "rows/s"),
            "Harvesting included where activations are made on the fly.",
        ),
    ]
    return f"<h2>Training</h2>{elements.cards(drawn)}"


def _measured(found: Json) -> str:
    return _of_rows(found) if found["bos_out"] is None else _of_text(found)


def _of_rows(found: Json) -> str:
    """Without a language model there is the reconstruction alone."""
    r, options = found["reconstruction"], found["options"]
    which = "held-out groups" if options["held_out"] else "groups"
    over = f"{r['rows']:,} rows in {r['documents']:,} {which} of {options['activations']}"
    by_condition = elements.rows(
        [{"reconstruction": name, "FVU": interval(fvu)} for name, fvu in r["conditions"].items()]
    )
    return (
        f"<h2>Reconstruction</h2>{elements.note(f'{over}; 95 % intervals over groups.')}{by_condition}"
        f"{elements.cards([_shares(r)])}{elements.rows(_scalars(r))}"
    )


def _scalars(r: Json) -> list[dict[str, str]]:
    return [
        {"measure": "MSE", "value": interval(r["mse"])},
        {"measure": "FVU, raw activations", "value": interval(r["fvu_raw"])},
        {"measure": "cosine", "value": interval(r["cosine"])},
        {"measure": "L0", "value": interval(r["l0"])},
        {"measure": "dead in these rows", "value": f"{r['dead_share']:.4f}"},
    ]


def _shares(r: Json) -> tuple[str, str]:
    return (
        figures.bars(
            "Pathway shares",
            {
                "size": {p: v["variance_share"] for p, v in r["pathways"].items()},
                "use": {p: v["unique_share"] for p, v in r["pathways"].items()},
            },
            "share of the variance of x",
        ),
        "Size: variance of the summand. Use: FVU added when it is held at its mean; the others were trained to "
        "rely on it, so this is no gain over an SAE trained without it.",
    )


def _of_text(found: Json) -> str:
    r, bos = found["reconstruction"], {"BOS kept": found["bos_out"]}
    if found["bos_in"] is not None:
        bos["Including BOS"] = found["bos_in"]
    b = found["bos_out"]
    held_out = f"{r['rows']:,} rows of {r['documents']} held-out documents; 95 % intervals over documents."
    table = elements.rows(
        [
            {
                "reconstruction": name,
                "FVU": interval(r["conditions"][name]) if name in r["conditions"] else "",
                "KL": interval(c["kl"]),
                "CE increase": interval(c["ce_increase"]),
                "loss recovered": interval(c["loss_recovered"]),
                "KL / random error": interval(c["kl_over_epsilon"]),
            }
            for name, c in b["conditions"].items()
        ]
    )
    scalars = elements.rows(
        [
            *_scalars(r),
            {"measure": "CE, clean model", "value": interval(b["ce_clean"])},
            {"measure": "CE, zeros", "value": interval(b["ce_ablated"])},
        ]
    )
    kl = [
        (
            figures.bars(
                f"KL by condition, {name}",
                {
                    "spliced": {c: v["kl"] for c, v in one["conditions"].items()},
                    "random error of its size": {c: v["epsilon_kl"] for c, v in one["conditions"].items()},
                },
                "KL(clean || spliced), nats",
            ),
            f"{name}. Each condition beside random errors as large as its own, token by token: a condition with larger "
            "errors also has a stronger control, so compare bars within a pair.",
        )
        for name, one in bos.items()
    ]
    return (
        "<h2>Reconstruction and behaviour</h2>"
        f"{elements.note(held_out)}"
        f"{table}{elements.cards([*kl, _shares(r)])}{scalars}{_own_branch(r, b)}"
    )


def _own_branch(r: Json, b: Json) -> str:
    own = r["error_reduction_against_own_identity_pathway"]
    if own is None:
        return ""
    title = "the paper's figure, against the SAE's own identity pathway"
    rows = [{title: "error reduction, full", "value": interval(own)}]
    for metric in ("kl", "ce"):
        for name, value in b[f"{metric}_reduction_against_own_identity_pathway"].items():
            told = f"{metric.upper()} reduction, {name}"
            rows.append({title: told, "value": interval(value)})
    note = "The identity pathway was never trained to reconstruct alone: none of these compares with a TopK SAE."
    return f"{elements.rows(rows)}{elements.note(note)}"


def _geometry(found: Json) -> str:
    drawn = [
        (
            figures.norm_histogram(f"Squared norms of {name} rows by firing rate", norms),
            f"Rows of {name}. Features that hardly fire hardly move: two humps need not be two kinds of features.",
        )
        for name, norms in found["squared_norms"].items()
    ]
    shares = found["weight_norm_share"]
    if shares is not None:
        known = {name: value for name, value in shares["spearman"].items() if value is not None}
        drawn.append(
            (
                figures.beside_null("Weight-norm shares against squared norm", known, "rank correlation with |W_dec|²"),
                "A share of weight norm holds |W_dec| in its denominator, so it correlates with it by construction: "
                "the band is the random baseline: the same W_dec with random W_lin and V.",
            )
        )
    contribution = found["contribution"]
    if contribution is not None:
        known = {name: value for name, value in contribution["spearman"].items() if value is not None}
        drawn.append(
            (
                figures.beside_null("Integration's share of contribution", known, "rank correlation with |W_dec|²"),
                "What features add to the output while they are active, by firing-rate group, beside W_lin and V drawn "
                "anew.",
            )
        )
    dips = elements.rows(
        [
            {"features": name, "dip": f"{dip['dip']:.4f}", "p (unimodal)": f"{dip['p']:.3f}"}
            for name, dip in found["dip_W_dec"].items()
            if dip is not None
        ]
    )
    note = (
        "Hartigan's dip test on the squared norms of W_dec, against the uniform distribution: a small p says that they "
        "have more than one mode. If it is small for all and not within groups, firing rates explain it."
    )
    return f"<h2>Geometry</h2>{elements.cards(drawn)}{dips}{elements.note(note)}"


def _features(found: Json) -> str:
    cards = []
    for feature in found["features"]:
        examples = feature["examples"]
        of_rows = any("row" in example for example in examples)
        if of_rows:
            texts = elements.rows(
                [
                    {"group": one["group"], "row": f"{one['row']:,}", "activation": f"{one['activation']:.4g}"}
                    for one in examples
                ]
            )
        else:
            texts = "".join(elements.shaded(example, feature["max_activation"]) for example in examples)
        rate = f"fires on {feature['firing_rate']:.2%} of {'rows' if of_rows else 'tokens'}"
        rate += f", at most {feature['max_activation']:.3g}"
        cards.append(f'<div class="feature"><h3>Feature {feature["feature"]}</h3>{elements.note(rate)}{texts}</div>')
    note = elements.note(
        "The features that are largest in the identity pathway (a² |W_dec|²), each with the places in held-out text, "
        "or the rows, where it is strongest. What these have in common need not hold where it is weak."
    )
    return f'<h2>Features</h2>{note}<div class="grid">{"".join(cards)}</div>'
