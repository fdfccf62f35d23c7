"""Documents: where their borders are, their order, and which of them are held out."""

import os
import sys
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


def test_the_standard_library_without_its_tests():
    documents = list(read_documents())
    names = {d.name for d in documents}
    assert len(names) == len(documents)
    assert {"ast.py", "json/decoder.py"} <= names
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(Path(name).parts)]
    assert all(d.text.strip() for d in documents)


def test_a_source_that_is_nothing_says_what_it_could_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(FileNotFoundError, match=r"no \.md/\.py/\.rst/\.txt files below"):
        list(read_documents(tmp_path))

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=unreachable))
    with pytest.raises(FileNotFoundError, match=r"'no-such' is neither .*ConnectionError: no route to host"):
        list(read_documents("no-such"))


def test_a_dataset_gives_its_text_column(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load_dataset(name: str, configuration: str | None, **options: object) -> list[dict[str, str]]:
        asked.append((name, configuration, options))
        return [{"text": "first"}, {"text": "  "}, {"text": "third"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert list(read_documents("owner/set:small")) == [
        Document("owner/set:small/0", "first"),
        Document("owner/set:small/2", "third"),
    ]
    assert asked == [("owner/set", "small", {"split": "train", "streaming": True})]

    no_text = SimpleNamespace(load_dataset=lambda *_, **__: [{"body": "x"}])
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


def test_a_file_that_is_no_text_is_skipped_with_a_warning(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes("grüße".encode("utf-16"))
    (tmp_path / "b.txt").write_bytes(b"a caf\xe9, and much more text after it. " * 10)
    (tmp_path / os.fsdecode(b"name\xff.txt")).write_text("text in a file whose name is not UTF-8")
    with pytest.warns(UserWarning, match=r"a\.txt is not UTF-8 text .*: skipped"):
        documents = list(read_documents(tmp_path))
    assert {d.name for d in documents} >= {os.fsdecode(b"name\xff.txt")}
    assert "a.txt" not in {d.name for d in documents}
    (latin,) = (d.text for d in documents if d.name == "b.txt")
    assert latin.startswith("a caf\ufffd, and")


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
        sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: [{"text": row} for row in rows])
    )
    assert list(read_documents("wikitext")) == [
        Document("wikitext/1", "".join(row or "" for row in rows[1:7])),
        Document("wikitext/7", "".join(rows[7:])),
    ]


def test_lines_of_json_are_documents(tmp_path):
    path = tmp_path / "pile.jsonl"
    path.write_text('{"text": "one\\n\\ntwo", "meta": 1}\n\n{"text": " "}\n{"text": "caf\u00e9"}\n', encoding="utf-8")
    assert list(read_documents(path)) == [Document("pile.jsonl#1", "one\n\ntwo"), Document("pile.jsonl#4", "caf\u00e9")]
    path.write_bytes(b'\xef\xbb\xbf{"text": "caf\xe9"}\n{"text": "\\ud83d half"}\n{"text": null}\n')
    assert [d.text for d in read_documents(path)] == ["caf\ufffd", "? half"]
    wrong = {"{": "is not valid JSON", '{"body": "x"}': 'holds no string "text"', "[1]": "holds no string"}
    for line, message in (wrong | {"[" * 10**5: "is not valid JSON"}).items():
        path.write_text(f'{{"text": "x"}}\n{line}\n')
        with pytest.raises(ValueError, match=f"line 2 of .*pile.jsonl {message}"):
            list(read_documents(path))
