"""From a folder to an archive that was received and verified: `tar | pigz -6` to a file and then
one POST of the whole of it, as the earlier worker did, against packing and sending in one pass.

Both send to the same server, a process of its own on this machine. Beside it stands the limit: the
processor time that tar, igzip and the digests need alone. Medians over ``--rounds``.
"""

from __future__ import annotations

import argparse
import array
import asyncio
import hashlib
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from isal import isal_zlib

from flowmesh_core.artifacts.layout import TaskFolders
from flowmesh_core.artifacts.pipeline import ArtifactPipeline
from flowmesh_core.config import Settings
from flowmesh_core.contract import parse_task
from flowmesh_core.executor import Artifact, Outcome
from flowmesh_core.stores.http import HttpStore
from flowmesh_core.testing.orchestrator.body import Body, Multipart

MIB = 1 << 20
NAME = "final_model"


# The receiving side.


class Receiver(BaseHTTPRequestHandler):
    """Keeps an upload, hashing it afterwards as the earlier host did, and gives it back."""

    protocol_version = "HTTP/1.1"
    # Or the answer's body waits 40 ms for its head to be acknowledged, whoever asks.
    disable_nagle_algorithm = True
    folder: Path

    def do_POST(self) -> None:
        body = Body(self.rfile, self.headers)
        path = self.folder / "received"
        if not self.path.endswith("/files"):
            body.drain()
            return self._answer(b"{}")
        for _, content in Multipart(body):
            with path.open("wb") as file:
                file.writelines(content)
        body.drain()
        hashed = self.headers.get("X-Hash") == "1"
        return self._answer(json.dumps({"sha256": digest_of(path) if hashed else ""}).encode())

    def do_GET(self) -> None:
        with (self.folder / "received").open("rb") as file:
            self.send_response(200)
            self.send_header("Content-Length", str(os.fstat(file.fileno()).st_size))
            self.end_headers()
            self.wfile.flush()
            self.connection.sendfile(file)

    def _answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_args: Any) -> None:
        """Be quiet."""


def serve(folder: Path) -> None:
    Receiver.folder = folder
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    print(server.server_address[1], flush=True)
    server.serve_forever()


def digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(MIB):
            digest.update(block)
    return digest.hexdigest()


# What is packed.


def draw_bf16(count: int) -> bytes:
    """Normal floats as bf16: the upper halves of their 32 bits."""
    draw = random.Random(5).gauss
    floats = array.array("f", (draw(0.0, 0.02) for _ in range(count))).tobytes()
    out = bytearray(2 * count)
    out[0::2], out[1::2] = floats[2::4], floats[3::4]
    return bytes(out)


def plant_weights(folder: Path, size_mb: int) -> None:
    # 16 MiB are drawn and then repeated: gzip looks back 32 KiB and sees no repetition.
    drawn = draw_bf16(8 * MIB)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"hidden_size": 4096}))
    for shard in range(4):
        with (folder / f"model-{shard + 1:05}-of-00004.safetensors").open("wb") as file:
            for piece in range(size_mb // 64):
                at = 4096 * (shard * 100 + piece)
                file.write(drawn[at:] + drawn[:at])


def plant_small_files(folder: Path, count: int) -> None:
    pick = random.Random(6)
    for number in range(count):
        path = folder / f"{number // 100:03}" / f"{number:05}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = [pick.randrange(100_000) for _ in range(pick.randrange(50, 500))]
        path.write_text(json.dumps({"id": number, "tokens": values}))


# The two ways.


def post_whole(archive: Path, url: str) -> dict[str, str]:
    """Build the whole body in memory and send it, as `requests` does."""
    mark = "b" * 32
    disposition = f'Content-Disposition: form-data; name="file"; filename="{archive.name}"'
    head = f"--{mark}\r\n{disposition}\r\n\r\n"
    body = b"".join([head.encode(), archive.read_bytes(), f"\r\n--{mark}--\r\n".encode()])
    headers = {"Content-Type": f"multipart/form-data; boundary={mark}", "X-Hash": "1"}
    parts = urlsplit(url)
    connection = HTTPConnection(parts.netloc, timeout=600)
    try:
        connection.request("POST", f"{parts.path}/t1/files", body, headers)
        answer: dict[str, str] = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    return answer


def ship_earlier(folder: Path, url: str, squeezer: list[str]) -> dict[str, Any]:
    archive = folder.with_name("earlier.tar.gz")
    started = time.perf_counter()
    with archive.open("wb") as out:
        tar = subprocess.Popen(
            ["tar", "-cf", "-", "-C", str(folder.parent), folder.name], stdout=subprocess.PIPE
        )
        subprocess.run(squeezer, stdin=tar.stdout, stdout=out, check=True)
        assert tar.stdout is not None
        tar.stdout.close()
        assert tar.wait() == 0
    packed_s = time.perf_counter() - started
    answer = post_whole(archive, url)
    assert answer["sha256"] == digest_of(archive), "the server must have got it whole"
    wall_s = time.perf_counter() - started
    return {"wall_s": wall_s, "packed_s": packed_s, "size_bytes": archive.stat().st_size}


def peak_kib() -> int:
    # Not ru_maxrss: it takes over what the parent had.
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


async def ship_ours(root: Path, url: str) -> dict[str, Any]:
    """Ship what lies in ``root/final_model``; run in a process of its own for its memory."""
    spec = {"taskType": "sft", "output": {"destination": {"type": "http", "url": url}}}
    task = parse_task({"spec": spec}, task_id="t1")
    attempt = TaskFolders(root / "results").begin("t1", task.destination)
    (root / NAME).rename(attempt.folder / NAME)
    store = HttpStore(Settings())
    pipeline = ArtifactPipeline(lambda _kind: store)
    await store.deliver("t1", {}, task.destination)  # connected and imported: that is idle
    idle, idle_kib = resource.getrusage(resource.RUSAGE_SELF), peak_kib()
    started = time.perf_counter()
    result = await pipeline.finish(task, attempt, Outcome(artifacts=[Artifact(NAME, archive=True)]))
    wall_s = time.perf_counter() - started
    used = resource.getrusage(resource.RUSAGE_SELF)
    await store.close()
    (attempt.final / NAME).rename(root / NAME)
    return {
        "wall_s": wall_s,
        "cpu_s": used.ru_utime + used.ru_stime - idle.ru_utime - idle.ru_stime,
        "grown_mib": (peak_kib() - idle_kib) / 1024,
        "size_bytes": result[f"{NAME}_archive_bytes"],
    }


def run_ours(root: Path, url: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--ours", str(root), url]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


# The limit.


def cpu_of(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def read_tar(folder: Path) -> Iterator[bytes]:
    """Run tar on a folder; blocks of its output."""
    command = ["tar", "-cf", "-", "-C", str(folder.parent), folder.name]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as tar:
        assert tar.stdout is not None
        while block := tar.stdout.read(MIB):
            yield block


def measure_limit(folder: Path) -> dict[str, float]:
    """Return the processor seconds of tar, igzip on its output, and SHA-256 at both ends."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in read_tar(folder):
        pass
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    tar_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    igzip_s = sha_s = 0.0
    for block in read_tar(folder):
        squeezer = isal_zlib.compressobj(1, isal_zlib.DEFLATED, -15)
        started = time.process_time()
        packed = squeezer.compress(block) + squeezer.flush(isal_zlib.Z_SYNC_FLUSH)
        igzip_s += time.process_time() - started
        sha_s += 2 * cpu_of(lambda packed=packed: hashlib.sha256(packed).digest())  # type: ignore[misc]
    return {"tar": tar_s, "igzip": igzip_s, "sha256, twice": sha_s}


# The report.


def median(rounds: list[dict[str, Any]], key: str) -> float:
    return float(statistics.median(figures[key] for figures in rounds))


def compare(title: str, root: Path, url: str, squeezer: list[str], rounds: int) -> None:
    folder = root / NAME
    size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    earlier, ours = [], []
    for _ in range(rounds):
        earlier.append(ship_earlier(folder, url, squeezer))
        ours.append(run_ours(root, url))
    limit = measure_limit(folder)
    wall_s, then_s = median(ours, "wall_s"), median(earlier, "wall_s")
    print(f"\n{title}: {size_bytes / MIB:.0f} MiB")
    packed = median(earlier, "packed_s")
    then = f"tar | {Path(squeezer[0]).name} -6, then POST"
    print(f"  {then:30}{then_s:7.2f} s  (packing {packed:.2f} s)")
    print(f"  one pass, checked by GET      {wall_s:7.2f} s  {then_s / wall_s:.1f} times as fast")
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in limit.items())
    cores, total_s = len(os.sched_getaffinity(0)), sum(limit.values())
    print(f"  the work alone                {total_s:7.2f} s of processor time ({parts});")
    print(
        f"                                {total_s / cores:7.2f} s if {cores} cores share it evenly"
    )
    print(f"  processor time of one pass    {median(ours, 'cpu_s'):7.2f} s")
    sizes = median(earlier, "size_bytes") / MIB, median(ours, "size_bytes") / MIB
    print(f"  archive                       {sizes[0]:.1f} MiB then, {sizes[1]:.1f} MiB now")
    print(f"  peak memory over idle         {median(ours, 'grown_mib'):.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size-mb", type=int, default=512, help="of weights, a multiple of 64")
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--pigz", default=shutil.which("pigz"))
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ours", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    if args.ours:
        return print(json.dumps(asyncio.run(ship_ours(Path(args.ours[0]), args.ours[1]))))
    if not args.pigz:
        print("pigz is not installed: gzip -6 takes its place, on one core")
    squeezer = [args.pigz, "-6"] if args.pigz else ["gzip", "-6"]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "server").mkdir()
        command = [sys.executable, __file__, "--serve", str(root / "server")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                url = f"http://127.0.0.1:{int(server.stdout.readline())}/api/v1/results"
                plant_weights(root / "weights" / NAME, args.size_mb)
                compare("Weights", root / "weights", url, squeezer, args.rounds)
                plant_small_files(root / "small" / NAME, args.files)
                title = f"{args.files} small files"
                compare(title, root / "small", url, squeezer, args.rounds)
            finally:
                server.terminate()
    return None


if __name__ == "__main__":
    main()
