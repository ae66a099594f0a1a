from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from flowmesh_agent.configs import MAX_BYTES, SHIPPED, list_agents, read_agent
from flowmesh_agent.settings import AgentSettings
from flowmesh_agent.spec import AgentBlock
from flowmesh_agent.tools import open_tools
from pydantic import SecretStr

from flowmesh_core import ConfigError, InputError

NAMES = ("data_analysis", "default", "file_manager", "paper_collector", "search")


def test_five_agents_come_with_the_plugin() -> None:
    assert tuple(list_agents([])) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_agent_says_what_it_is_and_its_tools_exist(name: str) -> None:
    agent = read_agent(name, [])
    assert agent.description
    assert agent.instructions.strip()
    opened = open_tools(agent.tools, AgentSettings(tools="*", serper_api_key="key"))
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


def test_keys_of_a_file_may_stand_in_variables_of_the_operator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWMESH_AGENT_LARGE_KEY", "sk-large-123456")
    reference = "${env.FLOWMESH_AGENT_LARGE_KEY}"
    model = {"base_url": "http://h", "api_key": reference, "headers": {"x": f"Bearer {reference}"}}
    worker = {"description": "reads", "model": model}
    agent = {"instructions": reference, "model": model, "workers": {"a": worker}}
    agent["mcp"] = {"docs": {"url": "http://h", "headers": {"x": reference}}}
    (tmp_path / "mine.yaml").write_text(json.dumps(agent))
    found = read_agent("mine", [tmp_path])
    for told in (found.model, found.workers["a"].model):
        assert told is not None
        assert told.api_key == SecretStr("sk-large-123456")
        assert told.headers == {"x": SecretStr("Bearer sk-large-123456")}
    assert found.mcp["docs"].headers == {"x": SecretStr("sk-large-123456")}
    assert found.instructions == reference  # for the model to read


@pytest.mark.parametrize("name", ["OTHER_KEY", "FLOWMESH_AGENT_UNSET", "FLOWMESH_REDIS_URL"])
def test_a_file_reaches_no_other_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for known in ("OTHER_KEY", "FLOWMESH_REDIS_URL"):
        monkeypatch.setenv(known, "s3cret")
    model = {"base_url": "http://h", "headers": {"x": f"Bearer ${{env.{name}}}"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"model": model}))
    with pytest.raises(ConfigError, match=rf"model.headers.x .*env.{name}}} must name a variable"):
        read_agent("mine", [tmp_path])


def test_a_document_reaches_no_variable_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWMESH_AGENT_LARGE_KEY", "sk-large-123456")
    headers = {"x": "${env.FLOWMESH_AGENT_LARGE_KEY}"}
    block = AgentBlock.model_validate({"model": {"base_url": "http://h", "headers": headers}})
    assert block.model is not None
    assert block.model.headers == {"x": SecretStr(headers["x"])}


def test_a_file_that_is_no_text_is_told_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"instructions: \xff\xfe\x00\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml cannot be read"):
        read_agent("mine", [tmp_path])


def test_an_empty_file_is_an_agent_without_anything(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("")
    assert read_agent("mine", [tmp_path]) == AgentBlock()


def test_shipped_files_are_those_that_the_distribution_packs() -> None:
    assert {path.stem for path in SHIPPED.glob("*.yaml")} == set(NAMES)
