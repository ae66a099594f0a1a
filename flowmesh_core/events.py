"""What a worker says on the bus: every event with every field, in the contract's spelling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import attrs
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from flowmesh_core.contract import Task
from flowmesh_core.errors import ContractError, FlowmeshError
from flowmesh_core.validation import validate_model
from flowmesh_core.wire import decode_json, encode_json, utc_now

__all__ = [
    "HEARTBEAT",
    "LOG_CHUNK_BYTES",
    "REGISTER",
    "STATUS",
    "TASK_FAILED",
    "TASK_LOG",
    "TASK_PROGRESS",
    "TASK_STARTED",
    "TASK_SUCCEEDED",
    "UNREGISTER",
    "LogChunk",
    "TaskEvent",
    "WorkerEvent",
    "parse_event",
    "whole_characters",
]

REGISTER = "REGISTER"
STATUS = "STATUS"
HEARTBEAT = "HEARTBEAT"
UNREGISTER = "UNREGISTER"
TASK_STARTED = "TASK_STARTED"
TASK_SUCCEEDED = "TASK_SUCCEEDED"
TASK_FAILED = "TASK_FAILED"
TASK_PROGRESS = "TASK_PROGRESS"
TASK_LOG = "TASK_LOG"

# The most of a log that one message carries.
LOG_CHUNK_BYTES = 64 * 1024


class _Event(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: str
    ts: str = Field(default_factory=utc_now)
    worker_id: str | None = None
    status: str | None = None
    payload: dict[str, Any] = Field(default_factory=dict)

    @field_validator("type", "task_id", mode="before", check_fields=False)
    @classmethod
    def _trimmed(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, str):
            return value
        text = value.strip()
        if not text:
            raise ValueError("must not be empty")
        return text.upper() if info.field_name == "type" else text

    @field_validator("payload", "metrics", mode="before", check_fields=False)
    @classmethod
    def _null_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value

    def to_json(self) -> bytes:
        """Return the event as one JSON object with every key, nulls included."""
        return encode_json({**self.__dict__, **(self.__pydantic_extra__ or {})})


class TaskEvent(_Event):
    """An event about one task; ``type`` begins with ``TASK``."""

    task_id: str
    error: str | None = None

    @classmethod
    def failed(cls, task_id: str, error: FlowmeshError, **fields: Any) -> TaskEvent:
        """Build a TASK_FAILED that carries the error's text, stable code and class."""
        payload = {**fields.pop("payload", {}), "code": error.code, "retriable": error.retriable}
        return cls(type=TASK_FAILED, task_id=task_id, error=str(error), payload=payload, **fields)


class WorkerEvent(_Event):
    """An event about the worker itself."""

    tags: list[str] | None = None
    metrics: dict[str, Any] = Field(default_factory=dict)


@attrs.frozen(kw_only=True)
class LogChunk:
    """A piece of one file of a task's ``logs/``.

    Attributes:
        stream: Name of the file without ``.log``: ``stdout``, ``stderr``, ``task``.
        offset: Where it stands in the file, in bytes.
        data: The bytes of the file; of text they are whole characters.
    """

    type: ClassVar[str] = TASK_LOG

    task_id: str
    worker_id: str
    stream: str
    offset: int
    data: bytes
    ts: str = attrs.field(factory=utc_now)

    def to_json(self) -> bytes:
        """Return one JSON object; bytes that are not UTF-8 become U+FFFD in its text."""
        return encode_json(
            {
                "type": self.type,
                "task_id": self.task_id,
                "worker_id": self.worker_id,
                "ts": self.ts,
                "stream": self.stream,
                "offset": self.offset,
                "size": len(self.data),
                "data": self.data.decode(errors="replace"),
            }
        )


def whole_characters(data: bytes) -> int:
    """Return how many bytes remain when the first bytes of a cut UTF-8 character are left out."""
    for missing in (1, 2, 3):
        lead = data[-missing] if missing <= len(data) else 0
        if lead >= 0xC0:
            length = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return len(data) - missing if missing < length and lead < 0xF8 else len(data)
        if lead < 0x80:
            break
    return len(data)


def task_payload(
    task: Task, *, started_at: str, dispatched_at: str | None = None
) -> dict[str, Any]:
    """Return the payload that all events of one run of a task share."""
    payload: dict[str, Any] = {"started_at": started_at}
    if task.task_type:
        payload["taskType"] = task.task_type
    if dispatched_at is not None:
        payload["dispatched_at"] = dispatched_at
    return payload


def parse_event(body: bytes | str | Mapping[str, Any]) -> TaskEvent | WorkerEvent:
    """Read an event from the bus.

    Raises:
        ContractError: It is not JSON, no object, or lacks what its type requires.
    """
    message = body if isinstance(body, Mapping) else decode_json(body)
    kind = message.get("type") if isinstance(message, Mapping) else None
    if not isinstance(kind, str):
        raise ContractError("event must be a JSON object with a type")
    if kind.strip().upper().startswith("TASK"):
        return validate_model(TaskEvent, message, where="event")
    return validate_model(WorkerEvent, message, where="event")
