"""Our stores keep what the suite checks; stores that are right but for one fault do not."""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock
from urllib.parse import quote, urlsplit

import pytest

from flowmesh_core.artifacts.parcel import Parcel, Receipt
from flowmesh_core.contract import Destination
from flowmesh_core.errors import UploadError
from flowmesh_core.stores.base import Store
from flowmesh_core.stores.fsspec import FsspecStore
from flowmesh_core.stores.http import HttpStore
from flowmesh_core.stores.local import LocalStore
from flowmesh_core.testing import Remote, StoreSuite
from flowmesh_core.testing.orchestrator.body import Body

DOCS = Path(__file__).parents[2] / "docs"
FLAGS = re.MULTILINE | re.DOTALL


# Ours.


class LocalRemote(Remote):
    store = LocalStore
    destination = Destination()

    def read(self, told: Mapping[str, Any]) -> bytes | None:
        path = Path(told["download_url"])
        return path.read_bytes() if path.exists() else None

    def names(self) -> set[str]:
        return set()  # the task's folder is the delivery


class TestLocal(StoreSuite):
    @pytest.fixture
    def remote(self) -> Remote:
        return LocalRemote()


class HttpRemote(Remote):
    """A real server that keeps what it is sent; ``trouble`` says how it misbehaves."""

    store = HttpStore
    secrets = ("passw0rd", "s1gnature")

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.results: dict[str, Any] = {}
        self.trouble = ""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        host = f"user:passw0rd@127.0.0.1:{self.server.server_address[1]}"
        url = f"http://{host}/results?sig=s1gnature"
        self.destination = Destination(type="http", url=url)

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def read(self, told: Mapping[str, Any]) -> bytes | None:
        return self.files.get(urlsplit(told["download_url"]).path)

    def names(self) -> set[str]:
        return set(self.files)

    def result(self, task_id: str) -> Any:
        return self.results[task_id]

    @contextmanager
    def _in_trouble(self, trouble: str) -> Iterator[None]:
        self.trouble = trouble
        yield
        self.trouble = ""

    def cut(self) -> Any:
        return self._in_trouble("cut")

    def deny(self) -> Any:
        return self._in_trouble("deny")

    def spoil(self) -> Any:
        return self._in_trouble("spoil")

    def take(self, path: str, body: bytes) -> None:
        if not path.endswith("/files"):
            told = json.loads(body)
            self.results[told["task_id"]] = told["result"]
            return
        head, _, rest = body.partition(b"\r\n\r\n")
        (name,) = re.findall(rb'filename="([^"]*)"', head)
        content = rest.rpartition(b"\r\n--")[0]
        if self.trouble == "spoil":
            content = b"?" + content[1:]
        self.files[f"{path}/{quote(name, safe='')}"] = content

    def _handler(remote) -> type[BaseHTTPRequestHandler]:  # noqa: N805 - `self` is the handler's
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                try:
                    body = b"".join(Body(self.rfile, self.headers))
                except ConnectionError:
                    body, self.close_connection = b"", True
                if remote.trouble == "cut" or self.close_connection:
                    self.close_connection = True
                    return
                path, answer = urlsplit(self.path).path, b"{}"
                if self.command == "GET":
                    answer = remote.files[path]
                elif remote.trouble != "deny":
                    remote.take(path, body)
                self.send_response(403 if remote.trouble == "deny" else 200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST  # noqa: N815 - the library's name

            def log_message(self, *_args: Any) -> None:
                """Be quiet."""

        return Handler


class TestHttp(StoreSuite):
    @pytest.fixture
    def remote(self) -> Iterator[Remote]:
        remote = HttpRemote()
        yield remote
        remote.close()


class FsspecRemote(Remote):
    """The file system that fsspec keeps in memory."""

    store = FsspecStore
    destination = Destination(type="fsspec", url="memory://bucket/results")

    def __init__(self, files: Any) -> None:
        self.files = files

    def read(self, told: Mapping[str, Any]) -> bytes | None:
        path = told["download_url"].removeprefix("memory:/")
        return bytes(self.files.cat_file(path)) if self.files.exists(path) else None

    def names(self) -> set[str]:
        return set(self.files.find("/"))

    def result(self, task_id: str) -> Any:
        told = json.loads(self.files.cat_file(f"/bucket/results/{task_id}/responses.json"))
        return told["result"]

    @contextmanager
    def _raising(self, error: Exception) -> Iterator[None]:
        with mock.patch.object(type(self.files), "mv", side_effect=error):
            yield

    def cut(self) -> Any:
        return self._raising(OSError("broken pipe"))

    def deny(self) -> Any:
        return self._raising(PermissionError("not your bucket"))

    @contextmanager
    def spoil(self) -> Iterator[None]:
        real = type(self.files).mv

        def spoil(files: Any, source: str, target: str) -> None:
            real(files, source, target)
            files.store[target].getbuffer()[0] = 77

        with mock.patch.object(type(self.files), "mv", spoil):
            yield


class TestFsspec(StoreSuite):
    @pytest.fixture
    def remote(self) -> Iterator[Remote]:
        fsspec = pytest.importorskip("fsspec")
        files = fsspec.filesystem("memory")
        files.store.clear()
        yield FsspecRemote(files)
        files.store.clear()


# Right, and then broken on purpose.


class SoundStore(Store):
    """Writes below the folder ``destination.path``; a file is renamed once it is whole."""

    trouble: ClassVar[str] = ""

    def folder(self, task_id: str, destination: Destination) -> Path:
        folder = Path(str(destination.path)) / task_id
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def look_for_trouble(self, destination: Destination) -> None:
        if self.trouble == "cut":
            raise self.cut_off(destination)
        if self.trouble == "deny":
            raise self.denied(destination)

    def cut_off(self, destination: Destination) -> Exception:
        return UploadError(f"{destination.path}: the connection broke", retriable=True)

    def denied(self, destination: Destination) -> Exception:
        return UploadError(f"{destination.path}: not permitted", retriable=False)

    def write(self, path: Path, content: bytes) -> None:
        path.write_bytes(b"?" + content[1:] if self.trouble == "spoil" else content)

    def tell(self, path: Path) -> dict[str, Any]:
        return dict.fromkeys(("url", "download_url"), str(path))

    async def upload(
        self, task_id: str, path: Path, final: Path, destination: Destination
    ) -> Mapping[str, Any]:
        return (await self.send(Parcel(task_id, path, final), destination)).told

    async def send(self, parcel: Parcel, destination: Destination) -> Receipt:
        there = self.folder(parcel.task_id, destination) / parcel.path.name
        part = there.with_name(f"{secrets.token_hex(4)}.part")
        try:
            content = b""
            async for block in parcel.blocks():
                part.touch()
                content += block
            self.look_for_trouble(destination)
            self.write(part, content)
            part.replace(there)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return Receipt(told=self.tell(there), verified=there.read_bytes() == content)

    async def deliver(
        self, task_id: str, result: Mapping[str, Any], destination: Destination
    ) -> None:
        self.look_for_trouble(destination)
        path = self.folder(task_id, destination) / "responses.json"
        path.write_text(json.dumps(dict(result)))


class FolderRemote(Remote):
    def __init__(self, store: type[SoundStore], folder: Path) -> None:
        self.store = store
        self.folder = folder
        self.destination = Destination(path=str(folder))

    def read(self, told: Mapping[str, Any]) -> bytes | None:
        path = Path(told["download_url"])
        return path.read_bytes() if path.exists() else None

    def names(self) -> set[str]:
        return {str(path) for path in self.folder.rglob("*") if path.is_file()}

    def result(self, task_id: str) -> Any:
        return json.loads((self.folder / task_id / "responses.json").read_text())

    def cut(self) -> Any:
        return mock.patch.object(SoundStore, "trouble", "cut")

    def deny(self) -> Any:
        return mock.patch.object(SoundStore, "trouble", "deny")

    def spoil(self) -> Any:
        return mock.patch.object(SoundStore, "trouble", "spoil")


class TestSound(StoreSuite):
    @pytest.fixture
    def remote(self, tmp_path: Path) -> Remote:
        return FolderRemote(SoundStore, tmp_path / "there")


CASES: dict[str, tuple[type[SoundStore], str, str]] = {}


def breaks(clause: str, told: str) -> Callable[[type[SoundStore]], type[SoundStore]]:
    """Name the check that must reject a store, alone, and what that must say."""

    def note(cls: type[SoundStore]) -> type[SoundStore]:
        CASES[cls.__name__] = (cls, f"store.{clause}", told)
        return cls

    return note


@breaks("whole", "told has no download_url")
class TellsNoAddressToLoadFrom(SoundStore):
    def tell(self, path: Path) -> dict[str, Any]:
        # Readers of the other checks look there.
        return Half({"url": str(path), "download_url": ""})


class Half(dict[str, Any]):
    def __getitem__(self, key: str) -> Any:
        return super().__getitem__("url")


@breaks("names", "'a%20b.bin' has 9 bytes, 7 other ones arrived|'a b.bin'")
class QuotesNames(SoundStore):
    async def send(self, parcel: Parcel, destination: Destination) -> Receipt:
        name = parcel.path.name
        plain = parcel.path.with_name(name.replace("%20", " "))
        if plain == parcel.path:
            return await super().send(parcel, destination)
        plain.write_bytes(parcel.path.read_bytes())
        return await super().send(Parcel(parcel.task_id, plain, parcel.final), destination)


@breaks("empty", "an empty file is not where the store says")
class SkipsEmptyFiles(SoundStore):
    def tell(self, path: Path) -> dict[str, Any]:
        if not path.stat().st_size:
            path.unlink()
            path.with_name("empty").touch()
        return super().tell(path)

    async def send(self, parcel: Parcel, destination: Destination) -> Receipt:
        if parcel.size_bytes == 0:
            there = self.folder(parcel.task_id, destination) / parcel.path.name
            return Receipt(told=super().tell(there))
        return await super().send(parcel, destination)


@breaks("large", "a file of 10 MB has 10240000 bytes, 8000000 other ones arrived")
class CutsLargeFiles(SoundStore):
    async def send(self, parcel: Parcel, destination: Destination) -> Receipt:
        grew = parcel.size_bytes is None
        receipt = await super().send(parcel, destination)
        path = Path(receipt.told["url"])
        if not grew and path.stat().st_size > 8_000_000:
            path.write_bytes(path.read_bytes()[:8_000_000])
        return receipt


@breaks("growing", "a file that grew has 10240000 bytes, 5120000 other ones arrived")
class TakesWhatIsThere(SoundStore):
    async def send(self, parcel: Parcel, destination: Destination) -> Receipt:
        start = parcel.path.read_bytes() if parcel.size_bytes is None else b""
        receipt = await super().send(parcel, destination)
        if start:
            Path(receipt.told["url"]).write_bytes(start)
        return receipt


@breaks("again", "sent again, it lies there twice")
class KeepsEveryVersion(SoundStore):
    async def send(self, parcel: Parcel, destination: Destination) -> Receipt:
        there = self.folder(parcel.task_id, destination) / parcel.path.name
        if there.exists():
            there.replace(there.with_name(f"{there.name}.{secrets.token_hex(4)}"))
        return await super().send(parcel, destination)


@breaks("tasks", "the file of kit-[12] has 5000 bytes, 5000 other ones arrived")
class MixesTasks(SoundStore):
    def folder(self, task_id: str, destination: Destination) -> Path:
        return super().folder("all", destination)

    async def deliver(
        self, task_id: str, result: Mapping[str, Any], destination: Destination
    ) -> None:
        self.look_for_trouble(destination)
        path = super().folder(task_id, destination) / "responses.json"
        path.write_text(json.dumps(dict(result)))


@breaks("result", "delivered was .*, there is .*'ok': False")
class KeepsTheFirstResult(SoundStore):
    async def deliver(
        self, task_id: str, result: Mapping[str, Any], destination: Destination
    ) -> None:
        self.look_for_trouble(destination)
        if not (self.folder(task_id, destination) / "responses.json").exists():
            await super().deliver(task_id, result, destination)


@breaks("given-up", r"left behind: .*\.part")
class KeepsWhatWasGivenUp(SoundStore):
    async def send(self, parcel: Parcel, destination: Destination) -> Receipt:
        try:
            return await super().send(parcel, destination)
        except UploadError:
            raise
        except Exception:
            (self.folder(parcel.task_id, destination) / "half.part").touch()
            raise


@breaks("given-up", r"must raise what the file was given up with, got UploadError")
class TakesAnyFailureForItsOwn(SoundStore):
    async def send(self, parcel: Parcel, destination: Destination) -> Receipt:
        try:
            return await super().send(parcel, destination)
        except UploadError:
            raise
        except Exception as exc:
            raise UploadError("something failed") from exc


@breaks("cancelled", r"left behind: .*\.part")
class CleansUpAfterErrorsAlone(SoundStore):
    async def send(self, parcel: Parcel, destination: Destination) -> Receipt:
        folder = self.folder(parcel.task_id, destination)
        (folder / "half.part").touch()
        try:
            receipt = await super().send(parcel, destination)
        except Exception:
            (folder / "half.part").unlink()
            raise
        (folder / "half.part").unlink()
        return receipt


@breaks("verified", "it calls verified what arrived changed")
class TrustsItself(SoundStore):
    async def send(self, parcel: Parcel, destination: Destination) -> Receipt:
        return Receipt(told=(await super().send(parcel, destination)).told, verified=True)


@breaks("broken", "send, cut off, must raise .*True, got retriable=False")
class GivesUpAtOnce(SoundStore):
    def cut_off(self, destination: Destination) -> Exception:
        return UploadError("the connection broke", retriable=False)


@breaks("broken", r"must raise an UploadError .*, got OSError\('broken pipe'\)")
class LetsErrorsThrough(SoundStore):
    def cut_off(self, destination: Destination) -> Exception:
        return OSError("broken pipe")


@breaks("denied", "deliver, denied, must raise .*False, got retriable=True")
class TriesForEver(SoundStore):
    def denied(self, destination: Destination) -> Exception:
        return UploadError("not permitted", retriable=True)


@breaks("secrets", r"an error of send \(cut\) tells a header")
class TellsItsHeaders(SoundStore):
    def cut_off(self, destination: Destination) -> Exception:
        return UploadError(f"not sent with {destination.headers}", retriable=True)


@breaks("closed", r"left among descriptors: .*responses\.json")
class LeavesFilesOpen(SoundStore):
    kept: ClassVar[list[Any]] = []

    async def deliver(
        self, task_id: str, result: Mapping[str, Any], destination: Destination
    ) -> None:
        await super().deliver(task_id, result, destination)
        self.kept.append((self.folder(task_id, destination) / "responses.json").open())


@pytest.fixture
def closing_what_is_left() -> Iterator[None]:
    yield
    for file in LeavesFilesOpen.kept:
        file.close()
    LeavesFilesOpen.kept.clear()


CHECKS = {
    check.pytestmark[0].args[0]: check
    for name, check in vars(StoreSuite).items()
    if name.startswith("test_")
}


@pytest.mark.usefixtures("closing_what_is_left")
@pytest.mark.parametrize("name", CASES)
def test_a_store_is_rejected_by_the_one_check_for_its_fault(name: str, tmp_path: Path) -> None:
    cls, clause, told = CASES[name]
    failed = {}
    for number, (checked, check) in enumerate(CHECKS.items()):
        folder = tmp_path / str(number)
        try:
            check(StoreSuite(), FolderRemote(cls, folder / "there"), folder)
        except pytest.fail.Exception as exc:
            failed[checked] = str(exc)
    assert list(failed) == [clause], failed
    assert re.search(told, failed[clause]), failed[clause]


def test_every_check_has_a_store_that_breaks_it_and_its_row_on_the_page() -> None:
    assert {clause for _, clause, _ in CASES.values()} == set(CHECKS)
    page = (DOCS / "conformance.md").read_text(encoding="utf-8")
    assert list(CHECKS) == re.findall(r"^\| `(store\.[a-z-]+)` \|", page, re.MULTILINE)


def test_what_the_far_side_cannot_do_is_skipped_by_name(tmp_path: Path) -> None:
    for clause, missing in {
        "store.broken": "give Remote.cut",
        "store.denied": "give Remote.deny",
        "store.verified": "give Remote.spoil",
        "store.result": "give Remote.result",
        "store.secrets": "give Remote.cut or Remote.deny",
    }.items():
        with pytest.raises(pytest.skip.Exception, match=missing):
            CHECKS[clause](StoreSuite(), LocalRemote(), tmp_path)


def test_the_store_of_the_page_passes(tmp_path: Path) -> None:
    page = (DOCS / "conformance.md").read_text(encoding="utf-8")
    (code,) = re.findall(r'^```python title="test_folder_store.py"\n(.*?)^```$', page, FLAGS)
    (tmp_path / "test_folder_store.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_folder_store.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "10 passed, 5 skipped" in done.stdout, done.stdout
