"""Archives on their way to a server that fails in every way, and through a real worker."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from flowmesh_core.artifacts.layout import Attempt, TaskFolders
from flowmesh_core.artifacts.pipeline import ArtifactPipeline
from flowmesh_core.artifacts.unpack import UnpackLimits, unpack
from flowmesh_core.config import Settings
from flowmesh_core.contract import Task, parse_task
from flowmesh_core.errors import UploadError
from flowmesh_core.executor import Artifact, Outcome
from flowmesh_core.stores import http as http_store
from flowmesh_core.stores import retry
from flowmesh_core.stores.http import HttpStore
from flowmesh_core.testing import StandInOrchestrator, WorkerProcess
from flowmesh_core.testing.orchestrator.body import Body, Multipart

NOISE = random.Random(11).randbytes(12 << 20)  # more than the buffers of a connection hold
MODEL = Artifact("final_model", archive=True)
NAME = "final_model.tar.gz"


class Depot:
    """A real server that keeps files on disk, and fails as it is told.

    Attributes:
        faults: What befalls the next uploads: ``drop`` closes in the middle of the body, ``stall``
            stops reading, ``silent`` reads all and closes without a word, ``short`` keeps half and
            says 200, a number is answered after the whole body.
        stored: Uploads that were answered with 200.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: list[str] = []
        self.uploads = 0
        self.stored = 0
        self.stop_stalling = threading.Event()
        folder.mkdir()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/api/v1/results"

    def close(self) -> None:
        self.stop_stalling.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def _handler(depot) -> type[BaseHTTPRequestHandler]:  # noqa: N805 - `self` is the handler's
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = Body(self.rfile, self.headers)
                if not self.path.endswith("/files"):
                    body.drain()
                    return self._answer(200)
                depot.uploads += 1
                fault = depot.faults.pop(0) if depot.faults else ""
                if fault in ("drop", "stall"):
                    body.read()
                    if fault == "stall":
                        depot.stop_stalling.wait(20)
                    self.close_connection = True
                    return None
                try:
                    size_bytes = self._keep(body)
                except ConnectionError:
                    self.close_connection = True
                    return None
                if fault == "short":
                    with (depot.folder / NAME).open("r+b") as file:
                        file.truncate(size_bytes // 2)
                if fault == "silent":
                    self.close_connection = True
                    return None
                depot.stored += not fault.isdecimal()
                return self._answer(int(fault) if fault.isdecimal() else 200)

            def _keep(self, body: Body) -> int:
                ((_, content),) = [(head, self._write(part)) for head, part in Multipart(body)]
                body.drain()
                return content

            def _write(self, content: Iterator[bytes]) -> int:
                with (depot.folder / NAME).open("wb") as file:
                    file.writelines(content)
                    return file.tell()

            def do_GET(self) -> None:
                path = depot.folder / self.path.rpartition("/")[2]
                with path.open("rb") as file:
                    self._answer(200, size_bytes=path.stat().st_size)
                    while block := file.read(1 << 18):
                        self.wfile.write(block)

            def _answer(self, status: int, size_bytes: int = 0) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(size_bytes))
                self.end_headers()

            def log_message(self, *_args: Any) -> None:
                """Be quiet."""

        return Handler


@pytest.fixture
def depot(tmp_path: Path) -> Iterator[Depot]:
    depot = Depot(tmp_path / "depot")
    yield depot
    depot.close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(http_store, "_SLOW_SERVER_BYTES_PER_S", 1e9)


def train(folder: Path) -> None:
    model = folder / "final_model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(NOISE)
    (model / "config.json").write_bytes(b"{}")


def begin(results: Path, url: str) -> tuple[Task, Attempt]:
    destination = {"type": "http", "url": url, "timeoutSec": 0.6}
    spec = {"taskType": "sft", "output": {"destination": destination}}
    task = parse_task({"spec": spec}, task_id="t1")
    attempt = TaskFolders(results).begin("t1", task.destination)
    train(attempt.folder)
    return task, attempt


def finish(task: Task, attempt: Attempt, **options: Any) -> Any:
    async def work() -> Any:
        store = HttpStore(Settings(worker_id="w1", delivery_retries=3))
        pipeline = ArtifactPipeline(lambda _kind: store, **options)
        try:
            return await pipeline.finish(task, attempt, Outcome(artifacts=[MODEL]))
        finally:
            await store.close()

    return asyncio.run(work())


@pytest.mark.parametrize(
    "faults",
    [
        [],
        ["drop"],
        ["drop", "drop", "drop"],
        ["500"],
        ["503", "429", "500"],
        ["stall"],
        ["silent"],
        ["short"],
        ["short", "drop", "500"],
        ["stall", "drop", "short", "silent"],
    ],
    ids=lambda faults: "-".join(faults) or "none",
)
def test_an_archive_arrives_whole_whatever_befalls_it(
    depot: Depot, tmp_path: Path, faults: list[str]
) -> None:
    depot.faults = list(faults)
    result = finish(*begin(tmp_path / "results", depot.url))
    local = Path(result["final_model_archive_path"]).read_bytes()
    assert (depot.folder / NAME).read_bytes() == local
    assert result["final_model_archive_url"] == f"{depot.url}/t1/files/{NAME}"
    assert depot.uploads == len(faults) + 1
    assert depot.stored == 1 + faults.count("short")
    out = unpack(depot.folder / NAME, tmp_path / "out", limits=UnpackLimits())
    assert (out / "final_model" / "model.safetensors").read_bytes() == NOISE


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("drop", r"upload of final_model\.tar\.gz to .* failed 4 times, last: \w+Error"),
        ("500", r"upload of .* failed 4 times, last: HTTP 500"),
        ("stall", r"upload of .* failed 4 times, last: WriteTimeout"),
        ("silent", r"upload of .* failed 4 times, last: \w+Error"),
        ("short", r"did not arrive as it is: .* sent 3 times"),
        ("413", r"upload of .* was refused: HTTP 413"),
    ],
)
def test_an_archive_that_never_arrives_fails_the_task_and_stays_here(
    depot: Depot, tmp_path: Path, fault: str, says: str
) -> None:
    depot.faults = [fault] * 20
    task, attempt = begin(tmp_path / "results", depot.url)
    with pytest.raises(UploadError, match=rf"task t1: .*{says}") as caught:
        finish(task, attempt, cleanup_after_upload=True)
    assert caught.value.retriable is (fault != "413")
    out = unpack(attempt.folder / NAME, tmp_path / "out", limits=UnpackLimits())
    assert (out / "final_model" / "model.safetensors").read_bytes() == NOISE
    assert (attempt.folder / "final_model").is_dir()


def test_an_upload_that_never_stalls_may_take_longer_than_its_timeout(
    depot: Depot, tmp_path: Path
) -> None:
    task, attempt = begin(tmp_path / "results", depot.url)
    (attempt.folder / "final_model" / "model.safetensors").write_bytes(NOISE[:400_000])

    async def work() -> None:
        slow = Settings(network_bandwidth_bytes_per_s=300_000.0, delivery_retries=0)
        store = HttpStore(slow)
        try:
            pipeline = ArtifactPipeline(lambda _kind: store)
            await pipeline.finish(task, attempt, Outcome(artifacts=[MODEL]))
        finally:
            await store.close()

    started = time.monotonic()
    asyncio.run(work())
    assert time.monotonic() - started > 1.2, "twice the timeout of 0.6 s"
    assert depot.uploads == 1


MEASURE = """
import asyncio, sys
from pathlib import Path
from flowmesh_core.artifacts.layout import TaskFolders
from flowmesh_core.artifacts.pipeline import ArtifactPipeline
from flowmesh_core.config import Settings
from flowmesh_core.contract import parse_task
from flowmesh_core.executor import Artifact, Outcome
from flowmesh_core.stores.http import HttpStore

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

async def ship(store, folders, task_id, copies):
    destination = {"type": "http", "url": sys.argv[1]}
    spec = {"taskType": "sft", "output": {"destination": destination}}
    task = parse_task({"spec": spec}, task_id=task_id)
    attempt = folders.begin(task_id, task.destination)
    (attempt.folder / "final_model").mkdir()
    with open(sys.argv[3], "rb") as source, \\
            (attempt.folder / "final_model" / "weights").open("wb") as target:
        for _ in range(copies):
            source.seek(0)
            while block := source.read(1 << 20):
                target.write(block)
    outcome = Outcome(artifacts=[Artifact("final_model", archive=True)])
    before = peak()
    pipeline = ArtifactPipeline(lambda _kind: store)
    await pipeline.finish(task, attempt, outcome)
    return peak() - before

async def main():
    store = HttpStore(Settings())
    print(await ship(store, TaskFolders(Path(sys.argv[2])), "large", 22))
    await store.close()

asyncio.run(main())
"""


def test_an_upload_needs_the_same_memory_whatever_its_size(depot: Depot, tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(NOISE)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, depot.url, tmp_path / "results", tmp_path / "noise"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100 << 10, "peak memory over idle in KiB, for 264 MiB"
    assert (depot.folder / NAME).stat().st_size > 22 * len(NOISE)


TRAINER = """
from flowmesh_core import Artifact, Executor, ExecutorInfo, Outcome, hookimpl

@hookimpl
def flowmesh_register_executors():
    return [ExecutorInfo(name="trainer", task_types={"sft"}, target=f"{__name__}:Trainer")]

class Trainer(Executor):
    def run(self, ctx):
        folder = ctx.folder / "final_model"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(range(256)) * 9000)
        (folder / "config.json").write_text("{}")
        return Outcome(
            result={"training_successful": True},
            artifacts=[Artifact("final_model", archive=True)],
        )
"""


def test_a_worker_ships_a_model_to_the_earlier_orchestrator(
    flowmesh_orchestrator: StandInOrchestrator, flowmesh_redis_url: str, tmp_path: Path
) -> None:
    plugin = tmp_path / "trainer.py"
    plugin.write_text(TRAINER)
    host, arguments = flowmesh_orchestrator, ("--plugin", str(plugin))
    with WorkerProcess(flowmesh_redis_url, tmp_path / "results", arguments=arguments) as worker:
        host.wait_workers(1, 20)
        host.fail_next(1, 503, only="/files")
        destination = {"type": "http", "url": host.results_url}
        spec = {"taskType": "sft", "output": {"destination": destination}}
        task_id = host.submit({"spec": spec})
        assert host.wait_task(task_id, 30).status == "DONE", worker.stderr
        result = host.result(task_id)["result"]
        stored = host.folder(task_id) / "artifacts" / NAME
        local = Path(result["final_model_archive_path"])
        assert result["training_successful"] is True
        assert result["final_model_archive_url"] == f"{host.results_url}/{task_id}/files/{NAME}"
        assert result["final_model_archive_bytes"] == stored.stat().st_size
        assert result["final_model_archive_uploaded"] is True
        assert stored.read_bytes() == local.read_bytes()
        manifest = json.loads((worker.results_dir / task_id / "manifest.json").read_text())
        digests = {entry["name"]: entry.get("sha256") for entry in manifest["entries"]}
        assert digests[NAME] == hashlib.sha256(stored.read_bytes()).hexdigest()
        methods = [r.method for r in host.requests if "/files" in r.path and r.status == 200]
        assert methods == ["POST", "GET"]
