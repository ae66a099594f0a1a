from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flowmesh_rag.blocks import StoreBlock
from flowmesh_rag.settings import RagSettings
from flowmesh_rag.stores.base import DENSE, CollectionFacts, Search, SearchOptions, open_store
from store_suite import FACTS, POINTS, OpenAgain, StoreSuite, make_id, make_point

from flowmesh_core import CancelledError, ExecutionError, InputError
from flowmesh_core.testing import wait_for

pytest.importorskip("qdrant_edge", reason="the embedded engine is what is tested")
from flowmesh_rag.stores.edge import EdgeStore

BLOCK = StoreBlock(type="edge", collection="docs", timeout_s=0.3)
PATIENT = BLOCK.model_copy(update={"timeout_s": 120.0})
DENSELY = SearchOptions(limit=3, vector=DENSE)
SIZE = 128


@pytest.fixture
def open_again(settings: RagSettings) -> Callable[[], EdgeStore]:
    def open_again() -> EdgeStore:
        store = open_store(BLOCK, owner="alice", settings=settings)
        assert isinstance(store, EdgeStore)
        return store

    return open_again


class TestEdge(StoreSuite):
    """The suite on a folder."""


def fill(open_again: OpenAgain) -> None:
    with open_again() as store:
        store.create(FACTS)
        store.upsert(POINTS)


def folder_of(settings: RagSettings) -> Path:
    (folder,) = settings.folder.rglob("docs/edge")
    return folder


def fill_many(store: EdgeStore, count: int) -> list[list[float]]:
    """Write so many random vectors, enough to keep the graph's builder busy for a while."""
    chance = random.Random(3)
    vectors = [[chance.gauss(0, 1) for _ in range(SIZE)] for _ in range(count)]
    store.create(CollectionFacts(vectors={DENSE: SIZE}))
    store.upsert([make_point(n, vector, "") for n, vector in enumerate(vectors)])
    return vectors


def builders(settings: RagSettings) -> list[int]:
    """Return the ids of processes that build a graph below the test's folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
        except OSError:  # ended meanwhile
            continue
        if b"stores.optimize" in command and bytes(settings.folder) in command:
            found.append(int(entry.name))
    return found


def is_at_work(process: int) -> bool:
    """Tell whether a process has done more than start."""
    ticks = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11]
    return int(ticks) > 0.3 * os.sysconf("SC_CLK_TCK")


@pytest.fixture
def elsewhere(settings: RagSettings) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the collection open until it is ended."""
    script = textwrap.dedent(
        f"""
        import sys
        from flowmesh_rag.blocks import StoreBlock
        from flowmesh_rag.settings import RagSettings
        from flowmesh_rag.stores.base import open_store
        settings = RagSettings.model_validate({{"FLOWMESH_RAG_DIR": {str(settings.folder)!r}}})
        block = StoreBlock(type="edge", collection="docs")
        with open_store(block, owner="alice", settings=settings) as store:
            print(store.count(), flush=True)
            sys.stdin.read()
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_nothing_is_made_by_looking(open_again: OpenAgain, settings: RagSettings) -> None:
    with open_again() as store:
        assert store.describe() is None
    assert not settings.folder.exists()


def test_owners_do_not_see_each_other(open_again: OpenAgain, settings: RagSettings) -> None:
    fill(open_again)
    with open_store(BLOCK, owner="bob", settings=settings) as store:
        assert store.describe() is None


def test_a_collection_in_use_elsewhere_is_told(
    open_again: OpenAgain, request: pytest.FixtureRequest
) -> None:
    fill(open_again)
    elsewhere = request.getfixturevalue("elsewhere")
    assert elsewhere.stdout.readline() == f"{len(POINTS)}\n"
    with open_again() as store:
        with pytest.raises(ExecutionError, match="'docs' is in use by another task") as caught:
            store.describe()
        assert caught.value.retriable


def test_a_cancel_is_heard_while_another_task_has_it(
    open_again: OpenAgain, settings: RagSettings, request: pytest.FixtureRequest
) -> None:
    fill(open_again)
    elsewhere = request.getfixturevalue("elsewhere")
    assert elsewhere.stdout.readline()

    def stop() -> None:
        raise CancelledError("enough")

    with (
        open_store(PATIENT, owner="alice", settings=settings, stop=stop) as store,
        pytest.raises(CancelledError, match="enough"),
    ):
        store.describe()


def test_whoever_waits_is_let_in(
    settings: RagSettings, open_again: OpenAgain, request: pytest.FixtureRequest
) -> None:
    fill(open_again)
    elsewhere = request.getfixturevalue("elsewhere")
    assert elsewhere.stdout.readline()
    with open_store(PATIENT, owner="alice", settings=settings) as store:
        elsewhere.stdin.close()
        assert store.count() == len(POINTS)


def test_a_killed_task_leaves_neither_lock_nor_loss(
    open_again: OpenAgain, request: pytest.FixtureRequest
) -> None:
    fill(open_again)
    elsewhere = request.getfixturevalue("elsewhere")
    assert elsewhere.stdout.readline()
    elsewhere.send_signal(signal.SIGKILL)
    elsewhere.wait()
    with open_again() as store:
        assert store.count() == len(POINTS)


def test_half_made_collections_are_made_anew(open_again: OpenAgain, settings: RagSettings) -> None:
    fill(open_again)
    folder = folder_of(settings)
    folder.rename(folder.parent / "new")  # as one that was killed leaves it
    with open_again() as store:
        assert store.describe() is None
        store.create(FACTS)
        assert store.count() == 0


def test_the_graph_finds_what_brute_force_finds(open_again: OpenAgain) -> None:
    with open_again() as store:
        vectors = fill_many(store, 1500)
        searches = [Search(text="", vector=vector) for vector in vectors[:100]]
        before = store.search(searches, DENSELY)
        calls = []
        store.finish(lambda: calls.append(1), graph="always")
        assert calls
        assert store.count() == 1500
        assert store._shard.info().indexed_vectors_count == 1500
        after = store.search(searches, DENSELY)
        exactly = store.search(searches, SearchOptions(limit=3, vector=DENSE, exact=True))
    assert [hits[0].id for hits in after] == [make_id(n) for n in range(100)]
    ids = [[hit.id for hit in hits] for hits in before]
    assert [[hit.id for hit in hits] for hits in exactly] == ids


@pytest.mark.parametrize("graph", ["auto", "never"])
def test_small_collections_get_no_graph(
    open_again: OpenAgain, graph: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(open_again)
    monkeypatch.setattr(subprocess, "Popen", None)
    with open_again() as store:
        store.finish(lambda: None, graph=graph)
        assert store.count() == len(POINTS)


def test_large_collections_get_a_graph_of_themselves(
    open_again: OpenAgain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowmesh_rag.stores.edge._GRAPH_POINTS", 1500)
    with open_again() as store:
        fill_many(store, 1500)
        store.finish(lambda: None)
        store.count()
        assert len(list(store._folder.glob("shard/segments/*"))) >= 1
        assert store._shard.info().indexed_vectors_count == 1500


def test_a_cancel_ends_the_builder_and_loses_nothing(
    open_again: OpenAgain, settings: RagSettings
) -> None:
    stopped: list[int] = []

    def stop() -> None:
        stopped.extend(filter(is_at_work, builders(settings)))
        if stopped:
            os.kill(stopped[0], signal.SIGSTOP)  # so that it cannot end by itself
            raise CancelledError("cancelled")

    with open_again() as store:
        vectors = fill_many(store, 9000)
        with pytest.raises(CancelledError, match="cancelled"):
            store.finish(stop, graph="always")
        assert len(stopped) == 1
        assert builders(settings) == []
        assert store.count() == 9000
        (hits,) = store.search([Search(text="", vector=vectors[77])], DENSELY)
        assert hits[0].id == make_id(77)


def test_the_builder_keeps_the_lock_when_its_parent_is_gone(
    open_again: OpenAgain, settings: RagSettings
) -> None:
    with open_again() as store:
        fill_many(store, 6000)
    script = textwrap.dedent(
        f"""
        import time
        from flowmesh_rag.blocks import StoreBlock
        from flowmesh_rag.settings import RagSettings
        from flowmesh_rag.stores.base import open_store
        settings = RagSettings.model_validate({{"FLOWMESH_RAG_DIR": {str(settings.folder)!r}}})
        block = StoreBlock(type="edge", collection="docs")
        with open_store(block, owner="alice", settings=settings) as store:
            store.finish(lambda: time.sleep(60), graph="always")
        """
    )
    with subprocess.Popen([sys.executable, "-c", script]) as parent:
        (builder,) = wait_for(lambda: builders(settings))
        os.kill(builder, signal.SIGSTOP)
        parent.kill()
    try:
        with open_again() as store, pytest.raises(ExecutionError, match="in use by another task"):
            store.describe()
    finally:
        os.kill(builder, signal.SIGCONT)
    with open_store(PATIENT, owner="alice", settings=settings) as store:
        assert store.count() == 6000


def test_a_builder_that_fails_is_told(open_again: OpenAgain, settings: RagSettings) -> None:
    fill(open_again)
    shutil.rmtree(folder_of(settings) / "shard")
    with (
        open_again() as store,
        pytest.raises(ExecutionError, match=r"'docs' could not be built: .*shard"),
    ):
        store.finish(lambda: None, graph="always")


def test_a_broken_shard_is_told(open_again: OpenAgain, settings: RagSettings) -> None:
    fill(open_again)
    shutil.rmtree(folder_of(settings) / "shard")
    with open_again() as store, pytest.raises(ExecutionError, match="cannot load edge shard"):
        store.count()


def test_facts_are_plain_json(open_again: OpenAgain, settings: RagSettings) -> None:
    fill(open_again)
    stored = json.loads((folder_of(settings) / "collection.json").read_text())
    assert stored["vectors"] == {DENSE: 3}
    assert stored["model"] == "tiny@1"


def test_broken_facts_are_told(open_again: OpenAgain, settings: RagSettings) -> None:
    fill(open_again)
    (folder_of(settings) / "collection.json").write_text("{")
    with open_again() as store, pytest.raises(InputError, match="store 'edge': Expecting"):
        store.describe()


@pytest.mark.parametrize("language", ["none", "german"])
def test_words_are_cut_as_the_language_says(open_again: OpenAgain, language: str) -> None:
    words = SearchOptions(limit=5, mode="sparse")
    points = [make_point(1, [1, 0, 0], "Häuser am Meer"), make_point(2, [1, 0, 0], "ein Haus")]
    with open_again() as store:
        store.create(CollectionFacts(vectors={DENSE: 3}, sparse=("bm25",), language=language))
        store.upsert(points)
        (hits,) = store.search([Search(text="Haus")], words)
    assert len(hits) == (2 if language == "german" else 1)


def test_unknown_languages_are_refused(open_again: OpenAgain) -> None:
    facts = CollectionFacts(vectors={DENSE: 3}, sparse=("bm25",), language="klingon")
    with open_again() as store:
        with pytest.raises(InputError, match=r"spec\.language.*klingon"):
            store.create(facts)
        assert store.describe() is None


def test_a_server_is_not_at_hand(open_again: OpenAgain) -> None:
    asked = SearchOptions(limit=1, server_model="m")
    with (
        open_again() as store,
        pytest.raises(InputError, match=r"cannot do spec\.embedding\.server"),
    ):
        store.require(asked)


def test_a_wrong_filter_is_refused_before_anything_is_embedded(open_again: OpenAgain) -> None:
    asked = SearchOptions(limit=1, filter={"must": [{"key": "a", "range": {"above": 1}}]})
    with open_again() as store, pytest.raises(InputError, match=r"search\.filter.*above"):
        store.require(asked)
