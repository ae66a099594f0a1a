"""What the operator decides: the endpoint, the tools, the network and the sandbox of agents."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, field_validator

from flowmesh_agent.spec import Limits, Prices
from flowmesh_core import CommaSeparated

__all__ = ["AgentSettings"]


def _split_folders(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(part for part in value.split(os.pathsep) if part)


def _read_prices(value: object) -> object:
    if not isinstance(value, str):
        return value
    prices = value.split(",")
    if len(prices) != 2:
        raise ValueError("must be two numbers, US dollars for a million tokens in and out")
    return {"input_per_million": prices[0], "output_per_million": prices[1]}


Folders = Annotated[tuple[Path, ...], BeforeValidator(_split_folders)]
Count = Annotated[int, Field(ge=1)]


class AgentSettings(BaseModel):
    """What the operator decides; a document can only narrow it.

    Without an alias, ``name`` is read from ``FLOWMESH_AGENT_NAME``.

    Attributes:
        llm_base_url: OpenAI-compatible endpoint of documents that name none; ``utu_base_url``
            and its like are older names, and the new ones win. An older key never goes to an
            endpoint of the new name.
        serper_api_key: Of the search behind ``web_search``.
        jina_api_key: Of the reader behind ``web_read``.
        search_url: Where that search is.
        reader_url: Where that reader is.
        fetch_allow: The core's list of hosts that documents may name; empty allows all.
        configs: Folders of named agents, looked through before those of the plugin.
        tools: Names in ``flowmesh.agent.tools`` that documents may use; ``*`` allows all.
        http_allow: Hosts that agents may reach by ``http``, ``web_read`` and MCP; empty is none.
        http_methods: Of requests by ``http``.
        mcp: YAML file of the MCP servers that documents may name.
        sandbox: ``strict`` refuses programs where the kernel cannot jail them, ``weak`` limits
            them only.
        sandbox_read: Folders that jailed programs may read.
        sandbox_network: Whether a document may give the tools ``python`` and ``shell`` a network.
        memory_bytes: Of one jailed program.
        cpu_s: Processor time of one jailed program.
        files_max_bytes: Of one file that a program or tool writes.
        processes: Of one jailed program at once.
        prices: What the endpoint of the operator costs; a document's are for its own only.
        steps_max: Ceiling over ``limits.steps`` of any document; the next two likewise.
    """

    model_config = ConfigDict(populate_by_name=True)

    llm_base_url: str = Field(default="", alias="AGENT_LLM_BASE_URL")
    llm_model: str = Field(default="", alias="AGENT_LLM_MODEL")
    llm_api_key: SecretStr | None = Field(default=None, alias="AGENT_LLM_API_KEY")
    utu_base_url: str = Field(default="", alias="UTU_LLM_BASE_URL")
    utu_model: str = Field(default="", alias="UTU_LLM_MODEL")
    utu_api_key: SecretStr | None = Field(default=None, alias="UTU_LLM_API_KEY")
    utu_type: str = Field(default="", alias="UTU_LLM_TYPE")
    serper_api_key: SecretStr | None = Field(default=None, alias="SERPER_API_KEY")
    jina_api_key: SecretStr | None = Field(default=None, alias="JINA_API_KEY")
    search_url: str = "https://google.serper.dev/search"
    reader_url: str = "https://r.jina.ai/"
    fetch_allow: CommaSeparated = Field(default=(), alias="FLOWMESH_HTTP_ALLOW")
    configs: Folders = ()
    tools: CommaSeparated = ("files",)
    http_allow: CommaSeparated = ()
    http_methods: CommaSeparated = ("GET", "HEAD")
    mcp: Path | None = None
    sandbox: Literal["strict", "weak"] = "strict"
    sandbox_read: Folders = ()
    sandbox_network: bool = False
    memory_bytes: Count = 2**30
    cpu_s: Count = 60
    files_max_bytes: Count = 256 * 2**20
    processes: Count = 64
    prices: Annotated[Prices | None, BeforeValidator(_read_prices)] = None
    steps_max: Count | None = None
    tokens_max: Count | None = None
    cost_max: Annotated[float, Field(gt=0)] | None = None

    @field_validator("utu_type")
    @classmethod
    def _is_chat(cls, value: str) -> str:
        if value not in ("", "chat.completions"):
            raise ValueError("must be chat.completions, the only way that agents ask a model")
        return value

    @property
    def base_url(self) -> str:
        """The operator's endpoint, or nothing."""
        return self.llm_base_url or self.utu_base_url

    @property
    def model(self) -> str:
        """The model to ask that endpoint for, or nothing."""
        return self.llm_model or self.utu_model

    @property
    def api_key(self) -> SecretStr | None:
        """The key for that endpoint, and for no other."""
        return self.llm_api_key or (None if self.llm_base_url else self.utu_api_key)

    @property
    def secrets(self) -> dict[str, str]:
        """Value of each secret by its variable, for masks."""
        keys = {
            "AGENT_LLM_API_KEY": self.llm_api_key,
            "UTU_LLM_API_KEY": self.utu_api_key,
            "SERPER_API_KEY": self.serper_api_key,
            "JINA_API_KEY": self.jina_api_key,
        }
        return {name: key.get_secret_value() for name, key in keys.items() if key}

    def allows(self, tool: str) -> bool:
        """Whether documents may use this entry of ``flowmesh.agent.tools``."""
        return tool in self.tools or "*" in self.tools

    def cap(self, limits: Limits) -> Limits:
        """Return the limits, none above the operator's ceilings."""
        costs = [cost for cost in (limits.cost_usd, self.cost_max) if cost is not None]
        return limits.model_copy(
            update={
                "steps": min(limits.steps, self.steps_max or limits.steps),
                "tokens": min(limits.tokens, self.tokens_max or limits.tokens),
                "cost_usd": min(costs, default=None),
            }
        )
