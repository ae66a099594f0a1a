"""Collections on this machine's disk, searched by Qdrant's engine inside the process.

A collection is a folder ``<owner>/<name>/edge`` with ``collection.json``, its facts, and
``shard``, the engine's own. It is open for one task at a time; others wait.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import attrs
import numpy as np
import qdrant_edge as edge

from flowmesh_core import ExecutionError, InputError
from flowmesh_rag.blocks import StoreBlock
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
from flowmesh_rag.stores.filters import edge_filter, parse_filter
from flowmesh_rag.stores.locks import FolderLock

__all__ = ["EdgeStore"]

_SOURCE = f"{BOOKKEEPING}.source_id"
# Points at once: the engine holds the interpreter's lock for each call.
_WRITE_POINTS = 256
_READ_POINTS = 1000
_SEARCHES = 32  # more are slower
_GRAPH_POINTS = 50_000  # below, looking at every vector is fast enough, and exact
_LOOK_S = 0.1


class EdgeStore(VectorStore):
    """A collection that ``rag_index`` made on this machine."""

    features = frozenset(Feature) - {Feature.SERVER_EMBEDDING}

    def __init__(self, block: StoreBlock, context: StoreContext) -> None:
        super().__init__(block, context)
        self._parent = context.folder / block.collection
        self._folder = self._parent / "edge"
        self._lock: FolderLock | None = None
        self._shard: Any = None
        self._known: CollectionFacts | None = None

    def require(self, options: SearchOptions) -> None:
        """Refuse a filter that cannot be read, too."""
        super().require(options)
        parse_filter(options.filter)

    def describe(self) -> CollectionFacts | None:
        """Wait for the lock and read the facts."""
        if self._known is None and self._folder.is_dir():
            self._hold()
            with _told():
                stored = json.loads((self._folder / "collection.json").read_text())
                self._known = CollectionFacts(**stored | {"sparse": tuple(stored["sparse"])})
        return self._known

    def create(self, facts: CollectionFacts) -> None:
        """Make the collection beside its place, and put it there when it is whole."""
        open_bm25(facts.language)
        self.context.folder.mkdir(0o700, parents=True, exist_ok=True)
        self._parent.mkdir(exist_ok=True)
        self._hold()
        if self._folder.is_dir():
            return
        new = self._parent / "new"
        shutil.rmtree(new, ignore_errors=True)  # of one that was killed
        new.mkdir()
        with _told():
            shard = edge.EdgeShard.create(str(new / "shard"), _config(facts))
            shard.update(
                edge.UpdateOperation.create_field_index(_SOURCE, edge.KeywordIndexParams())
            )
            shard.close()
        (new / "collection.json").write_text(json.dumps(attrs.asdict(facts)))
        new.rename(self._folder)

    def search(self, searches: Sequence[Search], options: SearchOptions) -> list[list[Hit]]:
        """Search for all queries in one batch."""
        shard, facts = self._open()
        rule = parse_filter(options.filter)
        with _told():
            chosen = edge_filter(rule) if rule else None
            bm25 = None if options.mode == "dense" else open_bm25(facts.language)
            requests = [_request(one, options, chosen, bm25) for one in searches]
            asked = [request for request in requests if request is not None]
            answers = itertools.chain.from_iterable(
                shard.query_batch(edge.QueryBatchRequest(list(batch)))
                for batch in _batches(asked, _SEARCHES)
            )
            return [_read_hits(next(answers)) if request else [] for request in requests]

    def upsert(self, points: Sequence[Point]) -> None:
        """Write points; the engine's journal keeps them, whatever happens next."""
        shard, facts = self._open()
        dense = DENSE if DENSE in facts.vectors else facts.choose_vector(None)
        bm25 = open_bm25(facts.language) if SPARSE in facts.sparse else None
        for batch in _batches(points, _WRITE_POINTS):
            with _told():
                written = [_write_point(point, dense, bm25) for point in batch]
                shard.update(edge.UpdateOperation.upsert_points(written))

    def digests(self, sources: Sequence[str] | None) -> Mapping[str, Mapping[str, str]]:
        """Read the bookkeeping page by page."""
        found: dict[str, dict[str, str]] = {}
        batches = [None] if sources is None else _batches(sources, _READ_POINTS)
        for batch in batches:
            for record in self._scroll(_written(batch)):
                ours = record.payload[BOOKKEEPING]
                found.setdefault(ours["source_id"], {})[str(record.id)] = ours["digest"]
        return found

    def delete(self, ids: Sequence[str]) -> None:
        """Remove points."""
        shard, _ = self._open()
        for batch in _batches(ids, _READ_POINTS):
            with _told():
                shard.update(edge.UpdateOperation.delete_points(list(batch)))

    def count(self) -> int:
        """Count exactly."""
        shard, _ = self._open()
        return int(shard.count(edge.CountRequest(exact=True)))

    def finish(
        self, stop: Callable[[], None], *, graph: Literal["auto", "always", "never"] = "auto"
    ) -> None:
        """Build the graph in a process of its own, which ends with the task."""
        if graph == "never" or (graph == "auto" and self.count() < _GRAPH_POINTS):
            return
        self._close_shard()  # the helper opens it; the lock stays with both
        self._optimize(stop)

    def close(self) -> None:
        """Write what is pending and let the next task in."""
        self._close_shard()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _hold(self) -> FolderLock:
        if self._lock is None:
            self._lock = FolderLock(self._parent / "edge.lock", self.context)
        return self._lock

    def _open(self) -> tuple[Any, CollectionFacts]:
        facts = self.describe()
        if facts is None:
            raise InputError(
                f"store 'edge' has no collection {self.block.collection!r}; make it with rag_index"
            )
        if self._shard is None:
            with _told():
                self._shard = edge.EdgeShard.load(str(self._folder / "shard"))
        return self._shard, facts

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    def _scroll(self, chosen: Any) -> Iterator[Any]:
        shard, _ = self._open()
        following = None
        while True:
            request = edge.ScrollRequest(
                offset=following, limit=_READ_POINTS, filter=chosen, with_payload=[BOOKKEEPING]
            )
            with _told():
                records, following = shard.scroll(request)
            yield from records
            if following is None:
                return

    def _optimize(self, stop: Callable[[], None]) -> None:
        lock = self._hold()
        shard = str(self._folder / "shard")
        with tempfile.TemporaryFile() as errors:
            helper = subprocess.Popen(  # noqa: S603 - our own module
                [sys.executable, "-m", "flowmesh_rag.stores.optimize", shard],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=[lock.fileno()],
            )
            try:
                while helper.poll() is None:
                    stop()
                    time.sleep(_LOOK_S)
            finally:
                helper.kill()
                helper.wait()
            if helper.returncode:
                errors.seek(0)
                lines = errors.read().decode(errors="replace").strip().splitlines()
                said = lines[-1] if lines else f"exit status {helper.returncode}"
                raise ExecutionError(
                    f"the graph of {self.block.collection!r} could not be built: {said}"
                )


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turn the engine's errors, which have no classes, into the project's."""
    try:
        yield
    except (ValueError, TypeError, OverflowError) as exc:
        raise InputError(f"store 'edge': {exc}") from exc
    except Exception as exc:
        if type(exc) is not Exception:  # the engine raises the bare class
            raise
        if any(text in str(exc) for text in ("dimension error", "vector name error")):
            raise InputError(f"store 'edge': {exc}") from exc
        raise ExecutionError(f"store 'edge': {exc}") from exc


def _config(facts: CollectionFacts) -> Any:
    vectors = {
        name: edge.EdgeVectorParams(size=size, distance=edge.Distance.Cosine)
        for name, size in facts.vectors.items()
    }
    counted = edge.EdgeSparseVectorParams(modifier=edge.Modifier.Idf)
    return edge.EdgeConfig(
        vectors=vectors,
        sparse_vectors=dict.fromkeys(facts.sparse, counted),
        # In KiB: whoever asks for the graph gets it.
        optimizers=edge.EdgeOptimizersConfig(indexing_threshold=1),
    )


def _request(one: Search, options: SearchOptions, chosen: Any, bm25: Any) -> Any:
    """Build one query; None when none of its words counts."""
    wanted = options.with_payload
    parts = {
        "with_payload": wanted if isinstance(wanted, bool) else list(wanted),
        "score_threshold": options.score_threshold,
        "limit": options.limit,
    }
    if options.mode == "dense":
        return edge.QueryRequest(**parts, **_nearest(one, options, chosen))
    counted = bm25.embed_query(one.text)
    by_words = {"query": edge.Query.Nearest(counted, options.sparse), "filter": chosen}
    if options.mode == "sparse":
        return edge.QueryRequest(**parts, **by_words) if counted.indices else None
    limit = max(options.candidates, options.limit)
    prefetches = [edge.Prefetch(limit=limit, **_nearest(one, options, chosen))]
    if counted.indices:
        prefetches.append(edge.Prefetch(limit=limit, **by_words))
    fusion = edge.Fusion.Dbsf() if options.fusion == "dbsf" else edge.Fusion.Rrf(k=options.rrf_k)
    return edge.QueryRequest(**parts, prefetches=prefetches, query=fusion)


def _nearest(one: Search, options: SearchOptions, chosen: Any) -> dict[str, Any]:
    """Build the part of a query that compares vectors."""
    vector = np.asarray(one.vector, float).tolist() if one.vector is not None else []
    return {
        "query": edge.Query.Nearest(vector, options.vector),
        "filter": chosen,
        "params": edge.SearchParams(exact=options.exact, hnsw_ef=options.ef),
    }


def _write_point(point: Point, dense: str, bm25: Any) -> Any:
    vectors: dict[str, Any] = {dense: np.asarray(point.vector, float).tolist()}
    if bm25:
        vectors[SPARSE] = bm25.embed_document(point.text)
    return edge.Point(point.id, vectors, dict(point.payload))


def _written(sources: Sequence[str] | None) -> Any:
    """Build the filter for points that ``rag_index`` wrote, of some documents or of all."""
    if sources is None:
        return edge.Filter(must_not=[edge.IsEmptyCondition(_SOURCE)])
    match = edge.MatchAny(list(sources))
    return edge.Filter(must=[edge.FieldCondition(_SOURCE, match=match)])


def _read_hits(points: Sequence[Any]) -> list[Hit]:
    return [
        Hit(
            id=point.id if isinstance(point.id, int) else str(point.id),
            score=point.score,
            payload=point.payload,
        )
        for point in points
    ]


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
