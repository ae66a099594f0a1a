"""The blocks of specs: stores, models, searches, answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BeforeValidator, Field, model_validator

from flowmesh_core import InferenceParams, Model, StrictBlock, refuse_fields
from flowmesh_rag.fields import (
    Collection,
    Count,
    Fields,
    Secret,
    Text,
    TimeoutS,
    Url,
    check_text,
)

__all__ = [
    "DEFAULT_MODEL",
    "Generate",
    "GenerateTask",
    "NamedModel",
    "QdrantBlock",
    "RagEmbedding",
    "RagSearch",
    "RemoteBlock",
    "Rerank",
    "SentenceOptions",
    "StoreBlock",
    "TextModel",
]

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"


def _named_model(value: object) -> object:
    return {"source": {"identifier": check_text(value)}} if isinstance(value, str) else value


class TextModel(Model):
    """A model by its hub id or folder, or by a block ``source``."""

    @model_validator(mode="after")
    def _needs_source(self) -> TextModel:
        if self.source is None:
            raise ValueError("must be a hub id, a folder, or an object with source")
        return self


NamedModel = Annotated[
    TextModel, BeforeValidator(_named_model, json_schema_input_type=str | TextModel)
]


class QdrantBlock(StrictBlock):
    """``qdrant``: a collection of a Qdrant server, short for ``store: {type: qdrant, ...}``."""

    url: Url
    collection: Collection
    api_key: Secret | None = None
    timeout_s: TimeoutS = 60.0


class StoreBlock(StrictBlock):
    """``store``: where the vectors lie.

    Attributes:
        type: ``qdrant``, ``edge``, ``sqlite``, or an entry point of ``flowmesh.rag.stores``.
        collection: A name; embedded stores keep it in a folder of the task's owner.
        url: Of a server; required by ``qdrant``, refused by embedded stores.
        api_key: Sent to the origin of ``url`` alone.
        timeout_s: Of one request, or of waiting for another process's lock.
        options: For third parties' stores.
    """

    type: Annotated[str, Field(pattern=r"^[A-Za-z][\w.-]*$")]
    collection: Collection
    url: Url | None = None
    api_key: Secret | None = None
    timeout_s: TimeoutS = 60.0
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits_type(self) -> StoreBlock:
        problems = []
        if self.type == "qdrant" and self.url is None:
            problems.append("url is required when type is qdrant")
        if self.type in ("edge", "sqlite"):
            named = [name for name in ("url", "api_key") if getattr(self, name) is not None]
            problems += [f"{name} has no meaning when type is {self.type}" for name in named]
        if self.options and self.type in ("edge", "qdrant", "sqlite"):
            problems.append(f"options has no meaning when type is {self.type}")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class RemoteBlock(StrictBlock):
    """A model behind an OpenAI-compatible endpoint.

    Attributes:
        endpoint: Base URL, such as ``https://api.openai.com/v1``.
        remote_model: What the endpoint calls the model.
        api_key: Sent as ``Authorization: Bearer`` to the origin of ``endpoint`` alone.
        timeout_s: Of one request.
    """

    endpoint: Url | None = None
    remote_model: Text | None = None
    api_key: Secret | None = None
    timeout_s: TimeoutS = 60.0

    def remote_problems(self) -> list[str]:
        """Return what is said of an endpoint where there is none."""
        if self.endpoint is not None:
            return []
        named = [name for name in ("remote_model", "api_key") if getattr(self, name) is not None]
        return [f"{name} has no meaning without endpoint" for name in named]


class SentenceOptions(StrictBlock):
    """How sentence-transformers embeds.

    Attributes:
        batch_size: Texts at once.
        dimensions: Keep so many of each vector's first numbers (Matryoshka models).
        max_tokens: Cut texts here; without it, where the model says.
        query_prompt: Put before queries; without it, what the model says.
        document_prompt: Put before documents, likewise.
        trust_remote_code: Run the repository's own code; the operator must allow it.
        dtype: Numbers that the model computes with; without it, those that it was saved with.
            Vectors are float32 in any case.
    """

    batch_size: int = Field(default=32, ge=1, le=4096)
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    dimensions: Count | None = None
    max_tokens: Count | None = None
    query_prompt: str | None = None
    document_prompt: str | None = None
    trust_remote_code: bool = False


class RagEmbedding(RemoteBlock, SentenceOptions):
    """``embedding``: which model turns texts into vectors, here, at an endpoint or in the store.

    Attributes:
        model: Hub id, folder or block of a model that this worker runs.
        server: The store's own server embeds queries with ``remote_model``.
        normalize: Give vectors the length 1.
    """

    model: NamedModel | None = None
    server: bool = False
    normalize: bool = True

    @model_validator(mode="after")
    def _one_place(self) -> RagEmbedding:
        problems = [] if self.server else self.remote_problems()
        if self.server and (self.endpoint or self.api_key):
            problems.append("server excludes endpoint and api_key")
        if self.server or self.endpoint:
            if self.remote_model is None:
                problems.append("remote_model is required with endpoint or server")
            if self.model is not None:
                problems.append("model is for this worker; name the remote one in remote_model")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class RagSearch(StrictBlock):
    """``search``.

    Attributes:
        top_k: Hits per query at most.
        mode: By vectors, by words (BM25), or both.
        candidates: Hits of each kind that a hybrid search joins.
        fusion: How it joins them: by rank, or by the distribution of the scores.
        rrf_k: Constant of the former.
        filter: Conditions on payloads, as Qdrant's JSON has them.
        score_threshold: The lowest score of a hit.
        exact: Look at every vector, not at the graph.
        ef: Breadth of the walk through the graph.
        using: Name of the collection's dense vector, if it has several.
        sparse_using: Name of its sparse vector.
        with_payload: Whether hits bring their payload, or which of its fields.
    """

    top_k: int = Field(default=5, ge=1, le=1000)
    mode: Literal["dense", "sparse", "hybrid"] = "dense"
    candidates: int = Field(default=50, ge=1, le=1000)
    fusion: Literal["rrf", "dbsf"] = "rrf"
    rrf_k: int = Field(default=60, ge=1, le=10_000)
    filter: dict[str, Any] | None = None
    score_threshold: float | None = Field(default=None, allow_inf_nan=False)
    exact: bool = False
    ef: int | None = Field(default=None, ge=1, le=10_000)
    using: str | None = None
    sparse_using: str = "bm25"
    with_payload: Fields = True


class Rerank(RemoteBlock):
    """``rerank``: a cross-encoder that sorts the hits anew, here or at an endpoint.

    Attributes:
        model: Hub id, folder or block of a model that this worker runs.
        candidates: Hits of each query that it looks at.
        batch_size: Pairs at once.
        text_field: Field of the payload that it reads.
        max_tokens: Cut pairs here.
        trust_remote_code: As in ``embedding``.
    """

    model: NamedModel | None = None
    candidates: int = Field(default=50, ge=1, le=1000)
    batch_size: int = Field(default=32, ge=1, le=4096)
    text_field: Text = "text"
    max_tokens: Count = 512
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_place(self) -> Rerank:
        problems = self.remote_problems()
        if (self.model is None) == (self.endpoint is None):
            problems.append("one of model, endpoint is required")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class GenerateTask(StrictBlock):
    """``generate.task``: what an ``inference`` task of this worker says of its model."""

    task_type: Literal["inference", "vllm"] = Field(
        default="inference", validation_alias=AliasChoices("taskType", "task_type")
    )
    executor: str | None = None
    model: dict[str, Any] = Field(default_factory=dict)
    checkpoint: dict[str, Any] | None = None


class Generate(RemoteBlock):
    """``generate``: write an answer to each query out of its hits, with citations.

    Attributes:
        task: A model of this worker.
        system_prompt: Instead of the plugin's own.
        text_field: Field of the payload that is shown to the model.
        max_context_chars: Of all hits shown for one query.
        inference: Sampling, for either kind of model.
        concurrency: Requests to ``endpoint`` at once.
    """

    task: GenerateTask | None = None
    system_prompt: Text | None = None
    text_field: Text = "text"
    max_context_chars: int = Field(default=8000, ge=100, le=10_000_000)
    inference: InferenceParams = Field(default_factory=InferenceParams)
    concurrency: int = Field(default=4, ge=1, le=64)

    @model_validator(mode="after")
    def _one_place(self) -> Generate:
        problems = self.remote_problems()
        if (self.task is None) == (self.endpoint is None):
            problems.append("one of task, endpoint is required")
        elif self.endpoint is not None and self.remote_model is None:
            problems.append("remote_model is required with endpoint")
        try:
            refused = ("n", "stream", "logprobs", "system_prompt")
            refuse_fields(self.inference, refused, engine="generate.inference")
        except ValueError as exc:
            problems.append(str(exc))
        if problems:
            raise ValueError("; ".join(problems))
        return self
