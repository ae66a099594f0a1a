"""Specs and results that several engines share: ``inference``, ``embedding``, ``serve``.

Defaults and ranges are those of the contract. A plugin subclasses a spec to add its own block;
an unknown key in a block is refused with the nearest name, and another engine's block is ignored.
Where unknown keys pass, in a spec and in ``model``, null means that a key is not there.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)

from flowmesh_core.validation import OpenBlock, StrictBlock, show_value

__all__ = [
    "Adapter",
    "Checkpoint",
    "CheckpointLoad",
    "Choice",
    "EmbeddingResult",
    "EmbeddingSpec",
    "FilesBlock",
    "InferenceItem",
    "InferenceParams",
    "InferenceResult",
    "InferenceSpec",
    "JsonlExport",
    "Model",
    "ModelSource",
    "Postprocess",
    "ResponseFormat",
    "ServeParams",
    "ServeResult",
    "ServeSpec",
    "TaskSpec",
    "Usage",
    "refuse_fields",
]

Fraction = Annotated[float, Field(ge=0, le=1)]

_HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")
_HEADER_TEXT = re.compile(r"[!-~]+")


def _number_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


IdText = Annotated[str, BeforeValidator(_number_as_text)]


class OpenResult(BaseModel):
    """A result, or a part of one, to which whoever writes it may add keys."""

    model_config = ConfigDict(extra="allow")


class TaskSpec(OpenBlock):
    """What every spec has; the core reads the rest of the common fields itself."""

    task_type: str = Field(default="", validation_alias=AliasChoices("taskType", "task_type"))


class ModelSource(OpenBlock):
    """``model.source``: where the weights come from.

    ``type`` is ``hub`` (an id on the model hub, or a folder if it exists), ``folder``, ``file``,
    ``package`` (weights shipped in an installed package), ``task`` (an earlier task's artifact),
    or one that a plugin adds. ``huggingface`` and ``hf`` mean ``hub``, ``local`` a path.
    """

    type: str = "hub"
    identifier: str | None = None
    revision: str | None = None
    path: str | None = None
    package: str | None = None
    file: str | None = Field(default=None, validation_alias=AliasChoices("file", "filename"))
    task_id: IdText | None = Field(default=None, validation_alias=AliasChoices("taskId", "task_id"))
    trust_remote_code: bool = False


class Adapter(OpenBlock):
    """One entry of ``model.adapters``: a LoRA from a path, a URL or an earlier task."""

    type: str = "lora"
    name: str | None = None
    id: IdText | None = Field(default=None, validation_alias=AliasChoices("id", "adapter_id"))
    apply: Literal["runtime", "merge"] = "runtime"
    path: str | None = None
    url: str | None = None
    task_id: IdText | None = Field(default=None, validation_alias=AliasChoices("taskId", "task_id"))
    headers: dict[str, str] = Field(default_factory=dict)
    archive_format: str = "auto"
    scale: float = 1.0

    @model_validator(mode="after")
    def _needs_origin(self) -> Adapter:
        if not (self.path or self.url or self.task_id):
            raise ValueError("one of path, url, taskId is required")
        return self


class Model(OpenBlock):
    """``model``: the source, adapters, and one block per engine."""

    source: ModelSource | None = None
    adapters: list[Adapter] = Field(default_factory=list)


class CheckpointLoad(OpenBlock):
    """``checkpoint.load``: weights that replace the model's, from a path, a URL or a task."""

    type: str = "local"
    path: str | None = Field(default=None, validation_alias=AliasChoices("path", "uri"))
    task_id: IdText | None = Field(default=None, validation_alias=AliasChoices("taskId", "task_id"))
    url: str | None = None
    base_url: str | None = None
    headers: dict[str, str] = Field(default_factory=dict)
    timeout_s: float | None = Field(
        default=None, gt=0, validation_alias=AliasChoices("timeoutSec", "timeout_s")
    )
    filename: str | None = None
    archive_format: Literal["auto", "zip", "tar", "tar.gz", "tgz", "tar.bz2", "tar.xz", "none"] = (
        "auto"
    )
    subdir: str | None = None


class Checkpoint(OpenBlock):
    """``checkpoint``."""

    load: CheckpointLoad | None = None


class FilesBlock(StrictBlock):
    """``files``: what an executor with the input ``files`` reads.

    Attributes:
        paths: Files, folders and patterns such as ``docs/**/*.md`` on the worker; relative ones
            count from its working folder. In folders, names that begin with a dot and links that
            lead out are left out.
        urls: Downloaded, each to one file.
        headers: Of each download, so all ``urls`` are of one server where these are secrets.
        max_files: More are an error.
        max_bytes: Of all files together.
    """

    paths: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    urls: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    headers: dict[str, SecretStr] = Field(default_factory=dict)
    max_files: int = Field(default=100_000, ge=1, le=1_000_000)
    max_bytes: int = Field(default=10 * 2**30, ge=1)

    @model_validator(mode="after")
    def _names_some(self) -> FilesBlock:
        if not (self.paths or self.urls):
            raise ValueError("one of paths, urls is required")
        return self


class ResponseFormat(StrictBlock):
    """``inference.response_format``: what the answer must look like, in OpenAI's spelling.

    The schema stands under ``json_schema.schema``, or directly under ``schema``. ``regex`` and
    ``choice`` go beyond OpenAI's; not every engine can hold its answers to them.
    """

    type: Literal["text", "json_object", "json_schema", "regex", "choice"] = "text"
    json_schema: dict[str, Any] | None = Field(
        default=None, validation_alias=AliasChoices("json_schema", "schema")
    )
    regex: str | None = None
    choice: list[str] | None = None

    @model_validator(mode="after")
    def _needs_its_form(self) -> ResponseFormat:
        if self.type in ("json_schema", "regex", "choice") and not getattr(self, self.type):
            raise ValueError(f'{self.type} is required when type is "{self.type}"')
        return self

    @property
    def schema_object(self) -> dict[str, Any] | None:
        """The JSON schema itself; ``{"type": "object"}`` for ``json_object``; else None."""
        if self.type == "json_object":
            return {"type": "object"}
        if self.type != "json_schema" or self.json_schema is None:
            return None
        inner = self.json_schema.get("schema")
        return inner if isinstance(inner, dict) else self.json_schema


class InferenceParams(StrictBlock):
    """``inference``: sampling and prompting, in the field's usual units and ranges.

    ``stream`` asks for what has been written so far as progress, where an engine can tell.
    """

    temperature: float = Field(default=0.7, ge=0)
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    top_k: int = Field(default=-1, ge=-1)
    min_p: Fraction = 0.0
    max_tokens: int = Field(
        default=512, ge=1, validation_alias=AliasChoices("max_tokens", "max_new_tokens")
    )
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, gt=0)
    stop: list[str] = Field(default_factory=list)
    seed: int | None = Field(default=None, ge=0, le=2**32 - 1)
    n: int = Field(default=1, ge=1, le=64)
    do_sample: bool | None = None
    logprobs: int | None = Field(default=None, ge=0)
    stream: bool = False
    system_prompt: str | None = Field(
        default=None, validation_alias=AliasChoices("system_prompt", "systemPrompt")
    )
    prompt_format: Literal["auto", "chat", "plain"] = "auto"
    response_format: ResponseFormat = Field(default_factory=ResponseFormat)

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        if value is None:
            return []
        return [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, value: list[str]) -> list[str]:
        if any(not text for text in value):
            raise ValueError("an empty string would stop before the first token")
        return value

    @property
    def deterministic(self) -> bool:
        """Whether the same prompt always gets the same answer."""
        return self.temperature == 0 or self.do_sample is False


def _prompt_and_output() -> dict[str, str | dict[str, Any]]:
    return {"prompt": "prompt", "output": "output"}


class JsonlExport(StrictBlock):
    """``postprocess.jsonl_export``: write the items as JSON lines.

    ``fields`` maps an output name to a selector: ``prompt``, ``output``, ``metadata.K``,
    ``item.K``, any other string as itself, or an object with ``from``, ``key``, ``value``,
    ``fallback``, ``default``.
    """

    path: str
    fields: dict[str, str | dict[str, Any]] = Field(default_factory=_prompt_and_output)
    required_fields: list[str] = Field(default_factory=list)


class Postprocess(OpenBlock):
    """``postprocess``."""

    jsonl_export: JsonlExport | None = None


class InferenceSpec(TaskSpec):
    """Spec of ``inference``; ``data`` is read by the core."""

    model: Model = Field(default_factory=Model)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    inference: InferenceParams = Field(default_factory=InferenceParams)
    postprocess: Postprocess = Field(default_factory=Postprocess)


class Usage(OpenResult):
    """Token counts without padding and the wall time, in seconds, of the work they stand for."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    latency_sec: float = 0.0
    num_requests: int = 0


class Choice(OpenResult):
    """One of ``n`` answers to a prompt.

    ``logprobs`` has one entry per token: ``token``, its natural ``logprob`` and the likeliest
    others in ``top_logprobs``, as OpenAI has them.
    """

    output: str
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: list[dict[str, Any]] | None = None


class InferenceItem(Choice):
    """The answer to one prompt; with ``n`` above 1 the first, and all of them in ``choices``.

    ``prompt`` is what the model was given; ``metadata`` holds the row's own fields and the raw
    ``prompt`` and ``rendered_prompt``.
    """

    index: int
    prompt: str
    metadata: dict[str, Any] = Field(default_factory=dict)
    choices: list[Choice] | None = None


class InferenceResult(OpenResult):
    """Result of ``inference``: one item per prompt, in order of the rows."""

    ok: Literal[True] = True
    model: str
    items: list[InferenceItem]
    usage: Usage


class EmbeddingSpec(TaskSpec):
    """Spec of ``embedding``: one vector per row of ``data``."""

    model: Model = Field(default_factory=Model)
    normalize: bool = True


class EmbeddingResult(OpenResult):
    """Result of ``embedding``: ``items[i].embedding`` is a vector of ``dimensions`` floats."""

    ok: Literal[True] = True
    model: str
    dimensions: int
    items: list[dict[str, Any]]
    usage: Usage


class ServeParams(StrictBlock):
    """``serve``: where an endpoint listens, for how long and for whom.

    Attributes:
        host: IP address or name to listen on.
        port: 0 takes a free one.
        ttl_s: Seconds for which it stays once it is ready; without it, until it is stopped.
        api_key: What requests must bring as ``Authorization: Bearer``; ``${env.NAME}`` keeps it
            out of the document.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535)
    ttl_s: float | None = Field(default=None, gt=0, le=1e9)
    api_key: SecretStr | None = None

    @field_validator("host")
    @classmethod
    def _is_host(cls, value: str) -> str:
        if not (_is_ip(value) or _HOST_NAME.fullmatch(value)):
            raise ValueError(
                "must be an IP address or a host name, without scheme and port, got "
                + show_value(value)
            )
        return value

    @field_validator("api_key")
    @classmethod
    def _fits_a_header(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not _HEADER_TEXT.fullmatch(value.get_secret_value()):
            raise ValueError("must be visible ASCII characters without blanks or a line end")
        return value

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the endpoint."""
        if _is_ip(self.host):
            return ipaddress.ip_address(self.host).is_loopback
        return self.host == "localhost"


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


class ServeSpec(TaskSpec):
    """Spec of ``serve``: a model behind an OpenAI-compatible endpoint.

    A block ``inference`` is not read: each request brings its own sampling.
    """

    model: Model = Field(default_factory=Model)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    serve: ServeParams = Field(default_factory=ServeParams)


class ServeResult(OpenResult):
    """Result of ``serve``, reported once the endpoint has answered a request.

    ``endpoint`` is the base URL that OpenAI's clients take, ``model`` the id to ask for, ``pid``
    the process on the worker; ``expires_at`` is null when the endpoint stays until it is stopped.
    """

    ok: Literal[True] = True
    endpoint: str
    model: str
    pid: int
    expires_at: AwareDatetime | None = None


def refuse_fields(block: BaseModel, names: Iterable[str], *, engine: str) -> None:
    """Refuse fields of a shared block that an engine cannot honour.

    Raises:
        ValueError: Naming each field that the document sets to something but its default.
    """
    fields = type(block).model_fields
    refused = [
        name
        for name in names
        if getattr(block, name)
        != fields[name].get_default(call_default_factory=True, validated_data={})
    ]
    if refused:
        raise ValueError(f"{engine} cannot honour {', '.join(refused)}; leave it out")
