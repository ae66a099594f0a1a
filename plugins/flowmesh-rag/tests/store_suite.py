"""What every store of vectors must do, on a collection small enough to reckon by hand.

A test module subclasses ``StoreSuite`` and gives the fixture ``open_again``, which opens the same
collection once more; what a store does not declare in ``features`` is not asked of it.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
from flowmesh_rag.stores.base import (
    BOOKKEEPING,
    DENSE,
    SPARSE,
    CollectionFacts,
    Hit,
    Point,
    Search,
    SearchOptions,
    VectorStore,
)

from flowmesh_core import InputError

__all__ = ["FACTS", "POINTS", "StoreSuite", "make_id", "make_point"]

OpenAgain = Callable[[], VectorStore]

FACTS = CollectionFacts(vectors={DENSE: 3}, sparse=(SPARSE,), model="tiny@1")


def make_id(number: int) -> str:
    """Return the id of a point."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, str(number)))


def make_point(
    number: int, vector: Sequence[float], text: str, source: str | None = None, **payload: Any
) -> Point:
    """Make a point; with ``source`` as ``rag_index`` writes it."""
    ours = {"source_id": source, "digest": f"digest-{number}", "model": "tiny@1", "chunks": 1}
    known = {BOOKKEEPING: ours} if source else {}
    data = {"text": text, **payload, **known}
    return Point(id=make_id(number), vector=vector, text=text, payload=data)


POINTS = [
    make_point(0, [1, 0, 0], "The lighthouse keeper lights the lamp", "sea", n=0, tag="a", ok=True),
    make_point(1, [0.9, 0.1, 0], "A lamp burns in the tower", "sea", n=1, tag="b", ok=False),
    make_point(2, [0, 2, 0.5], "Ships sail by the rocks", "ships", n=2, tags=["a", "c"]),
    make_point(3, [0, 0, -4], "Straße, naïve café, 灯台の光 🗼", n=3, when="2024-05-01T12:00:00Z"),
    make_point(4, [0.5, 0.5, 0.4], "Lamps and ships and lamps", "ships", deep={"n": 4}, tag=None),
]
QUERIES = [[1, 0.2, 0.1], [0.1, 1, 0], [-0.2, 0.3, -1], [3, 3, 2.9]]


def cosine(left: Sequence[float], right: Sequence[float]) -> float:
    """Return the cosine of the angle between two vectors."""
    product = sum(a * b for a, b in zip(left, right, strict=True))
    return product / (math.hypot(*left) * math.hypot(*right))


def by_hand(query: Sequence[float]) -> list[tuple[str, float]]:
    """Rank all points as brute force does."""
    scores = [(point.id, cosine(query, point.vector)) for point in POINTS]
    return sorted(scores, key=lambda item: -item[1])


def numbers(hits: Sequence[Hit]) -> list[int]:
    """Return the numbers of the points that were found."""
    known = {make_id(number): number for number in range(100)}
    return [known[str(hit.id)] for hit in hits]


def dense(*, limit: int = 10, **options: Any) -> SearchOptions:
    """Return options of a search by vectors."""
    return SearchOptions(limit=limit, vector=DENSE, **options)


class StoreSuite:
    """Checks of one store; each test begins without the collection."""

    @pytest.fixture
    def store(self, open_again: OpenAgain) -> Iterator[VectorStore]:
        """A store without a collection."""
        with open_again() as store:
            yield store

    @pytest.fixture
    def filled(self, store: VectorStore) -> VectorStore:
        """A store that holds ``POINTS``."""
        store.create(FACTS)
        store.upsert(POINTS)
        return store

    def ask(self, store: VectorStore, **options: Any) -> list[list[Hit]]:
        """Search for ``QUERIES``; skip what the store does not declare."""
        asked = dense(**options)
        if missing := asked.features - store.features:
            pytest.skip(f"no {', '.join(missing)}")
        return store.search([Search(text="", vector=vector) for vector in QUERIES], asked)

    def ask_words(self, store: VectorStore, text: str, **options: Any) -> list[Hit]:
        """Search for words; skip what the store does not declare."""
        asked = dense(mode="sparse", **options)
        if missing := asked.features - store.features:
            pytest.skip(f"no {', '.join(missing)}")
        return store.search([Search(text=text)], asked)[0]

    def test_what_is_not_there_is_told(self, store: VectorStore) -> None:
        assert store.describe() is None
        for attempt in (
            lambda: store.search([Search(text="", vector=QUERIES[0])], dense()),
            lambda: store.upsert(POINTS),
            store.count,
        ):
            with pytest.raises(InputError, match="no collection 'docs'"):
                attempt()

    def test_facts_are_kept_by_the_collection(
        self, store: VectorStore, open_again: OpenAgain
    ) -> None:
        store.create(FACTS)
        assert store.describe() == FACTS
        store.close()
        with open_again() as again:
            assert again.describe() == FACTS

    def test_a_collection_is_not_made_twice(
        self, filled: VectorStore, open_again: OpenAgain
    ) -> None:
        filled.close()
        with open_again() as again:
            again.create(CollectionFacts(vectors={DENSE: 7}, model="other"))
            assert again.describe() == FACTS
            assert again.count() == len(POINTS)

    def test_hits_are_those_of_brute_force(self, filled: VectorStore) -> None:
        found = self.ask(filled)
        assert len(found) == len(QUERIES)
        for query, hits in zip(QUERIES, found, strict=True):
            expected = by_hand(query)
            assert [hit.id for hit in hits] == [point_id for point_id, _ in expected]
            scores = [score for _, score in expected]
            assert [hit.score for hit in hits] == pytest.approx(scores, abs=1e-5)

    def test_many_queries_keep_their_order(self, filled: VectorStore) -> None:
        vectors = [POINTS[index * 7 % len(POINTS)].vector for index in range(200)]
        found = filled.search([Search(text="", vector=one) for one in vectors], dense(limit=1))
        best = [numbers(hits) for hits in found]
        assert best == [[index * 7 % len(POINTS)] for index in range(200)]

    def test_rows_of_an_array_are_vectors_too(self, filled: VectorStore) -> None:
        np = pytest.importorskip("numpy", reason="models give arrays")
        vectors = np.array([point.vector for point in POINTS], dtype=np.float32)
        filled.upsert([make_point(n + 10, row, "") for n, row in enumerate(vectors)])
        found = filled.search([Search(text="", vector=row) for row in vectors], dense(limit=2))
        assert [sorted(numbers(hits)) for hits in found] == [[n, n + 10] for n in range(5)]

    def test_no_query_finds_nothing(self, filled: VectorStore) -> None:
        assert filled.search([], dense()) == []

    def test_an_empty_collection_has_no_hits(self, store: VectorStore) -> None:
        store.create(FACTS)
        assert self.ask(store) == [[]] * len(QUERIES)
        assert store.count() == 0

    def test_no_more_hits_than_asked_for(self, filled: VectorStore) -> None:
        assert [len(hits) for hits in self.ask(filled, limit=2)] == [2] * len(QUERIES)

    def test_exact_and_wide_searches_find_the_same(self, filled: VectorStore) -> None:
        plain = [numbers(hits) for hits in self.ask(filled)]
        assert [numbers(hits) for hits in self.ask(filled, exact=True)] == plain
        assert [numbers(hits) for hits in self.ask(filled, ef=128)] == plain

    def test_payloads_come_back_as_they_were_written(self, filled: VectorStore) -> None:
        (hits, *_) = self.ask(filled)
        payloads = {str(hit.id): hit.payload for hit in hits}
        assert payloads == {point.id: point.payload for point in POINTS}

    def test_payloads_stay_away_when_nobody_asks(self, filled: VectorStore) -> None:
        for hits in self.ask(filled, with_payload=False):
            assert not any(hit.payload for hit in hits)

    def test_a_part_of_a_payload_is_enough(self, filled: VectorStore) -> None:
        (hits, *_) = self.ask(filled, with_payload=["n", "deep.n"])
        found = dict(zip(numbers(hits), [hit.payload for hit in hits], strict=True))
        assert found == {0: {"n": 0}, 1: {"n": 1}, 2: {"n": 2}, 3: {"n": 3}, 4: {"deep": {"n": 4}}}

    def test_a_point_of_the_same_id_is_replaced(self, filled: VectorStore) -> None:
        filled.upsert([make_point(0, [0, 0, -1], "Nothing but sand", n=77)])
        assert filled.count() == len(POINTS)
        (hits,) = filled.search([Search(text="", vector=[0, 0, -1])], dense(limit=2))
        assert sorted(numbers(hits)) == [0, 3]
        assert {"text": "Nothing but sand", "n": 77} in [hit.payload for hit in hits]

    def test_old_words_of_a_point_are_forgotten(self, filled: VectorStore) -> None:
        assert numbers(self.ask_words(filled, "keeper")) == [0]
        filled.upsert([make_point(0, [1, 0, 0], "Nothing but sand")])
        assert self.ask_words(filled, "keeper") == []
        assert numbers(self.ask_words(filled, "sand")) == [0]

    def test_what_was_written_outlives_the_store(
        self, filled: VectorStore, open_again: OpenAgain
    ) -> None:
        before = [numbers(hits) for hits in self.ask(filled)]
        filled.finish(lambda: None, graph="never")
        filled.close()
        filled.close()
        with open_again() as again:
            assert again.count() == len(POINTS)
            assert [numbers(hits) for hits in self.ask(again)] == before

    @pytest.mark.parametrize("vector", [[1, 2], [1, 2, 3, 4]])
    def test_vectors_of_another_size_are_refused(
        self, filled: VectorStore, vector: list[float]
    ) -> None:
        with pytest.raises(InputError, match=f"{len(vector)}"):
            filled.upsert([make_point(9, vector, "x")])
        with pytest.raises(InputError, match=f"{len(vector)}"):
            filled.search([Search(text="", vector=vector)], dense())
        assert filled.count() == len(POINTS)

    @pytest.mark.parametrize(
        ("rule", "expected"),
        [
            ({"must": [{"key": "tag", "match": {"value": "a"}}]}, {0}),
            ({"must": [{"key": "tags", "match": {"value": "c"}}]}, {2}),
            ({"must": [{"key": "ok", "match": {"value": True}}]}, {0}),
            ({"must": [{"key": "n", "match": {"value": 1}}]}, {1}),
            ({"must": [{"key": "n", "match": {"any": [1, 3, 9]}}]}, {1, 3}),
            ({"must": [{"key": "tag", "match": {"except": ["a"]}}]}, {1}),
            ({"must": [{"key": "text", "match": {"text": "tower lamp"}}]}, {1}),
            ({"must": [{"key": "n", "range": {"gt": 2}}]}, {3}),
            ({"must": [{"key": "n", "range": {"gte": 1, "lt": 3.0}}]}, {1, 2}),
            ({"must": [{"key": "n", "range": {"lte": 0}}]}, {0}),
            ({"must": [{"key": "when", "range": {"gt": "2024-05-01T13:00:00+02:00"}}]}, {3}),
            ({"must": [{"key": "when", "range": {"gt": "2024-05-01T12:00:00Z"}}]}, set()),
            ({"must": [{"key": "deep.n", "match": {"value": 4}}]}, {4}),
            ({"must": [{"is_empty": {"key": "tag"}}]}, {2, 3, 4}),
            ({"must": [{"is_null": {"key": "tag"}}]}, {4}),
            ({"must": [{"has_id": [make_id(2), make_id(50)]}]}, {2}),
            ({"must_not": [{"key": "tag", "match": {"value": "a"}}]}, {1, 2, 3, 4}),
            ({"must": {"must_not": [{"key": "n", "range": {"gte": 1}}]}}, {0, 4}),
            (
                {
                    "should": [
                        {"key": "n", "match": {"value": 2}},
                        {"key": "tag", "match": {"value": "b"}},
                    ]
                },
                {1, 2},
            ),
            (
                {
                    "min_should": {
                        "conditions": [
                            {"key": "n", "range": {"gte": 0}},
                            {"key": "tag", "match": {"value": "b"}},
                            {"key": "ok", "match": {"value": False}},
                        ],
                        "min_count": 3,
                    }
                },
                {1},
            ),
            ({}, {0, 1, 2, 3, 4}),
        ],
    )
    def test_filters_let_through_what_they_should(
        self, filled: VectorStore, rule: Mapping[str, Any], expected: set[int]
    ) -> None:
        for hits in self.ask(filled, filter=rule):
            assert set(numbers(hits)) == expected

    def test_filters_hold_for_words_too(self, filled: VectorStore) -> None:
        rule = {"must_not": [{"key": "tag", "match": {"value": "b"}}]}
        assert set(numbers(self.ask_words(filled, "lamp"))) == {0, 1, 4}
        assert set(numbers(self.ask_words(filled, "lamp", filter=rule))) == {0, 4}
        (hits, *_) = self.ask(filled, mode="hybrid", filter=rule)
        assert set(numbers(hits)) == {0, 2, 3, 4}

    @pytest.mark.parametrize(
        "rule",
        [
            {"mus": []},
            {"must": [{"key": "n", "matches": {"value": 1}}]},
            {"must": [{"key": "n", "range": {"above": 1}}]},
            {"must": [{"n": 1}]},
        ],
    )
    def test_unknown_filters_are_refused(self, filled: VectorStore, rule: dict[str, Any]) -> None:
        with pytest.raises(InputError, match=r"search\.filter"):
            self.ask(filled, filter=rule)

    def test_hits_below_the_threshold_are_left_out(self, filled: VectorStore) -> None:
        for query, hits in zip(QUERIES, self.ask(filled, score_threshold=0.5), strict=True):
            expected = [point_id for point_id, score in by_hand(query) if score >= 0.5]
            assert [hit.id for hit in hits] == expected

    def test_words_are_found_by_their_stems(self, filled: VectorStore) -> None:
        hits = self.ask_words(filled, "ship")
        assert sorted(numbers(hits)) == [2, 4]
        assert all(hit.score > 0 for hit in hits)

    def test_rare_and_repeated_words_count_more(self, filled: VectorStore) -> None:
        hits = self.ask_words(filled, "lamp tower")
        assert numbers(hits)[0] == 1
        assert set(numbers(hits)) == {0, 1, 4}
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)

    @pytest.mark.parametrize("text", ["", "?!", "zeppelin", '" OR * NEAR('])
    def test_words_that_nobody_wrote_find_nothing(self, filled: VectorStore, text: str) -> None:
        assert self.ask_words(filled, text) == []

    def test_a_whole_page_may_be_the_query(self, filled: VectorStore) -> None:
        page = " ".join(f"word{number}" for number in range(3000))
        assert numbers(self.ask_words(filled, f"{page} keeper")) == [0]

    def test_words_of_other_languages_are_found(self, filled: VectorStore) -> None:
        assert numbers(self.ask_words(filled, "straße")) == [3]

    @pytest.mark.parametrize("rrf_k", [1, 60])
    def test_hybrid_is_the_sum_of_reciprocal_places(self, filled: VectorStore, rrf_k: int) -> None:
        asked = dense(mode="hybrid", rrf_k=rrf_k)
        if asked.features - filled.features:
            pytest.skip("no hybrid search")
        search = Search(text="lamp tower ships", vector=[0.1, 1, 0.2])
        (hits,) = filled.search([search], asked)
        expected: dict[str, float] = {}
        for options in (dense(), dense(mode="sparse")):
            for place, hit in enumerate(filled.search([search], options)[0]):
                expected[str(hit.id)] = expected.get(str(hit.id), 0) + 1 / (rrf_k + place)
        assert {str(hit.id): hit.score for hit in hits} == pytest.approx(expected, rel=1e-4)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)

    def test_hybrid_joins_only_so_many_candidates(self, filled: VectorStore) -> None:
        (hits, *_) = self.ask(filled, mode="hybrid", limit=1, candidates=1)
        assert len(hits) == 1
        (far, *_) = self.ask(filled, mode="hybrid", limit=1, candidates=1, score_threshold=1.0)
        assert far == []

    def test_hybrid_without_known_words_goes_by_vectors(self, filled: VectorStore) -> None:
        plain = [numbers(hits) for hits in self.ask(filled)]
        assert [numbers(hits) for hits in self.ask(filled, mode="hybrid")] == plain

    def test_the_other_fusion_finds_the_same_points(self, filled: VectorStore) -> None:
        (hits, *_) = self.ask(filled, mode="hybrid", fusion="dbsf")
        assert sorted(numbers(hits)) == [0, 1, 2, 3, 4]

    def test_digests_are_told_by_document(self, filled: VectorStore) -> None:
        sea = {make_id(0): "digest-0", make_id(1): "digest-1"}
        ships = {make_id(2): "digest-2", make_id(4): "digest-4"}
        assert filled.digests(["sea", "nowhere"]) == {"sea": sea}
        assert filled.digests(None) == {"sea": sea, "ships": ships}
        assert filled.digests([]) == {}

    def test_digests_of_many_documents_come_whole(self, store: VectorStore) -> None:
        store.create(FACTS)
        many = [make_point(n, [1, n, 0], f"text {n}", f"doc-{n % 1300}") for n in range(2500)]
        store.upsert(many)
        found = store.digests(None)
        assert len(found) == 1300
        assert sum(map(len, found.values())) == 2500
        assert store.digests([f"doc-{n}" for n in range(1300)]) == found

    def test_deleted_points_are_gone(self, filled: VectorStore) -> None:
        filled.delete([make_id(0), make_id(50)])
        filled.delete([])
        assert filled.count() == len(POINTS) - 1
        assert all(0 not in numbers(hits) for hits in self.ask(filled))
        assert make_id(0) not in filled.digests(["sea"])["sea"]

    def test_deleted_words_are_gone(self, filled: VectorStore) -> None:
        filled.delete([make_id(0)])
        assert self.ask_words(filled, "keeper") == []
