"""Files of every kind, whole and broken, as documents."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    assert document.source == "https://***@example.org/x.txt?token=***"


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
