"""Declares the executors ``rag``, ``rag.index`` and ``rag.embedding``; imports no engine."""

from __future__ import annotations

from typing import Any

from flowmesh_core import Capability, ExecutorInfo, hookimpl

__all__ = ["flowmesh_register_executors"]

# The store is in no engine key: each run opens its own.
ENGINE_KEY = ("embedding", "rerank")
VECTOR_KEY = ("model.source", "model.sentence_transformers")


@hookimpl
def flowmesh_register_executors() -> list[ExecutorInfo]:
    """Declare what searches, what fills a collection, and what turns texts into vectors.

    Without CONCURRENT and BATCH_INVARIANT: torch and the embedded stores block, and a text's
    neighbours in a batch move the last bits of its vector.
    """
    capabilities = {Capability.CPU, Capability.GPU, Capability.SHRINK}
    shared: dict[str, Any] = {
        "install": "pip install 'flowmesh-rag[engine]'",
        "places": ["process"],  # a GPU's number counts those that the process sees
        "settings": "flowmesh_rag.settings:RagSettings",
        "variables": [
            *("FLOWMESH_RAG_*", "FLOWMESH_HTTP_ALLOW", "FLOWMESH_TRUST_REMOTE_CODE"),
            "OMP_NUM_THREADS",
            "OMP_WAIT_POLICY=PASSIVE",  # threads that spin make single queries 20 times slower
        ],
    }
    rag = ExecutorInfo(
        name="rag",
        task_types={"rag"},
        target="flowmesh_rag.retrieval:RagExecutor",
        needs=["sentence_transformers", "qdrant_client"],
        capabilities={*capabilities, Capability.GROUP},
        spec="flowmesh_rag.spec:RagSpec",
        result="flowmesh_rag.results:RagResult",  # no example: it needs a collection to search
        inputs={"rows"},
        models=("embedding.model", "rerank.model"),
        engine_key=ENGINE_KEY,
        group_key=(*ENGINE_KEY, "qdrant", "store", "search", "generate"),
        **shared,
    )
    index = ExecutorInfo(
        name="rag.index",
        task_types={"rag_index"},
        target="flowmesh_rag.indexing:IndexExecutor",
        needs=["sentence_transformers", "qdrant_client"],
        capabilities=capabilities,
        spec="flowmesh_rag.spec:IndexSpec",
        result="flowmesh_rag.results:IndexResult",
        example="flowmesh_rag.examples:INDEX",
        inputs={"rows", "files"},
        models=("embedding.model",),
        engine_key=("embedding",),
        **shared,
    )
    embedding = ExecutorInfo(
        name="rag.embedding",
        task_types={"embedding"},
        target="flowmesh_rag.embedding:EmbeddingExecutor",
        needs=["sentence_transformers"],
        capabilities={*capabilities, Capability.GROUP},
        spec="flowmesh_rag.spec:VectorSpec",
        result="flowmesh_core:EmbeddingResult",
        example="flowmesh_rag.examples:EMBEDDING",
        inputs={"rows", "model"},
        engine_key=VECTOR_KEY,
        group_key=(*VECTOR_KEY, "normalize"),
        model_formats={"hf"},
        priority=-2,  # engines that were there first keep their documents
        **shared,
    )
    return [rag, index, embedding]
