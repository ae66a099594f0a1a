from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

from flowmesh_core.artifacts.parcel import Parcel, Receipt
from flowmesh_core.config import Settings
from flowmesh_core.contract import Destination
from flowmesh_core.errors import ArchiveError, UploadError
from flowmesh_core.stores import retry
from flowmesh_core.stores.fsspec import FsspecStore

T = TypeVar("T")
CONTENT = bytes(range(256)) * 10_000


def run(work: Callable[[FsspecStore], Awaitable[T]], **settings: Any) -> T:
    async def main() -> T:
        store = FsspecStore(Settings(worker_id="w1", delivery_retries=2, **settings))
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(main())


def send(path: Path, url: str = "memory://bucket/results", **settings: Any) -> Receipt:
    there = Destination(type="fsspec", url=url)

    async def work(store: FsspecStore) -> Receipt:
        return await store.send(Parcel("t1", path, path), there)

    return run(work, **settings)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.001)


@pytest.fixture
def memory() -> Iterator[Any]:
    """The file system that fsspec keeps in memory, empty before and after."""
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "final_model.tar.gz"
    path.write_bytes(CONTENT)
    return path


def names(memory: Any) -> list[str]:
    return sorted(memory.find("/"))


def test_a_file_is_written_below_the_url_and_read_back(memory: Any, file: Path) -> None:
    receipt = send(file, "memory://bucket/results/")
    address = "memory://bucket/results/t1/files/final_model.tar.gz"
    assert receipt.verified
    assert receipt.told == {
        **dict.fromkeys(("url", "download_url", "path"), address),
        "uploaded": True,
        "artifact_name": "final_model.tar.gz",
    }
    assert names(memory) == ["/bucket/results/t1/files/final_model.tar.gz"]
    assert memory.cat(names(memory)[0]) == CONTENT


def test_a_result_is_written_as_it_would_be_posted(memory: Any) -> None:
    there = Destination(type="fsspec", url="memory://bucket")
    run(lambda store: store.deliver("t1", {"ok": True, "loss": float("nan")}, there))
    run(lambda store: store.deliver("t1", {"ok": True, "again": 1}, there))
    assert names(memory) == ["/bucket/t1/responses.json"]
    assert json.loads(memory.cat(names(memory)[0])) == {
        "task_id": "t1",
        "result": {"ok": True, "again": 1},
        "worker_id": "w1",
    }


def test_a_file_that_will_never_be_whole_is_never_stored(memory: Any, tmp_path: Path) -> None:
    path = tmp_path / "final_model.tar.gz"
    path.write_bytes(b"a" * 300_000)

    async def work(store: FsspecStore) -> Receipt:
        parcel = Parcel("t1", path, path, growing=True)
        there = Destination(type="fsspec", url="memory://bucket/results")
        sending = asyncio.ensure_future(store.send(parcel, there))
        parcel.grow(300_000)
        while not names(memory):
            await asyncio.sleep(0.01)
        parcel.give_up(ArchiveError("the folder is gone", retriable=True))
        return await sending

    with pytest.raises(ArchiveError, match=r"^the folder is gone$") as caught:
        run(work)
    assert caught.value.retriable
    assert names(memory) == []


def test_a_file_is_written_while_it_grows(memory: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.tar.gz"
    path.write_bytes(CONTENT)

    async def work(store: FsspecStore) -> Receipt:
        parcel = Parcel("t1", path, path, growing=True)
        there = Destination(type="fsspec", url="memory://bucket")
        sending = asyncio.ensure_future(store.send(parcel, there))
        parcel.grow(1000)
        while not [name for name in memory.store if memory.store[name].size == 1000]:
            await asyncio.sleep(0.01)
        parcel.seal(len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
        return await sending

    assert run(work).verified
    assert memory.cat("/bucket/t1/files/m.tar.gz") == CONTENT


def test_what_arrived_changed_is_a_failure(
    memory: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = type(memory).mv

    def spoil(self: Any, source: str, target: str, **kwargs: Any) -> None:
        real(self, source, target, **kwargs)
        memory.store[target].getbuffer()[0] = 77

    monkeypatch.setattr(type(memory), "mv", spoil)
    with pytest.raises(UploadError, match="what arrived is not what was sent") as caught:
        send(file)
    assert caught.value.retriable


class Trouble:
    """Stands in for a method of the file system: fails a number of times, then does its work."""

    def __init__(self, real: Callable[..., Any], error: Exception, times: int) -> None:
        self.real, self.error, self.times = real, error, times
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return self.real(*args, **kwargs)


class LibraryError(Exception):
    """What a file system's own library raises, which is no OSError."""


@pytest.mark.parametrize("error", [OSError("reset"), LibraryError("reset"), EOFError("reset")])
@pytest.mark.parametrize("method", ["makedirs", "mv", "open"])
def test_a_failure_that_passes_costs_tries_and_not_the_task(
    memory: Any, file: Path, monkeypatch: pytest.MonkeyPatch, method: str, error: Exception
) -> None:
    trouble = Trouble(getattr(memory, method), error, times=2)
    monkeypatch.setattr(type(memory), method, trouble)
    assert send(file).verified
    assert trouble.calls >= 3
    assert names(memory) == ["/bucket/results/t1/files/final_model.tar.gz"]
    assert memory.cat(names(memory)[0]) == CONTENT


def test_a_result_is_tried_again_too(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(memory), "mv", Trouble(memory.mv, TimeoutError("slow"), times=1))
    there = Destination(type="fsspec", url="memory://bucket")
    run(lambda store: store.deliver("t1", {"ok": True}, there))
    assert json.loads(memory.cat("/bucket/t1/responses.json"))["result"] == {"ok": True}


def test_a_failure_that_stays_ends_after_the_tries_and_may_be_retried_later(
    memory: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trouble = Trouble(memory.mv, OSError("disk full"), times=99)
    monkeypatch.setattr(type(memory), "mv", trouble)
    says = r"task t1: upload of final\S+ to memory://\S+ failed 3 times, last: OSError: disk full"
    with pytest.raises(UploadError, match=says) as caught:
        send(file)
    assert caught.value.retriable
    assert trouble.calls == 3
    assert names(memory) == []


def test_a_connection_that_broke_is_not_used_again(
    memory: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Any] = []
    real = type(memory).mv

    def note(self: Any, *args: Any) -> None:
        used.append(self)
        if len(used) == 1:
            raise OSError("broken pipe")
        real(self, *args)

    async def work(store: FsspecStore) -> Receipt:
        # One thread: fsspec keeps connections for each apart.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        there = Destination(type="fsspec", url="memory://bucket")
        return await store.send(Parcel("t1", file, file), there)

    monkeypatch.setattr(type(memory), "mv", note)
    assert run(work).verified
    first, second = used
    assert first is not second


def test_a_denied_access_fails_at_once_and_for_good(
    memory: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trouble = Trouble(memory.mv, PermissionError("not your bucket"), times=99)
    monkeypatch.setattr(type(memory), "mv", trouble)
    with pytest.raises(UploadError, match="was refused: not your bucket") as caught:
        send(file)
    assert not caught.value.retriable
    assert trouble.calls == 1
    assert names(memory) == []


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc",
        "local:///etc",
        "/etc",
        "",
        "simplecache::memory://x",
        "memory://x::file:///etc",
        "http://127.0.0.1/x",
        "reference://x",
        "memory://bucket/../../etc",
        # fsspec takes these for paths of this machine.
        *("s3:/tmp/x", "s3:x", "memory:/x", "s3:\t//x/y", "memory:\n//x/y"),
        "ftp://user:passw0rd@host/x",
    ],
)
def test_only_stores_elsewhere_may_be_named(file: Path, url: str) -> None:
    with pytest.raises(UploadError, match=r"destination\.url must begin with one of") as caught:
        send(file, url)
    assert not caught.value.retriable
    assert "passw0rd" not in str(caught.value)


def test_a_link_local_host_is_never_opened(file: Path) -> None:
    with pytest.raises(UploadError, match=r"was not sent: .*link-local") as caught:
        send(file, "sftp://169.254.169.254/x")
    assert not caught.value.retriable


def test_the_operator_says_which_buckets_a_document_may_name(memory: Any, file: Path) -> None:
    with pytest.raises(UploadError, match=r"host theirs is not among .*FLOWMESH_HTTP_ALLOW"):
        send(file, "s3://theirs/x", http_allow=("ours",))
    assert names(memory) == []


def test_without_the_library_the_error_says_how_to_get_it(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "fsspec"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UploadError, match=r"pip install 'flowmesh-core\[fsspec\]'") as caught:
        send(file)
    assert not caught.value.retriable


def test_a_missing_part_of_the_library_is_named(
    memory: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UploadError, match=r"s3://bucket/.*s3fs"):
        send(file, "s3://bucket/x")


def test_writing_takes_as_long_as_the_operator_says_the_link_does(
    memory: Any, tmp_path: Path
) -> None:
    path = tmp_path / "small.bin"
    path.write_bytes(bytes(10_000))
    started = time.monotonic()
    send(path, network_bandwidth_bytes_per_s=20_000.0)
    assert time.monotonic() - started >= 0.5
