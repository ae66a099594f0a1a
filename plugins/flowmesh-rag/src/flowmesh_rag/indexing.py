"""Fills a collection: documents to chunks to vectors to points, only those that are not there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from flowmesh_core import ExecutionError, Executor, InputError, RunContext
from flowmesh_rag.blocks import StoreBlock
from flowmesh_rag.chunking import Chunk, Splitter
from flowmesh_rag.collection import Collection
from flowmesh_rag.documents import Document, ReadOptions
from flowmesh_rag.documents.corpus import Corpus
from flowmesh_rag.embedder import Embedder, open_embedder
from flowmesh_rag.ledger import compare, digest_payload, point_id
from flowmesh_rag.spec import IndexSpec
from flowmesh_rag.stores.base import BOOKKEEPING, VectorStore, open_store

__all__ = ["IndexExecutor"]

_SHOWN_FAILURES = 100
_ASKED_AT_ONCE = 256  # documents
# What turns a text into its vector, beside the model.
_VECTOR_FIELDS = frozenset({"normalize", "dimensions", "max_tokens", "document_prompt"})


class IndexExecutor(Executor):
    """``rag_index``.

    A run that ends early leaves what it has written, and the next one does the rest. New chunks of
    a document are written before its old ones are deleted, so that it can always be found.
    """

    _embedder: Embedder | None = None

    def load(self, ctx: RunContext) -> None:
        """Load the model, or open the endpoint; does nothing when that is done."""
        if self._embedder is None:
            self._embedder = self.open_embedder(ctx)

    def open_embedder(self, ctx: RunContext) -> Embedder:
        """Open what ``embedding`` names; a test may put its own in this place."""
        return open_embedder(
            ctx.spec.embedding,
            ctx.inputs.models.get("embedding.model"),
            settings=ctx.settings,
            devices=ctx.devices,
        )

    def unload(self) -> None:
        """Free the model; may come twice."""
        if self._embedder is not None:
            self._embedder.close()
            self._embedder = None

    def run(self, ctx: RunContext) -> dict[str, Any]:
        """Bring the collection to what the task's documents say."""
        rows = ctx.inputs.rows
        if ctx.spec.prune and rows is not None and rows.shard_total > 1:
            raise InputError("spec.prune would remove the documents of the task's other shards")
        if self._embedder is None:
            raise ExecutionError(f"task {ctx.task_id}: run came before load")
        self._embedder.batch_scale = ctx.batch_scale
        self._embedder.remaining_s = lambda: ctx.remaining_s
        with open_store(
            ctx.spec.target,
            owner=ctx.owner,
            settings=ctx.settings,
            timeout_s=ctx.remaining_s,
            stop=ctx.check,
        ) as store:
            return self._fill(ctx, store, self._embedder)

    def _fill(self, ctx: RunContext, store: VectorStore, embedder: Embedder) -> dict[str, Any]:
        started = ctx.clock()
        collection = Collection(ctx, store, embedder)
        run = _Run(ctx, collection, embedder)
        run.fill()
        total = collection.finish()
        run.report(1.0)
        counts, latency_s = run.counts(), ctx.clock() - started
        counts["chunks"]["total"] = total
        read_s = max(0.0, latency_s - sum(collection.spent.values()))
        return {
            "ok": True,
            "executor": "rag.index",
            "store": _describe(ctx.spec.target),
            "embedding": {"model": embedder.model, "dimensions": embedder.dimensions},
            **counts,
            "usage": {"latency_sec": latency_s, **collection.spent, "read_sec": read_s},
        }


def _describe(block: StoreBlock) -> dict[str, str]:
    known = {"type": block.type, "collection": block.collection}
    return known if block.url is None else {**known, "url": block.url}


@attrs.frozen(kw_only=True)
class _Wanted:
    """A document as the collection is to have it.

    Attributes:
        read: The part of the task's input that is read with it.
        digests: By point id.
        payloads: Likewise, in order of the chunks.
    """

    read: float
    source: str
    digests: Mapping[str, str]
    payloads: Mapping[str, Mapping[str, Any]]


class _Run:
    """One task on its way into one collection."""

    def __init__(self, ctx: RunContext, collection: Collection, embedder: Embedder) -> None:
        self._ctx, self._collection, self._model = ctx, collection, embedder.model
        self._spec: IndexSpec = ctx.spec
        self._splitter = Splitter(self._spec.chunk, embedder.count_tokens)
        settings = self._spec.embedding.model_dump(include=_VECTOR_FIELDS, mode="json")
        self._identity = f"{embedder.model} {sorted(settings.items())}"
        self._seen: set[str] = set()
        self._chunks = {"wanted": 0, "unchanged": 0}
        self._documents = {"indexed": 0, "unchanged": 0, "removed": 0, "failed": 0}
        self._failures: list[dict[str, str]] = []

    def fill(self) -> None:
        """Read everything, write what is new, delete what is stale."""
        corpus = Corpus(
            files=self._ctx.inputs.files,
            rows=self._ctx.inputs.rows,
            options=self._read_options(),
            failed=self._fail,
        )
        wanted = (self._want(read, document) for read, document in corpus if self._is_new(document))
        done = 0.0
        for window in _windows(wanted, self._spec.batch_size):
            self._bring(window, done)
            done = window[-1].read
        if self._spec.prune:
            self._prune()

    def counts(self) -> dict[str, Any]:
        """Return what was done, as the result has it."""
        chunks = {
            "written": self._collection.written,
            "unchanged": self._chunks["unchanged"],
            "removed": self._collection.removed,
        }
        documents = {"seen": len(self._seen), **self._documents}
        return {"documents": documents, "chunks": chunks, "failures": self._failures}

    def report(self, fraction: float) -> None:
        """Report progress."""
        self._ctx.progress(fraction, documents=len(self._seen), chunks=self._collection.written)

    def _read_options(self) -> ReadOptions:
        spec, settings = self._spec, self._ctx.settings
        columns = spec.metadata_columns
        return ReadOptions(
            max_bytes=settings.max_file_bytes,
            max_pages=settings.max_pages,
            max_chars=settings.max_text_chars,
            text_column=spec.text_column,
            id_column=spec.id_column,
            metadata_columns=None if columns is None else tuple(columns),
            stop=self._ctx.check,
        )

    def _fail(self, problem: InputError) -> None:
        if self._spec.strict:
            raise InputError(f"{problem}; spec.strict: false indexes the others") from problem
        self._documents["failed"] += 1
        self._ctx.log(str(problem), level="warning")
        if len(self._failures) < _SHOWN_FAILURES:
            source, _, message = str(problem).partition(": ")
            self._failures.append({"source": source, "message": message})

    def _is_new(self, document: Document) -> bool:
        """Tell whether this is the first document of its name."""
        if document.source not in self._seen:
            self._seen.add(document.source)
            return True
        if not document.named_by_content:
            self._fail(InputError(f"{document.source}: this task has two documents of that name"))
        return False

    def _want(self, read: float, document: Document) -> _Wanted:
        digests, payloads = {}, {}
        for chunk in self._splitter.split(document, self._ctx.check):
            self._count_chunk()
            payload = _payload(document, chunk)
            digest = digest_payload(payload, self._identity)
            point = point_id(document.source, chunk.ordinal, digest)
            marks = {"source_id": document.source, "digest": digest, "model": self._model}
            digests[point] = digest
            payloads[point] = {**payload, BOOKKEEPING: marks}
        return _Wanted(read=read, source=document.source, digests=digests, payloads=payloads)

    def _count_chunk(self) -> None:
        self._chunks["wanted"] += 1
        if self._chunks["wanted"] > (most := self._ctx.settings.max_chunks):
            raise InputError(
                f"the task's documents have more than {most:,} chunks (FLOWMESH_RAG_MAX_CHUNKS);"
                " raise spec.chunk.size, or use several tasks"
            )

    def _bring(self, window: Sequence[_Wanted], done: float) -> None:
        """Bring some documents into the collection; ``done`` is the part read before them."""
        present = self._collection.present([wanted.source for wanted in window])
        new: dict[str, Mapping[str, Any]] = {}
        stale: list[str] = []
        for wanted in window:
            difference = compare(wanted.digests, present.get(wanted.source, {}))
            gone = () if self._spec.mode == "add" else difference.stale
            new |= {id_: wanted.payloads[id_] for id_ in wanted.payloads if id_ in difference.new}
            stale += gone
            self._documents["indexed" if difference.new or gone else "unchanged"] += 1
            self._chunks["unchanged"] += len(difference.unchanged)
        step = window[-1].read - done
        self._collection.write(new, lambda part: self.report(done + step * part))
        self._collection.delete(stale)
        self.report(window[-1].read)

    def _prune(self) -> None:
        """Delete the documents that did not come, unless one of them may only be unreadable."""
        if self._documents["failed"] or not self._seen:
            why = "documents failed" if self._documents["failed"] else "no document came"
            self._ctx.log(f"spec.prune: nothing removed, since {why}", level="warning")
            return
        present = self._collection.present(None)
        gone = [source for source in present if source not in self._seen]
        self._collection.delete([point for source in gone for point in present[source]])
        self._documents["removed"] = len(gone)


def _payload(document: Document, chunk: Chunk) -> dict[str, Any]:
    """Return what a hit is to bring; a row's own fields give way to those that place a chunk."""
    place = {"page": chunk.page, "heading": chunk.heading}
    return {
        **({"title": document.title} if document.title else {}),
        **document.metadata,
        "text": chunk.text,
        "source": document.source,
        "start": chunk.start,
        "end": chunk.end,
        **{key: value for key, value in place.items() if value is not None},
    }


def _windows(documents: Iterable[_Wanted], chunks: int) -> Iterator[list[_Wanted]]:
    """Gather documents until they fill a batch, so that small ones are embedded together."""
    window: list[_Wanted] = []
    size = 0
    for document in documents:
        window.append(document)
        size += len(document.payloads)
        if size >= chunks or len(window) == _ASKED_AT_ONCE:
            yield window
            window, size = [], 0
    if window:
        yield window
