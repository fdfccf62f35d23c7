"""Documents out of one file, told by what lies in it: text, or rows of JSON, CSV, Parquet and Arrow."""

import codecs
import csv
import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from fastsae.extras import LAB

ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_DOCUMENT_CHARS = 4000
# Without a blank line in so much text, lines are documents of their own. Many in one would leave few to hold out; one
# each, windows of mostly padding. So many characters fill one window.
_LONG, _LINES_CHARS = 16_000, 1000
# A line of this length is a whole corpus, or a book, and is cut between words.
_ENORMOUS_LINE = 100_000
# Some languages put no spaces between words: there a part ends after so many characters more.
_PART_OF_LINE = re.compile(r".{4000}\S{0,1000}\s?|.+", re.DOTALL)
# How WikiText, whose rows are lines, writes the title of an article.
_TITLE = re.compile(r" = [^=].* = \n")
_MARKUP = re.compile(r"\s*<(!doctype|html|\?xml)", re.IGNORECASE)
_BLANKS, _CONTENT = re.compile(r"\s*"), re.compile(r"\S")
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
# In this order: a mark of UTF-32 begins with one of UTF-16.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_NO_TEXT = {  # how such files begin
    b"\x28\xb5\x2f\xfd": "packed by zstd; unpack it first (zstd -d)",
    b"BZh": "packed by bzip2; unpack it first (bunzip2)",
    b"\xfd7zXZ\0": "packed by xz; unpack it first (unxz)",
    b"PK\3\4": "a zip archive, or a document that is one inside; unpack it or save its text first",
    b"%PDF": "a PDF; save its text first (pdftotext)",
    b"version https://git-lfs": "a pointer of Git LFS and not the file itself; fetch that first (git lfs pull)",
}


@dataclass(frozen=True)
class Document:
    """One text. `name` decides, for good, whether the document is held out."""

    name: str
    text: str


def kind(path: Path) -> str:
    """The suffix in lower case; of a .gz file the one before."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def documents(path: Path, name: str, of_folder: bool = False) -> Iterator[Document]:
    """The documents of one file, called `name` or `name#number`.

    of_folder: one text among many is one document, but for a long .txt file without blank lines.
    Raises ValueError: before the first document if the file is no text or has no rows with a text, at a row that is
    damaged otherwise.
    """
    if kind(path) in ROWS:
        yield from _row_documents(path, name)
        return
    text = _read(path)
    if _is_json(text):
        yield from _row_documents(path, name)
        return
    pieces = cut(text)
    if of_folder:
        pieces = list(pieces) if kind(path) == ".txt" and _is_lines(text) else [text] if text.strip() else []
        if len(pieces) == 1:
            yield Document(name, text)
            return
    for number, piece in enumerate(pieces):
        yield Document(f"{name}#{number}", piece)


def cut(text: str) -> Iterator[str]:
    """Documents of whole paragraphs, of about 4,000 characters; of whole lines, of about 1,000, where no blank line
    comes in 16,000, or none at all in a text of 4,000."""
    unbroken = len(text) >= _DOCUMENT_CHARS and not _BLANK_LINE.search(text.strip())
    for start, end in _paragraphs(text):
        if end - start < _LONG and not unbroken:
            yield text[start:end]
        else:
            yield from _of_lines(text, start, end)


def articles(rows: Iterable[tuple[str, str]]) -> Iterator[Document]:
    """Each (name, text) that is not blank; of WikiText, whose rows are lines, each article."""
    article: list[str] = []
    title = ""
    for name, text in rows:
        if _TITLE.fullmatch(text):
            if article:
                yield Document(title, "".join(article))
            title, article = name, [text]
        elif article:
            article.append(text)
        elif text.strip():
            yield Document(name, text)
    if article:
        yield Document(title, "".join(article))


def text_of(row: Any, where: str) -> str:
    """The "text" of a row; none where it is null."""
    if isinstance(row, dict) and "text" in row and isinstance(row["text"], str | None):
        return (row["text"] or "").encode(errors="replace").decode()  # JSON may hold half of a surrogate pair
    if not isinstance(row, dict):
        found = f"it is a {type(row).__name__}, expected an object"
    elif "text" in row:
        found = f"that of this row is a {type(row['text']).__name__}"
    else:
        found = f"it has columns {str(sorted(row))[:300]}, expected one named 'text'"
    raise ValueError(
        f'read_documents: {where} holds no string "text": {found}. If the text has another name, rename it, as in '
        "datasets.load_dataset(...).rename_column('content', 'text').to_json('texts.jsonl'), and pass that file."
    )


def _paragraphs(text: str) -> Iterator[tuple[int, int]]:
    """Find documents that end at blank lines, each at the first one that leaves it 4,000 characters."""
    start = 0
    while content := _CONTENT.search(text, start):
        least = max(start + _DOCUMENT_CHARS, content.end())
        blank = _BLANK_LINE.search(text, max(start, text.rfind("\n", start, least - 1)))
        end = blank.end() if blank else len(text)
        yield start, end
        start = end


def _of_lines(text: str, start: int, stop: int) -> Iterator[str]:
    while start < stop:
        content = _CONTENT.search(text, start, stop)
        least = max(start + _LINES_CHARS, content.end() if content else stop)
        end = text.find("\n", least - 1, stop) + 1 or stop
        if not _CONTENT.search(text, end, stop):
            end = stop
        line = max(start, text.rfind("\n", start, least - 1) + 1)
        if end - line < _ENORMOUS_LINE:
            yield text[start:end]
        else:
            yield from (match[0] for match in _PART_OF_LINE.finditer(text, start, end))
        start = end


def _is_lines(text: str) -> bool:
    """Whether most of a text has no blank lines that it could be cut at."""
    lengths = [end - start for start, end in _paragraphs(text)]
    return sum(length for length in lengths if length >= _LONG) > len(text) / 2


def _check_begin(path: Path, head: bytes) -> None:
    for magic, what in _NO_TEXT.items():
        if head.startswith(magic):
            raise ValueError(f"read_documents: {path} is {what}")


@contextmanager
def _opened(path: Path, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    """A text file, unpacked if it is packed by gzip; what is no UTF-8 or UTF-16 raises ValueError when it is read."""
    with path.open("rb") as raw:
        _check_begin(path, raw.peek(32))
        try:
            file = gzip.GzipFile(fileobj=raw) if raw.peek(2).startswith(b"\x1f\x8b") else raw
            head = file.peek(4)
            encoding = next((e for mark, e in _BYTE_ORDER_MARKS.items() if head.startswith(mark)), "utf-8")
            with io.TextIOWrapper(file, encoding, newline=newline) as text:
                yield text
        except UnicodeDecodeError as error:
            raise ValueError(f"read_documents: {path} {_not_decoded(error, path.name)}") from error
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"read_documents: {path} is damaged: it cannot be unpacked ({error})") from error


def _not_decoded(error: UnicodeDecodeError, name: str) -> str:
    encoding = error.encoding[:6].rstrip("-")
    if encoding == "utf-8" and b"\0" in error.object[:10_000]:
        return "is a binary file, no text"
    return (
        f"is not {encoding.upper()} text: it holds the byte {error.object[error.start]:#04x} ({error.reason}). Text in "
        f"another encoding is rewritten by `iconv -f latin1 -t utf-8 {name} > NEW`; damaged characters are left out by "
        f"`iconv -c -f {encoding} -t utf-8 {name} > NEW`"
    )


def _read(path: Path) -> str:
    with _opened(path) as file:
        text = file.read()
    if "\0" in text:
        raise ValueError(
            f"read_documents: {path} holds NUL characters: it is no text, or UTF-16 without a byte-order mark (iconv "
            "-f utf-16le -t utf-8)"
        )
    if _MARKUP.match(text) or kind(path) in (".html", ".htm", ".xml"):
        raise ValueError(f"read_documents: {path} is a page of HTML or XML, not its text; save the text and pass that")
    return text.lstrip("\ufeff").replace("\n\ufeff", "\n")  # files that begin with a mark are often put together


def _row_documents(path: Path, name: str) -> Iterator[Document]:
    if kind(path) in (".parquet", ".arrow"):
        yield from articles((f"{name}#{n}", text_of(row, where)) for n, where, row in _table_rows(path))
        return
    rows = _csv_rows(path) if kind(path) in (".csv", ".tsv") else _json_rows(path)
    for number, where, row in rows:
        text = text_of(row, where)
        if text.strip():
            yield Document(f"{name}#{number}", text)


# A row comes with its number from 1, and where it stands, in words.
_Rows = Iterator[tuple[int, str, Any]]


def _json_rows(path: Path) -> _Rows:
    with _opened(path) as file:
        first = next((line for line in file if line.strip()), "")
    return _json_lines(path) if _is_row(first) else _json_values(path)


def _is_row(line: str) -> bool:
    """Whether a first line is a row, and not the beginning of a value over several lines, nor all rows at once."""
    try:
        row = json.loads(line) if line.lstrip("\ufeff \t").startswith("{") else None
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and ("text" in row or not isinstance(row.get("data"), list))


def _json_lines(path: Path) -> _Rows:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            line = line.strip("\ufeff \n")
            where = f"line {number} of {path}"
            try:
                row = json.loads(line) if line.strip() else {"text": ""}
            except (ValueError, RecursionError) as error:
                raise ValueError(f"read_documents: {where} is not valid JSON ({error})") from error
            yield number, where, row


def _json_values(path: Path) -> _Rows:
    """One array of rows, by itself or as "data" of an object; or rows over several lines, one after another."""
    text = _read(path)
    values: list[Any] = []
    end = _after_blanks(text, 0)
    try:
        while end < len(text):
            value, end = json.JSONDecoder().raw_decode(text, end)
            values.append(value)
            end = _after_blanks(text, end)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"read_documents: {path} is not valid JSON ({error})") from error
    if len(values) == 1 and isinstance(values[0], dict) and isinstance(values[0].get("data"), list):
        values = values[0]["data"]
    elif len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    for number, row in enumerate(values, 1):
        yield number, f"row {number} of {path}", row


def _after_blanks(text: str, position: int) -> int:
    match = _BLANKS.match(text, position)
    return match.end() if match else position


def _is_json(text: str) -> bool:
    """Whether a file that does not say so holds JSON: its first value is an object, or an array of objects, and
    nothing or the next one comes after it."""
    start = _after_blanks(text, 0)
    if text[start : start + 1] not in ("{", "["):
        return False
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return False
    rows = value if isinstance(value, list) else [value]
    end = _after_blanks(text, end)
    return bool(rows) and isinstance(rows[0], dict) and text[end : end + 1] in ("", "{", "[")


def _csv_rows(path: Path) -> _Rows:
    number, limit = 0, csv.field_size_limit(2**31 - 1)  # of the process: 131,072 characters, and documents are longer
    with _opened(path, newline="") as file:
        first = file.readline()
        usual = "\t" if kind(path) == ".tsv" else ","
        separator = next(
            (s for s in (usual, ",", ";", "\t") if "text" in next(csv.reader([first], delimiter=s), [])), usual
        )
        rows = csv.reader(chain([first], file), delimiter=separator, strict=True)
        try:
            columns = next(rows, [])
            for number, row in enumerate(rows, 1):
                where = f"row {number} of {path}"
                if row and len(row) != len(columns):
                    raise ValueError(
                        f"read_documents: {where} has {len(row)} cells, its header {len(columns)}; a text that holds "
                        "the separator or line ends must stand in quotes"
                    )
                yield number, where, dict(zip(columns, row, strict=True)) if row else {"text": ""}
        except csv.Error as error:
            raise ValueError(f"read_documents: row {number + 1} of {path} is not valid CSV ({error})") from error
        finally:
            csv.field_size_limit(limit)


def _table_rows(path: Path) -> _Rows:
    with path.open("rb") as file:
        _check_begin(path, file.read(32))
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"read_documents: reading {path} needs datasets: {LAB}") from error
    try:
        file = glob.escape(str(path.resolve()))
        rows = datasets.load_dataset(kind(path)[1:], data_files=file, split="train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield number, f"row {number} of {path}", row
    except Exception as error:
        raise ValueError(
            f"read_documents: {path} could not be read as {kind(path)} ({type(error).__name__}: {error})"
        ) from error
