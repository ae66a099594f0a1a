from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from flowmesh_rag.blocks import RagSearch, StoreBlock
from flowmesh_rag.settings import RagSettings
from flowmesh_rag.stores import base
from flowmesh_rag.stores.base import (
    CollectionFacts,
    Feature,
    Hit,
    Point,
    Search,
    SearchOptions,
    StoreContext,
    VectorStore,
    open_store,
)

from flowmesh_core import InputError, NetworkPolicy

BLOCK = StoreBlock(type="acme.lance", collection="docs", timeout_s=30)


class PlainStore(VectorStore):
    """A store that can do nothing but hold facts, and counts how often it is closed."""

    features = frozenset({Feature.FILTER})
    closed = 0

    def describe(self) -> CollectionFacts | None:
        return None

    def create(self, facts: CollectionFacts) -> None:
        raise NotImplementedError

    def search(self, searches: Sequence[Search], options: SearchOptions) -> list[list[Hit]]:
        return [[] for _ in searches]

    def upsert(self, points: Sequence[Point]) -> None:
        raise NotImplementedError

    def digests(self, sources: Sequence[str] | None) -> Mapping[str, Mapping[str, str]]:
        return {}

    def delete(self, ids: Sequence[str]) -> None:
        raise NotImplementedError

    def count(self) -> int:
        return 0

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def store(tmp_path: Path) -> PlainStore:
    context = StoreContext(folder=tmp_path, policy=NetworkPolicy(), timeout_s=1)
    return PlainStore(BLOCK, context)


def test_options_say_all_that_the_block_says() -> None:
    block = RagSearch(
        top_k=7,
        mode="hybrid",
        candidates=9,
        fusion="dbsf",
        rrf_k=2,
        filter={"must": []},
        score_threshold=0.5,
        exact=True,
        ef=64,
        sparse_using="words",
        with_payload=["title"],
    )
    options = SearchOptions.from_block(block, vector="dense")
    assert options == SearchOptions(
        limit=7,
        mode="hybrid",
        vector="dense",
        sparse="words",
        candidates=9,
        fusion="dbsf",
        rrf_k=2,
        filter={"must": []},
        score_threshold=0.5,
        exact=True,
        ef=64,
        with_payload=["title"],
    )


def test_what_the_caller_knows_better_goes_before_the_block() -> None:
    block = RagSearch(top_k=5, with_payload=False)
    options = SearchOptions.from_block(block, limit=50, with_payload=True)
    assert (options.limit, options.with_payload) == (50, True)


@pytest.mark.parametrize(
    ("options", "features"),
    [
        ({}, set()),
        ({"fusion": "dbsf"}, set()),
        ({"mode": "sparse", "server_model": "m"}, {Feature.SPARSE}),
        ({"mode": "hybrid"}, {Feature.HYBRID}),
        ({"mode": "hybrid", "fusion": "dbsf"}, {Feature.HYBRID, Feature.DBSF}),
        ({"filter": {}, "score_threshold": 0.0}, {Feature.FILTER, Feature.SCORE_THRESHOLD}),
        ({"server_model": "m"}, {Feature.SERVER_EMBEDDING}),
    ],
)
def test_options_tell_what_a_store_must_be_able_to_do(options: Any, features: set[Feature]) -> None:
    assert SearchOptions(limit=5, **options).features == features


def test_a_store_refuses_all_that_it_cannot_do_at_once(store: PlainStore) -> None:
    store.require(SearchOptions(limit=5, filter={}))
    options = SearchOptions(limit=5, mode="hybrid", filter={}, score_threshold=0.1)
    with pytest.raises(
        InputError,
        match=r"store 'acme.lance' cannot do spec.search.mode hybrid, spec.search.score_threshold$",
    ):
        store.require(options)


def test_a_store_is_closed_at_the_end_of_its_block(store: PlainStore) -> None:
    with store as opened:
        assert opened is store
        assert store.closed == 0
    assert store.closed == 1


@pytest.mark.parametrize(
    ("vectors", "using", "chosen"),
    [
        ({"": 4}, None, ""),
        ({"fast-all-minilm-l6-v2": 4}, None, "fast-all-minilm-l6-v2"),
        ({"a": 4, "b": 8}, "b", "b"),
    ],
)
def test_the_vector_to_search_is_found_out_from_the_collection(
    vectors: dict[str, int], using: str | None, chosen: str
) -> None:
    assert CollectionFacts(vectors=vectors).choose_vector(using) == chosen


@pytest.mark.parametrize(
    ("vectors", "using", "message"),
    [
        ({"a": 4, "b": 8}, None, "search.using is required; the collection's vectors: a, b"),
        ({}, None, "search.using is required; the collection's vectors: none"),
        ({"a": 4}, "c", "no vector 'c'; the collection has a"),
    ],
)
def test_a_vector_that_cannot_be_found_out_is_asked_for(
    vectors: dict[str, int], using: str | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        CollectionFacts(vectors=vectors).choose_vector(using)


def test_a_collection_without_words_cannot_be_searched_by_them() -> None:
    facts = CollectionFacts(vectors={"dense": 4}, sparse=("bm25",))
    assert facts.choose_sparse("bm25") == "bm25"
    with pytest.raises(InputError, match="no sparse vector 'words'; the collection has bm25"):
        facts.choose_sparse("words")


def test_vectors_of_another_size_than_the_collections_are_refused() -> None:
    facts = CollectionFacts(vectors={"dense": 384})
    facts.check_size("dense", 384, model="acme/small")
    with pytest.raises(InputError, match=r"acme/small gives vectors of 768 .* holds 384"):
        facts.check_size("dense", 768, model="acme/small")


def test_a_store_that_is_not_installed_is_an_error_that_names_the_others(
    settings: RagSettings,
) -> None:
    with pytest.raises(
        InputError,
        match=r"spec.store.type 'acme.lance': .* no driver .*known are edge, qdrant, sqlite",
    ):
        open_store(BLOCK, owner="", settings=settings)


def test_each_owner_has_a_folder_that_tells_nothing_of_the_owner(
    settings: RagSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_load_store", lambda _name: PlainStore)
    owners = ["", '["anna", null, null]', '["../../bob", null, null]']
    folders = [open_store(BLOCK, owner=owner, settings=settings).context.folder for owner in owners]
    assert len(set(folders)) == 3
    assert all(folder.parent == settings.folder for folder in folders)
    assert all(folder.name.isalnum() for folder in folders)
    assert folders[1] == open_store(BLOCK, owner=owners[1], settings=settings).context.folder


@pytest.mark.parametrize(("left", "timeout_s"), [(None, 30), (5.0, 5), (300.0, 30)])
def test_a_store_waits_no_longer_than_the_task_has(
    left: float | None, timeout_s: float, settings: RagSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_load_store", lambda _name: PlainStore)
    opened = open_store(BLOCK, owner="", settings=settings, timeout_s=left)
    assert opened.context.timeout_s == timeout_s
    assert opened.context.policy == settings.policy
