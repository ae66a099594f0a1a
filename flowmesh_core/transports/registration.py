"""What a worker says of itself on the earlier orchestrator's wire: set, hash, heartbeat, events."""

from __future__ import annotations

import logging
import time
from typing import Any

import redis

from flowmesh_core.config import Settings
from flowmesh_core.contract import TASK_EVENTS_CHANNEL, WORKER_EVENTS_CHANNEL
from flowmesh_core.events import HEARTBEAT, REGISTER, STATUS, UNREGISTER, TaskEvent, WorkerEvent
from flowmesh_core.wire import encode_json, utc_now

__all__ = ["CHECK_INTERVAL_S", "Registration"]

_log = logging.getLogger(__name__)
_WORKER_IDS = "workers:ids"
CHECK_INTERVAL_S = 5.0

Event = TaskEvent | WorkerEvent


class Registration:
    """What this worker last said of itself, and the commands that say it (again)."""

    def __init__(self, settings: Settings) -> None:
        self.worker_id = settings.worker_id
        self.key = f"worker:{settings.worker_id}"
        self._ttl_s = settings.heartbeat_ttl_s
        self._register: WorkerEvent | None = None
        self._status: WorkerEvent | None = None
        self._beaten = False
        self._status_since = 0.0
        self._fields: dict[str, str] = {}

    def apply(self, pipe: Any, event: Event) -> None:
        """Queue the commands of one event; ``finish`` must follow in the same transaction."""
        if isinstance(event, TaskEvent):
            pipe.publish(TASK_EVENTS_CHANNEL, event.to_json())
            return
        if event.type == REGISTER:
            self._register, self._status = event, None
            self._write_registration(pipe)
        elif event.type == STATUS:
            self._status, self._status_since = event, time.monotonic()
            self._note_status(event)
        elif event.type == HEARTBEAT:
            self._beaten = True
            pipe.setex(f"{self.key}:hb", self._ttl_s, event.ts)
            self._fields["last_seen"] = event.ts
        elif event.type == UNREGISTER:
            self._register = self._status = None
            self._fields = {}
            pipe.srem(_WORKER_IDS, self.worker_id)
            pipe.delete(self.key, f"{self.key}:hb")
        pipe.publish(WORKER_EVENTS_CHANNEL, event.to_json())

    def _write_registration(self, pipe: Any) -> None:
        event = self._register
        if event is None:
            return
        payload = event.payload
        pipe.sadd(_WORKER_IDS, self.worker_id)
        pipe.hset(
            self.key,
            mapping={
                "worker_id": self.worker_id,
                "status": event.status or "STARTING",
                "started_at": payload.get("started_at", event.ts),
                "last_seen": utc_now(),
                "pid": str(payload.get("pid", "")),
                "env_json": encode_json(payload.get("env", {})),
                "hardware_json": encode_json(payload.get("hardware", {})),
                "tags_json": encode_json(event.tags or []),
                "cost_per_hour": str(payload.get("cost_per_hour", "")),
            },
        )

    def _note_status(self, event: WorkerEvent) -> None:
        extras = {f"extra_{key}": str(value) for key, value in event.payload.items()}
        self._fields |= {"status": event.status or "", "last_seen": event.ts, **extras}

    def finish(self, pipe: Any) -> None:
        """Queue one write of the hash for all events of the transaction."""
        if self._fields:
            pipe.hset(self.key, mapping=self._fields)
            self._fields = {}

    def heal(self, client: redis.Redis) -> None:
        """Put back what somebody flushed, and a status that somebody else overwrote.

        The earlier orchestrator writes RUNNING after it has published a task. When that lands
        behind a fast task's IDLE, or the task never arrived, nobody but the worker can mend it.
        """
        if self._register is None:
            return
        with client.pipeline(transaction=False) as pipe:
            pipe.sismember(_WORKER_IDS, self.worker_id)
            pipe.hmget(self.key, "worker_id", "status")
            member, (known, status) = pipe.execute()
        ours = self._status.status if self._status else None
        if not member or known is None:
            self._register_again(client)
        elif ours and status != ours.encode() and self._settled():
            _log.warning(
                "worker %s: status is %s, not %s; writing it again", self.worker_id, status, ours
            )
            self._repeat_status(client)

    def _settled(self) -> bool:
        return time.monotonic() - self._status_since > CHECK_INTERVAL_S

    def _register_again(self, client: redis.Redis) -> None:
        _log.warning("worker %s is not registered any more; registering again", self.worker_id)
        register, status = self._register, self._status
        with client.pipeline() as pipe:
            if register is not None:
                self.apply(pipe, register.model_copy(update={"ts": utc_now()}))
            if status is not None:
                self.apply(pipe, status.model_copy(update={"ts": utc_now()}))
            if self._beaten:
                pipe.setex(f"{self.key}:hb", self._ttl_s, utc_now())
            self.finish(pipe)
            pipe.execute()

    def _repeat_status(self, client: redis.Redis) -> None:
        if self._status is None:
            return
        with client.pipeline() as pipe:
            self.apply(pipe, self._status.model_copy(update={"ts": utc_now()}))
            self.finish(pipe)
            pipe.execute()
