"""What a store of vectors is: the interface, the objects it takes and gives, how one is opened.

Scores mean the same in every store, higher being better: ``dense`` gives the cosine, from -1 to
1; ``hybrid`` the sum of ``1 / (rrf_k + place)`` over both lists, places counted from 0, or with
``dbsf`` of both scores, each scaled to its list's mean and three deviations around it. Only those
of ``sparse`` mean something within one store alone: each has its own words and constants of BM25.
A collection that was made elsewhere with another distance keeps that.
Vectors come from ``Embedder.embed``, which alone refuses NaN and infinity; a collection's facts
refuse those of another size. A third party subclasses ``VectorStore`` and names it in the
entry-point group ``flowmesh.rag.stores``.
"""

from __future__ import annotations

import abc
import enum
import functools
import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal

import attrs

from flowmesh_core import InputError, NetworkPolicy, PluginError, load_driver
from flowmesh_rag.blocks import RagSearch, StoreBlock
from flowmesh_rag.settings import RagSettings

__all__ = [
    "BOOKKEEPING",
    "DENSE",
    "GROUP",
    "SPARSE",
    "CollectionFacts",
    "Feature",
    "Hit",
    "Point",
    "Search",
    "SearchOptions",
    "StoreContext",
    "VectorStore",
    "open_store",
]

GROUP = "flowmesh.rag.stores"
BOOKKEEPING = "_flowmesh"
"""Key of a payload under which the index keeps ``source_id``, ``digest``, ``model``."""
DENSE, SPARSE = "dense", "bm25"
"""Names of the vectors in collections that ``rag_index`` makes."""


class Feature(str, enum.Enum):
    """What not every store can do."""

    SPARSE = "search.mode sparse"
    HYBRID = "search.mode hybrid"
    DBSF = "search.fusion dbsf"
    FILTER = "search.filter"
    SCORE_THRESHOLD = "search.score_threshold"
    SERVER_EMBEDDING = "embedding.server"


@attrs.frozen(kw_only=True)
class Point:
    """A chunk to be written.

    Attributes:
        id: UUID as text; a point of the same id is replaced.
        vector: Finite, of the collection's size.
        text: What BM25 counts the words of.
        payload: JSON data, with ``text`` and ``BOOKKEEPING``.
    """

    id: str
    vector: Sequence[float]
    text: str
    payload: Mapping[str, Any]


@attrs.frozen(kw_only=True)
class Search:
    """A query; without a vector it is searched by its words, or embedded by the server."""

    text: str
    vector: Sequence[float] | None = None


@attrs.frozen(kw_only=True)
class Hit:
    """A point that was found: UUIDs as text, numbers of collections made elsewhere as numbers."""

    id: int | str
    score: float
    payload: Mapping[str, Any] | None = None


@attrs.frozen(kw_only=True)
class SearchOptions:
    """How all queries of one call are searched.

    Attributes:
        limit: Hits per query at most.
        mode: ``dense``, ``sparse``, ``hybrid``.
        vector: Name of the dense vector, empty for an unnamed one; as ``CollectionFacts`` tell.
        sparse: Name of the sparse one.
        candidates: Hits of each kind that a hybrid search joins.
        fusion: ``rrf``, ``dbsf``.
        rrf_k: Constant of the former.
        filter: Qdrant's JSON.
        score_threshold: The lowest score of a hit, as hits have it.
        exact: Look at every vector.
        ef: Breadth of the walk through a graph.
        with_payload: All of it, nothing, or these fields.
        server_model: What the store's server is to embed the texts with.
    """

    limit: int
    mode: Literal["dense", "sparse", "hybrid"] = "dense"
    vector: str = ""
    sparse: str = SPARSE
    candidates: int = 50
    fusion: Literal["rrf", "dbsf"] = "rrf"
    rrf_k: int = 60
    filter: Mapping[str, Any] | None = None
    score_threshold: float | None = None
    exact: bool = False
    ef: int | None = None
    with_payload: bool | Sequence[str] = True
    server_model: str | None = None

    @classmethod
    def from_block(cls, block: RagSearch, **changes: Any) -> SearchOptions:
        """Build the options of a block ``search``; ``changes`` are fields that it cannot know."""
        shared = {field.name for field in attrs.fields(cls)} & set(RagSearch.model_fields)
        known = {name: getattr(block, name) for name in shared}
        return cls(**{"limit": block.top_k, "sparse": block.sparse_using, **known, **changes})

    @property
    def features(self) -> frozenset[Feature]:
        """What a store must be able to do."""
        asked = {
            Feature.SPARSE: self.mode == "sparse",
            Feature.HYBRID: self.mode == "hybrid",
            Feature.DBSF: self.mode == "hybrid" and self.fusion == "dbsf",
            Feature.FILTER: self.filter is not None,
            Feature.SCORE_THRESHOLD: self.score_threshold is not None,
            Feature.SERVER_EMBEDDING: self.server_model is not None and self.mode != "sparse",
        }
        return frozenset(feature for feature, needed in asked.items() if needed)


@attrs.frozen(kw_only=True)
class CollectionFacts:
    """What a collection holds.

    Attributes:
        vectors: Size of each dense vector by its name; an unnamed one has the name "".
        sparse: Names of its sparse vectors.
        model: Identity of the model that ``rag_index`` filled it with; empty if made elsewhere.
        language: Of the stems that BM25 counts; ``none`` for whole words.
    """

    vectors: Mapping[str, int]
    sparse: tuple[str, ...] = ()
    model: str = ""
    language: str = "english"

    def choose_vector(self, using: str | None) -> str:
        """Return the name of the dense vector to search.

        Raises:
            InputError: The collection has none, none of that name, or several.
        """
        if using is not None and using in self.vectors:
            return using
        known = ", ".join(sorted(self.vectors)) or "none"
        if using is not None:
            raise InputError(f"spec.search.using: no vector {using!r}; the collection has {known}")
        if len(self.vectors) != 1:
            raise InputError(f"spec.search.using is required; the collection's vectors: {known}")
        return next(iter(self.vectors))

    def choose_sparse(self, using: str) -> str:
        """Return the name of the sparse vector to search.

        Raises:
            InputError: The collection has none of that name.
        """
        if using not in self.sparse:
            known = ", ".join(self.sparse) or "none"
            raise InputError(
                f"spec.search.sparse_using: no sparse vector {using!r}; the collection has {known}"
            )
        return using

    def check_size(self, vector: str, size: int, *, model: str) -> None:
        """Refuse vectors of another size than the collection's.

        Raises:
            InputError: Naming both sizes and the model.
        """
        if self.vectors[vector] != size:
            raise InputError(
                f"spec.embedding: model {model} gives vectors of {size} numbers, the collection"
                f" holds {self.vectors[vector]}; name the model that it was made with"
            )


@attrs.frozen(kw_only=True)
class StoreContext:
    """What a store is told about the task beside its block.

    Attributes:
        folder: Of the task's owner; an embedded store keeps its collection below it and makes
            the folder when it creates one.
        policy: The operator's rules for the network.
        timeout_s: Of one request, or of waiting for a lock.
        stop: To be called several times a second while waiting; raises when the task must stop.
    """

    folder: Path
    policy: NetworkPolicy
    timeout_s: float
    stop: Callable[[], None] = lambda: None


class VectorStore(abc.ABC):
    """One collection for one run; a context manager, used by one thread.

    Methods raise ``InputError`` for what trying again cannot mend (no such collection, a wrong
    size, a refused key) and a retriable ``ExecutionError`` for the rest.
    """

    features: ClassVar[frozenset[Feature]] = frozenset()

    def __init__(self, block: StoreBlock, context: StoreContext) -> None:
        self.block = block
        self.context = context

    def require(self, options: SearchOptions) -> None:
        """Refuse what this store cannot do; to be called before anything is embedded.

        Raises:
            InputError: Naming every such field.
        """
        if missing := options.features - self.features:
            names = ", ".join(sorted(f"spec.{feature.value}" for feature in missing))
            raise InputError(f"store {self.block.type!r} cannot do {names}")

    @abc.abstractmethod
    def describe(self) -> CollectionFacts | None:
        """Return what the collection holds; None when there is no such collection."""

    @abc.abstractmethod
    def create(self, facts: CollectionFacts) -> None:
        """Make the collection, for cosines; one that another process made meanwhile is kept."""

    @abc.abstractmethod
    def search(self, searches: Sequence[Search], options: SearchOptions) -> list[list[Hit]]:
        """Search for all queries in one request.

        Returns:
            The hits of each query, in order of the queries, best first; nothing for nothing.
        """

    @abc.abstractmethod
    def upsert(self, points: Sequence[Point]) -> None:
        """Write points, for good when this returns."""

    @abc.abstractmethod
    def digests(self, sources: Sequence[str] | None) -> Mapping[str, Mapping[str, str]]:
        """Return the digest of each point that ``rag_index`` wrote, by source and point id.

        Args:
            sources: Values of ``source_id`` in ``BOOKKEEPING``; None for all. One that has no
                points is left out.
        """

    @abc.abstractmethod
    def delete(self, ids: Sequence[str]) -> None:
        """Remove points; ids that are not there do no harm."""

    @abc.abstractmethod
    def count(self) -> int:
        """Return the number of points."""

    def finish(  # noqa: B027 - most stores have nothing to do
        self, stop: Callable[[], None], *, graph: Literal["auto", "always", "never"] = "auto"
    ) -> None:
        """Do what is to be done once after writing, such as building a graph.

        Args:
            stop: Called several times a second; raises when the task must stop.
            graph: As ``spec.graph`` says.
        """

    def close(self) -> None:  # noqa: B027 - as above
        """Give back connections, files and locks; may come twice."""

    def __enter__(self) -> VectorStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@functools.cache
def _load_store(name: str) -> type[VectorStore]:
    """Find a kind of store among all that is installed, once for each that is there."""
    with warnings.catch_warnings():  # libraries leave filters of their own behind
        found: type[VectorStore] = load_driver(GROUP, name)
    return found


def open_store(
    block: StoreBlock,
    *,
    owner: str,
    settings: RagSettings,
    timeout_s: float | None = None,
    stop: Callable[[], None] = lambda: None,
) -> VectorStore:
    """Open the store that a document names; whoever called closes it.

    Args:
        block: Which one.
        owner: ``ctx.owner``: embedded stores of one owner tell another's tasks nothing.
        settings: The operator's.
        timeout_s: What is left of the task's time, if it has an end.
        stop: As ``StoreContext`` has it, such as ``ctx.check``.

    Raises:
        InputError: No such store is installed, or it cannot be imported.
    """
    try:
        store = _load_store(block.type)
    except PluginError as exc:
        raise InputError(f"spec.store.type {block.type!r}: {exc}") from exc
    context = StoreContext(
        folder=settings.folder / hashlib.sha256(owner.encode()).hexdigest()[:16],
        policy=settings.policy,
        timeout_s=block.timeout_s if timeout_s is None else min(block.timeout_s, timeout_s),
        stop=stop,
    )
    return store(block, context)
