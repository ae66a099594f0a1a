from __future__ import annotations

from pathlib import Path

import pytest
from flowmesh_agent.hosts import HostRules
from flowmesh_agent.masks import build_mask
from flowmesh_agent.mcp_config import (
    MAX_FILE_BYTES,
    McpServer,
    allowed_tools,
    find_servers,
    read_servers,
    server_secrets,
)
from flowmesh_agent.settings import AgentSettings
from flowmesh_agent.spec import McpUse

from flowmesh_core import ConfigError, InputError

FILE = """
search: {command: search-server, args: [--fast], env: {TOKEN: "${env.FLOWMESH_AGENT_MCP_TOKEN}"}}
tickets:
  url: https://tickets.example.org/mcp
  headers: {Authorization: "Bearer ${env.FLOWMESH_AGENT_MCP_TOKEN}"}
  tools: [find]
"""
ENVIRON = {"FLOWMESH_AGENT_MCP_TOKEN": "secret-0123", "AGENT_LLM_API_KEY": "sk-0123456789"}


def read(text: str, folder: Path) -> dict[str, McpServer]:
    """Read a file of this text."""
    path = folder / "mcp.yaml"
    path.write_text(text)
    return read_servers(path, ENVIRON)


def test_servers_are_read_with_the_variables_that_they_name(tmp_path: Path) -> None:
    servers = read(FILE, tmp_path)
    assert servers["search"].env == {"TOKEN": "secret-0123"}
    assert servers["search"].files == "jail"
    assert not servers["search"].network
    assert servers["tickets"].headers == {"Authorization": "Bearer secret-0123"}
    assert read("", tmp_path) == read_servers(None, {}) == {}


@pytest.mark.parametrize("name", ["AGENT_LLM_API_KEY", "FLOWMESH_AGENT_MCP_NONE", "HOME", ""])
def test_other_variables_cannot_be_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=rf"env\.{name}}} must name a variable that is set"
    ) as caught:
        read(f"a: {{command: x, env: {{A: 'b ${{env.{name}}}'}}}}", tmp_path)
    assert "sk-0123456789" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: {}", "needs one of command and url"),
        ("a: {command: x, url: 'http://y'}", "needs one of command and url"),
        ("a: {command: x, headers: {b: c}}", "headers do not go with x"),
        ("a: {url: 'http://y', files: open, args: []}", "args, files do not go with http://y"),
        ("a: {comand: x}", "unknown key 'comand', did you mean 'command'"),
        ("'a b': {command: x}", "String should match pattern"),
        ("[a, b]", "valid dictionary"),
        ("a: {command: x, files: all}", r"a\.files: Input should be 'jail' or 'open'"),
        ("a: [", "cannot be read"),
        ("a: !!python/object:os.system {}", "cannot be read"),
        ("#" * (MAX_FILE_BYTES + 1), "must not be larger than"),
    ],
)
def test_a_file_with_a_fault_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        read(text, tmp_path)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"FLOWMESH_AGENT_MCP: .*none\.yaml cannot be read"):
        read_servers(tmp_path / "none.yaml", {})


def test_a_document_names_a_server_or_a_url(tmp_path: Path) -> None:
    path = tmp_path / "mcp.yaml"
    path.write_text(FILE)
    known = read_servers(path, ENVIRON)
    settings = AgentSettings(mcp=path, http_allow=("*.example.org",))

    def find(**uses: McpUse) -> dict[str, tuple[McpServer, HostRules]]:
        return find_servers(uses, settings, ENVIRON)

    url = "https://a.example.org/mcp"
    own = McpUse(url=url, headers={"k": "v"})
    assert find(tickets=McpUse(), x=McpUse(server="search"), own=own) == {
        "tickets": (known["tickets"], HostRules(hosts=("tickets.example.org",))),
        "x": (known["search"], HostRules(hosts=("",))),
        "own": (McpServer(url=url, headers={"k": "v"}), HostRules(hosts=("*.example.org",))),
    }
    with pytest.raises(InputError, match=r"no MCP server 'x'; it has search, tickets"):
        find(x=McpUse())
    with pytest.raises(InputError, match=r"mcp\.x: host other\.example is not among"):
        find(x=McpUse(url="https://other.example/"))


@pytest.mark.parametrize(
    ("document", "operator", "expected"),
    [
        (None, None, None),
        (["a"], None, {"a"}),
        (None, ["a"], {"a"}),
        (["a"], ["a", "b"], {"a"}),
        ([], ["a"], set()),
        ([], None, set()),
        (None, [], set()),
    ],
)
def test_tools_are_those_that_both_allow(
    document: list[str] | None, operator: list[str] | None, expected: set[str] | None
) -> None:
    server = McpServer(command="x", tools=operator)
    assert allowed_tools("x", McpUse(tools=document), server) == expected


def test_a_document_cannot_add_a_tool() -> None:
    with pytest.raises(InputError, match="not allowed on this worker: b, c"):
        allowed_tools("x", McpUse(tools=["c", "a", "b"]), McpServer(command="x", tools=["a"]))


def test_variables_and_words_of_headers_are_secret(tmp_path: Path) -> None:
    servers = read(FILE, tmp_path)
    mask = build_mask(server_secrets(servers, {**ENVIRON, "FLOWMESH_AGENT_MCP_PORT": "80"}))
    said = "80 sk-0123456789 got secret-0123 Bearer"
    assert mask.text(said) == "80 sk-0123456789 got ${env.FLOWMESH_AGENT_MCP_TOKEN} Bearer"
    other = McpServer(url="http://x", headers={"X-Key": "Basic abcdefgh"})
    assert "abcdefgh" not in build_mask(server_secrets({"x": other}, {})).text("key abcdefgh")
