"""Files of every kind, whole and broken, as documents."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from flowmesh_rag.documents import READERS, Document, ReadOptions, read_file
from flowmesh_rag.documents.corpus import Corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from flowmesh_core import CancelledError, FileRef, InputError, RowSource

Read = Callable[..., list[Document]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read(name: str, content: bytes | str, **options: Any) -> list[Document]:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return list(read_file(path, name, name, ReadOptions(**options)))

    return read


def test_a_text_file_is_one_document_as_it_stands(read: Read) -> None:
    (document,) = read("a.txt", "One line.\r\nTwo \N{SNOWMAN}.\n")
    assert document.sections[0].text == "One line.\r\nTwo \N{SNOWMAN}.\n"
    assert (document.source, document.title, document.format) == ("a.txt", "a.txt", "text")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_text_in_a_marked_encoding_is_read(read: Read, encoding: str) -> None:
    (document,) = read("a.txt", "grün".encode(encoding))
    assert document.sections[0].text == "grün"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"gr\xfcn", "a.txt: is not text in UTF-8: byte 2"),
        ("a.md", b"a\0b", "a.md: is not text: it holds a zero byte"),
        ("a.docx", b"PK", r"a.docx: no reader for files of suffix .docx; there are .htm, .html"),
        ("README", b"text", "README: no reader for names without suffix"),
        ("a.txt", b"x" * 101, "a.txt: is larger than 100 bytes; split it"),
        ("a.md", b"x" * 51, "a.md: has more than 50 characters of text; split it"),
        ("a.html", b"<p>" + b"x" * 51, "a.html: has more than 50 characters of text"),
        ("a.jsonl", b'{"text": "a"}\nnope\n', r"a.jsonl: .*line 2 must be a JSON object"),
        ("a.jsonl", b'{"txt": "a"}\n', "a.jsonl: row 0: column 'text' must hold text, got NoneTyp"),
        ("a.jsonl", b'{"text": "' + b"x" * 51 + b'"}', "a.jsonl: row 0: has more than 50 char"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_reason(
    read: Read, name: str, content: bytes, message: str
) -> None:
    if name.endswith(".html"):
        pytest.importorskip("selectolax", reason="comes with the engine")
    with pytest.raises(InputError, match=message):
        read(name, content, max_bytes=100, max_chars=50)


def test_a_file_that_is_gone_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"docs/a.md: cannot be read: No such file"):
        list(read_file(tmp_path / "a.md", "a.md", "docs/a.md", ReadOptions()))


def test_what_no_store_takes_becomes_a_mark_of_the_same_length(read: Read) -> None:
    (document,) = read("a.jsonl", '{"text": "a\\ud800b\\u0000c"}')
    assert document.sections[0].text == "a?b\ufffdc"


def test_headings_of_markdown_are_found_but_not_in_code(read: Read) -> None:
    text = "intro\n# One #\n```sh\n# no heading\n~~~\n```\n\n   ## Two\n####### seven\n#no\n"
    (document,) = read("a.md", text)
    (section,) = document.sections
    assert [heading for _, heading in section.headings] == ["One", "Two"]
    assert [text[at:].lstrip()[:2] for at, _ in section.headings] == ["# ", "##"]
    assert (document.title, document.format) == ("One", "markdown")
    assert read("b.md", "plain")[0].title == "b.md"


PAGE = """<!doctype html><html><head><title> The
 page </title><style>p {color: red}</style></head><body>
<nav>Menu</nav><h1>Big <em>news</em></h1>
<p>One <b>bold</b>word &amp; more<br>next line.</p><script>steal()</script><!-- hidden -->
<ul><li>first<li>second</ul><pre>  kept
    so</pre><h2></h2><table><tr><td>a</td><td>b</td></tr></table>
<iframe src="http://10.0.0.1/"></iframe><img src="http://10.0.0.1/x.png" onerror="steal()">end
</body></html>"""


def test_a_page_is_read_as_it_is_seen(read: Read) -> None:
    pytest.importorskip("selectolax", reason="comes with the engine")
    (document,) = read("a.html", PAGE)
    (section,) = document.sections
    assert section.text == (
        "Menu\n\nBig news\n\nOne boldword & more\nnext line.\n\nfirst\nsecond\n\n  kept\n    so"
        "\n\na\tb\n\nend"
    )
    assert document.title == "The page"
    assert section.headings == ((6, "Big news"),)
    assert section.text[6:].startswith("Big news")


def test_a_page_says_its_encoding_or_is_utf_8(read: Read) -> None:
    pytest.importorskip("selectolax", reason="comes with the engine")
    latin = "<meta charset=latin-1><p>grün".encode("latin-1")
    assert read("a.html", latin)[0].sections[0].text == "grün"
    assert read("b.html", "<p>grün".encode("utf-16"))[0].sections[0].text == "grün"
    nonsense = "<meta charset=rot13><p>grün"
    assert read("c.html", nonsense)[0].sections[0].text == "grün"


def test_a_page_nested_beyond_all_measure_is_read(read: Read) -> None:
    pytest.importorskip("selectolax", reason="comes with the engine")
    (document,) = read("deep.html", "<div>" * 20_000 + "core")
    assert document.sections[0].text == "core"


def _pdf(*pages: str, **options: Any) -> bytes:
    fpdf = pytest.importorskip("fpdf", reason="comes with the tests of the engine")
    pytest.importorskip("pypdf", reason="comes with the engine")
    pdf = fpdf.FPDF()
    pdf.set_title("A paper")
    for text in pages:
        pdf.add_page()
        pdf.set_font("helvetica", size=12)
        if text:
            pdf.multi_cell(0, 8, text)
    if options:
        pdf.set_encryption(**options)
    return bytes(pdf.output())


def test_pages_of_a_pdf_are_sections_and_empty_ones_left_out(read: Read) -> None:
    (document,) = read("a.pdf", _pdf("First page.", "", "Third page."))
    assert [(one.page, one.text) for one in document.sections] == [
        (1, "First page."),
        (3, "Third page."),
    ]
    assert document.title == "A paper"


@pytest.mark.parametrize("password", ["", "secret"])
def test_an_encrypted_pdf_is_refused(read: Read, password: str) -> None:
    content = _pdf("Page.", owner_password="owner", user_password=password)
    with pytest.raises(InputError, match=r"a.pdf: is encrypted; store a copy without"):
        read("a.pdf", content)


def test_limits_of_pages_and_text_hold_for_a_pdf(read: Read) -> None:
    content = _pdf("one", "two", "three")
    with pytest.raises(InputError, match=r"a.pdf: has more than 2 pages"):
        read("a.pdf", content, max_pages=2)
    with pytest.raises(InputError, match=r"a.pdf: has more than 7 characters of text"):
        read("a.pdf", content, max_chars=7)
    with pytest.raises(InputError, match=r"a.pdf: holds no text; pages that are pictures"):
        read("a.pdf", _pdf("", ""))


def test_a_pdf_that_is_none_is_told(read: Read) -> None:
    pytest.importorskip("pypdf", reason="comes with the engine")
    with pytest.raises(InputError, match=r"a.pdf: is no PDF, whatever its name says"):
        read("a.pdf", "<html>not found</html>")


def test_a_broken_pdf_is_read_or_refused_and_nothing_else(read: Read) -> None:
    content = _pdf(*(f"Page {number} of some length. " * 9 for number in range(3)))
    outcomes = set()
    for place in range(20, len(content), len(content) // 60):
        for broken in (content[:place], content[:place] + b"\xff<</" + content[place + 4 :]):
            try:
                outcomes.add(len(read("a.pdf", broken)))
            except InputError as exc:
                outcomes.add(str(exc)[:6])
    assert outcomes == {1, "a.pdf:"}


def test_a_pdf_that_unfolds_without_end_is_refused(read: Read) -> None:
    content = _pdf("A page.")
    start = content.index(b"stream\n", content.index(b"/FlateDecode")) + 7
    end = content.index(b"\nendstream", start)
    bomb = zlib.compress(bytes(120 << 20))
    length = content.rindex(b"/Length ", 0, start) + 8
    digits = content[length:start].split(b"\n")[0].split(b">")[0].split(b" ")[0]
    head = content[:length] + str(len(bomb)).encode() + content[length + len(digits) : start]
    with pytest.raises(InputError, match=r"a.pdf: is a PDF that cannot be read: LimitReachedError"):
        read("a.pdf", head + bomb + content[end:])


def test_reading_stops_between_pages(read: Read) -> None:
    def stop() -> None:
        raise CancelledError("enough")

    with pytest.raises(CancelledError, match="enough"):
        read("a.pdf", _pdf("one"), stop=stop)


def test_rows_are_documents_named_by_a_column_or_by_what_they_say(read: Read) -> None:
    rows = [{"text": "a", "id": 7, "lang": "de"}, {"text": "b", "id": "x", "lang": "en"}]
    lines = "\n".join(map(json.dumps, rows))
    named = read("a.jsonl", lines, id_column="id", metadata_columns=("lang", "none"))
    assert [document.source for document in named] == ["a.jsonl#7", "a.jsonl#x"]
    assert [document.metadata for document in named] == [{"lang": "de"}, {"lang": "en"}]
    bare = read("a.jsonl", lines)
    assert bare[0].metadata == {"id": 7, "lang": "de"}
    again = read("a.jsonl", "\n".join(map(json.dumps, reversed(rows))))
    assert {document.source for document in bare} == {document.source for document in again}
    assert len({document.source for document in bare}) == 2
    with pytest.raises(InputError, match="row 0: column 'lang2' must name the row by text or a w"):
        read("a.jsonl", lines, id_column="lang2")


def test_a_corpus_tells_how_far_it_is_and_goes_on_after_failures(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A")
    (tmp_path / "b.jsonl").write_text('{"text": "B"}\n{"no": 1}\n{"text": "C"}\n')
    (tmp_path / "c.exe").write_text("D")
    failed: list[str] = []
    corpus = Corpus(
        files=[FileRef(path=tmp_path / name, name=name) for name in ("a.txt", "b.jsonl", "c.exe")],
        rows=RowSource.from_prompts(["E", "F"]),
        options=ReadOptions(),
        failed=lambda exc: failed.append(str(exc)),
    )
    read = [(round(part, 2), document.sections[0].text) for part, document in corpus]
    assert [text for _, text in read] == ["A", "B", "C", "E", "F"]
    parts = [part for part, _ in read]
    assert parts == sorted(parts)
    assert (parts[0], parts[-2:]) == (round(1 / 7, 2), [round(6 / 7, 2), 1.0])
    assert [text[:15] for text in failed] == ["b.jsonl: row 1:", "c.exe: no reade"]


def test_a_page_from_the_network_is_named_without_secrets(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("A")
    url = "https://u:p@example.org/x.txt?token=abc"
    corpus = Corpus(
        files=[FileRef(path=tmp_path / "x", name="x.txt", url=url)],
        rows=None,
        options=ReadOptions(),
        failed=lambda exc: pytest.fail(str(exc)),
    )
    ((_, document),) = corpus
    assert document.source.startswith("https://***@example.org/x.txt?token=*** (")
    assert "abc" not in document.source
    assert len(document.source) == len("https://***@example.org/x.txt?token=*** (0123456789ab)")


def test_pages_that_differ_in_their_query_alone_are_different_documents(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("A")
    urls = [f"https://example.org/x.txt{query}" for query in ("", "?page=1", "?page=2", "?page=1")]
    corpus = Corpus(
        files=[FileRef(path=tmp_path / "x", name="x.txt", url=url) for url in urls],
        rows=None,
        options=ReadOptions(),
        failed=lambda exc: pytest.fail(str(exc)),
    )
    first, *pages = [document.source for _, document in corpus]
    assert first == urls[0], "as it is written, where there is nothing to hide"
    assert pages[0] == pages[2] != pages[1]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("intro", b"\xef\xbb\xbf\n<!DOCTYPE html><p>Hello &amp; you", "Hello & you"),
        ("a.php", b'<?xml version="1.0"?>\n<html><p>Hello', "Hello"),
        ("v1.2", b"# Not <html>", "# Not <html>"),
        ("a.txt", b"<p>as it stands", "<p>as it stands"),
    ],
)
def test_pages_whose_names_tell_nothing_are_read_as_they_begin(
    tmp_path: Path, name: str, content: bytes, text: str
) -> None:
    pytest.importorskip("selectolax", reason="comes with the engine")
    (tmp_path / name).write_bytes(content)
    failed: list[str] = []

    def read(url: str | None) -> list[str]:
        file = FileRef(path=tmp_path / name, name=name, url=url)
        corpus = Corpus(
            files=[file],
            rows=None,
            options=ReadOptions(),
            failed=lambda exc: failed.append(str(exc)),
        )
        return [document.sections[0].text for _, document in corpus]

    assert read(f"https://example.org/{name}") == [text]
    assert failed == []
    read(None)
    assert len(failed) == (name != "a.txt"), "a file that lies here is named by whoever asks"


def test_a_pdf_from_the_network_needs_no_suffix(tmp_path: Path) -> None:
    (tmp_path / "2401.00001").write_bytes(_pdf("Page."))
    file = FileRef(path=tmp_path / "2401.00001", name="2401.00001", url="https://example.org/p")
    corpus = Corpus(files=[file], rows=None, options=ReadOptions(), failed=lambda exc: None)
    assert [document.sections[0].page for _, document in corpus] == [1]


def test_a_line_that_cannot_be_read_leaves_those_after_it(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_bytes(b'{"text": "A"}\nnope\n\n[1]\n{"text": "\xff"}\n{"text": "B"}\n')
    failed: list[str] = []
    corpus = Corpus(
        files=[FileRef(path=path, name="docs/b.jsonl")],
        rows=RowSource(kind="jsonl", params={"path": str(path)}),
        options=ReadOptions(),
        failed=lambda exc: failed.append(str(exc)),
    )
    assert [document.sections[0].text for _, document in corpus] == ["A", "B", "A", "B"]
    assert [text.partition(" must be")[0] for text in failed[:3]] == [
        "docs/b.jsonl: row 1: line 2",
        "docs/b.jsonl: row 2: line 4",
        "docs/b.jsonl: row 3: line 5",
    ]
    assert not [text for text in failed[:3] if str(tmp_path) in text]
    assert len(failed) == 6
    path.unlink()
    assert list(attrs.evolve(corpus, rows=None)) == []
    assert failed[6] == "docs/b.jsonl: row 0: cannot be read: No such file or directory"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ('"x": NaN', "row 0: columns that its chunks carry must be JSON data: Out of range"),
        ('"x": {"y": [-Infinity]}', "row 0: columns that its chunks carry must be JSON data"),
        ('"x": "\\ud800"', "row 0: columns that its chunks carry must be JSON data: .*surrogates"),
        ('"\\ud800": 1', "row 0: columns that its chunks carry must be JSON data"),
        ('"x": "' + "é" * 33_000 + '"', "row 0: columns .* more than 65,536 bytes; name fewer in"),
        ('"id": "' + "x" * 1_001 + '"', "row 0: column 'id' names the row by more than 1000"),
    ],
)
def test_a_row_whose_fields_no_store_takes_is_refused(
    read: Read, fields: str, message: str
) -> None:
    options = {"id_column": "id"} if fields.startswith('"id"') else {}
    line = f'{{"text": "a", {fields}}}'
    with pytest.raises(InputError, match=message):
        read("a.jsonl", line, **options)
    if not options:
        assert read("a.jsonl", line, metadata_columns=())[0].metadata == {}
    assert read("b.jsonl", '{"text": "' + "a" * 99_000 + '"}'), "the text itself may be long"


def test_headings_and_titles_are_cut_and_none_holds_another(read: Read) -> None:
    pytest.importorskip("selectolax", reason="comes with the engine")
    page = f"<title>{'t' * 900}</title>" + "<div><h1>ab" * 2_000 + "</h1></div>" * 2_000
    (document,) = read("a.html", page + f"<h2>{'w' * 900}</h2>")
    assert document.title == "t" * 300
    assert [text for _, text in document.sections[0].headings] == ["ab", "w" * 300]
    (document,) = read("a.md", f"# {'h' * 900}\n")
    assert (document.title, document.sections[0].headings[0][1]) == ("h" * 300, "h" * 300)


@pytest.mark.parametrize(
    ("line", "heading"),
    [
        ("## Two ##  ", "Two"),
        ("# C#", "C#"),
        ("# C# #", "C#"),
        ("# \t # x\t##\t", "# x"),
        ("# ##", None),
        ("#  ", None),
    ],
)
def test_the_closing_marks_of_a_heading_are_not_in_it(
    read: Read, line: str, heading: str | None
) -> None:
    (document,) = read("a.md", f"{line}\n")
    assert [text for _, text in document.sections[0].headings] == ([heading] if heading else [])


def test_a_heading_with_a_long_gap_is_read_in_time(read: Read) -> None:
    started = time.monotonic()
    (document,) = read("a.md", f"# a{' ' * 200_000}x\n")
    assert document.title == "a" + " " * 299
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("label", ["punycode", "idna", "utf-7", "raw_unicode_escape", "base64"])
def test_a_page_in_an_encoding_that_no_page_has_is_utf_8(read: Read, label: str) -> None:
    pytest.importorskip("selectolax", reason="comes with the engine")
    page = f"<meta charset={label}><p>grün+ADw-b \\u0041"
    assert read("a.html", page)[0].sections[0].text == "grün+ADw-b \\u0041"


@pytest.mark.parametrize("label", ["Shift_JIS", "euc-kr", "windows-1251", "iso-8859-5", "gb18030"])
def test_a_page_in_an_encoding_that_pages_have_is_read(read: Read, label: str) -> None:
    pytest.importorskip("selectolax", reason="comes with the engine")
    page = f"<meta charset={label}><p>Яблоко".encode(label)
    assert read("a.html", page)[0].sections[0].text == "Яблоко"


@given(
    suffix=st.sampled_from([suffix for suffix in sorted(READERS) if suffix != ".pdf"]),
    content=st.binary(max_size=60) | st.text('<>/!-ahp1td b\n#`{}"', max_size=80).map(str.encode),
)
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_documents_or_an_input_error(
    suffix: str, content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pytest.importorskip("selectolax", reason="comes with the engine")
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content)
    documents: list[Document] = []
    message = "any: "
    try:
        documents = list(read_file(path, path.name, "any", ReadOptions()))
    except InputError as exc:
        message = str(exc)
    assert message.startswith("any: ")
    for document in documents:
        for section in document.sections:
            section.text.encode()
            for start, heading in section.headings:
                assert heading in section.text[start:]


def test_further_readers_can_be_added(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(READERS, ".adoc", READERS[".txt"])
    assert read("a.ADOC", "text")[0].sections[0].text == "text"
