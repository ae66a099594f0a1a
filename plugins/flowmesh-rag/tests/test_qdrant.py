from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flowmesh_rag.blocks import StoreBlock
from flowmesh_rag.settings import RagSettings
from flowmesh_rag.stores.base import (
    DENSE,
    SPARSE,
    CollectionFacts,
    Search,
    SearchOptions,
    VectorStore,
    open_store,
)
from pydantic import SecretStr
from store_suite import FACTS, POINTS, OpenAgain, StoreSuite, make_id, make_point

from flowmesh_core import ExecutionError, FlowmeshError, InputError

pytest.importorskip("qdrant_client", reason="the client is what is tested")
pytest.importorskip("qdrant_edge", reason="it counts the words")
from flowmesh_rag.stores.qdrant import QdrantStore
from qdrant_client import models
from qdrant_server import Fault, QdrantServer, serve_qdrant

KEY = "sekrit-of-the-operator"
DENSELY = SearchOptions(limit=3, vector=DENSE)
SEARCH = [Search(text="lamp", vector=[1, 0, 0])]
Opener = Callable[..., VectorStore]


@pytest.fixture(scope="module")
def running() -> Iterator[QdrantServer]:
    with serve_qdrant(embed=lambda text: [1.0, 0.0, float(len(text))]) as server:
        yield server


@pytest.fixture
def server(running: QdrantServer) -> Iterator[QdrantServer]:
    """A server without collections and faults."""
    for found in running.client.get_collections().collections:
        running.client.delete_collection(found.name)
    running.seen.clear()
    yield running
    running.fault, running.delay_s = None, 0.0


@pytest.fixture
def connect(server: QdrantServer, settings: RagSettings) -> Opener:
    """Stores by ``connect(api_key=..., url=..., allow=[...], timeout_s=...)``."""

    def connect(
        *, allow: tuple[str, ...] = (), api_key: str | None = None, **changes: Any
    ) -> VectorStore:
        known = {"type": "qdrant", "collection": "docs", "url": server.url, **changes}
        block = StoreBlock(**known, api_key=SecretStr(api_key) if api_key else None)
        rules = settings.model_copy(update={"http_allow": allow})
        return open_store(block, owner="alice", settings=rules)

    return connect


@pytest.fixture
def open_again(connect: Opener) -> OpenAgain:
    return connect


@pytest.fixture
def filled(connect: Opener) -> Iterator[VectorStore]:
    with connect() as store:
        store.create(FACTS)
        store.upsert(POINTS)
        yield store


class TestQdrant(StoreSuite):
    """The suite over HTTP."""


def routes(server: QdrantServer) -> list[str]:
    return [f"{one.method} {one.path}" for one in server.seen]


def test_all_queries_travel_in_one_request(server: QdrantServer, filled: VectorStore) -> None:
    server.seen.clear()
    searches = [Search(text="lamp", vector=[1, n, 0]) for n in range(256)]
    assert len(filled.search(searches, DENSELY)) == 256
    hybrid = SearchOptions(limit=3, vector=DENSE, mode="hybrid")
    assert len(filled.search(searches, hybrid)) == 256
    assert routes(server)[-1] == "POST /collections/docs/points/query/batch"
    assert len([route for route in routes(server) if "query" in route]) == 2


def test_documents_are_indexed_by_their_names(server: QdrantServer, filled: VectorStore) -> None:
    assert filled.count() == len(POINTS)
    (made,) = [one for one in server.seen if one.path.endswith("/index")]
    assert made.body == {"field_name": "_flowmesh.source_id", "field_schema": "keyword"}


def test_writing_is_waited_for_and_cut_small(server: QdrantServer, filled: VectorStore) -> None:
    server.seen.clear()
    filled.upsert([make_point(n, [1, 0, 0], "x") for n in range(600)])
    sizes = [len(one.body["points"]) for one in server.seen if one.method == "PUT"]
    assert sum(sizes) == 600
    assert max(sizes) <= 256


@pytest.mark.parametrize("name", ["", "fast-all-minilm-l6-v2"])
def test_collections_made_elsewhere_are_searched(
    server: QdrantServer, connect: Opener, name: str
) -> None:
    params = models.VectorParams(size=3, distance=models.Distance.COSINE)
    server.client.create_collection("docs", vectors_config={name: params} if name else params)
    vectors = [[1, 0, 0], [0, 1, 0]]
    structs = [
        models.PointStruct(id=n, vector={name: one} if name else one, payload={"document": f"d{n}"})
        for n, one in enumerate(vectors)
    ]
    server.client.upsert("docs", structs)
    with connect() as store:
        facts = store.describe()
        assert facts == CollectionFacts(vectors={name: 3})
        using = facts.choose_vector(None)
        (hits,) = store.search(SEARCH, SearchOptions(limit=1, vector=using))
        assert (hits[0].id, hits[0].payload) == (0, {"document": "d0"})
        assert store.digests(None) == {}
        store.upsert([make_point(7, [0, 0, 1], "new")])
        assert store.count() == 3


def test_the_server_may_embed_the_queries(server: QdrantServer, filled: VectorStore) -> None:
    server.seen.clear()
    asked = SearchOptions(limit=1, vector=DENSE, server_model="acme/small")
    (hits,) = filled.search([Search(text="")], asked)
    assert hits[0].id == make_id(0)
    (sent,) = server.seen[-1].body["searches"]
    assert sent["query"]["nearest"] == {"text": "", "model": "acme/small"}


def test_all_of_qdrants_filters_reach_the_server(server: QdrantServer, filled: VectorStore) -> None:
    rule = {"must": [{"nested": {"key": "parts", "filter": {"must": []}}}]}
    asked = SearchOptions(limit=1, vector=DENSE, filter=rule, exact=True, ef=77)
    assert filled.search(SEARCH, asked) == [[]]
    (sent,) = server.seen[-1].body["searches"]
    assert sent["filter"] == rule
    assert sent["params"] == {"exact": True, "hnsw_ef": 77}


def test_the_key_goes_to_its_server(server: QdrantServer, connect: Opener) -> None:
    with connect(api_key=KEY) as store:
        assert store.describe() is None
    assert {one.headers["api-key"] for one in server.seen} == {KEY}
    server.seen.clear()
    with connect() as store:
        store.describe()
    assert "api-key" not in server.seen[0].headers


def test_a_redirect_is_told_and_not_followed(server: QdrantServer, connect: Opener) -> None:
    with serve_qdrant() as thief:
        server.fault = Fault(status=307, headers={"location": f"{thief.url}/collections/docs"})
        with connect(api_key=KEY) as store, pytest.raises(InputError, match="307, a redirect"):
            store.describe()
        assert thief.seen == []


@pytest.mark.parametrize("status", [401, 403, 400, 500])
@pytest.mark.parametrize("plain", [True, False])
def test_a_server_that_quotes_the_key_is_not_repeated(
    server: QdrantServer, connect: Opener, status: int, plain: bool
) -> None:
    quoted = "x" * 490 + f" {KEY} "  # where long texts are cut
    text = quoted if plain else json.dumps({"status": {"error": quoted}})
    server.fault = Fault(status=status, text=text)
    with (
        connect(api_key=KEY) as store,
        pytest.raises((InputError, ExecutionError), match=str(status)) as caught,
    ):
        store.count()
    assert "sekrit" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("status", "error", "text"),
    [
        (401, InputError, "api_key is required"),
        (403, InputError, "api_key is required"),
        (404, InputError, "no collection 'docs'"),
        (400, InputError, "answered 400: as the server says"),
        (422, InputError, "answered 422"),
        (408, ExecutionError, "answered 408"),
        (429, ExecutionError, "answered 429"),
        (500, ExecutionError, "answered 500"),
        (503, ExecutionError, "answered 503"),
        (507, ExecutionError, "answered 507"),
    ],
)
def test_only_what_may_pass_is_tried_again(
    server: QdrantServer, filled: VectorStore, status: int, error: type[FlowmeshError], text: str
) -> None:
    said = json.dumps({"status": {"error": "as the server says"}})
    headers = {"retry-after": "3"} if status == 429 else {}
    server.fault = Fault(status=status, text=said, headers=headers)
    with pytest.raises(error, match=text) as caught:
        filled.search(SEARCH, DENSELY)
    assert caught.value.retriable is (error is ExecutionError)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (Fault(), "cannot be reached: Server disconnected"),
        (Fault(status=200, text="<html>hello</html>"), "does not answer as a Qdrant server"),
        (Fault(status=200, text='{"result": 7}'), "does not answer as a Qdrant server"),
        (Fault(status=200, text=""), "does not answer as a Qdrant server"),
    ],
)
def test_an_answer_that_is_none_may_pass(
    server: QdrantServer, filled: VectorStore, fault: Fault, text: str
) -> None:
    server.fault = fault
    with pytest.raises(ExecutionError, match=text) as caught:
        filled.search(SEARCH, DENSELY)
    assert caught.value.retriable


def test_nobody_at_home_may_pass(connect: Opener) -> None:
    with (
        connect(url="http://127.0.0.1:9") as store,
        pytest.raises(ExecutionError, match=r"http://127\.0\.0\.1:9 cannot be reached") as caught,
    ):
        store.describe()
    assert caught.value.retriable


def test_points_are_sent_in_loads_of_16_mib(server: QdrantServer, filled: VectorStore) -> None:
    server.seen.clear()
    big = "x" * (6 << 20)
    filled.upsert([make_point(n, [1, 0, 0], big if n < 5 else "x") for n in range(8)])
    sizes = [len(one.body["points"]) for one in server.seen if one.method == "PUT"]
    assert sizes == [2, 2, 4]


def test_a_collection_that_is_made_meanwhile_is_kept(connect: Opener) -> None:
    """The server answers with 409, which elsewhere may be tried again."""
    with connect() as one, connect() as other:
        assert other.describe() is None
        one.create(FACTS)
        other.create(FACTS)
        assert other.describe() == FACTS


def test_no_hit_holds_the_key(server: QdrantServer, connect: Opener) -> None:
    with connect(api_key=KEY) as store:
        store.create(FACTS)
        store.upsert([make_point(1, [1, 0, 0], f"the key is {KEY}, says the server")])
        ((hit,),) = store.search(SEARCH, DENSELY)
    assert hit.payload is not None
    assert hit.payload["text"] == "the key is ${env.api_key}, says the server"
    assert KEY not in str(hit)


def test_a_slow_server_is_given_up(server: QdrantServer, connect: Opener) -> None:
    server.delay_s = 2.5
    with (
        connect(timeout_s=0.5) as store,
        pytest.raises(ExecutionError, match=r"did not answer within 0\.5 s") as caught,
    ):
        store.count()
    assert caught.value.retriable


def test_hosts_that_the_operator_forbids_are_not_asked(
    server: QdrantServer, connect: Opener
) -> None:
    with (
        connect(allow=("qdrant.example.org",)) as store,
        pytest.raises(InputError, match=r"127\.0\.0\.1 is not among those.*FLOWMESH_HTTP_ALLOW"),
    ):
        store.describe()
    assert server.seen == []


def test_metadata_services_are_never_asked(connect: Opener) -> None:
    with (
        connect(url="http://169.254.169.254") as store,
        pytest.raises(InputError, match="link-local or metadata address"),
    ):
        store.describe()


def test_a_proxy_does_not_see_what_stays_here(
    server: QdrantServer, connect: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with connect() as store:
        assert store.describe() is None
    with (
        connect(url="http://qdrant.invalid:6333") as store,
        pytest.raises(ExecutionError, match="Connection refused"),
    ):
        store.describe()


def test_a_key_without_encryption_is_said_once(
    connect: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        connect(api_key=KEY).close()
        assert caplog.records == []
        connect(api_key=KEY, url="http://qdrant.example.org:6333").close()
    assert [one.getMessage() for one in caplog.records] == [
        "http://qdrant.example.org:6333: the key is sent without encryption; use https"
    ]
    assert KEY not in caplog.text


def test_two_tasks_may_make_it_at_once(server: QdrantServer, connect: Opener) -> None:
    with connect() as one, connect() as other:
        assert one.describe() is other.describe() is None
        one.create(FACTS)
        other.create(CollectionFacts(vectors={DENSE: 9}))
        assert other.describe() == FACTS


def test_a_refused_creation_is_told(server: QdrantServer, connect: Opener) -> None:
    facts = CollectionFacts(vectors={DENSE: 3}, sparse=(SPARSE,), language="klingon")
    with connect() as store, pytest.raises(InputError, match=r"spec\.language.*klingon"):
        store.create(facts)
    assert server.seen == []


def test_the_languages_of_words_are_kept(connect: Opener) -> None:
    facts = CollectionFacts(vectors={DENSE: 3}, sparse=(SPARSE,), language="german")
    words = SearchOptions(limit=5, mode="sparse")
    with connect() as store:
        store.create(facts)
        store.upsert([make_point(1, [1, 0, 0], "Häuser am Meer")])
    with connect() as store:
        assert len(store.search([Search(text="Haus")], words)[0]) == 1
        assert isinstance(store, QdrantStore)


def test_a_wrong_filter_is_refused_before_anything_is_embedded(connect: Opener) -> None:
    asked = SearchOptions(limit=1, filter={"must": [{"key": "a", "range": {"above": 1}}]})
    with connect() as store, pytest.raises(InputError, match=r"search\.filter.*above"):
        store.require(asked)
