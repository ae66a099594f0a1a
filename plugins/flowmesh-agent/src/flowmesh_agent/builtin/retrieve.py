"""The tool ``retrieve``: passages of an index, found by a ``rag`` task on this worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field, model_validator

from flowmesh_agent.tools import Tool, ToolContext, ToolError
from flowmesh_core import StrictBlock

__all__ = ["RetrieveTool"]

_SOURCE_FIELDS = ("source", "title", "page", "heading", "start", "end")


class RetrieveOptions(StrictBlock):
    """What a document says of ``retrieve``: blocks of a ``rag`` task, which checks them.

    Attributes:
        store: The index; or ``qdrant`` in its place.
        embedding: Must be the model that the index was made with.
        search: ``top_k`` is how many passages the model gets, however many it asks for.
        text_field: Field of a passage's payload that holds its text.
        description: What the index holds; told to the model.
    """

    store: dict[str, Any] | None = None
    qdrant: dict[str, Any] | None = None
    embedding: dict[str, Any] | None = None
    search: dict[str, Any] | None = None
    rerank: dict[str, Any] | None = None
    text_field: str = "text"
    description: str = ""

    @model_validator(mode="after")
    def _has_one_index(self) -> RetrieveOptions:
        if (self.store is None) == (self.qdrant is None):
            raise ValueError("needs one of store and qdrant: the index to search")
        return self

    def task(self, query: str) -> dict[str, Any]:
        """Return the spec of the task that asks the index."""
        blocks = self.model_dump(
            include={"store", "qdrant", "embedding", "search", "rerank"}, exclude_none=True
        )
        return {"taskType": "rag", **blocks, "query": query}


class RetrieveArguments(BaseModel):
    """What the model gives ``retrieve``."""

    query: str = Field(min_length=1, max_length=4000, description="what to look for, in words")


class RetrieveTool(Tool[RetrieveArguments]):
    """Looks up passages in one index, which the document names and the model cannot change."""

    name = "retrieve"
    description = "Find passages about a question in the indexed documents, with their sources."
    parameters = RetrieveArguments

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = RetrieveOptions.model_validate(options)
        if self._options.description:
            self.description = f"{self.description} They hold: {self._options.description}"

    async def call(
        self, ctx: ToolContext, arguments: RetrieveArguments
    ) -> list[dict[str, Any]] | str:
        """Return the passages, best first: ``number``, ``text``, ``score`` and where it is from."""
        outcome = await ctx.run_task(self._options.task(arguments.query))
        if outcome.error is not None:
            raise ToolError(f"the index could not be searched: {outcome.error}")
        found = outcome.result["queries"][0]["items"]
        passages = [self._passage(number, item) for number, item in enumerate(found, 1)]
        return passages or "nothing was found"

    def _passage(self, number: int, item: Mapping[str, Any]) -> dict[str, Any]:
        payload = item["payload"] or {}
        known = {name: payload[name] for name in _SOURCE_FIELDS if payload.get(name) is not None}
        text = str(payload.get(self._options.text_field, ""))
        return {"number": number, "text": text, "score": round(item["score"], 4), **known}
