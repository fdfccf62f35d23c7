"""Text by document: where activations come from, and which documents are held out."""

import hashlib
import os
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from fastsae import packages, progress
from fastsae.activations import textfile
from fastsae.activations.textfile import Document
from fastsae.extras import LAB

STDLIB = "stdlib"
_TEXT = (".txt", ".md", ".rst", ".py")
# Where rows lie, these describe them.
_ABOUT, _ABOUT_NAMES = (".md", ".rst", ".py"), ("readme", "license", "licence", "requirements")
# Not read either, and it may be what the folder is for.
_PACKED = (".zst", ".bz2", ".xz", ".gz", ".zip", ".7z", ".tar", ".pdf", ".docx", ".epub", ".html", ".htm", ".xml")
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


def read_documents(source: str | Path = STDLIB) -> Iterator[Document]:
    """The documents of `source`, in a fixed order.

    source:
    - "stdlib": the Python sources of the running interpreter's standard library.
    - A text file, cut at blank lines into documents of about 4,000 characters. Where no blank line comes in 16,000, or
      in all of a text of 4,000, as in a file with a document a line, it is cut at line ends into documents of about
      1,000; no line is cut but those of 100,000 and more, between words.
    - A file of rows, whose "text" is a document each: .jsonl, .ndjson or .json (or what its content tells to be JSON;
      rows follow one another or are one array), .csv, .tsv, .parquet, .arrow.
    - A folder: each .txt, .md, .rst and .py file below it is a document, but for a .txt file that would mostly be cut
      at line ends, which is cut; files of rows give their rows. In folders with rows in or below them .md, .rst and .py
      files, and any README, LICENSE or requirements, are left out: they describe the rows. So is what is no such text.
      A warning says what was left out. Hidden files and folders are not looked at.
    - The name of a Hugging Face dataset whose train split has a "text" column, optionally with a configuration:
      "wikitext:wikitext-103-raw-v1". Each row is a document; in WikiText, whose rows are lines, each article.
    Files are UTF-8, or UTF-16 with a byte-order mark, and may be packed by gzip.

    Raises FileNotFoundError when `source` is none of these, ValueError for a file or a row without such text.
    """
    path = Path(source)
    if source == STDLIB:
        stdlib = Path(sysconfig.get_paths()["stdlib"])
        paths, _ = _files_below(stdlib, _SKIPPED_STDLIB_FOLDERS)
        yield from _documents_of([path for path in paths if path.suffix == ".py"], stdlib)
    elif path.is_dir():
        yield from _folder_documents(path)
    elif path.is_file():
        yield from _file_documents(path)
    elif path.exists() or path.is_symlink():
        raise FileNotFoundError(
            f"read_documents: {path} is no ordinary file, or a link to nothing; pass a file or folder"
        )
    else:
        yield from _dataset_documents(str(source))


def is_held_out(name: str, share: float = 0.05) -> bool:
    """Whether the document `name` belongs to the held-out split: a fixed `share` of all names, by their hash."""
    return int.from_bytes(_hash(name)[:8], "big") < share * 2**64


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()


def _file_documents(path: Path) -> Iterator[Document]:
    read = held_out = 0
    for document in textfile.documents(path, path.name):
        read += 1
        held_out += is_held_out(document.name)
        yield document
    if not read:
        raise ValueError(f"read_documents: {path} holds no text: it is empty or blank")
    _say(f"read_documents: {path} was read to its end: {read:,} documents, {held_out:,} of them held out")


def _folder_documents(folder: Path) -> Iterator[Document]:
    paths, closed = _files_below(folder, {"__pycache__"})
    rows = {path for path in paths if textfile.kind(path) in textfile.ROWS}
    refused = {path: why for path in paths if path in rows and (why := _refusal(path))}
    above_rows = {parent for path in rows if path not in refused for parent in path.parents}
    about = {path for path in paths if path.parent in above_rows and path not in rows and _describes(path)}
    rest = [path for path in paths if path not in refused and path not in about]
    kept = [path for path in rest if textfile.kind(path) in _TEXT + textfile.ROWS]
    others = [path for path in rest if textfile.kind(path) not in _TEXT + textfile.ROWS]
    packed = [path for path in others if path.suffix.lower() in _PACKED]

    left_out = (
        [f"{_counted(about)} that describe rows ({', '.join(sorted({path.name for path in about})[:3])})"]
        if about
        else []
    )
    left_out += [f"{_counted(refused)} ({next(iter(refused.values()))})"] if refused else []
    left_out += [f"{_counted(others)} of kinds that are not read"] if others else []
    left_out += [f"{len(closed)} links or folders that cannot be opened ({closed[0]})"] if closed else []
    said = f"Left out: {'; '.join(left_out) or 'nothing'}."
    if not kept:
        wanted = f"{'/'.join(sorted(_TEXT))} files below {folder}, nor rows ({'/'.join(textfile.ROWS)})"
        raise FileNotFoundError(f"read_documents: no {wanted}. {said}")
    if (refused or others) and all(_is_named_readme(path) for path in kept):
        raise ValueError(f"read_documents: nothing but {kept[0].name} could be read below {folder}. {said}")
    said = f"read_documents: read below {folder}: {_counted(kept)}. {said}"
    if about or refused or packed or closed:
        warnings.warn(said, stacklevel=2)
    else:
        _say(said)
    yield from _documents_of(kept, folder)


def _files_below(folder: Path, skipped: set[str]) -> tuple[list[Path], list[str]]:
    """Files in a fixed order; and folders that were not entered, links to nothing."""
    found: list[Path] = []
    closed: list[str] = []
    for root, folders, names in os.walk(folder, onerror=lambda error: closed.append(str(error.filename))):
        # Never entered: packages of others are many.
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        closed.extend(str(Path(root, name)) for name in folders if Path(root, name).is_symlink())
        found += [Path(root, name) for name in names if not name.startswith(".")]
    # By a hash: the first million tokens are a fair sample, and not the first letters of the alphabet. Not by the hash
    # that holds documents out: it would put those first.
    found.sort(key=lambda p: _hash(f"order of {p.relative_to(folder).as_posix()}"))
    closed.extend(str(path) for path in found if path.is_symlink() and not path.exists())
    return [path for path in found if path.is_file()], closed


def _documents_of(paths: list[Path], folder: Path) -> Iterator[Document]:
    refused: list[str] = []
    some = False
    try:
        for path in paths:
            documents = textfile.documents(path, path.relative_to(folder).as_posix(), of_folder=True)
            try:
                first = next(documents, None)
            except (ValueError, OSError) as error:
                refused.append(_why(error))
                continue
            if first is not None:
                some = True
                yield first
                yield from documents
    finally:  # when no more is wanted too
        if refused:
            skipped = f"{len(refused)} of {len(paths)} files below {folder}"
            warnings.warn(f"read_documents: {skipped} were skipped. The first: {refused[0]}", stacklevel=2)
    if not some:
        raise ValueError(f"read_documents: the files below {folder} hold no text: they are blank or were skipped")


def _refusal(path: Path) -> str:
    """Why no rows are read from a file; empty if they are."""
    try:
        return "" if next(textfile.documents(path, path.name), None) else f"{path} holds no text"
    except (ValueError, OSError, ImportError) as error:
        return _why(error)


def _why(error: Exception) -> str:
    return str(error).removeprefix("read_documents: ")


def _describes(path: Path) -> bool:
    return textfile.kind(path) in _ABOUT or _is_named_readme(path)


def _is_named_readme(path: Path) -> bool:
    return path.name.lower().startswith(_ABOUT_NAMES)


def _counted(paths: Iterable[Path]) -> str:
    """Such as: 12 .txt, 1 .jsonl."""
    counts = Counter(textfile.kind(path) or "no suffix" for path in paths).most_common()
    more = sum(count for _, count in counts[6:])
    return ", ".join(f"{count:,} {kind}" for kind, count in counts[:6]) + (f", {more:,} others" if more else "")


@cache  # once, though text is read for training and again for what is held out
def _say(line: str) -> None:
    progress.logger.info(line)


def _dataset_documents(spec: str) -> Iterator[Document]:
    name, _, configuration = spec.partition(":")
    packages.need("datasets", f"read_documents: {spec!r} is no file or folder, and reading it as a dataset")
    try:
        import datasets

        rows = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
    except ImportError as error:
        raise ImportError(
            f"read_documents: {spec!r} is no file or folder, and reading it as a dataset needs datasets: {LAB}"
        ) from error
    except Exception as error:
        raise FileNotFoundError(
            f"read_documents: {spec!r} is neither 'stdlib', nor a file, nor a folder, and could not be loaded as a "
            f"Hugging Face dataset ({type(error).__name__}: {error}). Check the spelling, the network, or download "
            "the text and pass its path."
        ) from error
    where = f"dataset {spec!r}"
    yield from textfile.articles((f"{spec}/{number}", textfile.text_of(row, where)) for number, row in enumerate(rows))
