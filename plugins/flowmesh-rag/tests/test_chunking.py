"""How texts are split, and where each piece says that it stands."""

from __future__ import annotations

import itertools
import time

import pytest
from flowmesh_rag.chunking import Chunk, Splitter
from flowmesh_rag.documents import Document, Section
from flowmesh_rag.spec import Chunking
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowmesh_core import CancelledError, InputError

pytest.importorskip("semantic_text_splitter", reason="comes with the engine")


def _document(*texts: str, **fields: object) -> Document:
    sections = tuple(Section(text=text) for text in texts)
    return Document(source="a", sections=sections, **fields)  # type: ignore[arg-type]


def _split(document: Document, **block: object) -> list[Chunk]:
    # Smaller chunks than documents may ask for, so that short texts have many.
    return list(Splitter(Chunking.model_construct(**block)).split(document))  # type: ignore[arg-type]


_TEXTS = st.text(st.sampled_from("ab \n\t.#-`é\N{SNOWMAN}\N{GRINNING FACE}"), max_size=300)


@given(
    texts=st.lists(_TEXTS, max_size=3),
    size=st.integers(1, 60),
    overlap=st.integers(0, 59),
    markdown=st.booleans(),
)
@example(texts=[" ``.\n..."], size=7, overlap=3, markdown=True)
@settings(max_examples=150, deadline=None)
def test_offsets_give_back_the_text_and_no_word_is_lost(
    texts: list[str], size: int, overlap: int, markdown: bool
) -> None:
    sections = tuple(Section(text=text, page=page) for page, text in enumerate(texts))
    document = Document(source="a", sections=sections, format="markdown" if markdown else "text")
    chunks = _split(document, size=size, overlap=min(overlap, size - 1))
    assert [chunk.ordinal for chunk in chunks] == list(range(len(chunks)))
    places = [(chunk.page or 0, chunk.start) for chunk in chunks]
    assert places == sorted(set(places))
    covered: list[set[int]] = [set() for _ in texts]
    for (page, _), chunk in zip(places, chunks, strict=True):
        assert texts[page][chunk.start : chunk.end] == chunk.text
        assert chunk.text.strip()
        assert len(chunk.text) <= size
        covered[page] |= set(range(chunk.start, chunk.end))
    for text, found in zip(texts, covered, strict=True):
        assert not {at for at, letter in enumerate(text) if letter.strip()} - found


def test_neighbours_overlap_as_far_as_asked() -> None:
    words = " ".join(f"word{number:03}" for number in range(60))
    apart = _split(_document(words), size=80, overlap=0)
    joined = _split(_document(words), size=80, overlap=30)
    assert all(one.end <= two.start for one, two in itertools.pairwise(apart))
    shared = [one.end - two.start for one, two in itertools.pairwise(joined)]
    assert all(0 < length <= 30 for length in shared)


def test_a_chunk_stands_under_the_nearest_heading_and_on_its_page() -> None:
    text = "intro\n\n# One\n\nbody of one\n\n## Two\n\nbody of two"
    section = Section(text=text, page=4, headings=((7, "One"), (27, "Two")))
    document = Document(source="a", sections=(section,), format="markdown")
    chunks = _split(document, size=20, overlap=0)
    assert [(chunk.text, chunk.heading) for chunk in chunks] == [
        ("intro", None),
        ("# One\n\nbody of one", "One"),
        ("## Two\n\nbody of two", "Two"),
    ]
    assert {chunk.page for chunk in chunks} == {4}


def test_the_format_of_the_document_decides_unless_the_task_does() -> None:
    text = "# A\n\nbody\n\n# B\n\nbody"
    markdown = _document(text, format="markdown")
    assert [one.text for one in _split(markdown, size=14, overlap=0)] == [
        "# A\n\nbody",
        "# B\n\nbody",
    ]
    as_text = _split(markdown, size=14, overlap=0, format="text")
    assert as_text == _split(_document(text), size=14, overlap=0)
    assert [one.text for one in as_text] != ["# A\n\nbody", "# B\n\nbody"]


def test_tokens_are_counted_by_the_model() -> None:
    def count(text: str) -> int:
        return len(text.split())

    block = Chunking.model_construct(size=3, overlap=1, unit="tokens")
    chunks = Splitter(block, count).split(_document("a b c d e f g"))
    assert [chunk.text for chunk in chunks] == ["a b c", "c d e", "e f g"]
    with pytest.raises(InputError, match=r"spec.chunk.unit tokens needs a model on this worker"):
        Splitter(block)


def test_a_long_text_is_split_in_time_and_can_be_stopped() -> None:
    lines = ("word " * 10 + "\n") * 4_000
    long = [_document("a" * 120_000), _document(lines)]
    for document in long:
        chunks = _split(document, size=800, overlap=100)
        (text,) = (section.text for section in document.sections)
        covered = {at for chunk in chunks for at in range(chunk.start, chunk.end)}
        assert all(at in covered for at, letter in enumerate(text) if letter.strip())
    asked = []

    def stop() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise CancelledError("enough")

    with pytest.raises(CancelledError, match="enough"):
        list(Splitter(Chunking()).split(long[1], stop))
    ends = [chunk.text[-4:] for chunk in _split(long[1], size=800, overlap=0)]
    assert set(ends) == {"word"}, "no word is cut where there are borders"


@pytest.mark.parametrize("text", ["a" * 50_000, "word " * 10_000])
def test_small_chunks_come_as_soon_as_they_are_split(text: str) -> None:
    asked: list[float] = []
    block = Chunking(size=16, overlap=15)
    chunks = Splitter(block).split(_document(text), lambda: asked.append(time.monotonic()))
    early = list(itertools.islice(chunks, 4_000))
    assert len({chunk.start for chunk in early}) == 4_000
    assert len(asked) > 1
    waits = [later - sooner for sooner, later in itertools.pairwise(asked)]
    assert max(waits) < 1
