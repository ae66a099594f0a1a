"""A real worker on a real Redis with real small models, and contexts to run tasks in without it."""

from __future__ import annotations

import importlib.util
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from flowmesh_core.testing import (
    RedisServer,
    WorkerProcess,
    build_lora,
    build_smollm2,
    build_tiny_llama,
    wait_for,
)

ENDS = ("TASK_SUCCEEDED", "TASK_FAILED")
# One process less.
OPTIONS: dict[str, Any] = {
    "max_model_len": 512,
    "kv_cache_memory_bytes": 2**28,
    "distributed_executor_backend": "uni",
}
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING")
# Its threads wait by spinning, which takes ten times as long beside whatever else runs here.
os.environ.update(VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1")


class Fleet:
    """One worker, whoever sends it tasks, and whoever listens."""

    def __init__(self, folder: Path, **environ: str) -> None:
        self.results = folder / "results"
        self.server = RedisServer()
        self.server.start()
        self.events: list[dict[str, Any]] = []
        self.progress: list[dict[str, Any]] = []
        self._client = redis.Redis.from_url(self.server.url, decode_responses=True)
        self._pubsub = self._client.pubsub()
        self._pubsub.psubscribe("tasks.events", "tasks.progress:*")
        self._pubsub.get_message(timeout=5)
        self._stopped = threading.Event()
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()
        settings = {"MAX_CONCURRENT_TASKS": "16", "FLOWMESH_STRICT_PLUGINS": "1", **environ}
        self.worker = WorkerProcess(self.server.url, self.results, environ=settings)
        self.worker.start()
        wait_for(lambda: self._client.hget("worker:w1", "status") == "IDLE", 30)

    def _listen(self) -> None:
        while not self._stopped.is_set():
            message = self._pubsub.get_message(timeout=0.2)
            if message and message["type"] == "pmessage":
                kept = self.events if message["channel"] == "tasks.events" else self.progress
                kept.append(json.loads(message["data"]))

    def send(self, task_id: str, spec: Mapping[str, Any], *children: Mapping[str, Any]) -> None:
        body = {
            "task_id": task_id,
            "assigned_worker": "w1",
            "task": {"spec": spec},
            "merged_children": list(children) or None,
        }
        assert self._client.publish("tasks", json.dumps(body)) == 1

    def order(self, **order: str) -> None:
        assert self._client.publish("workers.control:w1", json.dumps(order)) == 1

    def end(self, task_id: str, timeout_s: float = 120.0) -> dict[str, Any]:
        """Wait for a task's last event."""

        def ended() -> Any:
            found = (e for e in self.events if e["task_id"] == task_id and e["type"] in ENDS)
            return next(found, None)

        event: dict[str, Any] = wait_for(ended, timeout_s)
        return event

    def result(self, task_id: str) -> dict[str, Any]:
        """Wait for a task that succeeds, and return its result."""
        event = self.end(task_id)
        assert event["type"] == "TASK_SUCCEEDED", event["error"]
        return self.read(task_id)

    def read(self, task_id: str) -> dict[str, Any]:
        document = json.loads((self.results / task_id / "responses.json").read_bytes())
        result: dict[str, Any] = document.get("result", document)
        return result

    def error(self, task_id: str, timeout_s: float = 120.0) -> str:
        """Wait for a task that fails, and return its error."""
        event = self.end(task_id, timeout_s)
        assert event["type"] == "TASK_FAILED", self.read(task_id)
        return str(event["error"])

    def partial(self, task_id: str) -> list[dict[str, Any]]:
        """Return what was told of a task's first answer while it was being written."""
        told = [event["payload"] for event in self.progress if event["task_id"] == task_id]
        return [payload["partial"][0] for payload in told if "partial" in payload]

    wait_for = staticmethod(wait_for)

    def engines(self) -> list[int]:
        """Return the processes in which vLLM computes."""
        found = []
        for process in self.worker.process.children(recursive=True):
            try:
                if any("EngineCore" in word for word in process.cmdline()):
                    found.append(process.pid)
            except psutil.Error:
                continue
        return found

    def close(self) -> None:
        try:
            if self.worker.alive:
                self.worker.stop(40)
        finally:
            self._stopped.set()
            self._listener.join()
            self._pubsub.close()
            self._client.close()
            self.server.close()


@pytest.fixture(scope="session")
def options() -> dict[str, Any]:
    return dict(OPTIONS)


@pytest.fixture(scope="session")
def needs_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs the package vllm")


@pytest.fixture(scope="module")
def fleet(needs_vllm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("fleet"))
    yield fleet
    fleet.close()


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_smollm2(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def adapters(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two LoRA folders for SmolLM2, which change what it says in different ways."""
    folder = tmp_path_factory.mktemp("adapters")
    return [build_lora(folder / str(seed), smollm2, seed=seed, strength=0.9) for seed in (4, 5)]
