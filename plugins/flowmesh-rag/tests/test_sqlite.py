from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from flowmesh_rag.blocks import StoreBlock
from flowmesh_rag.settings import RagSettings
from flowmesh_rag.stores.base import DENSE, CollectionFacts, Search, SearchOptions, open_store
from store_suite import FACTS, POINTS, OpenAgain, StoreSuite, make_id, make_point

from flowmesh_core import CancelledError, ExecutionError, InputError

np = pytest.importorskip("numpy", reason="NumPy compares the vectors")
from flowmesh_rag.stores.sqlite import SqliteStore  # noqa: E402 - needs NumPy

BLOCK = StoreBlock(type="sqlite", collection="docs", timeout_s=0.2)
DENSELY = SearchOptions(limit=3, vector=DENSE)


@pytest.fixture
def open_again(settings: RagSettings) -> Callable[[], SqliteStore]:
    def open_again() -> SqliteStore:
        store = open_store(BLOCK, owner="alice", settings=settings)
        assert isinstance(store, SqliteStore)
        return store

    return open_again


class TestSqlite(StoreSuite):
    """The suite on a file."""


def file_of(settings: RagSettings) -> Path:
    (file,) = settings.folder.rglob("points.sqlite3")
    return file


def fill(open_again: OpenAgain) -> None:
    with open_again() as store:
        store.create(FACTS)
        store.upsert(POINTS)


def test_nothing_is_made_by_looking(open_again: OpenAgain, settings: RagSettings) -> None:
    with open_again() as store:
        assert store.describe() is None
    assert not settings.folder.exists()


def test_owners_do_not_see_each_other(open_again: OpenAgain, settings: RagSettings) -> None:
    fill(open_again)
    with open_store(BLOCK, owner="bob", settings=settings) as store:
        assert store.describe() is None


@pytest.fixture
def other_task(open_again: OpenAgain, settings: RagSettings) -> Iterator[sqlite3.Connection]:
    """Another connection to a collection with ``POINTS``."""
    fill(open_again)
    with contextlib.closing(sqlite3.connect(file_of(settings), isolation_level=None)) as other:
        yield other


def test_readers_go_on_while_one_writes(
    open_again: OpenAgain, other_task: sqlite3.Connection
) -> None:
    other_task.execute("BEGIN IMMEDIATE")
    other_task.execute("DELETE FROM points")
    with open_again() as one, open_again() as two:
        assert one.count() == two.count() == len(POINTS)
        with pytest.raises(ExecutionError, match="'docs' is in use by another task") as caught:
            one.delete([make_id(0)])
        assert caught.value.retriable


def test_one_writes_while_readers_go_on(
    open_again: OpenAgain, other_task: sqlite3.Connection
) -> None:
    count = "SELECT count(*) FROM points"
    other_task.execute("BEGIN")
    assert other_task.execute(count).fetchone() == (len(POINTS),)
    with open_again() as store:
        store.delete([make_id(0)])
        assert store.count() == len(POINTS) - 1
    assert other_task.execute(count).fetchone() == (len(POINTS),)


def test_what_another_task_writes_is_found_at_once(open_again: OpenAgain) -> None:
    fill(open_again)
    search = [Search(text="", vector=[0, -1, 0])]
    with open_again() as reader, open_again() as writer:
        assert reader.search(search, DENSELY)[0][0].score < 0.5
        writer.upsert([make_point(9, [0, -1, 0], "new")])
        assert reader.search(search, DENSELY)[0][0].id == make_id(9)
        reader.upsert([make_point(9, [0, 1, 0], "newer")])
        assert reader.search(search, DENSELY)[0][0].id != make_id(9)


def test_tasks_may_make_it_at_once(open_again: OpenAgain, settings: RagSettings) -> None:
    patient = BLOCK.model_copy(update={"timeout_s": 60.0})

    def make(_number: int) -> int:
        with open_store(patient, owner="alice", settings=settings) as store:
            store.create(FACTS)
            store.upsert(POINTS)
            return store.count()

    with ThreadPoolExecutor(max_workers=4) as threads:
        assert list(threads.map(make, range(4))) == [len(POINTS)] * 4


def test_a_cancel_is_heard_while_another_task_writes(
    open_again: OpenAgain, other_task: sqlite3.Connection, settings: RagSettings
) -> None:
    other_task.execute("BEGIN IMMEDIATE")
    patient = BLOCK.model_copy(update={"timeout_s": 60.0})

    def stop() -> None:
        raise CancelledError("enough")

    with (
        open_store(patient, owner="alice", settings=settings, stop=stop) as store,
        pytest.raises(CancelledError, match="enough"),
    ):
        store.upsert(POINTS)


def test_a_task_writes_as_soon_as_another_has_written(
    open_again: OpenAgain, other_task: sqlite3.Connection, settings: RagSettings
) -> None:
    other_task.execute("BEGIN IMMEDIATE")
    looks: list[bool] = []

    def end_the_other() -> None:
        looks.append(True)
        if len(looks) == 3:
            other_task.execute("ROLLBACK")

    patient = BLOCK.model_copy(update={"timeout_s": 60.0})
    with open_store(patient, owner="alice", settings=settings, stop=end_the_other) as store:
        store.delete([make_id(1)])
        assert store.count() == len(POINTS) - 1
    assert len(looks) == 3


def test_half_a_batch_is_never_written(open_again: OpenAgain) -> None:
    fill(open_again)
    bad = make_point(8, [1, 1, 1], "x", broken=object())
    with open_again() as store:
        with pytest.raises(TypeError, match="not JSON serializable"):
            store.upsert([make_point(7, [1, 1, 1], "x"), bad])
        assert store.count() == len(POINTS)


def test_a_vector_of_zeros_is_like_nothing(open_again: OpenAgain) -> None:
    fill(open_again)
    with open_again() as store:
        store.upsert([make_point(9, [0, 0, 0], "zero")])
        (hits,) = store.search([Search(text="", vector=[0, 0, 0])], DENSELY)
        assert [hit.score for hit in hits] == [0, 0, 0]


def test_more_queries_than_fit_at_once_are_like_numpy(open_again: OpenAgain) -> None:
    random = np.random.default_rng(7)
    stored = random.standard_normal((300, 16)).astype(np.float32)
    asked = random.standard_normal((150, 16)).astype(np.float32)
    facts = CollectionFacts(vectors={DENSE: 16})
    with open_again() as store:
        store.create(facts)
        store.upsert([make_point(n, row.tolist(), "") for n, row in enumerate(stored)])
        found = store.search([Search(text="", vector=row) for row in asked], DENSELY)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    best = np.argsort(-(asked @ stored.T), axis=1)[:, :3]
    assert [[hit.id for hit in hits] for hits in found] == [
        [make_id(n) for n in row] for row in best.tolist()
    ]


def test_words_are_not_kept_where_nobody_searches_them(open_again: OpenAgain) -> None:
    with open_again() as store:
        store.create(CollectionFacts(vectors={DENSE: 3}))
        store.upsert(POINTS)
        with pytest.raises(InputError, match="no sparse vector 'bm25'"):
            store.search([Search(text="lamp")], SearchOptions(limit=1, mode="sparse"))


def test_whole_words_are_kept_for_no_language(open_again: OpenAgain) -> None:
    words = SearchOptions(limit=5, mode="sparse")
    with open_again() as store:
        store.create(CollectionFacts(vectors={DENSE: 3}, sparse=("bm25",), language="none"))
        store.upsert(POINTS)
        assert [hit.id for hit in store.search([Search(text="ship")], words)[0]] == []
        assert len(store.search([Search(text="ships")], words)[0]) == 2


def test_languages_without_stems_here_are_refused(open_again: OpenAgain) -> None:
    with open_again() as store, pytest.raises(InputError, match="knows english, none"):
        store.create(CollectionFacts(vectors={DENSE: 3}, language="german"))


def test_a_broken_file_is_told(open_again: OpenAgain, settings: RagSettings) -> None:
    fill(open_again)
    file_of(settings).write_bytes(b"no database" * 500)
    with open_again() as store, pytest.raises(InputError, match="index anew"):
        store.count()


@pytest.mark.parametrize("feature", ["fusion", "server"])
def test_what_it_cannot_do_is_refused_before(open_again: OpenAgain, feature: str) -> None:
    asked = {
        "fusion": SearchOptions(limit=1, mode="hybrid", fusion="dbsf"),
        "server": SearchOptions(limit=1, server_model="m"),
    }[feature]
    with open_again() as store, pytest.raises(InputError, match=f"cannot do spec.*{feature}"):
        store.require(asked)


def test_a_wrong_filter_is_refused_before_anything_is_embedded(open_again: OpenAgain) -> None:
    asked = SearchOptions(limit=1, filter={"must": [{"key": "a", "range": {"above": 1}}]})
    with open_again() as store, pytest.raises(InputError, match=r"search\.filter.*above"):
        store.require(asked)
