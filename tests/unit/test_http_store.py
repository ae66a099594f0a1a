from __future__ import annotations

import asyncio
import email
import hashlib
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import attrs
import pytest

from flowmesh_core.artifacts.layout import TaskFolders
from flowmesh_core.artifacts.parcel import Parcel, Receipt
from flowmesh_core.artifacts.pipeline import ArtifactPipeline
from flowmesh_core.config import Settings
from flowmesh_core.contract import Destination, parse_task
from flowmesh_core.errors import ArchiveError, UploadError
from flowmesh_core.executor import Outcome
from flowmesh_core.stores import http as http_store
from flowmesh_core.stores import retry
from flowmesh_core.stores.http import HttpStore
from flowmesh_core.testing.orchestrator.body import Body

T = TypeVar("T")


@attrs.frozen
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def file_part(self) -> tuple[str, str | None, str, bytes]:
        """Return field name, file name, type and content of the one part of a multipart body."""
        head = f"Content-Type: {self.headers['content-type']}\r\n\r\n".encode()
        parts = email.message_from_bytes(head + self.body).get_payload()
        assert isinstance(parts, list)
        (part,) = parts
        assert isinstance(part, email.message.Message)
        name = part.get_param("name", header="content-disposition")
        content = part.get_payload(decode=True)
        assert isinstance(content, bytes)
        return str(name), part.get_filename(), part.get_content_type(), content


class Receiver:
    """A real HTTP server that notes each request and answers as it is told, then with 200."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.answers: list[int] = []
        self.location = ""
        self.delay_s = 0.0
        self.keep_bodies = True
        self.files: dict[str, bytes] = {}
        # How many bytes the server keeps of each of the next files, however it answers.
        self.kept: list[int] = []
        self.begun = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def url(self) -> str:
        return f"{self.origin}/api/v1/results"

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def keep(self, request: Request) -> None:
        _, name, _, content = request.file_part()
        size_bytes = self.kept.pop(0) if self.kept else len(content)
        self.files[f"{request.path}/{name}"] = content[:size_bytes]

    def _handler(receiver) -> type[BaseHTTPRequestHandler]:  # noqa: N805 - `self` is the handler's
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                try:
                    body = self._body() if self.command != "GET" else b""
                except ConnectionError:  # the client went away
                    self.close_connection = True
                    return
                headers = {name.lower(): value for name, value in self.headers.items()}
                assert len(headers) == len(self.headers.items()), "a header came twice"
                request = Request(self.command, self.path, headers, body)
                receiver.requests.append(request)
                time.sleep(receiver.delay_s)
                answer = receiver.files.get(self.path, b"{}") if self.command == "GET" else b"{}"
                if self.path.endswith("/files") and receiver.keep_bodies:
                    receiver.keep(request)
                self.send_response(receiver.answers.pop(0) if receiver.answers else 200)
                if receiver.location:
                    self.send_header("Location", receiver.location)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_PUT = do_GET = do_POST  # noqa: N815 - the library's names

            def _body(self) -> bytes:
                kept = bytearray()
                for block in Body(self.rfile, self.headers):
                    receiver.begun.set()
                    if receiver.keep_bodies:
                        kept += block
                return bytes(kept)

            def log_message(self, *_args: Any) -> None:
                """Be quiet."""

        return Handler


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.001)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
def elsewhere() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "final_model.tar.gz"
    path.write_bytes(bytes(range(256)) * 50)
    return path


def run(work: Callable[[HttpStore], Awaitable[T]], **settings: Any) -> T:
    async def main() -> T:
        store = HttpStore(Settings(worker_id="w1", delivery_retries=2, **settings))
        try:
            return await work(store)
        finally:
            await store.close()
            await store.close()

    return asyncio.run(main())


def deliver(url: str, result: Any = None, *, settings: Any = None, **destination: Any) -> None:
    there = Destination.model_validate({"type": "http", "url": url, **destination})
    run(lambda store: store.deliver("t1", result or {}, there), **(settings or {}))


def upload(url: str, path: Path, *, settings: Any = None, **destination: Any) -> dict[str, Any]:
    there = Destination.model_validate({"type": "http", "url": url, **destination})
    work = run(lambda store: store.upload("t1", path, path, there), **(settings or {}))
    assert isinstance(work, dict)
    return work


def send(url: str, path: Path, *, settings: Any = None, **destination: Any) -> Receipt:
    there = Destination.model_validate({"type": "http", "url": url, **destination})

    async def work(store: HttpStore) -> Receipt:
        return await store.send(Parcel("t1", path, path), there)

    return run(work, **(settings or {}))


def refused_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/results"


def test_a_result_is_posted_as_the_contract_has_it(receiver: Receiver) -> None:
    result = {"ok": True, "text": "grün", "loss": float("nan")}
    deliver(receiver.url, result, headers={"X-Team": "a"})
    (request,) = receiver.requests
    assert (request.method, request.path) == ("POST", "/api/v1/results")
    assert request.headers["content-type"] == "application/json"
    assert request.headers["x-team"] == "a"
    assert "authorization" not in request.headers
    assert json.loads(request.body) == {
        "task_id": "t1",
        "result": {"ok": True, "text": "grün", "loss": None},
        "worker_id": "w1",
    }


def test_url_and_method_are_taken_as_they_are(receiver: Receiver) -> None:
    deliver(f"{receiver.origin}/x/?a=1&b=%20", method="put")
    assert [(r.method, r.path) for r in receiver.requests] == [("PUT", "/x/?a=1&b=%20")]


def test_the_documents_content_type_replaces_ours(receiver: Receiver) -> None:
    deliver(receiver.url, headers={"content-type": "application/x-json"})
    assert receiver.requests[0].headers["content-type"] == "application/x-json"


def test_a_file_goes_as_one_multipart_field_beside_the_result(
    receiver: Receiver, file: Path
) -> None:
    told = upload(receiver.url, file, headers={"Content-Type": "text/x", "X-Team": "a"})
    (request,) = receiver.requests
    assert (request.method, request.path) == ("POST", "/api/v1/results/t1/files")
    assert request.headers["content-type"].startswith("multipart/form-data; boundary=")
    assert request.headers["x-team"] == "a"
    name, filename, kind, content = request.file_part()
    assert (name, filename) == ("file", "final_model.tar.gz")
    assert kind == "application/octet-stream"
    assert content == file.read_bytes()
    address = f"{receiver.url}/t1/files/final_model.tar.gz"
    assert told == {
        **dict.fromkeys(("url", "download_url", "path"), address),
        "uploaded": True,
        "artifact_name": "final_model.tar.gz",
        "host_path": "artifacts/final_model.tar.gz",
        "download_timeoutSec": 30.0,
    }


def test_the_address_of_a_file_keeps_query_and_quotes_the_name(
    receiver: Receiver, tmp_path: Path
) -> None:
    path = tmp_path / "a b?#%.jsonl"
    path.write_text("{}\n")
    told = upload(f"{receiver.url}/?key=1", path, timeoutSec=7)
    assert receiver.requests[0].path == "/api/v1/results/t1/files?key=1"
    assert receiver.requests[0].file_part()[1] == "a b?#%.jsonl"
    assert told["url"] == f"{receiver.url}/t1/files/a%20b%3F%23%25.jsonl?key=1"
    assert told["download_timeoutSec"] == 7


def test_an_export_over_http_has_every_key_of_the_contract(
    receiver: Receiver, tmp_path: Path
) -> None:
    spec = {
        "taskType": "inference",
        "output": {"destination": {"type": "http", "url": receiver.url}},
        "postprocess": {"jsonl_export": {"path": "out.jsonl", "fields": {"text": "output"}}},
    }
    task = parse_task({"spec": spec}, task_id="t1")
    attempt = TaskFolders(tmp_path).begin("t1", task.destination)

    async def finish(store: HttpStore) -> None:
        pipeline = ArtifactPipeline(lambda _kind: store)
        outcome = Outcome(result={"items": [{"output": "hi"}]})
        await pipeline.deliver(task, await pipeline.finish(task, attempt, outcome))

    run(finish)
    files, check, result = receiver.requests
    assert (check.method, check.path) == ("GET", "/api/v1/results/t1/files/out.jsonl")
    assert files.path == "/api/v1/results/t1/files"
    assert files.file_part()[3] == b'{"text": "hi"}\n'
    address = f"{receiver.url}/t1/files/out.jsonl"
    block = json.loads(result.body)["result"]["jsonl_export"]
    assert block == {
        **dict.fromkeys(("path", "url", "download_url"), address),
        "worker_path": str(tmp_path / "t1" / "out.jsonl"),
        "relative_path": "out.jsonl",
        "record_count": 1,
        "fields": ["text"],
        "uploaded": True,
        "artifact_name": "out.jsonl",
        "host_path": "artifacts/out.jsonl",
        "download_timeoutSec": 30.0,
    }


@pytest.mark.parametrize("bad", [500, 503, 429])
def test_a_passing_failure_costs_tries_and_not_the_task(receiver: Receiver, bad: int) -> None:
    receiver.answers = [bad, bad, 200]
    deliver(receiver.url, {"a": 1})
    assert len(receiver.requests) == 3
    assert len({request.body for request in receiver.requests}) == 1


def test_a_file_is_sent_whole_again_after_a_failure(receiver: Receiver, file: Path) -> None:
    receiver.answers = [502, 200]
    upload(receiver.url, file)
    assert [request.file_part()[3] for request in receiver.requests] == [file.read_bytes()] * 2


def test_failures_that_do_not_pass_end_after_the_tries_and_may_be_retried_later(
    receiver: Receiver,
) -> None:
    receiver.answers = [500, 502, 503, 200]
    with pytest.raises(
        UploadError, match=r"task t1: delivery of the result to http.* failed 3 times, last: .*503"
    ) as caught:
        deliver(receiver.url)
    assert caught.value.retriable
    assert len(receiver.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_a_refusal_fails_at_once_and_for_good(receiver: Receiver, status: int) -> None:
    receiver.answers = [status]
    with pytest.raises(UploadError, match=rf"was refused: HTTP {status}$") as caught:
        deliver(receiver.url)
    assert not caught.value.retriable
    assert len(receiver.requests) == 1


def test_nobody_listening_is_tried_again_and_named(caplog: pytest.LogCaptureFixture) -> None:
    url = refused_url()
    with pytest.raises(UploadError, match=rf"{url} failed 3 times, last: ConnectError") as caught:
        deliver(url)
    assert caught.value.retriable
    tries = [r.args for r in caplog.records if r.name == retry.__name__]
    assert [args[1:3] for args in tries if isinstance(args, tuple)] == [(1, 3), (2, 3), (3, 3)]


def test_a_server_that_does_not_answer_in_time_is_tried_again(receiver: Receiver) -> None:
    receiver.delay_s = 0.6
    with pytest.raises(UploadError, match="failed 3 times, last: ReadTimeout") as caught:
        deliver(receiver.url, timeoutSec=0.1)
    assert caught.value.retriable
    assert len(receiver.requests) == 3


def test_pauses_grow_and_stay_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.2)
    pauses = [retry._pause_s(tried) for tried in (1, 3, 5, 60, 5000)]
    for pause_s, longest_s in zip(pauses, (0.4, 1.6, 6.4, 10.0, 10.0), strict=True):
        assert longest_s / 2 <= pause_s <= longest_s


@pytest.mark.parametrize(
    "destination",
    [
        {"url": "http://xn--/results"},
        {"headers": {"X-Key": "s3cret\nX-Other: 1"}},
        {"headers": {"X-Key": "s3crët"}},
        {"method": "PO ST"},
    ],
)
def test_a_request_that_can_never_be_sent_fails_at_once_without_telling_secrets(
    receiver: Receiver, destination: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UploadError, match=r"task t1: .*(cannot be|was not) sent") as caught:
        deliver(**{"url": receiver.url, **destination})
    assert not caught.value.retriable
    assert "s3cr" not in str(caught.value) + caplog.text
    assert receiver.requests == []


def test_a_host_that_the_operator_does_not_allow_is_never_asked(
    receiver: Receiver, file: Path
) -> None:
    with pytest.raises(UploadError, match=r"was not sent: .*FLOWMESH_HTTP_ALLOW") as caught:
        upload(receiver.url, file, settings={"http_allow": ("example.org",)})
    assert not caught.value.retriable
    assert receiver.requests == []


def test_the_token_goes_to_the_orchestrators_origin_alone(
    receiver: Receiver, elsewhere: Receiver, file: Path
) -> None:
    settings = {"orchestrator_base_url": receiver.origin, "orchestrator_token": "t0ken"}
    for url in (receiver.url, elsewhere.url, receiver.url.replace("127.0.0.1", "localhost")):
        deliver(url, settings=settings)
        upload(url, file, settings=settings)
    told = [request.headers.get("authorization") for request in receiver.requests]
    assert told == ["Bearer t0ken", "Bearer t0ken", None, None]
    assert [r.headers.get("authorization") for r in elsewhere.requests] == [None, None]


def test_the_documents_own_authorization_wins(receiver: Receiver) -> None:
    settings = {"orchestrator_base_url": receiver.origin, "orchestrator_token": "t0ken"}
    deliver(receiver.url, settings=settings, headers={"authorization": "Basic abc"})
    assert receiver.requests[0].headers["authorization"] == "Basic abc"


def test_a_redirect_keeps_the_body_and_takes_no_credentials_elsewhere(
    receiver: Receiver, elsewhere: Receiver
) -> None:
    receiver.answers, receiver.location = [307], elsewhere.url
    settings = {"orchestrator_base_url": receiver.origin, "orchestrator_token": "t0ken"}
    deliver(receiver.url, {"a": 1}, settings=settings, headers={"X-Key": "k"})
    (request,) = elsewhere.requests
    assert json.loads(request.body)["result"] == {"a": 1}
    assert not {"authorization", "x-key"} & request.headers.keys()
    assert receiver.requests[0].headers["authorization"] == "Bearer t0ken"


def test_a_redirect_that_would_lose_the_body_is_a_refusal(receiver: Receiver) -> None:
    receiver.answers, receiver.location = [302], f"{receiver.origin}/login"
    with pytest.raises(UploadError, match=r"was redirected to .*/login as GET") as caught:
        deliver(receiver.url)
    assert not caught.value.retriable
    assert len(receiver.requests) == 1


def test_signed_urls_and_passwords_appear_in_no_error_and_no_log(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    receiver.answers = [500, 400]
    url = receiver.url.replace("//", "//user:passw0rd@") + "?sig=s1gnature#fr4gment"
    with pytest.raises(UploadError, match=r"/api/v1/results\?sig=\*\*\*") as caught:
        deliver(url, settings={"orchestrator_token": "t0ken"}, headers={"X-Key": "k3y"})
    ours = [r.getMessage() for r in caplog.records if not r.name.startswith("httpcore")]
    shown = f"{caught.value} {' '.join(ours)}"
    assert "try 1 of 3" in shown
    for secret in ("passw0rd", "s1gnature", "fr4gment", "t0ken", "k3y"):
        assert secret not in shown
    assert receiver.requests[0].path.endswith("?sig=s1gnature")


def test_delivery_takes_as_long_as_the_operator_says_the_link_does(receiver: Receiver) -> None:
    started = time.monotonic()
    deliver(
        receiver.url, {"text": "x" * 20_000}, settings={"network_bandwidth_bytes_per_s": 50_000.0}
    )
    assert time.monotonic() - started >= 0.4
    assert len(receiver.requests) == 1


def test_a_redirect_keeps_the_file(receiver: Receiver, elsewhere: Receiver, file: Path) -> None:
    receiver.answers, receiver.location = [307], f"{elsewhere.url}/t1/files"
    upload(receiver.url, file)
    (request,) = elsewhere.requests
    assert request.file_part()[3] == file.read_bytes()


# The receipt.


def test_what_arrived_is_fetched_and_compared(receiver: Receiver, file: Path) -> None:
    receipt = send(receiver.url, file, headers={"X-Team": "a"})
    assert receipt.verified
    assert receipt.told["url"] == f"{receiver.url}/t1/files/final_model.tar.gz"
    post, check = receiver.requests
    assert (post.method, check.method) == ("POST", "GET")
    assert check.path == "/api/v1/results/t1/files/final_model.tar.gz"
    assert (check.headers["x-team"], check.headers["accept-encoding"]) == ("a", "identity")


def test_a_file_that_arrived_short_is_sent_again(receiver: Receiver, file: Path) -> None:
    receiver.kept = [100]
    assert send(receiver.url, file).verified
    assert [request.method for request in receiver.requests] == ["POST", "GET"] * 2
    assert list(receiver.files.values()) == [file.read_bytes()]


def test_a_file_that_never_arrives_whole_is_a_failure_that_says_so(
    receiver: Receiver, file: Path
) -> None:
    receiver.kept = [100] * 10
    with pytest.raises(
        UploadError, match=r"has 12800 bytes, the server shows 100, .* sent 3 times"
    ) as caught:
        send(receiver.url, file)
    assert caught.value.retriable
    assert len(receiver.requests) == 6


def test_other_bytes_of_the_same_length_are_no_receipt(receiver: Receiver, file: Path) -> None:
    class Liar(dict[str, bytes]):
        def get(self, key: str, _default: Any = None) -> bytes:
            return bytes(len(self[key]))

    receiver.files = Liar()
    with pytest.raises(UploadError, match="with another SHA-256"):
        send(receiver.url, file)


@pytest.mark.parametrize("status", [401, 403, 405, 501])
def test_a_server_that_hides_what_it_took_gives_no_verified_receipt(
    receiver: Receiver, file: Path, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.answers = [200, status]
    receipt = send(receiver.url, file)
    assert not receipt.verified
    assert receipt.told["uploaded"] is True
    assert f"the server does not show it (HTTP {status})" in caplog.text
    assert len(receiver.requests) == 2


def test_a_file_that_is_gone_when_it_is_asked_for_is_a_failure(
    receiver: Receiver, file: Path
) -> None:
    receiver.answers = [200, 404]
    with pytest.raises(UploadError, match=r"check of final_model\.tar\.gz at .*refused: HTTP 404"):
        send(receiver.url, file)


def test_a_check_that_fails_for_a_while_costs_no_second_upload(
    receiver: Receiver, file: Path
) -> None:
    receiver.answers = [200, 503, 500]
    assert send(receiver.url, file).verified
    assert [request.method for request in receiver.requests] == ["POST", "GET", "GET", "GET"]


# Files that grow.


def send_growing(
    receiver: Receiver, path: Path, grow: Callable[[Parcel], Awaitable[None]]
) -> Receipt:
    there = Destination(type="http", url=receiver.url)

    async def work(store: HttpStore) -> Receipt:
        parcel = Parcel("t1", path, path, growing=True)
        sending = asyncio.ensure_future(store.send(parcel, there))
        await grow(parcel)
        return await sending

    return run(work)


def test_a_file_is_sent_while_it_grows(receiver: Receiver, tmp_path: Path) -> None:
    path = tmp_path / "final_model.tar.gz"

    async def grow(parcel: Parcel) -> None:
        with path.open("wb", buffering=0) as file:
            file.write(b"a" * 300_000)
            parcel.grow(300_000)
            assert await asyncio.to_thread(receiver.begun.wait, 10), "nothing was sent yet"
            file.write(b"b" * 300_000)
        whole = path.read_bytes()
        parcel.seal(len(whole), hashlib.sha256(whole).hexdigest())

    assert send_growing(receiver, path, grow).verified
    post = receiver.requests[0]
    assert post.headers["transfer-encoding"] == "chunked"
    assert "content-length" not in post.headers
    assert post.file_part()[3] == b"a" * 300_000 + b"b" * 300_000


def test_a_second_try_sends_what_has_grown_meanwhile(receiver: Receiver, tmp_path: Path) -> None:
    path = tmp_path / "final_model.tar.gz"
    receiver.answers = [500]

    async def grow(parcel: Parcel) -> None:
        path.write_bytes(b"a" * 500_000)
        parcel.seal(500_000, hashlib.sha256(b"a" * 500_000).hexdigest())

    assert send_growing(receiver, path, grow).verified
    first, second, _check = receiver.requests
    assert second.headers["content-length"] == str(len(second.body))
    assert first.file_part()[3] == second.file_part()[3] == b"a" * 500_000


def test_a_file_that_will_never_be_whole_is_never_stored(
    receiver: Receiver, tmp_path: Path
) -> None:
    path = tmp_path / "final_model.tar.gz"

    async def grow(parcel: Parcel) -> None:
        path.write_bytes(b"a" * 300_000)
        parcel.grow(300_000)
        assert await asyncio.to_thread(receiver.begun.wait, 10)
        parcel.give_up(ArchiveError("the folder is gone", retriable=True))

    with pytest.raises(ArchiveError, match=r"^the folder is gone$") as caught:
        send_growing(receiver, path, grow)
    assert caught.value.retriable
    assert receiver.files == {}


def test_an_upload_takes_as_long_as_the_operator_says_the_link_does(
    receiver: Receiver, file: Path
) -> None:
    started = time.monotonic()
    send(receiver.url, file, settings={"network_bandwidth_bytes_per_s": 25_600.0})
    assert time.monotonic() - started >= 0.5
    assert receiver.files


def test_a_server_gets_time_to_store_what_it_was_sent(
    receiver: Receiver, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_store, "_SLOW_SERVER_BYTES_PER_S", file.stat().st_size / 10)
    receiver.delay_s = 0.5
    there = Destination.model_validate({"type": "http", "url": receiver.url, "timeoutSec": 0.2})

    async def work(store: HttpStore) -> Receipt:
        parcel = Parcel("t1", file, file, growing=True)
        sending = asyncio.ensure_future(store.send(parcel, there))
        parcel.grow(1000)
        assert await asyncio.to_thread(receiver.begun.wait, 10)  # its size is not known yet
        parcel.seal(file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
        return await sending

    assert run(work).verified
    assert [request.method for request in receiver.requests] == ["POST", "GET"]
    with pytest.raises(UploadError, match="ReadTimeout"):
        deliver(receiver.url, timeoutSec=0.2)


UPLOAD_LARGE = """
import asyncio, sys
from pathlib import Path
from flowmesh_core.config import Settings
from flowmesh_core.contract import Destination
from flowmesh_core.stores.http import HttpStore
from flowmesh_core.testing.orchestrator.body import Body

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

async def main():
    store = HttpStore(Settings())
    there = Destination(type="http", url=sys.argv[1])
    small, large = map(Path, sys.argv[2:])
    await store.upload("t1", small, small, there)
    before = peak()
    await store.upload("t1", large, large, there)
    print(peak() - before)
    await store.close()

asyncio.run(main())
"""


def test_a_large_file_is_streamed_and_not_held_in_memory(
    receiver: Receiver, file: Path, tmp_path: Path
) -> None:
    receiver.keep_bodies = False
    large = tmp_path / "large.bin"
    with large.open("wb") as handle:
        handle.truncate(20_000_000)
    done = subprocess.run(
        [sys.executable, "-c", UPLOAD_LARGE, receiver.url, str(file), str(large)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert int(receiver.requests[1].headers["content-length"]) > 20_000_000
    assert int(done.stdout) < 8_000, "peak memory grew by that many KiB"
