from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flowmesh_agent.builtin import files
from flowmesh_agent.builtin.files import file_tools
from flowmesh_agent.settings import AgentSettings
from flowmesh_agent.spec import ToolUse
from flowmesh_agent.tools import ToolContext, ToolError, open_tools
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowmesh_core import ContractError

ToolContexts = Callable[..., ToolContext]
TOOLS = {tool.name: tool for tool in file_tools({})}


@pytest.fixture
def ctx(make_tool_context: ToolContexts) -> ToolContext:
    return make_tool_context()


def call(ctx: ToolContext, tool: str, **arguments: Any) -> Any:
    parameters = TOOLS[tool].parameters(**arguments)
    return asyncio.run(TOOLS[tool].call(ctx, parameters))


def test_files_are_five_tools_and_take_no_options() -> None:
    use = ToolUse(name="files")
    names = [tool.name for tool in open_tools([use], AgentSettings())]
    assert names == ["read_file", "write_file", "edit_file", "list_files", "search_files"]
    wrong = ToolUse.model_validate({"name": "files", "root": "/"})
    with pytest.raises(ContractError, match=r"'files': takes no options, got root"):
        open_tools([wrong], AgentSettings())


def test_what_is_written_can_be_read_listed_and_found(ctx: ToolContext) -> None:
    told = call(ctx, "write_file", path="notes/deep/a.txt", content="one\ntwo ä\n")
    assert told == "wrote 11 bytes to notes/deep/a.txt"
    assert (ctx.folder / "notes/deep/a.txt").read_text() == "one\ntwo ä\n"
    assert call(ctx, "read_file", path="./notes/deep/a.txt") == "one\ntwo ä\n"
    listed = {"files": {"notes/deep/a.txt": 11}, "more": False}
    assert call(ctx, "list_files") == call(ctx, "list_files", path="notes") == listed
    found = {"path": "notes/deep/a.txt", "line": 2, "text": "two ä"}
    assert call(ctx, "search_files", text="wo Ä", ignore_case=True)["found"] == [found]
    assert call(ctx, "search_files", text="wo Ä")["found"] == []
    assert call(ctx, "search_files", text="two", path="notes/deep")["found"] == [found]


def test_writing_replaces_and_leaves_no_drafts(ctx: ToolContext) -> None:
    call(ctx, "write_file", path="a", content="long text")
    call(ctx, "write_file", path="a", content="new")
    assert (ctx.folder / "a").read_text() == "new"
    assert [path.name for path in ctx.folder.iterdir()] == ["a"]


def test_lines_can_be_chosen(ctx: ToolContext) -> None:
    (ctx.folder / "a").write_text("1\n2\n3\n4\n")
    assert call(ctx, "read_file", path="a", first_line=2, lines=2) == "2\n3\n\n[1 more lines]"
    assert call(ctx, "read_file", path="a", first_line=4) == "4\n"
    assert call(ctx, "read_file", path="a", first_line=9) == ""


def test_an_edit_replaces_what_is_there_just_once(ctx: ToolContext) -> None:
    content = b"a = 1\r\nb = 1\n\xff"
    (ctx.folder / "a.py").write_bytes(content)
    with pytest.raises(ToolError, match=r"a\.py: has the old text 2 times; give more of it"):
        call(ctx, "edit_file", path="a.py", old="= 1", new="= 2")
    with pytest.raises(ToolError, match=r"a\.py: does not have the old text"):
        call(ctx, "edit_file", path="a.py", old="= 3", new="= 2")
    assert (ctx.folder / "a.py").read_bytes() == content
    assert call(ctx, "edit_file", path="a.py", old="b = 1", new="c = 1") == "replaced 1 in a.py"
    told = call(ctx, "edit_file", path="a.py", old="= 1", new="= 2", all=True)
    assert told == "replaced 2 in a.py"
    assert (ctx.folder / "a.py").read_bytes() == b"a = 2\r\nc = 2\n\xff"


def test_edits_at_the_same_time_all_count(ctx: ToolContext) -> None:
    (ctx.folder / "a").write_text("".join(f"<{i}>" for i in range(40)))
    tool = TOOLS["edit_file"]

    async def main() -> None:
        changes = [
            tool.call(ctx, tool.parameters(path="a", old=f"<{i}>", new=".")) for i in range(40)
        ]
        await asyncio.gather(*changes)

    asyncio.run(main())
    assert (ctx.folder / "a").read_text() == "." * 40


OUTSIDE = ["/etc/passwd", "..", "../canary", "a/../../canary", "a\0b", "/"]
CALLS = {
    "read_file": {},
    "write_file": {"content": "x"},
    "edit_file": {"old": "tweet", "new": "x"},
    "list_files": {},
    "search_files": {"text": "tweet"},
}


@pytest.mark.parametrize("tool", CALLS)
@pytest.mark.parametrize("path", OUTSIDE)
def test_paths_that_lead_out_are_refused(
    ctx: ToolContext, tmp_path: Path, tool: str, path: str
) -> None:
    (tmp_path / "canary").write_text("tweet")
    with pytest.raises(ToolError, match="path must lead from the working folder into it, got"):
        call(ctx, tool, path=path, **CALLS[tool])
    assert (tmp_path / "canary").read_text() == "tweet"


@pytest.mark.parametrize("tool", CALLS)
def test_links_are_followed_nowhere(ctx: ToolContext, tmp_path: Path, tool: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "canary").write_text("tweet")
    (ctx.folder / "folder").symlink_to(tmp_path / "outside")
    (ctx.folder / "file").symlink_to(tmp_path / "outside" / "canary")
    for path in ("folder/canary", "folder", "file"):
        if tool == "write_file" and "/" not in path:  # takes the place of the link
            assert call(ctx, tool, path=path, content="x") == f"wrote 1 bytes to {path}"
            assert not (ctx.folder / path).is_symlink()
            continue
        with pytest.raises(ToolError, match=f"^{path}: (is a link|leads through|is a folder)"):
            call(ctx, tool, path=path, **CALLS[tool])
    assert call(ctx, "search_files", text="tweet")["found"] == []
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["canary"]
    assert (tmp_path / "outside" / "canary").read_text() == "tweet"


def test_a_folder_that_becomes_a_link_in_the_meantime_leads_nowhere(
    ctx: ToolContext, tmp_path: Path
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a").write_text("tweet")
    here, link = ctx.folder / "sub", ctx.folder / "link"
    here.mkdir()
    (here / "a").write_text("mine")
    link.symlink_to(tmp_path / "outside")
    over, swaps = threading.Event(), []
    paths = [os.fsencode(path) for path in (here, link)]
    rename = ctypes.CDLL(None).renameat2

    def swap() -> None:
        while not over.is_set():  # either is now the folder and now the link
            swaps.append(rename(-100, paths[0], -100, paths[1], 2))

    swapping = threading.Thread(target=swap)
    swapping.start()
    seen = set()
    try:
        for i in range(200):
            try:
                seen.add(call(ctx, "read_file", path="sub/a"))
                call(ctx, "write_file", path=f"sub/{i}", content="x")
            except ToolError as exc:
                seen.add(str(exc).partition(": ")[2])
    finally:
        over.set()
        swapping.join()
    assert set(swaps) == {0}
    assert "mine" in seen
    assert "tweet" not in seen
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("none", "none: does not exist"),
        ("folder", "folder: is a folder"),
        ("pipe", "pipe: is no file"),
        ("file/a", "file/a: leads through what is no folder, or through a link"),
        ("data", "data: is no text"),
        ("", "path must name a file, got the working folder"),
        ("x" * 300, "File name too long"),
    ],
)
def test_what_cannot_be_read_says_why(ctx: ToolContext, path: str, problem: str) -> None:
    (ctx.folder / "folder").mkdir()
    os.mkfifo(ctx.folder / "pipe")
    (ctx.folder / "file").write_text("x")
    (ctx.folder / "data").write_bytes(b"a\0b")
    with pytest.raises(ToolError, match=problem):
        call(ctx, "read_file", path=path)


def test_what_cannot_be_written_says_why(make_tool_context: ToolContexts) -> None:
    ctx = make_tool_context(settings=AgentSettings(files_max_bytes=10))
    (ctx.folder / "folder").mkdir()
    with pytest.raises(ToolError, match="a: 12 bytes are more than the 10 of one file"):
        call(ctx, "write_file", path="a", content="ä" * 6)
    with pytest.raises(ToolError, match="folder: is a folder"):
        call(ctx, "write_file", path="folder", content="x")
    assert [path.name for path in ctx.folder.iterdir()] == ["folder"]


def test_the_whole_folder_holds_eight_of_the_longest_files(
    make_tool_context: ToolContexts,
) -> None:
    ctx = make_tool_context(settings=AgentSettings(files_max_bytes=10))
    for number in range(7):
        call(ctx, "write_file", path=f".hidden/{number}", content="x" * 10)
    call(ctx, "write_file", path="a", content="x" * 5)
    with pytest.raises(ToolError, match="b: the working folder holds no more than 80 bytes"):
        call(ctx, "write_file", path="b", content="x" * 6)
    with pytest.raises(ToolError, match="a: the working folder holds no more than 80 bytes"):
        call(ctx, "edit_file", path="a", old="x", new="yy", all=True)
    assert (ctx.folder / "a").read_text() == "xxxxx"
    assert not (ctx.folder / "b").exists()
    call(ctx, "write_file", path="b", content="x" * 5)


def test_a_folder_that_is_not_there_is_named(ctx: ToolContext) -> None:
    with pytest.raises(ToolError, match="none: does not exist"):
        call(ctx, "list_files", path="none")


def test_long_files_lists_and_findings_end_with_a_word(
    ctx: ToolContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_TEXT_BYTES", 8), ("_LISTED", 2), ("_FOUND", 2), ("_SEARCHED_BYTES", 9)):
        monkeypatch.setattr(files, name, value)
    for name in "abc":
        (ctx.folder / name).write_text("hit\nhit\n!")
    read = call(ctx, "read_file", path="a")
    assert read == "hit\nhit\n\n[the file goes on; only its first 8 bytes can be read]"
    assert call(ctx, "list_files") == {"files": {"a": 9, "b": 9}, "more": True}
    assert call(ctx, "search_files", text="hit")["more"] is True
    monkeypatch.setattr(files, "_FOUND", 200)
    searched = call(ctx, "search_files", text="hit")  # two files, then the bytes are spent
    assert ([hit["path"] for hit in searched["found"]], searched["more"]) == (list("aabb"), True)
    with pytest.raises(ToolError, match="a: is too long to be edited"):
        call(ctx, "edit_file", path="a", old="!", new="?")


def test_what_begins_with_a_dot_is_not_listed_or_searched(ctx: ToolContext) -> None:
    (ctx.folder / ".tmp").mkdir()
    (ctx.folder / ".tmp" / "a").write_text("hit")
    (ctx.folder / "pipe").parent.joinpath("b").write_bytes(b"hit\0")
    os.mkfifo(ctx.folder / "pipe")
    assert call(ctx, "list_files")["files"] == {"b": 4}
    assert call(ctx, "search_files", text="hit") == {"found": [], "more": False}


def test_deep_folders_end_the_walk(ctx: ToolContext) -> None:
    deep = ctx.folder.joinpath(*["d"] * 60)
    deep.mkdir(parents=True)
    (deep / "a").write_text("x")
    (ctx.folder / "z").write_text("x")
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert call(ctx, "list_files")["files"] == {"z": 1}
    assert len(list(Path("/proc/self/fd").iterdir())) == before


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), max_size=12)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(parts=st.lists(st.one_of(st.sampled_from(["..", ".", "", "/"]), NAMES), max_size=6))
def test_no_path_writes_anywhere_else(ctx: ToolContext, tmp_path: Path, parts: list[str]) -> None:
    with contextlib.suppress(ToolError):
        call(ctx, "write_file", path="/".join(parts), content="x")
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
