"""docs/paper.md, against the committed results."""

from benchmarks import paper


def test_the_table_says_what_the_results_say():
    assert paper.main(["--check"]) == 0
    assert len(paper.table().splitlines()) == len(paper.ROWS) + 4
