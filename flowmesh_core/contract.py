"""The task contract: bytes and documents in, ``Envelope`` and ``Task`` out.

Whatever the contract accepts is accepted, and unknown fields pass through. Whatever would fail
later is refused here, every problem in one ``ContractError``. Wire spellings stop in this file.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

import attrs
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
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
    "find_task_id",
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
ParsedT = TypeVar("ParsedT")

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}\Z")
_PLAIN_NAME_RULE = (
    "must be a plain name (letters, digits, '-', '_', '.', not starting with '.', at most 200)"
)
# What no file name can hold: NUL, and the surrogates that UTF-8 has no form for.
_NOT_IN_A_PATH = re.compile("[\0\ud800-\udfff]")
# What a merged child may leave out because its leader says it for the whole group.
_SHARED_BY_GROUP = (
    *("taskType", "task_type", "model", "checkpoint", "resources", "enforce_cpu", "executor"),
)
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
        ValueError: An integer is too long to be written.
        RecursionError: The value nests too deeply, or holds itself.
    """
    try:
        text = _dump(value, ensure_ascii=False, allow_nan=False, indent=indent)
    except ValueError:
        value = _without_nan(value)
        text = _dump(value, ensure_ascii=False, indent=indent)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent).encode()


def _dump(value: Any, **options: Any) -> str:
    try:
        return json.dumps(value, **options)
    except TypeError as exc:
        raise TypeError(f"{_first_unknown(value) or 'value'} is not JSON: {exc}") from exc


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0.0 else None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value


def _first_unknown(value: Any, path: str = "") -> str:
    if isinstance(value, dict):
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
    text = _shown(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(text, str) and _PLAIN_NAME.match(text):
        return text
    raise ContractError(f"task_id {_PLAIN_NAME_RULE}, got {_shown(value)}")


def _shown(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 600:
        return f"a number of {value.bit_length()} bits"  # Python refuses to write long ones out
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
        problems = [_unknown_key(str(key), known) for key in value if key not in known]
        if not problems:
            return value
        try:  # the known keys may be wrong too
            cls.model_validate({key: item for key, item in value.items() if key in known})
        except ValidationError as exc:
            problems += describe_problems(exc, skip_placeholders=True)
        raise _UnknownKeyError("; ".join(problems))


class _UnknownKeyError(ValueError):
    """Certain, whatever the placeholders beside it turn out to be."""


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

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {key: item for key, item in value.items() if item is not None}


def _is_http_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        usable = text.isprintable() and bool(parts.hostname) and parts.port != 0
        return usable and parts.scheme in ("http", "https")
    except ValueError:
        return False


def _nameable(path: str) -> str:
    if _NOT_IN_A_PATH.search(path):
        raise ValueError(f"must be text that a file name can hold, got {_shown(path)}")
    return path


def _inside_task_folder(path: str) -> str:
    if path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"must lie in the task's folder, got {_shown(path)}")
    return path


PathText = Annotated[str, AfterValidator(_nameable)]
ArtifactName = Annotated[PathText, AfterValidator(_inside_task_folder)]


class Destination(_Open):
    """Where the result goes: ``spec.output.destination``.

    ``type`` names a store driver; ``timeout_s`` is the allowance of one request in seconds.
    """

    type: str = "local"
    path: PathText | None = None
    url: str | None = None
    method: str = "POST"
    headers: dict[str, str] = Field(default_factory=dict)
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None, validation_alias=AliasChoices("timeoutSec", "timeout_s")
    )

    @model_validator(mode="after")
    def _needs_url(self) -> Destination:
        if self.type == "http" and not _is_http_url(self.url or ""):
            got = _shown(self.url)
            raise ValueError(f'url must be an http(s) URL when type is "http", got {got}')
        return self


class Output(_Open):
    """``spec.output``: the destination and the artifacts that the manifest must list."""

    destination: Destination = Field(default_factory=Destination)
    artifacts: list[ArtifactName] = Field(default_factory=list)


class Shard(_Open):
    """``spec.shard``: this task reads part ``index`` of ``total`` of its rows."""

    index: int = Field(default=0, ge=0)
    total: int = Field(default=1, ge=1)
    contiguous: bool = True

    @model_validator(mode="after")
    def _in_range(self) -> Shard:
        if self.index >= self.total:
            index, total = _shown(self.index), _shown(self.total)
            raise ValueError(f"index {index} must be below total {total}")
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


def _plain_name(value: Any) -> str:
    try:
        return check_task_id(value)
    except ContractError:
        raise ValueError(f"{_PLAIN_NAME_RULE}, got {_shown(value)}") from None


TaskId = Annotated[str, BeforeValidator(_plain_name)]


class _Child(_Open):
    task_id: TaskId = Field(validation_alias=AliasChoices("task_id", "taskId"))
    spec: Any = None
    metadata: Any = None


class _Message(_Open):
    task_id: TaskId
    task: dict[str, Any]
    merged_children: list[_Child] = Field(
        default_factory=list, validation_alias=AliasChoices("merged_children", "merge_children")
    )
    assigned_worker: str | None = None
    dispatched_at: str | None = None
    parent_task_id: str | None = None
    shard_index: int | None = None
    shard_total: int | None = None
    attempt: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _each_once(self) -> _Message:
        named = Counter([self.task_id, *(child.task_id for child in self.merged_children)])
        twice = ", ".join(task_id for task_id, times in named.items() if times > 1)
        if twice:
            raise ValueError(f"merged_children names a task twice: {twice}")
        return self


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
    raw_id, document = find_task_id(message), message.get("task")
    task_id = _attempt([], lambda: check_task_id(raw_id)) or ""
    where = f"task {task_id}" if task_id else "message"
    problems: list[str] = []
    complete = {**message, "task_id": raw_id}
    fields = _attempt(problems, lambda: validate_model(_Message, complete, where=where))
    task = None
    if isinstance(document, Mapping):
        task = _attempt(problems, lambda: parse_task(document, task_id=task_id))
    if fields is None or task is None:
        raise ContractError(problems, where=where)
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


def find_task_id(message: Mapping[str, Any]) -> Any:
    """Return the leader's id as it came; the message's own goes before its document's."""
    document = message.get("task")
    places = (message, document) if isinstance(document, Mapping) else (message,)
    found = (place.get(name) for place in places for name in ("task_id", "taskId"))
    return next((value for value in found if value is not None), None)


def _attempt(problems: list[str], parse: Callable[[], ParsedT]) -> ParsedT | None:
    try:
        return parse()
    except ContractError as exc:
        problems.extend(exc.problems)
        return None


def _parse_children(
    leader: Task, children: Iterable[_Child]
) -> tuple[tuple[Task, ...], dict[str, ContractError]]:
    parsed: list[Task] = []
    rejected: dict[str, ContractError] = {}
    for child in children:
        try:
            parsed.append(_parse_child(leader, child))
        except ContractError as exc:
            rejected[child.task_id] = exc
    return tuple(parsed), rejected


def _parse_child(leader: Task, child: _Child) -> Task:
    if not isinstance(child.spec, Mapping):
        raise ContractError(
            f"spec must be an object, got {_shown(child.spec)}", where=f"task {child.task_id}"
        )
    shared = {key: leader.spec[key] for key in _SHARED_BY_GROUP if key in leader.spec}
    spec = {**shared, **child.spec}
    document = {**leader.document, "metadata": child.metadata, "spec": spec}
    return parse_task(document, task_id=child.task_id)


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
    "int_parsing_size": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "invalid_key": "named by a string",
    "string_unicode": "an object whose keys are valid text",
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
        if not (skip_placeholders and _waits_for_placeholder(item))
    ]


def _waits_for_placeholder(item: Mapping[str, Any]) -> bool:
    certain = item["type"] == "missing" or isinstance(
        item.get("ctx", {}).get("error"), _UnknownKeyError
    )
    return not certain and _has_placeholder(item["input"])


def _has_placeholder(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_placeholder, value.values()))
    if isinstance(value, list):
        return any(map(_has_placeholder, value))
    return isinstance(value, str) and "${" in value


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
        text = str(item["ctx"]["error"])
        if not path:
            return text
        return f"{path} {text}" if text.startswith("must ") else f"{path}: {text}"
    if kind in _EXPECTATIONS:
        return f"{field} must be {_EXPECTATIONS[kind]}, got {_shown(item['input'])}"
    message = item["msg"].replace("Input should be", "must be", 1)
    return f"{field} {message}, got {_shown(item['input'])}"
