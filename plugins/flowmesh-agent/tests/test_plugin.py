from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import entry_points, requires

from flowmesh_agent import plugin
from flowmesh_agent.settings import AgentSettings
from flowmesh_agent.tools import GROUP

from flowmesh_core import Capability, ExecutorInfo
from flowmesh_core.config import child_environment, plugin_variables
from flowmesh_core.merge import engine_key

(INFO,) = plugin.flowmesh_register_executors()


def test_the_declaration_survives_the_trip_to_another_process() -> None:
    assert ExecutorInfo.from_dict(INFO.to_dict()) == INFO


def test_the_entry_point_leads_to_the_declaration() -> None:
    (found,) = entry_points(group="flowmesh", name="agent")
    assert found.load() is plugin


def test_what_it_names_can_be_imported_from_its_path() -> None:
    for path in (INFO.spec, INFO.settings, INFO.result, INFO.target):
        module, name = path.split(":")
        assert hasattr(__import__(module, fromlist=[name]), name)


def test_each_task_has_a_process_of_its_own_on_a_cpu() -> None:
    assert INFO.places == ("process",)  # what a tool leaves behind ends with it
    assert INFO.capabilities == {Capability.CPU}
    assert INFO.task_types == {"agent"}
    assert INFO.inputs == {"rows"}


def test_one_warm_process_serves_any_agent() -> None:
    keys = [
        engine_key(INFO, {"taskType": "agent", "task": "a"}),
        engine_key(INFO, {"taskType": "agent", "configName": "search", "agent": {"tools": ["x"]}}),
    ]
    assert keys[0] == keys[1]


def test_the_engine_is_an_extra_that_the_hint_names() -> None:
    wanted = [line for line in requires("flowmesh-agent") or [] if "extra ==" in line]
    named = {re.split(r"[\[>=<; ]", line)[0] for line in wanted}
    assert {"pydantic-ai-slim", "jsonschema"} <= named
    assert "flowmesh-agent[engine]" in INFO.install
    assert set(INFO.needs) == {"pydantic_ai", "openai", "fastmcp", "jsonschema"}


def test_a_child_keeps_every_variable_that_fills_the_settings() -> None:
    variables = plugin_variables(AgentSettings, plugin="agent")
    assert "FLOWMESH_AGENT_SANDBOX" in variables
    secrets = ("AGENT_LLM_API_KEY", "UTU_LLM_API_KEY", "SERPER_API_KEY", "JINA_API_KEY")
    assert set(secrets) <= set(variables)
    environ = dict.fromkeys((*variables, "OPENAI_ORG_ID", "OPENAI_API_KEY", "HF_TOKEN"), "x")
    kept = child_environment(plugin=INFO.name, variables=INFO.variables, environ=environ)
    assert set(variables) <= set(kept)
    assert kept["PYDANTIC_AI_NO_BANNER"] == "1"
    # The library would send them to any endpoint.
    assert not {"OPENAI_ORG_ID", "OPENAI_API_KEY", "HF_TOKEN"} & set(kept)


def test_built_in_tools_are_entry_points_like_any_other() -> None:
    ours = {
        point.name
        for point in entry_points(group=GROUP)
        if point.value.startswith("flowmesh_agent.builtin.")
    }
    assert ours == {"files", "python", "shell", "http", "web_search", "web_read", "retrieve"}


def test_declaring_and_checking_imports_no_engine() -> None:
    engine = {"pydantic_ai", "openai", "fastmcp", "mcp", "httpx2", "jsonschema"}
    code = (
        "import sys, flowmesh_agent.plugin, flowmesh_agent.spec, flowmesh_agent.settings,"
        f" flowmesh_agent.budget, flowmesh_agent.answer; print({engine} & {{*sys.modules}})"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert run.stdout.strip() == "set()"
