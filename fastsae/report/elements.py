"""The pieces a report page is put together from: each is a string of HTML."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]


def shaded(example: Json, highest: float) -> str:
    spans = []
    for token, activation in zip(example["tokens"], example["activations"], strict=True):
        shade = activation / highest if highest > 0 else 0.0
        told = (
            f' style="background: rgba(var(--mark), {0.75 * shade:.2f})" title="{activation:.3g}"' if shade > 0 else ""
        )
        shown = html.escape(token).replace("\n", "↵")  # lines of their own would take the page
        spans.append(f"<span{told}>{shown}</span>")
    where = html.escape(example["document"], quote=True)
    return f'<p class="text" title="{where}">{"".join(spans)}</p>'


def rows(rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row.values()) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def cards(drawn: Sequence[tuple[str, str]]) -> str:
    cards = [f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>" for svg, caption in drawn]
    return f'<div class="grid">{"".join(cards)}</div>'


def note(text: str) -> str:
    return f'<p class="note">{text}</p>'


def code(text: str) -> str:
    return f"<code>{html.escape(text)}</code>"
