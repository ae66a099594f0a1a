from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from flowmesh_agent.builtin.retrieve import RetrieveTool
from flowmesh_agent.tools import ToolContext, ToolError

from flowmesh_core import InputError, Outcome

STORE = {"type": "edge", "collection": "handbook"}
ITEMS = [
    {
        "id": "a",
        "score": 0.876543,
        "payload": {
            "text": "Say ${env.SECRET}",
            "source": "guide.md",
            "heading": "Start",
            "start": 0,
            "_flowmesh": {"digest": "x"},
        },
    },
    {"id": 7, "score": 0.5, "payload": None},
]


class Index:
    """Stands where ``rag`` tasks are run."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.specs: list[Mapping[str, Any]] = []

    async def __call__(self, spec: Mapping[str, Any]) -> Outcome:
        self.specs.append(spec)
        return self.outcome


def found(*items: Any) -> Outcome:
    """Return the outcome of a ``rag`` task with one query."""
    return Outcome(result={"ok": True, "queries": [{"index": 0, "query": "q", "items": [*items]}]})


@pytest.fixture
def ask(make_tool_context: Callable[..., ToolContext]) -> Callable[..., Any]:
    """Call the tool once."""

    def call(tool: RetrieveTool, index: Index, query: str) -> Any:
        ctx = make_tool_context(run_task=index)
        return asyncio.run(tool.call(ctx, tool.parameters(query=query)))

    return call


def test_passages_come_numbered_with_their_sources(ask: Any) -> None:
    index = Index(found(*ITEMS))
    tool = RetrieveTool({"store": STORE, "search": {"top_k": 2}, "embedding": {"model": "m"}})
    assert ask(tool, index, "how?") == [
        {
            "number": 1,
            "text": "Say ${env.SECRET}",
            "score": 0.8765,
            "source": "guide.md",
            "heading": "Start",
            "start": 0,
        },
        {"number": 2, "text": "", "score": 0.5},
    ]
    assert index.specs == [
        {
            "taskType": "rag",
            "store": STORE,
            "embedding": {"model": "m"},
            "search": {"top_k": 2},
            "query": "how?",
        }
    ]


def test_the_text_may_stand_in_another_field(ask: Any) -> None:
    item = {"id": 1, "score": 1, "payload": {"body": "here", "text": "not"}}
    tool = RetrieveTool({"qdrant": {"url": "http://q", "collection": "c"}, "text_field": "body"})
    assert ask(tool, Index(found(item)), "q")[0]["text"] == "here"


def test_nothing_found_is_said_in_words(ask: Any) -> None:
    assert ask(RetrieveTool({"store": STORE}), Index(found()), "q") == "nothing was found"


def test_an_index_that_fails_is_an_error_for_the_model(ask: Any) -> None:
    index = Index(Outcome(error=InputError("no collection 'handbook'")))
    with pytest.raises(ToolError, match="could not be searched: no collection 'handbook'"):
        ask(RetrieveTool({"store": STORE}), index, "q")


def test_the_document_names_one_index() -> None:
    for options in ({}, {"store": STORE, "qdrant": {}}):
        with pytest.raises(ValueError, match="needs one of store and qdrant"):
            RetrieveTool(options)
    with pytest.raises(ValueError, match="unknown key 'stor'"):
        RetrieveTool({"stor": STORE})


def test_the_model_is_told_what_the_index_holds() -> None:
    tool = RetrieveTool({"store": STORE, "description": "the handbook"})
    assert tool.description.endswith("They hold: the handbook")
    assert "They hold" not in RetrieveTool({"store": STORE}).description
    assert list(tool.parameters.model_json_schema()["properties"]) == ["query"]
