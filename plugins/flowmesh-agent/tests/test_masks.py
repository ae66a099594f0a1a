"""Which secrets of a task are found, and by which name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flowmesh_agent.masks import build_mask, task_mask
from flowmesh_agent.settings import AgentSettings
from flowmesh_agent.spec import AgentBlock

from flowmesh_core import SecretMask


def model(**fields: Any) -> dict[str, Any]:
    return {"base_url": "https://llm.example.org/v1", **fields}


def mask_of(block: dict[str, Any], **settings: Any) -> SecretMask:
    """Return the mask of a task with this block."""
    lead = AgentBlock.model_validate(block)
    return task_mask([lead, *lead.workers.values()], AgentSettings(**settings), ENVIRON)


ENVIRON = {"FLOWMESH_AGENT_MCP_TOKEN": "server-secret", "FLOWMESH_AGENT_MCP_PORT": "80"}


def test_secrets_of_the_document_and_the_operator_are_all_known() -> None:
    block = {
        "model": model(
            api_key="document-key", headers={"X-Team": "team-header-secret", "Accept": "json"}
        ),
        "mcp": {"shop": {"url": "https://x.org", "headers": {"Auth": "mcp-header-secret"}}},
    }
    mask = mask_of(block, serper_api_key="operator-key")
    text = "document-key team-header-secret mcp-header-secret operator-key json"
    assert mask.text(text) == (
        "${env.agent.model.api_key} ${env.agent.headers.X-Team} ${env.agent.headers.shop.Auth}"
        " ${env.SERPER_API_KEY} json"
    )


def test_secrets_of_one_place_are_masked_for_each_agent() -> None:
    def agent(which: str) -> dict[str, Any]:
        headers = {"Auth": f"{which}-mcp-secret"}
        return {
            "description": which,
            "model": model(api_key=f"{which}-key", headers={"X-Team": f"{which}-team-secret"}),
            "mcp": {"shop": {"url": "https://x.org", "headers": headers}},
        }

    mask = mask_of({**agent("lead-a"), "workers": {"w": agent("worker")}})
    for kind in ("key", "mcp-secret", "team-secret"):
        said = mask.text(f"lead-a-{kind} worker-{kind}")
        assert "lead-a" not in said
        assert "worker" not in said


def test_the_operators_name_is_told_where_a_document_repeats_the_secret() -> None:
    mask = mask_of({"model": model(api_key="same-key")}, llm_api_key="same-key")
    assert mask.text("same-key") == "${env.AGENT_LLM_API_KEY}"


@pytest.mark.parametrize("key", ["none", "x", "EMPTY", "1234567"])
def test_a_key_that_is_none_leaves_answers_as_they_are(key: str) -> None:
    mask = mask_of({"model": model(api_key=key)}, llm_api_key=key, serper_api_key=key)
    assert mask.text(f"there are {key} left") == f"there are {key} left"


def test_a_token_is_found_without_the_word_before_it() -> None:
    mask = mask_of({"model": model(headers={"Authorization": "Bearer tok-0123456789"})})
    assert mask.text("Bearer tok-0123456789") == "${env.agent.headers.Authorization}"
    assert mask.text("it is tok-0123456789") == "it is ${env.agent.headers.Authorization}"
    assert mask.text("a Bearer of news") == "a Bearer of news"


def test_secrets_of_servers_are_known_where_an_agent_has_one(tmp_path: Path) -> None:
    file = tmp_path / "mcp.yaml"
    file.write_text("shop: {url: 'https://x.org', headers: {X-Key: written-there}}")
    text = "server-secret written-there 80"
    shop = {"w": {"description": "buys", "mcp": {"shop": {}}}}
    block = {"form": "workforce", "workers": shop}
    assert mask_of(block, mcp=file).text(text) == (
        "${env.FLOWMESH_AGENT_MCP_TOKEN} ${env.X-Key} 80"
    )
    assert mask_of({}, mcp=tmp_path / "no such file").text("written-there") == "written-there"


def test_a_secret_inside_a_json_string_is_found() -> None:
    mask = build_mask([("KEY", 'sk-0"1\\23456')])
    assert mask.text('{"a": "sk-0\\"1\\\\23456"}') == '{"a": "${env.KEY in JSON}"}'
