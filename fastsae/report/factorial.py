"""A 2x2 experiment: what responds to both factors together, and what clamping it does beside controls."""

import html

from fastsae.report import elements, figures
from fastsae.report.elements import Json
from fastsae.report.text import interval

_PLOTTED = 4


def section(found: Json) -> str:
    """Write the section on factorial-NAME.json."""
    told, discovery = found["stimuli"], found["discovery"]
    pool = found["options"]["pool"]
    head = (
        f"<h2>2x2: {html.escape(told['name'])}</h2><p>{html.escape(told['description'])}</p>{_cells(told, discovery)}"
    )
    families = "".join(_family(name, family, told, pool) for name, family in discovery["families"].items())
    return head + families + _clamps(found["effects"]) + _texts(found)


def _cells(told: Json, discovery: Json) -> str:
    rows = [
        {"cell": label, "texts": str(discovery["texts"][level]), "tokens a text": f"{discovery['tokens'][level]:.1f}"}
        for level, label in told["cells"].items()
    ]
    p = ", ".join(f"{html.escape(name)} {_number(value, '.2g')}" for name, value in discovery["tokens_p"].items())
    note = elements.note(f"Do texts differ in length? ANOVA p: {p}." if p else "All texts are equally long.")
    return elements.rows(rows) + note


def _family(name: str, family: Json, told: Json, pool: str) -> str:
    said = (
        f"{family['discoveries']:,} of {family['tested']:,} show an interaction (q at most 0.05), "
        f"{family['crossing']:,} of them crossing; "
        f"{family['small_p']:.1%} have a permutation p of at most 0.05, about 5 % would by luck. An interaction of "
        f"{_number(family['detectable_d'], '.2f')} standard deviations is found in 4 of 5 cases."
    )
    features = family["features"]
    labels = [", ".join(map(str, f["features"])) for f in features]
    factors = [{key: _drawn(text) for key, text in factor.items()} for factor in told["factors"]]
    drawn = [
        (
            figures.interaction_plot(f"{name} {label}", factors, f["means"]),
            f"{name} {label}: d {_number(f['d'], '.2f')}, partial η² {f['partial_eta_squared']:.2f}, "
            f"p {f['p']:.2g}, q {f['q']:.2g}" + ("" if f["crossover"] else "; no crossover, so it may be one of scale"),
        )
        for label, f in list(zip(labels, features, strict=True))[:_PLOTTED]
    ]
    if features:
        cells = [_drawn(label) for label in told["cells"].values()]
        relative = [_relative([f["means"][level]["estimate"] for level in told["cells"]]) for f in features]
        drawn.append(
            (
                figures.heat_map(f"{told['name']} {name} by cell", labels, cells, relative),
                f"{pool.capitalize()} activation by cell, over the largest of the four.",
            )
        )
    if name == "pair":
        said += (
            " A pair's response is a product: it shows that two features are active together, not what is made of it."
        )
    note = elements.note(f"{said} Bars are 95 % intervals over texts.")
    return f"<h3>Family: {name}</h3>{note}{elements.cards(drawn)}"


def _number(value: float | None, spec: str) -> str:
    """JSON holds no infinity: null is what is larger than all, or no number."""
    return "∞" if value is None else format(value, spec)


def _drawn(text: str) -> str:
    """As matplotlib is given it: what stands between two dollar signs it would read as mathematics."""
    return text.replace("$", r"\$")


def _relative(values: list[float]) -> list[float]:
    largest = max(map(abs, values))
    return [value / largest if largest else 0.0 for value in values]


def _clamps(effects: list[Json]) -> str:
    if not effects:
        return ""
    rows = [
        {
            "clamped": effect["target"],
            "active": f"{effect['active']:.0%}",
            "change": ", ".join(
                f"{level['amount']:g}: {_number(level['change'], '.2%')}" for level in effect["levels"]
            ),
            "first factor": _shown(effect["contrasts"]["first"]),
            "second factor": _shown(effect["contrasts"]["second"]),
            "interaction": _shown(effect["contrasts"]["interaction"]),
            "linear pathway": "" if effect["linear"] is None else _linear(effect["linear"]),
            "mixed model p": "" if effect["mixed"] is None or effect["mixed"]["p"] is None else _p(effect["mixed"]),
            "p, random directions": f"{effect['p_random']:.3f}",
        }
        for effect in effects
    ]
    drawn = [
        (
            figures.beside_controls(
                f"clamp {effect['target']}",
                effect["contrasts"]["interaction"],
                {
                    "random directions": _known(effect["random"]),
                    "other features": _known(effect["other"]),
                    "linear pathway": _known([effect["linear"]] if effect["linear"] else []),
                },
            ),
            f"{effect['target']}. {effect['verdict']}",
        )
        for effect in effects
        if effect["mixed"] is not None
    ]
    values = [[e["contrasts"][c]["estimate"] or 0.0 for c in ("first", "second", "interaction")] for e in effects]
    columns = ["first factor", "second factor", "interaction"]
    heat = figures.heat_map("clamps", [e["target"] for e in effects], columns, [_relative(row) for row in values])
    drawn.append((heat, "Effect on the contrasts between groups of words, over the largest of the three."))
    note = elements.note(
        "Clamped at every token of the prompts, activations change by the shown share of their length. Contrasts "
        "between the four groups of words are per unit of amount, in nats of log-probability (for words of one token: "
        "logits), with 95 % intervals over prompts. Controls change activations as much, token by token."
    )
    return f"<h3>Clamping</h3>{note}{elements.rows(rows)}{elements.cards(drawn)}"


def _linear(control: Json) -> str:
    matched = control["matched"] or 0.0  # null where lengths overflow
    short = f" (of {matched:.0%} of the length)" if matched < 0.995 else ""
    return f"{_number(control['interaction'], '.2g')}{short}"


def _known(controls: list[Json]) -> list[float]:
    return [c["interaction"] for c in controls if c["interaction"] is not None]


def _p(mixed: Json) -> str:
    over_all = f" ({mixed['p_family']:.3f} over all)" if mixed.get("p_family") is not None else ""
    return f"{mixed['p']:.3f}{over_all}" + ("" if mixed["converged"] else " (did not converge)")


def _shown(value: Json) -> str:
    return interval(value) if value["low"] is None else "{estimate:.2g} [{low:.2g}, {high:.2g}]".format(**value)


def _texts(found: Json) -> str:
    blocks = []
    for target, by_edit in found["texts"].items():
        for p, prompt in enumerate(found["prompts"]):
            rows = [{"": name, prompt: texts[p]} for name, texts in by_edit.items()]
            blocks.append(f"<h4>{html.escape(target)}</h4>{elements.rows(rows)}")
    if not blocks:
        return ""
    return f"<details><summary>text written under clamps</summary>{''.join(blocks)}</details>"
