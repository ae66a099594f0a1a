"""The task contract: bytes and documents in, ``Envelope`` and ``Task`` out.

Whatever the contract accepts is accepted, and unknown fields pass through. Whatever would fail
later is refused here, every problem in one ``ContractError``. Wire spellings stop in this file.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Annotated, Any, TypeVar

import attrs
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from flowmesh_core.errors import ContractError

__all__ = [
    "CONTRACT_VERSION",
    "CommonSpec",
    "Destination",
    "Envelope",
    "Output",
    "Shard",
    "StrictBlock",
    "Task",
    "UpstreamResults",
    "check_task_id",
    "decode_json",
    "describe_problems",
    "encode_json",
    "parse_envelope",
    "parse_message",
    "parse_task",
    "utc_now",
    "validate_model",
]

CONTRACT_VERSION = "mloc/v1"
TASK_CHANNEL = "tasks"
TASK_EVENTS_CHANNEL = "tasks.events"
WORKER_EVENTS_CHANNEL = "workers.events"
TASK_PROGRESS_CHANNEL = "tasks.progress:{task_id}"

UpstreamResults = Mapping[str, Mapping[str, Any]]
ModelT = TypeVar("ModelT", bound=BaseModel)

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}\Z")
# What a merged child may leave out because its leader says it for the whole group.
_SHARED_BY_GROUP = ("taskType", "model", "checkpoint", "resources", "enforce_cpu", "executor")
_MAX_DEPTH = 200


def utc_now() -> str:
    """Return the wall clock as the wire writes it: RFC 3339, UTC, microseconds."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def decode_json(text: bytes | str) -> Any:
    """Parse JSON and turn every way in which that fails into one ``ContractError``."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ContractError(f"message nests deeper than {_MAX_DEPTH} levels") from None
    except ValueError as exc:
        raise ContractError(f"message must be JSON in UTF-8: {exc}") from exc


def encode_json(value: Any, *, indent: int | None = None) -> bytes:
    """Write JSON as the wire has it: UTF-8, not ASCII-escaped, strictly valid.

    NaN and infinities become ``null``, which is what JSON has for them; a lone surrogate, which
    UTF-8 cannot hold, makes the whole text ASCII-escaped instead.

    Raises:
        TypeError: A value is of a type that JSON does not know; the message names where it stands.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    except ValueError:
        value = _without_nan(value)
        text = json.dumps(value, ensure_ascii=False, indent=indent)
    except TypeError as exc:
        raise TypeError(f"{_first_unknown(value) or 'value'} is not JSON: {exc}") from exc
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent).encode()


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0.0 else None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value


def _first_unknown(value: Any, path: str = "") -> str:
    if isinstance(value, Mapping):
        children: Iterable[tuple[str, Any]] = ((f"{path}.{key}", v) for key, v in value.items())
    elif isinstance(value, (list, tuple)):
        children = ((f"{path}[{i}]", v) for i, v in enumerate(value))
    else:
        known = isinstance(value, (str, int, float, bool, type(None)))
        return "" if known else f"{path.lstrip('.') or 'value'} of type {type(value).__name__}"
    return next((found for at, item in children if (found := _first_unknown(item, at))), "")


def check_task_id(value: object) -> str:
    """Return a task id that is safe as a folder name.

    Raises:
        ContractError: It is no plain name; numbers count as their decimal text.
    """
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(text, str) and _PLAIN_NAME.match(text):
        return text
    raise ContractError(
        "task_id must be a plain name (letters, digits, '-', '_', '.', not starting with '.', "
        f"at most 200), got {_shown(value)}"
    )


def _shown(value: object) -> str:
    if isinstance(value, (str, int, float, bool, type(None))):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    return type(value).__name__


class StrictBlock(BaseModel):
    """A block in which an unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        known = set(_accepted_names(cls))
        unknown = [str(key) for key in value if str(key) not in known]
        if unknown:
            raise ValueError("; ".join(_unknown_key(key, known) for key in unknown))
        return value


def _accepted_names(model: type[BaseModel]) -> Iterable[str]:
    for name, field in model.model_fields.items():
        yield name
        alias = field.validation_alias
        if isinstance(alias, AliasChoices):
            yield from (choice for choice in alias.choices if isinstance(choice, str))
        elif isinstance(alias, str):
            yield alias


def _unknown_key(key: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"
    return f"unknown key {key!r}, {hint}"


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow", populate_by_name=True)


class Destination(_Open):
    """Where the result goes: ``spec.output.destination``.

    ``type`` names a store driver; ``timeout_s`` is the allowance of one request in seconds.
    """

    type: str = "local"
    path: str | None = None
    url: str | None = None
    method: str = "POST"
    headers: dict[str, str] = Field(default_factory=dict)
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None, validation_alias=AliasChoices("timeoutSec", "timeout_s")
    )

    @model_validator(mode="after")
    def _needs_url(self) -> Destination:
        if self.type == "http" and not re.match(r"https?://[^/]", self.url or ""):
            got = _shown(self.url)
            raise ValueError(f'url must be an http(s) URL when type is "http", got {got}')
        return self


class Output(_Open):
    """``spec.output``: the destination and the artifacts that the manifest must list."""

    destination: Destination = Field(default_factory=Destination)
    artifacts: list[str] = Field(default_factory=list)

    @field_validator("destination", mode="before")
    @classmethod
    def _default_destination(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("artifacts", mode="before")
    @classmethod
    def _confined(cls, value: Any) -> Any:
        if value is None:
            return []
        names = value if isinstance(value, list) else [value]
        for name in names:
            if not isinstance(name, str):
                raise ValueError(f"each entry must be a string, got {_shown(name)}")  # noqa: TRY004 - pydantic turns ValueError into a problem
            if name.startswith("/") or ".." in name.split("/") or "\0" in name:
                raise ValueError(f"each entry must lie in the task's folder, got {_shown(name)}")
        return value


class Shard(_Open):
    """``spec.shard``: this task reads part ``index`` of ``total`` of its rows."""

    index: int = Field(default=0, ge=0)
    total: int = Field(default=1, ge=1)
    contiguous: bool = True

    @model_validator(mode="after")
    def _in_range(self) -> Shard:
        if self.index >= self.total:
            raise ValueError(f"index {self.index} must be below total {self.total}")
        return self


class CommonSpec(_Open):
    """The part of ``spec`` that the core itself reads, whatever the task type."""

    task_type: str = Field(default="", validation_alias=AliasChoices("taskType", "task_type"))
    executor: str | None = None
    enforce_cpu: bool = False
    output: Output = Field(default_factory=Output)
    resources: dict[str, Any] = Field(default_factory=dict)
    shard: Shard = Field(default_factory=Shard)
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None, validation_alias=AliasChoices("timeoutSec", "timeout_s")
    )
    upstream: dict[str, dict[str, Any]] = Field(
        default_factory=dict, validation_alias="_upstreamResults"
    )

    @field_validator("output", "resources", "shard", "upstream", mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("task_type", mode="before")
    @classmethod
    def _no_type(cls, value: Any) -> Any:
        return "" if value is None else value


@attrs.frozen(kw_only=True)
class Task:
    """One validated task.

    Attributes:
        task_id: Plain name, unique per task; safe as a folder name.
        spec: The document's ``spec`` as it came, for executors and for echo.
        common: What the core reads of it.
        document: The rest of the document: ``apiVersion``, ``kind``, ``metadata`` and extras.
    """

    task_id: str
    spec: Mapping[str, Any]
    common: CommonSpec
    document: Mapping[str, Any] = attrs.field(factory=dict)

    @property
    def task_type(self) -> str:
        """The ``taskType``, empty when the document names none."""
        return self.common.task_type

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The document's ``metadata``, empty when it has none."""
        found = self.document.get("metadata")
        return found if isinstance(found, Mapping) else {}

    @property
    def destination(self) -> Destination:
        """Where the result goes."""
        return self.common.output.destination


@attrs.frozen(kw_only=True)
class Envelope:
    """One dispatch: a leading task, perhaps with merged children.

    Attributes:
        task: The task whose events the orchestrator waits for.
        children: Merged members in dispatch order.
        rejected: Members that could not be read, by task id; they fail alone.
        dispatched_at: Text of the dispatcher's clock; with the task id it names one attempt.
        attempt: Number of the attempt, from 1, when the transport counts them.
    """

    task: Task
    children: tuple[Task, ...] = ()
    rejected: Mapping[str, ContractError] = attrs.field(factory=dict)
    assigned_worker: str | None = None
    dispatched_at: str | None = None
    parent_task_id: str | None = None
    shard_index: int | None = None
    shard_total: int | None = None
    attempt: int | None = None

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The leader, then its children."""
        return (self.task, *self.children)


class _Message(_Open):
    task_id: Any = Field(default=None, validation_alias=AliasChoices("task_id", "taskId"))
    task: dict[str, Any]
    merged_children: list[dict[str, Any]] = Field(
        default_factory=list, validation_alias=AliasChoices("merged_children", "merge_children")
    )
    assigned_worker: str | None = None
    dispatched_at: str | None = None
    parent_task_id: str | None = None
    shard_index: int | None = None
    shard_total: int | None = None
    attempt: int | None = Field(default=None, ge=1)

    @field_validator("merged_children", mode="before")
    @classmethod
    def _no_children(cls, value: Any) -> Any:
        return [] if value is None else value


def parse_message(body: bytes | str) -> Mapping[str, Any]:
    """Read bytes as one JSON object.

    Raises:
        ContractError: It is not JSON, not an object, or nests too deeply to be handled safely.
    """
    message = decode_json(body)
    if not isinstance(message, dict):
        raise ContractError(f"message must be a JSON object, got {type(message).__name__}")
    if _too_deep(message):
        raise ContractError(f"message nests deeper than {_MAX_DEPTH} levels")
    return message


def _too_deep(value: Any) -> bool:
    """Look level by level, so that the check itself needs no recursion."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True


def parse_envelope(message: Mapping[str, Any]) -> Envelope:
    """Validate one dispatch message.

    Raises:
        ContractError: Every problem of the message and of the leading task. A child with a
            readable id but a bad document is listed in ``Envelope.rejected`` instead.
    """
    fields = validate_model(_Message, message, where="message")
    raw_id = fields.task.get("task_id") if fields.task_id is None else fields.task_id
    task = parse_task(fields.task, task_id=check_task_id(raw_id))
    children, rejected = _parse_children(task, fields.merged_children)
    return Envelope(
        task=task,
        children=children,
        rejected=rejected,
        assigned_worker=fields.assigned_worker,
        dispatched_at=fields.dispatched_at,
        parent_task_id=fields.parent_task_id,
        shard_index=fields.shard_index,
        shard_total=fields.shard_total,
        attempt=fields.attempt,
    )


def _parse_children(
    leader: Task, raw_children: Sequence[Mapping[str, Any]]
) -> tuple[tuple[Task, ...], dict[str, ContractError]]:
    children: list[Task] = []
    rejected: dict[str, ContractError] = {}
    seen = {leader.task_id}
    for raw in raw_children:
        # Without an id nobody could be answered, so such a child spoils the whole message.
        task_id = check_task_id(raw.get("task_id", raw.get("taskId")))
        if task_id in seen:
            raise ContractError(
                f"merged_children names task {task_id} twice", where=f"task {leader.task_id}"
            )
        seen.add(task_id)
        try:
            children.append(_parse_child(leader, raw, task_id))
        except ContractError as exc:
            rejected[task_id] = exc
    return tuple(children), rejected


def _parse_child(leader: Task, raw: Mapping[str, Any], task_id: str) -> Task:
    spec = raw.get("spec")
    if not isinstance(spec, Mapping):
        raise ContractError(f"spec must be an object, got {_shown(spec)}", where=f"task {task_id}")
    shared = {key: leader.spec[key] for key in _SHARED_BY_GROUP if key in leader.spec}
    document = {**leader.document, "metadata": raw.get("metadata"), "spec": {**shared, **spec}}
    return parse_task(document, task_id=task_id)


def parse_task(document: Mapping[str, Any], *, task_id: str) -> Task:
    """Validate one task document.

    Args:
        document: ``apiVersion``, ``kind``, ``metadata``, ``spec`` and whatever else came.
        task_id: Already checked.

    Raises:
        ContractError: Naming the task and every problem.
    """
    where = f"task {task_id}"
    spec = document.get("spec")
    if spec is None:
        spec = {}
    if not isinstance(spec, Mapping):
        raise ContractError(f"spec must be an object, got {_shown(spec)}", where=where)
    common = validate_model(CommonSpec, spec, where=where, prefix="spec")
    rest = {key: value for key, value in document.items() if key not in ("spec", "task_id")}
    return Task(task_id=task_id, spec=spec, common=common, document=rest)


def validate_model(model: type[ModelT], value: Any, *, where: str, prefix: str = "") -> ModelT:
    """Validate with pydantic, speaking the project's language about what is wrong.

    Raises:
        ContractError: One problem per fault, fields named from ``prefix`` on.
    """
    try:
        return model.model_validate(value)
    except ValidationError as exc:
        raise ContractError(describe_problems(exc, prefix=prefix), where=where) from None
    except RecursionError:
        raise ContractError(f"nests deeper than {_MAX_DEPTH} levels", where=where) from None


_EXPECTATIONS: Mapping[str, str] = {
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "mapping_type": "an object",
    "list_type": "a list",
    "string_type": "a string",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
}


def describe_problems(
    error: ValidationError, *, prefix: str = "", skip_placeholders: bool = False
) -> list[str]:
    """Turn pydantic's findings into sentences of the form *field must be X, got Y*.

    Args:
        error: What pydantic found.
        prefix: Path of the validated value, such as ``spec``.
        skip_placeholders: Leave out fields whose value is still to be filled in (``${...}``).
    """
    return [
        _describe(dict(item), prefix)
        for item in error.errors(include_url=False)
        if not (skip_placeholders and "${" in str(item["input"]))
    ]


def _describe(item: Mapping[str, Any], prefix: str) -> str:
    path = prefix
    for part in item["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith(("function-", "constrained-")):
            path += f".{part}" if path else part
    field = path or "document"
    kind = item["type"]
    if kind == "missing":
        return f"{field} is required"
    if kind == "value_error":
        return f"{field}: {item['ctx']['error']}"
    if kind in _EXPECTATIONS:
        return f"{field} must be {_EXPECTATIONS[kind]}, got {_shown(item['input'])}"
    message = item["msg"].replace("Input should be", "must be", 1)
    return f"{field} {message}, got {_shown(item['input'])}"
