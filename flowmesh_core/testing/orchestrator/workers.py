"""The workers as the stand-in sees them in Redis: who may get a task, and who has gone quiet."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from flowmesh_core.testing.orchestrator.results import now
from flowmesh_core.testing.orchestrator.rules import fits, strength

__all__ = ["WORKER_EVENTS", "WorkerTable", "parse_object"]

WORKER_EVENTS = "workers.events"


class WorkerTable:
    """Reads and overwrites the workers' keys; keeps only who was found dead.

    Args:
        client: A redis-py client that decodes answers; it types each answer as one of two worlds.
        grace_s: How long a heartbeat key may be gone.
    """

    def __init__(self, client: Any, grace_s: float) -> None:
        self._redis = client
        self._grace_s = grace_s
        self._missing_since: dict[str, float] = {}
        self.dead: set[str] = set()

    def idle(self, spec: Mapping[str, Any]) -> list[str]:
        """Ids that may get the task, strongest first."""
        ids = self._redis.smembers("workers:ids") - self._redis.smembers("workers:elastic_disabled")
        found = []
        for worker in ids:
            known = self._redis.hgetall(f"worker:{worker}")
            hardware = parse_object(known.get("hardware_json", "{}")) or {}
            alive = self._redis.ttl(f"worker:{worker}:hb") > -1
            if known.get("status") == "IDLE" and alive and fits(spec, hardware):
                found.append((tuple(-int(part) for part in strength(hardware)), worker))
        return [worker for _, worker in sorted(found)]

    def set_status(self, worker: str, status: str) -> None:
        """Overwrite a worker's status, whether it is known or not, and say so on the bus."""
        self._redis.hset(f"worker:{worker}", mapping={"status": status, "last_seen": now()})
        event = {"type": "STATUS", "worker_id": worker, "status": status, "ts": now()}
        self._redis.publish(WORKER_EVENTS, json.dumps(event))

    def newly_dead(self) -> list[str]:
        """Workers whose heartbeat key has been gone for too long, each named once per outage."""
        gone = [worker for worker in self._redis.smembers("workers:ids") if self._is_gone(worker)]
        found = [worker for worker in gone if worker not in self.dead]
        self.dead.update(found)
        return found

    def _is_gone(self, worker: str) -> bool:
        if self._redis.ttl(f"worker:{worker}:hb") >= 0:
            self._missing_since.pop(worker, None)
            self.dead.discard(worker)
            return False
        since = self._missing_since.setdefault(worker, time.monotonic())
        return time.monotonic() - since >= self._grace_s


def parse_object(text: str) -> dict[str, Any] | None:
    """The JSON object that the text is, or None."""
    try:
        parsed = json.loads(text)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None
