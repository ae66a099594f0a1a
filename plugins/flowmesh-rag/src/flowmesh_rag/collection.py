"""One collection as ``rag_index`` fills it: made when there is a first vector, checked before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from flowmesh_core import InputError, RunContext
from flowmesh_rag.embedder import Embedder
from flowmesh_rag.spec import IndexSpec
from flowmesh_rag.stores.base import DENSE, SPARSE, CollectionFacts, Feature, Point, VectorStore

__all__ = ["Collection"]

Payload = Mapping[str, Any]

_DELETED_AT_ONCE = 1000


class Collection:
    """A store with the model that fills it; for one task.

    Attributes:
        written: Chunks so far.
        removed: Likewise.
        spent: Seconds by what they went into.
    """

    def __init__(self, ctx: RunContext, store: VectorStore, embedder: Embedder) -> None:
        """Look at what is there.

        Raises:
            InputError: Its points would not fit beside those of this task.
        """
        self.written = self.removed = 0
        self.spent = {"embed_sec": 0.0, "store_sec": 0.0}
        self._ctx, self._store, self._embedder = ctx, store, embedder
        self._spec: IndexSpec = ctx.spec
        self._counts_words = self._spec.sparse and Feature.SPARSE in store.features
        with self._timed("store_sec"):
            self._facts = store.describe()
        if self._facts is not None:
            self._check(self._facts)

    def present(self, sources: Sequence[str] | None) -> Mapping[str, Mapping[str, str]]:
        """Return the digests of what is there, as ``VectorStore.digests`` does."""
        if self._facts is None:
            return {}
        with self._timed("store_sec"):
            return self._store.digests(sources)

    def write(self, payloads: Mapping[str, Payload], on_part: Callable[[float], None]) -> None:
        """Embed and write chunks.

        Args:
            payloads: By point id.
            on_part: Told after each batch which part of them is written.
        """
        items, written = iter(payloads.items()), 0
        while batch := list(islice(items, self._spec.batch_size)):
            vectors = self._embed([payload["text"] for _, payload in batch])
            points = [
                Point(id=point, vector=vector, text=payload["text"], payload=payload)
                for (point, payload), vector in zip(batch, vectors, strict=True)
            ]
            self._ctx.check()
            with self._timed("store_sec"):
                self._store.upsert(points)
            written += len(batch)
            self.written += len(batch)
            on_part(written / len(payloads))

    def delete(self, ids: Sequence[str]) -> None:
        """Delete points."""
        for start in range(0, len(ids), _DELETED_AT_ONCE):
            self._ctx.check()
            part = ids[start : start + _DELETED_AT_ONCE]
            with self._timed("store_sec"):
                self._store.delete(part)
            self.removed += len(part)

    def finish(self) -> int:
        """Do what the store does after writing, and return how many points it has."""
        if self._facts is None:
            return 0
        with self._timed("store_sec"):
            self._store.finish(self._ctx.check, graph=self._spec.graph)
            return self._store.count()

    def _check(self, facts: CollectionFacts) -> None:
        problems = []
        if DENSE not in facts.vectors:
            problems.append(f"has no vector {DENSE!r}, so rag_index did not make it")
        if facts.model and facts.model != self._embedder.model:
            problems.append(f"holds vectors of {facts.model}, not of {self._embedder.model}")
        if self._counts_words and SPARSE not in facts.sparse:
            problems.append(f"has no sparse vector {SPARSE!r}; set spec.sparse: false")
        elif self._counts_words and facts.language != self._spec.language:
            problems.append(f"has words of language {facts.language}, not {self._spec.language}")
        if problems:
            name = self._spec.target.collection
            raise InputError(f"collection {name!r} {'; '.join(problems)}; or use another one")
        if self._embedder.dimensions is not None:
            facts.check_size(DENSE, self._embedder.dimensions, model=self._embedder.model)

    def _embed(self, texts: Sequence[str]) -> Any:
        with self._timed("embed_sec"):
            vectors = self._embedder.embed(
                texts,
                role="document",
                stop=self._ctx.check,
                normalize=self._spec.embedding.normalize,
            )
        if self._facts is None:
            self._facts = self._create(vectors.shape[1])
        self._facts.check_size(DENSE, vectors.shape[1], model=self._embedder.model)
        return vectors

    def _create(self, size: int) -> CollectionFacts:
        facts = CollectionFacts(
            vectors={DENSE: size},
            sparse=(SPARSE,) if self._counts_words else (),
            model=self._embedder.model,
            language=self._spec.language,
        )
        with self._timed("store_sec"):
            self._store.create(facts)
            made = self._store.describe() or facts
        self._check(made)  # another process may have been first
        return made

    @contextlib.contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        started = self._ctx.clock()
        try:
            yield
        finally:
            self.spent[kind] += self._ctx.clock() - started
