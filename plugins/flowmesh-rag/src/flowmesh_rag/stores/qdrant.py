"""Collections of a Qdrant server, over REST.

gRPC is not offered: it would pass by the operator's rules for the network.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import logging
import ssl
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx
from pydantic import ValidationError
from qdrant_client import QdrantClient, models
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from flowmesh_core import ExecutionError, FlowmeshError, InputError, SecretMask, client_hooks
from flowmesh_rag.blocks import StoreBlock
from flowmesh_rag.endpoint import refuse_answer
from flowmesh_rag.stores.base import (
    BOOKKEEPING,
    DENSE,
    SPARSE,
    CollectionFacts,
    Feature,
    Hit,
    Point,
    Search,
    SearchOptions,
    StoreContext,
    VectorStore,
)
from flowmesh_rag.stores.bm25 import open_bm25
from flowmesh_rag.stores.filters import refuse_filter

__all__ = ["QdrantStore"]

logger = logging.getLogger(__name__)

_SOURCE = f"{BOOKKEEPING}.source_id"
_WRITE_POINTS = 256
_READ_POINTS = 1000
_WRITE_BYTES = 16 * 2**20  # a server takes 32 MiB at once
_NOT_FOUND = 404


class QdrantStore(VectorStore):
    """A collection of a server, also one that other programs made."""

    features = frozenset(Feature)

    def __init__(self, block: StoreBlock, context: StoreContext) -> None:
        super().__init__(block, context)
        self._key = block.api_key.get_secret_value() if block.api_key else None
        self._mask = SecretMask({"api_key": self._key or ""})
        self._client = _connect(block.url or "", self._key, context)
        self._facts: CollectionFacts | None = None

    def require(self, options: SearchOptions) -> None:
        """Refuse a filter that cannot be read, too."""
        super().require(options)
        _read_filter(options.filter)

    def describe(self) -> CollectionFacts | None:
        """Ask the server, and remember what it said."""
        try:
            with self._told():
                found = self._client.get_collection(self.block.collection)
        except _NoCollectionError:
            return None
        params = found.config.params
        named = params.vectors if isinstance(params.vectors, dict) else {"": params.vectors}
        ours = self._mask.value((found.config.metadata or {}).get("flowmesh") or {})
        self._facts = CollectionFacts(
            vectors={name: vector.size for name, vector in named.items() if vector},
            sparse=tuple(params.sparse_vectors or ()),
            model=ours.get("model", ""),
            language=ours.get("language", "english"),
        )
        return self._facts

    def create(self, facts: CollectionFacts) -> None:
        """Make it, with an index for the names of documents."""
        cosine = functools.partial(models.VectorParams, distance=models.Distance.COSINE)
        vectors = {name: cosine(size=size) for name, size in facts.vectors.items()}
        counted = models.SparseVectorParams(modifier=models.Modifier.IDF)
        ours = {"model": facts.model, "language": facts.language}
        open_bm25(facts.language)
        try:
            with self._told():
                self._client.create_collection(
                    self.block.collection,
                    vectors_config=vectors.get("", vectors),
                    sparse_vectors_config=dict.fromkeys(facts.sparse, counted) or None,
                    metadata={"flowmesh": ours},
                )
        except FlowmeshError:
            if self.describe() is None:  # otherwise somebody was faster
                raise
        with self._told():
            self._client.create_payload_index(
                self.block.collection, _SOURCE, models.PayloadSchemaType.KEYWORD, wait=True
            )

    def search(self, searches: Sequence[Search], options: SearchOptions) -> list[list[Hit]]:
        """Send all queries as one batch."""
        chosen = _read_filter(options.filter)
        requests = [self._request(one, options, chosen) for one in searches]
        asked = [request for request in requests if request is not None]
        if not asked:
            return [[] for _ in searches]
        with self._told():
            answers = iter(self._client.query_batch_points(self.block.collection, asked))
        return [self._read_hits(next(answers).points) if request else [] for request in requests]

    def upsert(self, points: Sequence[Point]) -> None:
        """Write points and wait until the server has them."""
        facts = self._known()
        dense = DENSE if DENSE in facts.vectors else facts.choose_vector(None)
        bm25 = open_bm25(facts.language) if SPARSE in facts.sparse else None
        for batch in _loads(_write_point(point, dense, bm25) for point in points):
            with self._told():
                self._client.upsert(self.block.collection, batch, wait=True)

    def digests(self, sources: Sequence[str] | None) -> Mapping[str, Mapping[str, str]]:
        """Read the bookkeeping page by page."""
        found: dict[str, dict[str, str]] = {}
        batches = [None] if sources is None else _batches(sources, _READ_POINTS)
        for batch in batches:
            for record in self._scroll(_written(batch)):
                ours = record.payload[BOOKKEEPING]
                found.setdefault(ours["source_id"], {})[str(record.id)] = ours.get("digest", "")
        return found

    def delete(self, ids: Sequence[str]) -> None:
        """Remove points and wait until they are gone."""
        for batch in _batches(ids, _READ_POINTS):
            with self._told():
                self._client.delete(self.block.collection, list(batch), wait=True)

    def count(self) -> int:
        """Count exactly."""
        with self._told():
            return int(self._client.count(self.block.collection, exact=True).count)

    def close(self) -> None:
        """Give the connections back."""
        self._client.close()

    def _known(self) -> CollectionFacts:
        facts = self._facts or self.describe()
        if facts is None:
            raise _NoCollectionError(self._no_collection())
        return facts

    def _no_collection(self) -> str:
        return f"{self.block.url}: there is no collection {self.block.collection!r}"

    def _request(self, one: Search, options: SearchOptions, chosen: Any) -> Any:
        """Build one query; None when none of its words counts."""
        parts = {
            "with_payload": _payload(options.with_payload),
            "score_threshold": options.score_threshold,
            "limit": options.limit,
        }
        if options.mode == "dense":
            return models.QueryRequest(**parts, **_nearest(one, options), filter=chosen)
        counted = open_bm25(self._known().language).embed_query(one.text)
        by_words = {"query": _sparse(counted), "using": options.sparse, "filter": chosen}
        if options.mode == "sparse":
            return models.QueryRequest(**parts, **by_words) if counted.indices else None
        limit = max(options.candidates, options.limit)
        prefetch = [models.Prefetch(**_nearest(one, options), filter=chosen, limit=limit)]
        if counted.indices:
            prefetch.append(models.Prefetch(**by_words, limit=limit))
        return models.QueryRequest(**parts, prefetch=prefetch, query=_fusion(options))

    def _scroll(self, chosen: Any) -> Iterator[Any]:
        following = None
        while True:
            with self._told():
                records, following = self._client.scroll(
                    self.block.collection,
                    scroll_filter=chosen,
                    limit=_READ_POINTS,
                    offset=following,
                    with_payload=[BOOKKEEPING],
                )
            yield from records
            if following is None:
                return

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn the client's errors into the project's, without the key."""
        try:
            yield
        except UnexpectedResponse as exc:
            raise self._refused(exc.status_code or 0, self._server_text(exc)) from None
        except ResourceExhaustedResponse as exc:
            raise self._refused(429, self._masked(exc.message)) from None
        except ResponseHandlingException as exc:
            raise self._unreachable(exc.source) from None
        except ValueError as exc:  # an answer that is no JSON
            raise self._unreachable(exc) from None

    def _refused(self, status: int, text: str) -> FlowmeshError:
        if status == _NOT_FOUND:
            return _NoCollectionError(f"{self._no_collection()} ({text})")
        return refuse_answer(self.block.url or "", status, text, has_key=bool(self._key))

    def _unreachable(self, cause: BaseException) -> FlowmeshError:
        if isinstance(cause, FlowmeshError):  # the operator's rules forbid it
            return InputError(self._masked(str(cause)))
        if isinstance(cause, httpx.TimeoutException):
            text = f"did not answer within {self.context.timeout_s:g} s"
        elif isinstance(cause, ValueError):
            text = "does not answer as a Qdrant server does"
        else:
            text = f"cannot be reached: {self._masked(str(cause))}"
        return ExecutionError(f"{self.block.url} {text}", retriable=True)

    def _read_hits(self, points: Sequence[Any]) -> list[Hit]:
        """Return hits, without the key that a payload may hold."""
        clean = self._mask.value
        return [Hit(id=clean(p.id), score=p.score, payload=clean(p.payload)) for p in points]

    def _server_text(self, error: Any) -> str:
        """Return what the server says, without its JSON."""
        try:
            text = str(error.structured()["status"]["error"])
        except (ValueError, TypeError, LookupError):
            text = error.content.decode(errors="replace")
        return self._masked(text) or error.reason_phrase or "nothing"

    def _masked(self, text: str) -> str:
        """Shorten what comes from outside, without the key that a server may quote."""
        clean = text.replace(self._key, "***") if self._key else text
        return " ".join(clean.split())[:500]


class _NoCollectionError(InputError):
    """The server has no such collection."""


def _connect(url: str, key: str | None, context: StoreContext) -> Any:
    """Open a client that keeps the operator's rules; it connects with the first request."""
    host = urlsplit(url).hostname or ""
    local = _is_local(host)
    if key and url.startswith("http://") and not local:
        logger.warning("%s: the key is sent without encryption; use https", url)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same, said in another way
        return QdrantClient(
            url=url,
            api_key=key,
            timeout=context.timeout_s,
            cloud_inference=True,  # texts go to the server as they are
            check_compatibility=False,  # it would call the server from a thread
            trust_env=not local,
            verify=_certificates(trust_env=not local),
            limits=httpx.Limits(max_keepalive_connections=4),
            **client_hooks(context.policy),
        )


@functools.cache
def _certificates(*, trust_env: bool) -> ssl.SSLContext:
    """Read the authorities once for all clients, which takes longer than many a search."""
    return httpx.create_ssl_context(trust_env=trust_env)


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _read_filter(raw: Mapping[str, Any] | None) -> Any:
    if raw is None:
        return None
    try:
        return models.Filter.model_validate(raw)
    except ValidationError as exc:
        raise refuse_filter(exc) from None


def _nearest(one: Search, options: SearchOptions) -> dict[str, Any]:
    """Build the part of a query that compares vectors."""
    query: Any = None if one.vector is None else [float(number) for number in one.vector]
    if query is None:
        query = models.Document(text=one.text, model=options.server_model or "")
    params = models.SearchParams(exact=options.exact, hnsw_ef=options.ef)
    return {
        "query": models.NearestQuery(nearest=query),
        "using": options.vector or None,
        "params": params if options.exact or options.ef else None,
    }


def _fusion(options: SearchOptions) -> Any:
    if options.fusion == "dbsf":
        return models.FusionQuery(fusion=models.Fusion.DBSF)
    return models.RrfQuery(rrf=models.Rrf(k=options.rrf_k))


def _payload(wanted: bool | Sequence[str]) -> bool | list[str]:
    return wanted if isinstance(wanted, bool) else list(wanted)


def _sparse(counted: Any) -> Any:
    return models.SparseVector(indices=list(counted.indices), values=list(counted.values))


def _write_point(point: Point, dense: str, bm25: Any) -> Any:
    vector: Any = [float(number) for number in point.vector]
    if dense or bm25:
        vector = {dense: vector}
    if bm25:
        vector[SPARSE] = _sparse(bm25.embed_document(point.text))
    return models.PointStruct(id=point.id, vector=vector, payload=dict(point.payload))


def _written(sources: Sequence[str] | None) -> Any:
    """Build the filter for points that ``rag_index`` wrote, of some documents or of all."""
    if sources is None:
        return models.Filter(must_not=[models.IsEmptyCondition(is_empty={"key": _SOURCE})])
    match = models.MatchAny(any=list(sources))
    return models.Filter(must=[models.FieldCondition(key=_SOURCE, match=match)])


def _loads(structs: Iterable[Any]) -> Iterator[list[Any]]:
    """Yield as many points at once as a server takes, by their number and their size."""
    load: list[Any] = []
    left = _WRITE_BYTES
    for struct in structs:
        size = len(struct.model_dump_json().encode())
        if load and (size > left or len(load) == _WRITE_POINTS):
            yield load
            load, left = [], _WRITE_BYTES
        load.append(struct)
        left -= size
    if load:
        yield load


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
