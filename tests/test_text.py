"""Documents: where their borders are, their order, and which of them are held out."""

import gzip
import json
import logging
import os
import random
import re
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastsae.activations import Document, is_held_out, read_documents


def test_held_out_is_a_fixed_property_of_the_name():
    names = [f"document {i}" for i in range(4000)]
    held_out = [name for name in names if is_held_out(name)]
    assert 0.04 * len(names) < len(held_out) < 0.06 * len(names)
    assert held_out[:4] == ["document 21", "document 22", "document 55", "document 59"]  # never changes, on any machine
    assert not any(is_held_out(name, share=0.0) for name in names)
    assert all(is_held_out(name, share=1.0) for name in names)
    assert not any(map(is_held_out, ("argparse.py", "inspect.py", "typing.py")))


def test_a_folder_gives_its_text_files_in_an_order_that_does_not_depend_on_where_it_lies(tmp_path: Path):
    files = {f"{name}.txt": name for name in "abcdefgh"} | {"sub/b.md": "beta", "sub/c.py": "gamma", "d.rst": "delta"}
    others = {"e.bin": "no text", "__pycache__/f.py": "no source", "blank.txt": " \n"}
    orders = []
    for root in (tmp_path / "here", tmp_path / "there"):
        for name, text in (files | others).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        documents = list(read_documents(str(root)))
        assert documents == list(read_documents(root))
        assert {d.name: d.text for d in documents} == files
        orders.append([d.name for d in documents])
    assert orders[0] == orders[1]
    assert orders[0] != sorted(orders[0])


def test_a_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path):
    paragraphs = [f"paragraph {i} " + "word " * 300 for i in range(20)]
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(paragraphs))
    documents = list(read_documents(path))
    assert "".join(d.text for d in documents) == path.read_text()
    assert [d.name for d in documents] == [f"book.txt#{i}" for i in range(len(documents))]
    assert all(4000 <= len(d.text) < 6000 for d in documents[:-1])
    assert all(d.text.startswith("paragraph") for d in documents)
    assert all(d.text.endswith("\n\n") for d in documents[:-1])


def by_blank_lines(text: str) -> list[str]:
    """Documents of at least 4,000 characters, each but the last ended by a blank line."""
    documents = [""]
    for paragraph in re.split(r"(?<=\n\n)", text):
        documents[-1] += paragraph
        if len(documents[-1]) >= 4000 and documents[-1].strip():
            documents.append("")
    return [document for document in documents if document.strip()]


def test_where_paragraphs_are_cut_never_changes(tmp_path: Path):
    """Documents are held out by their number."""
    draw = random.Random(0)
    exact = ["x" * (4000 - n) + "\n" * blank for n in range(6) for blank in (2, 3, 5000)]
    lines = ["word " * draw.randrange(400) + "end\n" * draw.randrange(3) + "\n" * draw.randrange(4) for _ in range(900)]
    path = tmp_path / "book.txt"
    path.write_text("".join(["\n", *exact, *lines]))
    documents = list(read_documents(path))
    assert [d.text for d in documents] == by_blank_lines(path.read_text())
    assert [d.name for d in documents] == [f"book.txt#{i}" for i in range(len(documents))]


LINES = [f"This is document number {i}, about thing {i % 17}, with some words to read." for i in range(3000)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("blank", ["", "\n", " \n", "\t\n"])
def test_documents_do_not_depend_on_line_ends_or_on_spaces_in_blank_lines(tmp_path: Path, end: str, blank: str):
    text = f"\n{blank}".join(LINES)
    (tmp_path / "texts.txt").write_bytes(text.replace("\n", end).encode())
    documents = list(read_documents(tmp_path / "texts.txt"))
    assert "".join(d.text for d in documents) == text
    assert all(len(d.text) < 5000 and d.text.startswith("This is document") for d in documents)
    assert sum(is_held_out(d.name) for d in documents) > 0
    assert [d.name for d in documents] == [f"texts.txt#{i}" for i in range(len(documents))]


def test_a_few_blank_lines_do_not_make_paragraphs(tmp_path: Path):
    text = "A title\n\n" + "\n".join(LINES[:2000]) + "\n\n" + "\n".join(LINES[2000:]) + "\n\n"
    (tmp_path / "texts.txt").write_text(text)
    documents = list(read_documents(tmp_path / "texts.txt"))
    assert "".join(d.text for d in documents) == text
    assert len(documents) > 100
    assert all(len(d.text) < 2000 and d.text.endswith("\n") for d in documents)


def test_no_line_is_cut_but_one_that_is_a_whole_corpus(tmp_path: Path):
    path = tmp_path / "texts.txt"
    lines = ["word " * n + "end\n" for n in (5, 15_000, 700, 9_000)]
    path.write_text("".join(lines))
    texts = [d.text for d in read_documents(path)]
    assert texts == [lines[0] + lines[1], lines[2], lines[3]]
    for word in ("word ", "\u5b57"):  # some languages have no spaces
        path.write_text(word * 200_000)
        texts = [d.text for d in read_documents(path)]
        assert "".join(texts) == path.read_text()
        assert all(4000 <= len(text) <= 5001 for text in texts[:-1])
    path.write_text("word " * 200_000)
    assert all(d.text.startswith("word") and d.text.endswith("word ") for d in read_documents(path))


def test_a_folder_of_files_with_a_document_a_line(tmp_path: Path):
    """A file that is cut has many names, any other the one it always had."""
    files = {"lines.txt": "\n".join(LINES), "book.txt": "\n\n".join(LINES), "article.txt": "word " * 9000}
    files |= {"short.txt": "\n".join(LINES[:100]), "table.py": "\n".join(LINES)}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    documents = list(read_documents(tmp_path))
    cut = [d for d in documents if d.name not in files]
    assert {d.name: d.text for d in documents if d.name in files} == {
        n: t for n, t in files.items() if n != "lines.txt"
    }
    assert "".join(d.text for d in cut) == files["lines.txt"]
    assert [d.name for d in cut] == [f"lines.txt#{i}" for i in range(len(cut))]
    assert len(cut) > 100


def test_the_standard_library_without_its_tests():
    documents = list(read_documents())
    names = {d.name for d in documents}
    assert len(names) == len(documents)
    assert {"ast.py", "json/decoder.py"} <= names
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(Path(name).parts)]
    assert all(d.text.strip() for d in documents)
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    assert all(d.text == (stdlib / d.name).read_text(encoding="utf-8") for d in documents)


def test_a_source_that_is_nothing_says_what_it_could_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(FileNotFoundError, match=r"no \.md/\.py/\.rst/\.txt files below"):
        list(read_documents(tmp_path))

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(__file__="datasets.py", load_dataset=unreachable))
    with pytest.raises(FileNotFoundError, match=r"'no-such' is neither .*ConnectionError: no route to host"):
        list(read_documents("no-such"))


def test_a_dataset_gives_its_text_column(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load_dataset(name: str, configuration: str | None, **options: object) -> list[dict[str, str]]:
        asked.append((name, configuration, options))
        return [{"text": "first"}, {"text": "  "}, {"text": "third"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(__file__="datasets.py", load_dataset=load_dataset))
    assert list(read_documents("owner/set:small")) == [
        Document("owner/set:small/0", "first"),
        Document("owner/set:small/2", "third"),
    ]
    assert asked == [("owner/set", "small", {"split": "train", "streaming": True})]

    no_text = SimpleNamespace(__file__="datasets.py", load_dataset=lambda *_, **__: [{"body": "x"}])
    monkeypatch.setitem(sys.modules, "datasets", no_text)
    with pytest.raises(ValueError, match=r"has columns \['body'\], expected one named 'text'"):
        list(read_documents("owner/set"))


def test_the_order_has_nothing_to_do_with_what_is_held_out(tmp_path: Path):
    """Otherwise the first documents of a folder would all be held out."""
    for i in range(600):
        (tmp_path / f"{i}.txt").write_text("some text")
    names = [d.name for d in read_documents(tmp_path)]
    assert sum(map(is_held_out, names)) > 20
    assert 2 < sum(map(is_held_out, names[:200])) < 25


def test_a_file_in_another_encoding_is_skipped_or_refused_in_words(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes("grüße".encode("utf-16"))
    (tmp_path / "b.txt").write_bytes(b"a caf\xe9, and much more text after it. " * 10)
    (tmp_path / "c.txt").write_bytes("no mark".encode("utf-16-le"))
    (tmp_path / os.fsdecode(b"name\xff.txt")).write_text("text in a file whose name is not UTF-8")
    with pytest.warns(UserWarning, match=r"2 of 4 files below .* were skipped"):
        documents = {d.name: d.text for d in read_documents(tmp_path)}
    assert documents == {"a.txt": "grüße", os.fsdecode(b"name\xff.txt"): "text in a file whose name is not UTF-8"}
    with pytest.raises(
        ValueError, match=r"b\.txt is not UTF-8 text: it holds the byte 0xe9 .*iconv -f latin1 -t utf-8"
    ):
        list(read_documents(tmp_path / "b.txt"))
    with pytest.raises(ValueError, match=r"c\.txt holds NUL characters.*UTF-16 without a byte-order mark"):
        list(read_documents(tmp_path / "c.txt"))
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"d\.jsonl is not UTF-8 text"):
        list(read_documents(tmp_path / "d.jsonl"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_tells_the_encoding_and_is_no_text(tmp_path: Path, encoding: str):
    texts = ("grüße", '{"text": "grüße"}', "text\ngrüße\n")
    for text, name in zip(texts, ("a.txt", "a.jsonl", "a.csv"), strict=True):
        path = tmp_path / name
        path.write_bytes(text.encode(encoding))
        assert [d.text for d in read_documents(path)] == ["grüße"]
    (tmp_path / "b.txt").write_bytes("one\n".encode("utf-8-sig") + "two\n".encode("utf-8-sig"))
    assert [d.text for d in read_documents(tmp_path / "b.txt")] == ["one\ntwo\n"]


def test_what_is_no_text_is_refused_in_words(tmp_path: Path):
    files = {
        "page.txt": (b"\n<!DOCTYPE html>\n<p>text", "HTML or XML"),
        "page.html": (b"<p>text", "HTML or XML"),
        "paper.txt": (b"%PDF-1.7 \xff", "a PDF; save its text first"),
        "texts.jsonl.zst": (b"\x28\xb5\x2f\xfd....", r"packed by zstd; .*zstd -d"),
        "words.docx": (b"PK\3\4....", "a zip archive"),
        "clone.parquet": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        "clone.txt": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        "cut.txt.gz": (gzip.compress(b"some text " * 50)[:-20], "is damaged: it cannot be unpacked"),
        "weights.bin": (b"\0\1\xff\xfe", "is a binary file"),
        "empty.txt": (b"", "holds no text"),
        "blank.csv": (b"text\n", "holds no text"),
        "null.jsonl": (b'{"text": null}', "holds no text"),
        "broken.parquet": (b"PAR1", "could not be read as .parquet"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            list(read_documents(tmp_path / name))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(FileNotFoundError, match="a link to nothing"):
        list(read_documents(tmp_path / "loop"))


def test_lines_of_wikitext_are_joined_to_articles(monkeypatch: pytest.MonkeyPatch):
    rows = [
        "",
        " = First = \n",
        "",
        " One line . \n",
        None,
        " = = Section = = \n",
        " Two . \n",
        " = Second = \n",
        " Three . \n",
    ]
    monkeypatch.setitem(
        sys.modules,
        "datasets",
        SimpleNamespace(__file__="datasets.py", load_dataset=lambda *_, **__: [{"text": row} for row in rows]),
    )
    assert list(read_documents("wikitext")) == [
        Document("wikitext/1", "".join(row or "" for row in rows[1:7])),
        Document("wikitext/7", "".join(rows[7:])),
    ]


def test_lines_of_json_are_documents(tmp_path):
    path = tmp_path / "pile.jsonl"
    path.write_text('{"text": "one\\n\\ntwo", "meta": 1}\n\n{"text": " "}\n{"text": "caf\u00e9"}\n', encoding="utf-8")
    assert list(read_documents(path)) == [Document("pile.jsonl#1", "one\n\ntwo"), Document("pile.jsonl#4", "caf\u00e9")]
    path.write_bytes(b'\xef\xbb\xbf{"text": "caf\xc3\xa9"}\n{"text": "\\ud83d half"}\n{"text": null}\n')
    assert [d.text for d in read_documents(path)] == ["caf\u00e9", "? half"]
    wrong = {"{": "is not valid JSON", '{"body": "x"}': 'holds no string "text"', "[1]": "holds no string"}
    for line, message in (wrong | {"[" * 10**5: "is not valid JSON"}).items():
        path.write_text(f'{{"text": "x"}}\n{line}\n')
        with pytest.raises(ValueError, match=f"line 2 of .*pile.jsonl {message}"):
            list(read_documents(path))


ROWS = [{"id": 1, "text": "alpha, and\n\nmore"}, {"id": 2, "text": " "}, {"id": 3, "text": "caf\u00e9"}]
TEXTS = ["alpha, and\n\nmore", "caf\u00e9"]


def test_rows_of_json_are_told_by_content(tmp_path: Path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    contents = [lines, "\n" + lines, json.dumps(ROWS), json.dumps(ROWS, indent=2), json.dumps({"data": ROWS})]
    contents += ["\n".join(json.dumps(row, indent=2) for row in ROWS)]
    for content in contents:
        for name in ("rows.json", "rows.jsonl", "rows.ndjson", "rows.JSON", "rows.txt", "rows"):
            (tmp_path / name).write_text(content)
            assert [d.text for d in read_documents(tmp_path / name)] == TEXTS, (name, content)
        (tmp_path / "rows.json.gz").write_bytes(gzip.compress(content.encode()))
        documents = list(read_documents(tmp_path / "rows.json.gz"))
        assert [d.text for d in documents] == TEXTS
        assert documents[0].name.startswith("rows.json.gz#")
    for text in ("[1] A note.\n[2] Another.", "{} and [] are brackets", '{"a": 1} is an object', "[1]\n[2]\n"):
        (tmp_path / "rows.txt").write_text(text)
        assert [d.text for d in read_documents(tmp_path / "rows.txt")] == [text]
    wrong = {
        '{"a": 1, "b": 2}': r"columns \['a', 'b'\].*rename",
        '["x"]': "it is a str",
        '{"text": ["x"]}': "is a list",
    }
    for content, message in (wrong | {"{": "is not valid JSON"}).items():
        (tmp_path / "rows.json").write_text(content)
        with pytest.raises(ValueError, match=rf"rows\.json .*{message}"):
            list(read_documents(tmp_path / "rows.json"))


def test_gzip_is_unpacked(tmp_path: Path):
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress("gr\u00fc\u00dfe".encode()))
    assert list(read_documents(tmp_path / "book.txt.gz")) == [Document("book.txt.gz#0", "gr\u00fc\u00dfe")]
    assert list(read_documents(tmp_path)) == [Document("book.txt.gz", "gr\u00fc\u00dfe")]


def test_rows_of_tables(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow", reason="comes with datasets")
    from pyarrow import csv, parquet

    table = pyarrow.Table.from_pylist(ROWS)
    files = [tmp_path / f"data[1].{suffix}" for suffix in ("parquet", "arrow", "csv", "tsv")]
    parquet.write_table(table, files[0])
    with pyarrow.ipc.new_stream(str(files[1]), table.schema) as stream:
        stream.write_table(table)
    csv.write_csv(table, files[2])
    csv.write_csv(table, files[3], csv.WriteOptions(delimiter="\t"))
    for path in files:
        assert list(read_documents(path)) == [
            Document(f"{path.name}#1", TEXTS[0]),
            Document(f"{path.name}#3", TEXTS[1]),
        ]
    parquet.write_table(table.rename_columns(["id", "content"]), files[0])
    with pytest.raises(ValueError, match=r"\['content', 'id'\], expected one named 'text'.*rename_column"):
        list(read_documents(files[0]))


def test_rows_of_csv(tmp_path: Path):
    path = tmp_path / "rows.csv"
    long = "word " * 60_000
    path.write_text(f"id;text\n1;a, b\n\n2;{long}\n")
    assert list(read_documents(path)) == [Document("rows.csv#1", "a, b"), Document("rows.csv#3", long)]
    wrong = {
        "text,id\na, b,1\n": r"row 1 of .*rows\.csv has 3 cells, its header 2",
        'text\nx\n"never ended\n': r"row 2 of .*rows\.csv is not valid CSV",
        "body,id\nx,1\n": r"columns \['body', 'id'\], expected one named 'text'",
    }
    for content, message in wrong.items():
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            list(read_documents(path))


def test_a_cloned_dataset_is_its_rows_and_not_what_describes_them(tmp_path: Path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    files = {"README.md": "# Card", "load.py": "import x", "LICENSE.txt": "free", "data/part.jsonl": lines}
    files |= {"dataset_info.json": "{}", ".git/notes.txt": "hidden", "texts/a.txt": "prose", "texts/b.md": "more"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "texts" / "again").symlink_to(tmp_path)
    with pytest.warns(UserWarning, match="read below") as warned:
        documents = {d.name: d.text for d in read_documents(tmp_path)}
    rows = {"data/part.jsonl#1": TEXTS[0], "data/part.jsonl#3": TEXTS[1]}
    assert documents == rows | {"texts/a.txt": "prose", "texts/b.md": "more"}
    (said,) = (str(warning.message) for warning in warned)
    for part in ("1 .jsonl", "1 .md", "1 .txt", "1 .py", "README.md", "1 .json (", "dataset_info.json", "again"):
        assert part in said


def test_a_readme_alone_is_not_taken_for_the_data_it_describes(tmp_path: Path):
    (tmp_path / "README.md").write_text("# Card")
    assert [d.name for d in read_documents(tmp_path)] == ["README.md"]
    (tmp_path / "train.jsonl").write_text('{"content": "x"}\n')
    with pytest.raises(ValueError, match=r"nothing but README.md could be read.*columns \['content'\]"):
        list(read_documents(tmp_path))
    (tmp_path / "train.jsonl").rename(tmp_path / "train.jsonl.zst")
    with pytest.raises(ValueError, match=r"nothing but README.md could be read.*1 \.zst"):
        list(read_documents(tmp_path))


def test_a_damaged_row_is_named_in_a_folder_too(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"line 2 of .*a\.jsonl is not valid JSON"):
        list(read_documents(tmp_path))


def test_a_folder_in_which_nothing_is_text_says_so(tmp_path: Path):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match="hold no text"):
        list(read_documents(tmp_path))


def test_what_was_read_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "a.txt").write_text("\n".join(LINES))
    (tmp_path / "b.png").write_bytes(b"x")
    with caplog.at_level(logging.INFO, "fastsae"):
        documents = list(read_documents(tmp_path / "a.txt"))
        list(read_documents(tmp_path))
    held_out = sum(is_held_out(d.name) for d in documents)
    assert f"a.txt was read to its end: {len(documents)} documents, {held_out} of them held out" in caplog.text
    assert f"read below {tmp_path}: 1 .txt. Left out: 1 .png of kinds that are not read" in caplog.text


@pytest.mark.parametrize(("lines", "documents"), [(30, 1), (100, 10), (150, 15)])
def test_a_short_file_with_a_document_a_line(lines, documents, tmp_path):
    """Lines have 100 characters each, so that lines 1 to 10 are the first document."""
    text = "".join(f"{number:099}\n" for number in range(lines))
    (tmp_path / "short.txt").write_text(text + "\n\n")
    read = list(read_documents(tmp_path / "short.txt"))
    assert "".join(document.text for document in read).strip() == text.strip()
    assert len(read) == documents
    assert all(document.text.endswith("\n") for document in read)
