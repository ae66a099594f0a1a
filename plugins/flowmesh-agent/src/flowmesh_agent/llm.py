"""The models of one task: an endpoint, steps of ``inference`` tasks, or a ``serve`` task.

Each is opened once, however many agents and items share it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import attrs
from openai import AsyncOpenAI
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart
from pydantic_ai.models import Model
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai_compatible import OpenAICompatibleProvider
from pydantic_ai.settings import ModelSettings
from pydantic_ai.usage import RequestUsage

from flowmesh_agent.json_steps import JsonSteps, read_chat
from flowmesh_agent.network import build_http_client
from flowmesh_agent.settings import AgentSettings
from flowmesh_agent.spec import AgentModel, Prices
from flowmesh_core import ContractError, InputError, NetworkPolicy, Outcome

__all__ = ["Models", "OpenedModel"]

RunTask = Callable[[Mapping[str, Any]], Awaitable[Outcome]]


@attrs.frozen(kw_only=True)
class OpenedModel:
    """A model that can be asked.

    Attributes:
        name: As results tell it.
        settings: Of each request.
        retries: How often a request that failed in passing is sent again.
    """

    model: Model
    name: str
    settings: ModelSettings = attrs.field(factory=ModelSettings)
    retries: int = 0
    prices: Prices | None = None


class Models:
    """Opens the models that the agents of one task name; use it as a context.

    Args:
        settings: The operator's.
        run_task: Runs another task on this worker.
    """

    def __init__(self, settings: AgentSettings, run_task: RunTask) -> None:
        self._settings = settings
        self._run_task = run_task
        self._opened: list[tuple[AgentModel, OpenedModel]] = []
        self._clients: list[Any] = []
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> Models:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        for client in self._clients:
            await client.aclose()

    async def open(self, spec: AgentModel) -> OpenedModel:
        """Return a model, which is the same for every block that says the same.

        Raises:
            InputError: Nothing says which model.
            ContractError: What is said does not go together, such as prices of the operator's.
            FlowmeshError: As the ``serve`` task failed.
        """
        async with self._lock:
            for known, opened in self._opened:
                if known == spec:
                    return opened
            opened = await self._open(spec)
            self._opened.append((spec, opened))
            return opened

    async def _open(self, spec: AgentModel) -> OpenedModel:
        prices = spec.prices
        if spec.inference is not None:
            name, model = self._open_task(spec, spec.inference)
        elif spec.serve is not None:
            name, model = await self._open_served(spec, spec.serve)
        elif spec.base_url is not None:
            name, model = self._open_endpoint(spec, spec.base_url)
        else:
            name, model = self._open_operators(spec)
            prices = self._settings.prices
        return OpenedModel(
            model=JsonSteps(model) if _in_json(spec) else model,
            name=name,
            settings=_settings(spec),
            retries=spec.retries,
            prices=prices,
        )

    def _open_operators(self, spec: AgentModel) -> tuple[str, Model]:
        settings = self._settings
        name = spec.name or settings.model
        if not settings.base_url or not name:
            raise InputError(
                "no model: set AGENT_LLM_BASE_URL and AGENT_LLM_MODEL on the worker, or give"
                " spec.agent.model one of base_url with name, inference, serve"
            )
        if spec.prices is not None:
            raise ContractError(
                "spec.agent.model.prices need base_url, inference or serve: those of the worker's"
                " endpoint are its operator's to say (FLOWMESH_AGENT_PRICES)"
            )
        policy = NetworkPolicy(allow=(urlsplit(settings.base_url).hostname or "",))
        key = settings.api_key.get_secret_value() if settings.api_key else None
        return name, self._connect(spec, name, settings.base_url, key=key, policy=policy)

    def _open_endpoint(self, spec: AgentModel, base_url: str) -> tuple[str, Model]:
        if spec.name is None:
            raise ContractError("spec.agent.model.name is required beside base_url")
        policy = NetworkPolicy(allow=self._settings.fetch_allow)
        key = spec.api_key.get_secret_value() if spec.api_key else None
        return spec.name, self._connect(spec, spec.name, base_url, key=key, policy=policy)

    async def _open_served(self, spec: AgentModel, fields: Mapping[str, Any]) -> tuple[str, Model]:
        # Other programs of this machine must not use up what this task has started.
        key = secrets.token_urlsafe(24)
        serve = {**(fields.get("serve") or {}), "api_key": key}
        outcome = await self._run_task({**fields, "taskType": "serve", "serve": serve})
        if outcome.error is not None:
            raise outcome.error
        name, url = str(outcome.result["model"]), str(outcome.result["endpoint"])
        policy = NetworkPolicy(allow=(urlsplit(url).hostname or "",))
        return name, self._connect(spec, name, url, key=key, policy=policy)

    def _connect(
        self, spec: AgentModel, name: str, url: str, *, key: str | None, policy: NetworkPolicy
    ) -> Model:
        client = build_http_client(
            policy, timeout_s=spec.request_timeout_s, trust_env=not _is_loopback(url)
        )
        self._clients.append(client)
        if key is None:
            client.event_hooks["request"].append(_drop_key)
        sdk = AsyncOpenAI(
            base_url=url,
            api_key=key or _NO_KEY,
            default_headers={
                header: value.get_secret_value() for header, value in spec.headers.items()
            },
            http_client=client,
            max_retries=0,  # the gate sends again, within the budget
        )
        return OpenAIChatModel(
            name, provider=OpenAICompatibleProvider("flowmesh", openai_client=sdk)
        )

    def _open_task(self, spec: AgentModel, fields: Mapping[str, Any]) -> tuple[str, Model]:
        if spec.tool_calls == "native":
            raise ContractError("spec.agent.model.tool_calls must be json or auto with inference")
        name = spec.name or _model_name(fields)

        async def ask(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
            outcome = await self._run_task(_inference(spec, fields, messages, info))
            if outcome.error is not None:
                raise outcome.error
            return _answer(outcome.result)

        return name, FunctionModel(ask, model_name=name)


# The library demands one, and would look for OpenAI's.
_NO_KEY = "none"


async def _drop_key(request: Any) -> None:
    if request.headers.get("authorization") == f"Bearer {_NO_KEY}":
        del request.headers["authorization"]


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _in_json(spec: AgentModel) -> bool:
    if spec.tool_calls == "auto":
        return spec.inference is not None or spec.serve is not None
    return spec.tool_calls == "json"


def _settings(spec: AgentModel) -> ModelSettings:
    settings = ModelSettings(max_tokens=spec.max_tokens)
    if spec.temperature is not None:
        settings["temperature"] = spec.temperature
    if spec.top_p is not None:
        settings["top_p"] = spec.top_p
    if spec.seed is not None:
        settings["seed"] = spec.seed
    if spec.stop:
        settings["stop_sequences"] = list(spec.stop)
    # The first step of an inference task loads its model, which may take as long as it takes.
    if spec.inference is None or "request_timeout_s" in spec.model_fields_set:
        settings["request_timeout"] = spec.request_timeout_s
    return settings


def _model_name(fields: Mapping[str, Any]) -> str:
    model = fields.get("model")
    source = model.get("source") if isinstance(model, Mapping) else None
    known = source if isinstance(source, Mapping) else {}
    return str(known.get("identifier") or known.get("package") or known.get("path") or "inference")


def _inference(
    spec: AgentModel, fields: Mapping[str, Any], messages: Sequence[ModelMessage], info: AgentInfo
) -> dict[str, Any]:
    """Return the task that answers one step; what ``agent.model`` says wins."""
    said = {name: getattr(spec, name) for name in ("temperature", "top_p", "seed", "stop")}
    sampling = {
        "max_tokens": spec.max_tokens,
        **(fields.get("inference") or {}),
        **{name: value for name, value in said.items() if value not in (None, [])},
    }
    if "max_tokens" in spec.model_fields_set:
        sampling["max_tokens"] = spec.max_tokens
    wanted = info.model_request_parameters.output_object
    if wanted is not None:
        sampling["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": wanted.json_schema},
        }
    data = {"type": "list", "items": [read_chat(messages, info.instructions)]}
    return {**fields, "taskType": "inference", "inference": sampling, "data": data}


def _answer(result: Mapping[str, Any]) -> ModelResponse:
    item, usage = result["items"][0], result["usage"]
    return ModelResponse(
        parts=[TextPart(item["output"])],
        usage=RequestUsage(
            input_tokens=usage["prompt_tokens"], output_tokens=usage["completion_tokens"]
        ),
        finish_reason="length" if item.get("finish_reason") == "length" else "stop",
    )
