"""Our tools as the engine calls them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic_ai", reason="needs the engine")

from endpoint import call
from flowmesh_agent.settings import AgentSettings
from flowmesh_agent.spec import Role, ToolUse
from flowmesh_agent.tools import Tool, ToolContext, ToolError
from flowmesh_agent.toolset import Toolset, build_toolsets, keep_text
from orders import returned, run
from pydantic import BaseModel, Field
from pydantic_ai import Agent
from pydantic_ai.messages import BinaryContent
from scripted import ScriptedModel, scripted

from flowmesh_core import InputError, SecretMask

SECRET = "sk-0123456789"


class Count(BaseModel):
    """What ``Say`` is given."""

    times: int = Field(ge=0, description="how often")


class Say(Tool[Count]):
    """Returns, or raises, what it was made with."""

    name = "say"
    description = "Say it."
    parameters = Count

    def __init__(self, what: Any) -> None:
        self.what = what
        self.seen: list[Any] = []
        self.cancelled = False

    async def call(self, ctx: ToolContext, arguments: Count) -> Any:
        self.seen.append((ctx.folder, arguments))
        if isinstance(self.what, BaseException):
            raise self.what
        if self.what == "hang":
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                self.cancelled = True
                raise
        return self.what * arguments.times if isinstance(self.what, str) else self.what


class Bench:
    """An agent with one tool, and what its model was told."""

    def __init__(self, ctx: ToolContext) -> None:
        self.ctx = ctx
        self.model: ScriptedModel = scripted()

    def run(self, tool: Tool[Any], *calls: Any) -> Sequence[tuple[str, Any]]:
        """Let the model call the tool; returns the results that it was shown."""
        self.model = scripted(*calls, "end")
        run(
            self.model,
            toolsets=[Toolset([tool], self.ctx, self.ctx.seconds)],
            folder=self.ctx.folder,
            limits={"result_chars": 200},
            mask=SecretMask({"KEY": SECRET}),
        )
        return returned(self.model)


@pytest.fixture
def bench(make_tool_context: Callable[..., ToolContext]) -> Bench:
    return Bench(make_tool_context(seconds=5.0))


def test_the_model_is_told_name_description_and_schema(bench: Bench) -> None:
    tool = Say("a")
    results = bench.run(tool, call("say", times=3))
    (told,) = bench.model.requests[0][1].function_tools
    assert (told.name, told.description) == ("say", "Say it.")
    assert told.parameters_json_schema["properties"]["times"]["description"] == "how often"
    assert results == [("success", "aaa")]
    assert tool.seen == [(bench.ctx.folder, Count(times=3))]


def test_wrong_arguments_come_back_and_the_tool_is_not_called(bench: Bench) -> None:
    tool = Say("a")
    first, second = bench.run(tool, call("say", times="many"), call("say", times=-1))
    assert first[0] == second[0] == "failed"
    assert first[1].startswith("say cannot be called so: times: Input should be a valid")
    assert "greater than or equal to 0" in second[1]
    assert tool.seen == []


def test_json_data_stays_data_and_the_rest_becomes_text(bench: Bench) -> None:
    picture = BinaryContent(data=b"\x89PNG\xff", media_type="image/png")
    for value in ([{"a": 1.5}], {"b": None}, 7):
        assert bench.run(Say(value), call("say", times=1)) == [("success", value)]
    ((_, result),) = bench.run(Say({"at": Path("x"), "what": object()}), call("say", times=1))
    assert result == {"at": "x", "what": "[object, not shown]"}
    ((_, result),) = bench.run(Say([picture]), call("say", times=1))
    assert "PNG" not in json.dumps(result)


def test_a_long_result_is_cut_and_kept_whole(bench: Bench) -> None:
    ((_, text),) = bench.run(Say("0123456789"), call("say", times=100))
    assert len(text) == 200
    assert text.startswith("0123456789")
    note = "[cut: 1000 characters in all, kept in the file tool-result-1.txt]"
    assert text.endswith(note)
    assert (bench.ctx.folder / "tool-result-1.txt").read_text() == "0123456789" * 100
    bench.run(Say(["x" * 300]), call("say", times=1))
    assert json.loads((bench.ctx.folder / "tool-result-2.txt").read_text()) == ["x" * 300]


def test_a_result_that_just_fits_is_left_alone(bench: Bench) -> None:
    assert bench.run(Say("x"), call("say", times=200)) == [("success", "x" * 200)]
    assert list(bench.ctx.folder.iterdir()) == []


def test_secrets_are_masked_before_the_cut(bench: Bench) -> None:
    kept = 200 - len("\n[cut: 313 characters in all, kept in the file tool-result-1.txt]")
    text = "x" * (kept - 5) + SECRET + "y" * 300
    ((_, result),) = bench.run(Say(text), call("say", times=1))
    assert SECRET[:5] not in result
    assert SECRET not in (bench.ctx.folder / "tool-result-1.txt").read_text()
    results = bench.run(Say(ToolError(f"no {SECRET}")), call("say", times=1))
    assert results == [("failed", "no ${env.KEY}")]


def test_a_call_ends_after_its_seconds(bench: Bench, make_tool_context: Any) -> None:
    tool = Say("hang")
    bench.ctx = make_tool_context(seconds=0.2)
    began = time.monotonic()
    results = bench.run(tool, call("say", times=1))
    assert time.monotonic() - began < 2
    assert results == [("failed", "say did not end within 0.2 s")]
    assert tool.cancelled


def test_what_else_is_raised_is_not_for_the_model(bench: Bench) -> None:
    assert bench.run(Say(OSError("disk")), call("say", times=1)) == [
        ("failed", "say failed: OSError")
    ]


def test_links_that_a_program_left_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "tool-result-1.txt").symlink_to(outside)
    outside_folder = tmp_path / "link"
    outside_folder.symlink_to(folder)
    assert keep_text(folder, "new \udcff") == "tool-result-2.txt"
    assert not outside.exists()
    assert (folder / "tool-result-2.txt").read_text() == "new ?"
    with pytest.raises(OSError, match="link"):
        keep_text(outside_folder, "new")


def test_an_agent_has_what_its_document_names(make_tool_context: Any) -> None:
    settings = AgentSettings(tools=("http",))
    ctx = make_tool_context(settings=settings)
    known = {"ctx": ctx, "mask": SecretMask({})}
    toolsets = build_toolsets(Role(tools=[ToolUse(name="http")]), [Say("a")], **known)
    model = scripted("end")
    asyncio.run(Agent(model, toolsets=toolsets).run("go"))
    assert [tool.name for tool in model.requests[0][1].function_tools] == ["http", "say"]
    assert build_toolsets(Role(), [], **known) == []
    with pytest.raises(InputError, match="tools not allowed on this worker: shell"):
        build_toolsets(Role(tools=[ToolUse(name="shell")]), [], **known)


def test_what_a_form_gives_has_no_time_of_its_own(make_tool_context: Any) -> None:
    class Slow(Say):
        async def call(self, ctx: ToolContext, arguments: Count) -> Any:
            await asyncio.sleep(0.3)
            return "done"

    ctx = make_tool_context(seconds=0.05)
    toolsets = build_toolsets(Role(), [Slow("")], ctx=ctx, mask=SecretMask({}))
    model = scripted(call("say", times=1), "end")
    asyncio.run(Agent(model, toolsets=toolsets).run("go"))
    assert "done" in str(model.requests[1][0])
