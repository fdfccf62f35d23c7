"""Text by document: where activations come from, and which documents are held out."""

import hashlib
import json
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastsae import packages

STDLIB = "stdlib"
_FILE_DOCUMENT_CHARS = 4000
# How WikiText, whose rows are lines, writes the title of an article.
_TITLE = re.compile(r" = [^=].* = \n")
_TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py"}
# Test suites and code pages are mostly tables of literals, and some distributions leave the former out.
_SKIPPED_STDLIB_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "__pycache__",
}


@dataclass(frozen=True)
class Document:
    """One text. `name` decides, for good, whether the document is held out."""

    name: str
    text: str


def read_documents(source: str | Path = STDLIB) -> Iterator[Document]:
    """The documents of `source`, in a fixed order.

    source: "stdlib" (the Python sources of the running interpreter's standard library); a folder (every .txt, .md,
    .rst and .py below it is a document); a text file (cut at blank lines into documents of about 4,000 characters); a
    .jsonl file (the "text" of each line is a document); or the name of a Hugging Face dataset whose train split has a
    "text" column, optionally with a configuration: "wikitext:wikitext-103-raw-v1". Each row is a document; in WikiText,
    whose rows are lines, each article.
    Raises FileNotFoundError when `source` is none of these, ValueError for a dataset or a line without a "text".
    """
    path = Path(source)
    if source == STDLIB:
        yield from _files_below(Path(sysconfig.get_paths()["stdlib"]), {".py"}, _SKIPPED_STDLIB_FOLDERS)
    elif path.is_dir():
        yield from _files_below(path, _TEXT_SUFFIXES, {"__pycache__"})
    elif path.is_file():
        yield from _json_documents(path) if path.suffix == ".jsonl" else _file_documents(path)
    else:
        yield from _dataset_documents(str(source))


def is_held_out(name: str, share: float = 0.05) -> bool:
    """Whether the document `name` belongs to the held-out split: a fixed `share` of all names, by their hash."""
    return int.from_bytes(_hash(name)[:8], "big") < share * 2**64


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()


def _files_below(folder: Path, suffixes: set[str], skipped: set[str]) -> Iterator[Document]:
    kept = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in skipped]  # never entered: packages of others are many
        kept += [path for path in (Path(root, name) for name in names) if path.suffix in suffixes and path.is_file()]
    # By a hash: the first million tokens are a fair sample, and not the first letters of the alphabet. Not by the hash
    # that holds documents out: it would put those first.
    kept.sort(key=lambda p: _hash(f"order of {p.relative_to(folder).as_posix()}"))
    if not kept:
        raise FileNotFoundError(f"read_documents: no {'/'.join(sorted(suffixes))} files below {folder}")
    for path in kept:
        if text := _read_text(path):
            yield Document(path.relative_to(folder).as_posix(), text)


def _read_text(path: Path) -> str:
    """The text of a file; none, with a warning, if it does not look like UTF-8 text."""
    text = path.read_text(encoding="utf-8", errors="replace")
    strange = text.count("\ufffd") + text.count("\0")
    if strange > len(text) / 10:  # Latin-1 has fewer, UTF-16 and what is no text more
        warnings.warn(f"{path} is not UTF-8 text ({strange} strange characters of {len(text)}): skipped", stacklevel=2)
        return ""
    return text if text.strip() else ""


def _file_documents(path: Path) -> Iterator[Document]:
    paragraphs = re.split(r"(?<=\n\n)", _read_text(path))
    text, number = "", 0
    for position, paragraph in enumerate(paragraphs):
        text += paragraph
        last = position == len(paragraphs) - 1
        if text.strip() and (last or len(text) >= _FILE_DOCUMENT_CHARS):
            yield Document(f"{path.name}#{number}", text)
            text, number = "", number + 1


def _json_documents(path: Path) -> Iterator[Document]:
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if line.strip() else {"text": ""}
            except (ValueError, RecursionError) as error:
                raise ValueError(f"read_documents: line {number} of {path} is not valid JSON ({error})") from error
            if not isinstance(row, dict) or "text" not in row or not isinstance(row["text"], str | None):
                raise ValueError(f'read_documents: line {number} of {path} holds no string "text"')
            text = (row["text"] or "").encode(errors="replace").decode()  # JSON may hold half of a surrogate pair
            if text.strip():
                yield Document(f"{path.name}#{number}", text)


def _dataset_documents(spec: str) -> Iterator[Document]:
    name, _, configuration = spec.partition(":")
    packages.need("datasets", f"read_documents: {spec!r} is no file or folder, and reading it as a dataset")
    try:
        import datasets

        rows = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
    except ImportError as error:
        raise ImportError(
            f"read_documents: {spec!r} is no file or folder, and reading it as a dataset needs "
            "`pip install fastsae[lab]`"
        ) from error
    except Exception as error:
        raise FileNotFoundError(
            f"read_documents: {spec!r} is neither 'stdlib', nor a file, nor a folder, and could not be loaded as a "
            f"Hugging Face dataset ({type(error).__name__}: {error}). Check the spelling, the network, or download "
            "the text and pass its path."
        ) from error
    article: Document | None = None
    for number, row in enumerate(rows):
        if "text" not in row:
            raise ValueError(f"read_documents: dataset {spec!r} has columns {sorted(row)}, expected one named 'text'")
        text = row["text"] or ""
        if _TITLE.fullmatch(text):
            if article:
                yield article
            article = Document(f"{spec}/{number}", text)
        elif article:
            article = Document(article.name, article.text + text)
        elif text.strip():
            yield Document(f"{spec}/{number}", text)
    if article:
        yield article
