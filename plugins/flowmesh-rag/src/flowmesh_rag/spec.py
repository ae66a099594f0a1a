"""Specs of ``rag``, ``rag_index`` and ``embedding``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from flowmesh_core import EmbeddingSpec, FilesBlock, Model, StrictBlock, TaskSpec
from flowmesh_rag.blocks import (
    Generate,
    QdrantBlock,
    RagEmbedding,
    RagSearch,
    Rerank,
    SentenceOptions,
    StoreBlock,
)
from flowmesh_rag.fields import Text, Texts

__all__ = ["Chunking", "IndexSpec", "RagSpec", "VectorSpec"]


class StoredSpec(TaskSpec):
    """What ``rag`` and ``rag_index`` have in common: a collection and a model for its vectors."""

    qdrant: QdrantBlock | None = None
    store: StoreBlock | None = None
    embedding: RagEmbedding = Field(default_factory=RagEmbedding)

    @model_validator(mode="after")
    def _one_collection(self) -> StoredSpec:
        if (self.qdrant is None) == (self.store is None):
            raise ValueError("one of qdrant, store is required")
        return self

    @property
    def target(self) -> StoreBlock:
        """The collection, in whichever spelling."""
        if self.store is not None:
            return self.store
        return StoreBlock(type="qdrant", **dict(self.qdrant or ()))

    @property
    def has_data(self) -> bool:
        """Whether there is a block ``data``, which the core reads."""
        return (self.model_extra or {}).get("data") is not None


class RagSpec(StoredSpec):
    """Spec of ``rag``; queries are the rows of ``data``, or else ``query``."""

    query: Texts = Field(default_factory=list)
    search: RagSearch = Field(default_factory=RagSearch)
    rerank: Rerank | None = None
    generate: Generate | None = None

    @model_validator(mode="after")
    def _needs_queries(self) -> RagSpec:
        problems = []
        if not self.query and not self.has_data:
            problems.append("one of data, query is required")
        if self.embedding.server and self.target.type in ("edge", "sqlite"):
            problems.append("embedding.server needs a store with a server")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class Chunking(StrictBlock):
    """``chunk``: how texts are split.

    Attributes:
        size: Of a chunk at most, in ``unit``.
        overlap: What neighbours share at most, in ``unit``.
        unit: Characters, or tokens of the embedding model.
        format: ``markdown`` keeps headings with their text; ``auto`` goes by the document.
    """

    size: int = Field(default=800, ge=16, le=1_000_000)
    overlap: int = Field(default=100, ge=0)
    unit: Literal["chars", "tokens"] = "chars"
    format: Literal["auto", "text", "markdown"] = "auto"

    @model_validator(mode="after")
    def _overlaps_less_than_all(self) -> Chunking:
        if self.overlap >= self.size:
            raise ValueError(f"overlap must be below size ({self.size}), got {self.overlap}")
        return self


class IndexSpec(StoredSpec):
    """Spec of ``rag_index``; documents are ``files``, the rows of ``data``, or both.

    Attributes:
        files: Read by the core.
        text_column: Field of a row that holds the text.
        id_column: Field that names the document; without it, a digest of the row does.
        metadata_columns: Fields kept in the payload; without it, all others.
        chunk: How texts are split.
        mode: ``sync`` replaces what changed; ``add`` only adds.
        prune: Remove documents of the collection that this task does not bring.
        sparse: Index words too, for searches by BM25.
        language: Of their stems; ``none`` leaves words as they are.
        batch_size: Chunks that are embedded and written at once.
        graph: Whether to build one that makes searches faster and less exact; ``auto`` goes by
            the number of chunks.
        strict: One document that cannot be read fails the task.
    """

    files: FilesBlock | None = None
    text_column: Text = "text"
    id_column: Text | None = None
    metadata_columns: list[str] | None = None
    chunk: Chunking = Field(default_factory=Chunking)
    mode: Literal["sync", "add"] = "sync"
    prune: bool = False
    sparse: bool = True
    language: Annotated[str, Field(pattern=r"^[a-z]+$")] = "english"
    batch_size: int = Field(default=256, ge=1, le=10_000)
    graph: Literal["auto", "always", "never"] = "auto"
    strict: bool = True

    @model_validator(mode="after")
    def _needs_documents(self) -> IndexSpec:
        problems = []
        if self.files is None and not self.has_data:
            problems.append("one of files, data is required")
        if self.embedding.server:
            problems.append("embedding.server is for searching; name a model or an endpoint")
        if self.prune and self.mode == "add":
            problems.append("prune needs mode sync")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class VectorModel(Model):
    """``model`` with the block of sentence-transformers; other engines' blocks are ignored."""

    sentence_transformers: SentenceOptions = Field(default_factory=SentenceOptions)


class VectorSpec(EmbeddingSpec):
    """Spec of ``embedding`` by sentence-transformers."""

    model: VectorModel = Field(default_factory=VectorModel)
