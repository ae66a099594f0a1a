from __future__ import annotations

from pathlib import Path

import pytest
from flowmesh_agent.configs import MAX_BYTES, SHIPPED, list_agents, read_agent
from flowmesh_agent.settings import AgentSettings
from flowmesh_agent.spec import AgentBlock
from flowmesh_agent.tools import open_tools

from flowmesh_core import ConfigError, InputError

NAMES = ("data_analysis", "default", "file_manager", "paper_collector", "search")


def test_five_agents_come_with_the_plugin() -> None:
    assert tuple(list_agents([])) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_agent_says_what_it_is_and_its_tools_exist(name: str) -> None:
    agent = read_agent(name, [])
    assert agent.description
    assert agent.instructions.strip()
    opened = open_tools(agent.tools, AgentSettings(tools="*"))
    assert len(opened) >= len(agent.tools)
    assert AgentBlock().over(agent) == agent


def test_the_default_agent_runs_on_a_worker_that_allows_no_tools() -> None:
    assert open_tools(read_agent("default", []).tools, AgentSettings(tools="")) == []


def test_the_search_agent_names_the_variable_that_allows_its_tools() -> None:
    with pytest.raises(InputError, match=r"web_search, web_read.*FLOWMESH_AGENT_TOOLS"):
        open_tools(read_agent("search", []).tools, AgentSettings())


def test_folders_of_the_operator_come_first_in_their_order(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, text in ((first, "one"), (second, "two")):
        folder.mkdir()
        (folder / "mine.yaml").write_text(f"instructions: {text}\n")
    (second / "default.yaml").write_text("instructions: ours no more\n")
    folders = [first, second]
    assert read_agent("mine", folders).instructions == "one"
    assert read_agent("default", folders).instructions == "ours no more"
    assert list_agents(folders) == sorted({*NAMES, "mine"})


def test_an_unknown_agent_is_told_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"no agent 'other'; it has data_analysis, default,.*CONFIGS"
    ):
        read_agent("other", [tmp_path])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("instruction: x\n", r"did you mean 'instructions'"),
        ("limits: {steps: 0}\n", r"limits.steps .*greater than or equal to 1"),
        ("- a\n- b\n", r"valid dictionary"),
        ("a: [1\n", r"cannot be read"),
        ("a: &x [1]\nb: *x\n", r"must not use aliases"),
        ("!!python/object/apply:os.system ['true']\n", r"cannot be read"),
        ("tools: " + "[" * 5000 + "]" * 5000, r"must not nest deeper than 64 levels"),
        ("#" * (MAX_BYTES + 1), r"must not be larger than 262144 bytes"),
        ("model: {api_key: sk-never-shown}\n", r"api_key and headers need base_url"),
    ],
)
def test_a_file_that_is_no_agent_is_told_with_its_path(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_agent("mine", [tmp_path])
    assert str(path) in str(caught.value)
    assert "sk-never-shown" not in str(caught.value)


def test_a_file_that_is_no_text_is_told_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"instructions: \xff\xfe\x00\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml cannot be read"):
        read_agent("mine", [tmp_path])


def test_an_empty_file_is_an_agent_without_anything(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("")
    assert read_agent("mine", [tmp_path]) == AgentBlock()


def test_shipped_files_are_those_that_the_distribution_packs() -> None:
    assert {path.stem for path in SHIPPED.glob("*.yaml")} == set(NAMES)
