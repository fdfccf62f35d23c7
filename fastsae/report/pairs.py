"""The pairs of features that an integration works with, or that drive a secondary SAE's features."""

from fastsae.report import elements
from fastsae.report.elements import Json


def section(found: Json) -> str:
    """Write the section on pairs.json."""
    return _pairs(found["pairs"]) if "pairs" in found else _drivers(found["drivers"])


def _pairs(found: list[Json]) -> str:
    cards = []
    for pair in found:
        i, j = pair["features"]
        highest = max((max(example["activations"]) for example in pair["examples"]), default=0.0)
        texts = "".join(elements.shaded(example, highest) for example in pair["examples"])
        said = (
            f"together on {pair['together']:.3%} of tokens ({pair['together_if_independent']:.3%} if independent), "
            f"V_i·V_j = {pair['dot']:.3f}; left out, the interaction output changes by {pair['output_change']:.2%} of "
            "its variance"
        )
        cards.append(f'<div class="feature"><h3>Pair {i}, {j}</h3>{elements.note(said)}{texts}</div>')
    note = elements.note(
        "The pairs that put most into z, |a_i a_j V_i∘V_j|² on average over held-out text, each with the places where "
        "their product is largest. V_i·V_j alone is no interaction: features never active together have one too."
    )
    return f'<h2>Pairs</h2>{note}<div class="grid">{"".join(cards)}</div>'


def _drivers(found: list[Json]) -> str:
    rows = [
        {
            "secondary feature": str(one["feature"]),
            "active on rows": f"{one['rows']:,}",
            "pair": "{}, {}".format(*pair["features"]),
            "share": f"{pair['share']:.1%}",
            "together on": f"{pair['together']:.1%}",
        }
        for one in found
        for pair in one["pairs"][:4]
    ]
    note = elements.note(
        "What drives secondary features: the hidden layer is a sum over pairs of primary features, so each pair's "
        "share of a feature's pre-activation (constants left out) is exact, and all shares add up to 1. Negative ones "
        "hold it down."
    )
    return f"<h2>Drivers</h2>{note}{elements.rows(rows)}"
