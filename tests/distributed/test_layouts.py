"""Ranks in every layout train as one process does: losses, weights, counters, to rounding; codes to the bit."""

import pytest
from crew import Crew
from ranked import assert_equal_to_rounding, trained

LAYOUTS = [("two", 1), ("two", 2), ("four", 1), ("four", 2), ("four", 4)]
IDS = [f"{2 if crew == 'two' else 4} ranks, {features} of them for features" for crew, features in LAYOUTS]


@pytest.fixture(params=LAYOUTS, ids=IDS)
def layout(request: pytest.FixtureRequest) -> tuple[Crew, int]:
    crew, features = request.param
    return request.getfixturevalue(crew), features


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("topk", {}),
        ("topk", {"auxk": 5, "dead_after_tokens": 24, "clip_grad_norm": 0.05, "unit_norm_decoder": True}),
        ("joint", {"warmup_steps": 2, "decay_steps": 2, "k_anneal_from": 20, "k_anneal_steps": 3}),
        ("joint", {"auxk": 40, "dead_after_tokens": 24, "clip_grad_norm": 0.05, "unit_norm_decoder": True}),
    ],
    ids=["topk", "topk with everything", "joint", "joint with everything"],
)
def test_as_one_process(layout, name, options):
    crew, features = layout
    assert_equal_to_rounding(crew(trained, name, features, options), features, trained(name, 0, options))


@pytest.mark.parametrize("name", ["one pair", "no pairs", "all", "linear", "interaction", "sequential"])
def test_every_pathway(four, name):
    assert_equal_to_rounding(four(trained, name, 2, {}), 2, trained(name, 0, {}))
