"""Echo tasks through a real Redis with every file written: throughput, latency, start, memory.

The reference is a plain loop in one process that does the same Redis commands and file writes one
after the other, measured in the same run on the same server.

    python benchmarks/dispatch.py [--tasks 2000] [--rounds 3] [--json]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime, timezone
from pathlib import Path

import psutil
import redis

from flowmesh_core.testing.redis_server import RedisServer

WORKER = "bench"


def message(task_id: str) -> str:
    """Return a dispatch as the earlier orchestrator writes it."""
    document = {
        "apiVersion": "mloc/v1",
        "kind": "EchoTask",
        "metadata": {"name": "bench", "owner": "bench"},
        "spec": {
            "taskType": "echo",
            "message": "hello " * 20,
            "resources": {"hardware": {"cpu": "1", "memory": "1Gi"}},
            "output": {"destination": {"type": "local"}, "artifacts": ["responses.json", "logs"]},
        },
    }
    return json.dumps(
        {
            "task_id": task_id,
            "task": document,
            "task_type": "echo",
            "assigned_worker": WORKER,
            "dispatched_at": datetime.now(timezone.utc).isoformat(),
            "parent_task_id": None,
        }
    )


def plain_loop(url: str, results: Path, ready: threading.Event, count: int) -> None:
    """Do what one task costs, without a framework: the reference."""
    client = redis.Redis.from_url(url, decode_responses=True)
    pubsub = client.pubsub(ignore_subscribe_messages=True)
    pubsub.subscribe("tasks")
    pubsub.get_message(timeout=5)
    ready.set()
    for done, raw in enumerate(pubsub.listen(), start=1):
        dispatch = json.loads(raw["data"])
        task_id = dispatch["task_id"]
        _say_status(client, "RUNNING", {"task_id": task_id})
        _say_task(client, "TASK_STARTED", task_id, {"started_at": _now()})
        _write_files(results / task_id, task_id, {"ok": True, "echo": dispatch["task"]["spec"]})
        _say_task(client, "TASK_SUCCEEDED", task_id, {"finished_at": _now()})
        _say_status(client, "IDLE", {"last_task": task_id})
        if done == count:
            break
    pubsub.close()
    client.close()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat()


def _say_status(client: redis.Redis, status: str, payload: dict[str, str]) -> None:
    event = {"type": "STATUS", "ts": _now(), "worker_id": WORKER, "status": status}
    event |= {"tags": None, "metrics": {}, "payload": payload}
    extras = {f"extra_{key}": value for key, value in payload.items()}
    with client.pipeline() as pipe:
        pipe.hset(f"worker:{WORKER}", mapping={"status": status, "last_seen": _now(), **extras})
        pipe.publish("workers.events", json.dumps(event))
        pipe.execute()


def _say_task(client: redis.Redis, kind: str, task_id: str, payload: dict[str, str]) -> None:
    event = {"type": kind, "ts": _now(), "worker_id": WORKER, "task_id": task_id}
    event |= {"status": None, "error": None, "payload": payload}
    client.publish("tasks.events", json.dumps(event))


def _write_files(folder: Path, task_id: str, result: dict[str, object]) -> None:
    folder.mkdir()
    (folder / "logs").mkdir()
    (folder / "artifacts").mkdir()
    body = json.dumps(result, ensure_ascii=False).encode()
    _write_whole(folder / "responses.json", body)
    entries = [
        {"name": "artifacts", "path": "artifacts", "type": "artifact", "size": 0, "file_count": 0},
        {"name": "logs", "path": "logs", "type": "logs", "size": 0, "file_count": 0},
        {"name": "responses.json", "path": "responses.json", "type": "result", "size": len(body)},
    ]
    for entry in entries:
        entry |= {"required": True, "status": "present", "updated_at": _now()}
    entries[2]["sha256"] = hashlib.sha256(body).hexdigest()
    manifest = {"task_id": task_id, "generated_at": _now(), "entries": entries}
    _write_whole(folder / "manifest.json", json.dumps(manifest, indent=2).encode())


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


class Watcher:
    """Counts TASK_SUCCEEDED on the bus and notes when each came."""

    def __init__(self, url: str) -> None:
        self._client = redis.Redis.from_url(url)
        self._pubsub = self._client.pubsub(ignore_subscribe_messages=True)
        self._pubsub.subscribe("tasks.events", "workers.events")
        self._pubsub.get_message(timeout=1)
        self._pubsub.get_message(timeout=1)

    def wait_for(self, needle: bytes, count: int, timeout_s: float = 60) -> float:
        """Return the time at which the ``count``-th event with the needle arrived."""
        until = time.perf_counter() + timeout_s
        seen = 0
        while seen < count:
            if time.perf_counter() > until:
                raise SystemExit(f"only {seen} of {count} events {needle!r} within {timeout_s} s")
            event = self._pubsub.get_message(timeout=0.5)
            seen += event is not None and needle in event["data"]
        return time.perf_counter()

    def close(self) -> None:
        self._pubsub.close()
        self._client.close()


def throughput(client: redis.Redis, watcher: Watcher, prefix: str, count: int) -> float:
    """Return tasks per second with the whole load published at once."""
    messages = [message(f"{prefix}-{i}") for i in range(count)]
    started = time.perf_counter()
    publishing = threading.Thread(target=_publish_all, args=(client, messages))
    publishing.start()
    ended = watcher.wait_for(b'"TASK_SUCCEEDED"', count)
    publishing.join()
    return count / (ended - started)


def _publish_all(client: redis.Redis, messages: list[str]) -> None:
    for start in range(0, len(messages), 100):
        with client.pipeline(transaction=False) as pipe:
            for text in messages[start : start + 100]:
                pipe.publish("tasks", text)
            pipe.execute()


def latencies_ms(client: redis.Redis, watcher: Watcher, prefix: str, count: int) -> list[float]:
    """Return milliseconds from publish to TASK_SUCCEEDED, one task at a time."""
    found = []
    for i in range(count):
        text = message(f"{prefix}-{i}")
        started = time.perf_counter()
        client.publish("tasks", text)
        found.append((watcher.wait_for(b'"TASK_SUCCEEDED"', 1) - started) * 1000)
        watcher.wait_for(b'"IDLE"', 1)
    return found


def measure_worker(url: str, count: int, samples: int, folder: Path) -> dict[str, float]:
    client, watcher = redis.Redis.from_url(url), Watcher(url)
    env = {**os.environ, "REDIS_URL": url, "RESULTS_DIR": str(folder), "WORKER_ID": WORKER}
    env |= {"LOG_LEVEL": "WARNING", "HEARTBEAT_INTERVAL_SEC": "5"}
    started = time.perf_counter()
    worker = subprocess.Popen([sys.executable, "-m", "flowmesh_core", "worker"], env=env)
    try:
        start_s = watcher.wait_for(b'"IDLE"', 1) - started
        rss_mib = psutil.Process(worker.pid).memory_info().rss / 2**20
        throughput(client, watcher, "warm", 50)
        rate = throughput(client, watcher, "rate", count)
        time.sleep(0.5)
        watcher.close()
        watcher = Watcher(url)
        waits = latencies_ms(client, watcher, "wait", samples)
    finally:
        worker.terminate()
        worker.wait(20)
        watcher.close()
        client.close()
    return {
        "tasks_per_s": rate,
        "p50_ms": statistics.median(waits),
        "p95_ms": statistics.quantiles(waits, n=20)[-1],
        "start_to_idle_s": start_s,
        "rss_mib": rss_mib,
    }


def measure_reference(url: str, count: int, folder: Path) -> float:
    folder.mkdir()
    ready = threading.Event()
    client, watcher = redis.Redis.from_url(url), Watcher(url)
    # A process of its own, as the worker has.
    code = (
        "import sys,threading,pathlib; sys.path.insert(0, sys.argv[1]);"
        "import dispatch; e=threading.Event();"
        "threading.Thread(target=lambda: (e.wait(), print('ready', flush=True))).start();"
        "dispatch.plain_loop(sys.argv[2], pathlib.Path(sys.argv[3]), e, int(sys.argv[4]))"
    )
    here = str(Path(__file__).parent)
    argv = [sys.executable, "-c", code, here, url, str(folder), str(count)]
    loop = subprocess.Popen(argv, stdout=subprocess.PIPE)
    try:
        assert loop.stdout is not None
        loop.stdout.readline()
        ready.set()
        return throughput(client, watcher, "ref", count)
    finally:
        loop.wait(60)
        loop.stdout.close()
        watcher.close()
        client.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rounds = []
    with RedisServer() as server, tempfile.TemporaryDirectory() as root:
        for number in range(options.rounds):
            reference = measure_reference(server.url, options.tasks, Path(root) / f"ref-{number}")
            folder = Path(root) / f"worker-{number}"
            row = measure_worker(server.url, options.tasks, options.samples, folder)
            row |= {"reference_tasks_per_s": reference, "ratio": row["tasks_per_s"] / reference}
            rounds.append(row)
    best = {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}
    if options.json:
        print(json.dumps({"median": best, "rounds": rounds}, indent=2))
        return
    for key, value in best.items():
        spread = f"{min(r[key] for r in rounds):.2f} to {max(r[key] for r in rounds):.2f}"
        print(f"{key:24} {value:10.2f}   ({spread} over {options.rounds} rounds)")


if __name__ == "__main__":
    main()
