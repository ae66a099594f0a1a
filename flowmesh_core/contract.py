"""The task contract: bytes and documents in, ``Envelope`` and ``Task`` out.

Whatever the contract accepts is accepted, and unknown fields pass through. Whatever would fail
later is refused here, every problem in one ``ContractError``. Wire spellings stop in this file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

import attrs
from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Field,
    model_validator,
)

from flowmesh_core.errors import ContractError
from flowmesh_core.validation import OpenBlock, show_value, validate_model
from flowmesh_core.wire import MAX_DEPTH, decode_json

__all__ = [
    "CONTRACT_VERSION",
    "CommonSpec",
    "Control",
    "Destination",
    "Envelope",
    "Output",
    "Shard",
    "Task",
    "check_task_id",
    "find_task_id",
    "parse_control",
    "parse_envelope",
    "parse_message",
    "parse_task",
]

CONTRACT_VERSION = "mloc/v1"
TASK_EVENTS_CHANNEL = "tasks.events"
WORKER_EVENTS_CHANNEL = "workers.events"
TASK_PROGRESS_CHANNEL = "tasks.progress:{task_id}"
TASK_LOGS_CHANNEL = "tasks.logs:{task_id}"
WORKER_CONTROL_CHANNEL = "workers.control:{worker_id}"
CANCEL = "CANCEL"
DRAIN = "DRAIN"

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


def check_task_id(value: object) -> str:
    """Return a task id that is safe as a folder name.

    Raises:
        ContractError: It is no plain name; numbers count as their decimal text.
    """
    text = show_value(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(text, str) and _PLAIN_NAME.match(text):
        return text
    raise ContractError(f"task_id {_PLAIN_NAME_RULE}, got {show_value(value)}")


def _is_http_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        usable = text.isprintable() and bool(parts.hostname) and parts.port != 0
        return usable and parts.scheme in ("http", "https")
    except ValueError:
        return False


def _nameable(path: str) -> str:
    if _NOT_IN_A_PATH.search(path):
        raise ValueError(f"must be text that a file name can hold, got {show_value(path)}")
    return path


def _inside_task_folder(path: str) -> str:
    if path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"must lie in the task's folder, got {show_value(path)}")
    return path


PathText = Annotated[str, AfterValidator(_nameable)]
ArtifactName = Annotated[PathText, AfterValidator(_inside_task_folder)]


class Destination(OpenBlock):
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
            got = show_value(self.url)
            raise ValueError(f'url must be an http(s) URL when type is "http", got {got}')
        return self


class Output(OpenBlock):
    """``spec.output``: the destination and the artifacts that the manifest must list."""

    destination: Destination = Field(default_factory=Destination)
    artifacts: list[ArtifactName] = Field(default_factory=list)


class Shard(OpenBlock):
    """``spec.shard``: this task reads part ``index`` of ``total`` of its rows."""

    index: int = Field(default=0, ge=0)
    total: int = Field(default=1, ge=1)
    contiguous: bool = True

    @model_validator(mode="after")
    def _in_range(self) -> Shard:
        if self.index >= self.total:
            index, total = show_value(self.index), show_value(self.total)
            raise ValueError(f"index {index} must be below total {total}")
        return self


class CommonSpec(OpenBlock):
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
        raise ValueError(f"{_PLAIN_NAME_RULE}, got {show_value(value)}") from None


TaskId = Annotated[str, BeforeValidator(_plain_name)]


class _Child(OpenBlock):
    task_id: TaskId = Field(validation_alias=AliasChoices("task_id", "taskId"))
    spec: Any = None
    metadata: Any = None


class _Message(OpenBlock):
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
        raise ContractError(f"message nests deeper than {MAX_DEPTH} levels")
    return message


def _too_deep(value: Any) -> bool:
    """Look level by level, so that the check itself needs no recursion."""
    level = [value]
    for _ in range(MAX_DEPTH):
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
            f"spec must be an object, got {show_value(child.spec)}", where=f"task {child.task_id}"
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
        raise ContractError(f"spec must be an object, got {show_value(spec)}", where=where)
    common = validate_model(CommonSpec, spec, where=where, prefix="spec")
    rest = {key: value for key, value in document.items() if key not in ("spec", "task_id")}
    return Task(task_id=task_id, spec=spec, common=common, document=rest)


@attrs.frozen(kw_only=True)
class Control:
    """An order to one worker.

    Attributes:
        type: ``CANCEL`` for one task, ``DRAIN`` for the worker.
        task_id: The task to cancel; empty for ``DRAIN``.
        reason: For people; may be empty.
    """

    type: str
    task_id: str = ""
    reason: str = ""


class _Control(OpenBlock):
    type: Any = None
    task_id: TaskId | None = Field(default=None, validation_alias=AliasChoices("task_id", "taskId"))
    reason: str = ""

    @model_validator(mode="after")
    def _known(self) -> _Control:
        if self.type not in (CANCEL, DRAIN):
            raise ValueError(f"type must be {CANCEL} or {DRAIN}, got {show_value(self.type)}")
        if self.type == CANCEL and self.task_id is None:
            raise ValueError(f"task_id is required when type is {CANCEL}")
        return self


def parse_control(body: bytes | str) -> Control:
    """Read a message of the worker's control channel.

    Raises:
        ContractError: It is no JSON object, or no order that a worker knows.
    """
    fields = validate_model(_Control, parse_message(body), where="control message")
    task_id = fields.task_id if fields.type == CANCEL else None
    return Control(type=fields.type, task_id=task_id or "", reason=fields.reason)
