"""Markdown: tables, and the sections of pages written by hand that results go into."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from fastsae import files


def table(header: Sequence[str], rows: Iterable[Iterable[str]], words: int = 1) -> str:
    """The first columns are `words`, the others numbers, which go to the right."""
    lines = [list(header), ["---"] * words + ["---:"] * (len(header) - words)]
    lines += [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_section(text: str, name: str, content: str) -> str:
    """The text of a page, with `content` in place of what lies between <!-- name --> and <!-- /name -->.

    Raises ValueError where the two marks are not there once each.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"expected one {begin} and one {end}, between which the results go")
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n{content.rstrip()}\n{end}{after}"


def put_section(page: Path, name: str, content: str) -> None:
    """Write a page anew, with_section. Raises ValueError naming the page."""
    try:
        text = with_section(page.read_text(encoding="utf-8"), name, content)
    except ValueError as error:
        raise ValueError(f"{page}: {error}") from error
    files.write_atomically(page, lambda p: p.write_text(text, encoding="utf-8"))
