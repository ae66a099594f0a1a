from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from flowmesh_core.artifacts.download_cache import DownloadCache
from flowmesh_core.artifacts.fetch import Fetcher
from flowmesh_core.artifacts.network import NetworkPolicy
from flowmesh_core.errors import InputError

CONTENT = bytes(range(256)) * 400


class Site:
    """A real server that knows conditions, and notes what it sent."""

    def __init__(self) -> None:
        self.content = CONTENT
        self.mark = {"ETag": '"one"'}
        self.sent: list[int] = []
        self.cut = False
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/model.bin"

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def _handler(site) -> type[BaseHTTPRequestHandler]:  # noqa: N805 - `self` is the handler's
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.headers.get("If-None-Match") or self.headers.get("If-Modified-Since")
                same = asked is not None and asked in site.mark.values()
                site.sent.append(304 if same else 200)
                self.send_response(304 if same else 200)
                for name, value in site.mark.items():
                    self.send_header(name, value)
                if not same:
                    self.send_header("Content-Length", str(len(site.content)))
                self.end_headers()
                if not same:
                    self.wfile.write(site.content[: 1000 if site.cut else None])
                    site.cut = False

            def log_message(self, *_args: Any) -> None:
                """Be quiet."""

        return Handler


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


@pytest.fixture
def cache(tmp_path: Path) -> DownloadCache:
    return DownloadCache(folder=tmp_path / "cache", max_bytes=1 << 20)


@pytest.fixture
def fetcher(tmp_path: Path, cache: DownloadCache) -> Fetcher:
    policy = NetworkPolicy()
    return Fetcher(policy=policy, results_dir=tmp_path, cache=cache, sleep=lambda _s: None)


def kept(cache: DownloadCache) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in cache.folder.iterdir() if p.is_file()}


@pytest.mark.parametrize(
    "mark", [{"ETag": '"one"'}, {"Last-Modified": "Sat, 01 Nov 2025 10:00:00 GMT"}]
)
def test_an_unchanged_file_is_sent_once(
    site: Site, fetcher: Fetcher, cache: DownloadCache, tmp_path: Path, mark: dict[str, str]
) -> None:
    site.mark = mark
    for task in ("a", "b"):
        path = fetcher.download(site.url, tmp_path / task)
        assert path == tmp_path / task / "model.bin"
        assert path.read_bytes() == CONTENT
        assert [p.name for p in path.parent.iterdir()] == ["model.bin"]
    assert site.sent == [200, 304]
    assert kept(cache) == {hashlib.sha256(CONTENT).hexdigest(): CONTENT}


def test_a_file_that_changed_is_sent_again(site: Site, fetcher: Fetcher, tmp_path: Path) -> None:
    fetcher.download(site.url, tmp_path / "a")
    site.content, site.mark = b"new", {"ETag": '"two"'}
    assert fetcher.download(site.url, tmp_path / "b").read_bytes() == b"new"
    assert fetcher.download(site.url, tmp_path / "c").read_bytes() == b"new"
    assert site.sent == [200, 200, 304]


def test_a_task_that_changes_its_file_harms_no_other(
    site: Site, fetcher: Fetcher, cache: DownloadCache, tmp_path: Path
) -> None:
    first = fetcher.download(site.url, tmp_path / "a")
    with first.open("r+b") as file:
        file.write(b"changed in place")
    assert fetcher.download(site.url, tmp_path / "b").read_bytes() == CONTENT
    second = fetcher.download(site.url, tmp_path / "c")
    with second.open("r+b") as file:
        file.write(b"changed in place")
    assert fetcher.download(site.url, tmp_path / "d").read_bytes() == CONTENT
    assert list(kept(cache).values()) == [CONTENT]


def test_a_file_that_was_removed_meanwhile_is_fetched(
    site: Site, fetcher: Fetcher, cache: DownloadCache, tmp_path: Path
) -> None:
    fetcher.download(site.url, tmp_path / "a")
    for path in cache.folder.iterdir():
        if path.is_file():
            path.unlink()
    assert fetcher.download(site.url, tmp_path / "b").read_bytes() == CONTENT
    assert site.sent == [200, 200]


@pytest.mark.parametrize("entry", ["", "[]", "{}", '{"sha256": 3, "validator": 4}', "\0"])
def test_an_entry_that_cannot_be_read_is_as_if_it_were_not_there(
    site: Site, fetcher: Fetcher, cache: DownloadCache, tmp_path: Path, entry: str
) -> None:
    fetcher.download(site.url, tmp_path / "a")
    (path,) = (cache.folder / "urls").iterdir()
    path.write_text(entry)
    assert cache.find(site.url) is None
    assert fetcher.download(site.url, tmp_path / "b").read_bytes() == CONTENT


def test_what_no_server_can_vouch_for_is_not_kept(
    site: Site, fetcher: Fetcher, cache: DownloadCache, tmp_path: Path
) -> None:
    site.mark = {}
    fetcher.download(site.url, tmp_path / "a")
    assert not cache.folder.exists()


def test_the_cache_stays_within_its_bound_and_keeps_what_was_used_last(
    cache: DownloadCache, tmp_path: Path
) -> None:
    digests = []
    for number in range(4):
        file = tmp_path / f"{number}.bin"
        file.write_bytes(bytes([number]) * 300_000)
        digests.append(hashlib.sha256(file.read_bytes()).hexdigest())
        if number == 3:
            used = cache.find("url 0")
            assert used is not None
            assert used.copy_to(tmp_path / "copy") is not None
        cache.keep(f"url {number}", '"mark"', file, digests[number])
        if number < 3:
            os.utime(cache.folder / digests[number], (number, number))
    assert set(kept(cache)) == {digests[0], digests[2], digests[3]}
    assert cache.find("url 1") is None
    found = cache.find("url 2")
    assert found is not None
    assert found.condition == {"If-None-Match": '"mark"'}


def test_a_file_above_the_bound_is_not_kept(
    site: Site, fetcher: Fetcher, cache: DownloadCache, tmp_path: Path
) -> None:
    site.content = bytes(2 << 20)
    fetcher.download(site.url, tmp_path / "a")
    assert not cache.folder.exists()


def test_a_cache_that_cannot_be_written_fails_nothing(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    cache = DownloadCache(folder=tmp_path / "file" / "cache", max_bytes=1 << 20)
    fetcher = Fetcher(policy=NetworkPolicy(), results_dir=tmp_path, cache=cache)
    assert fetcher.download(site.url, tmp_path / "a").read_bytes() == CONTENT


def test_no_url_stands_in_the_cache(
    site: Site, fetcher: Fetcher, cache: DownloadCache, tmp_path: Path
) -> None:
    fetcher.download(f"{site.url}?sig=s3cret", tmp_path / "a")
    for path in cache.folder.rglob("*"):
        assert "s3cret" not in path.name
        assert path.is_dir() or b"s3cret" not in path.read_bytes()


def test_the_size_limit_holds_for_what_is_cached(
    site: Site, fetcher: Fetcher, tmp_path: Path
) -> None:
    fetcher.download(site.url, tmp_path / "a")
    with pytest.raises(InputError, match="must have at most 10 bytes, got 102400"):
        fetcher.download(site.url, tmp_path / "b", max_bytes=10)


def test_the_digest_that_is_expected_must_come(
    site: Site, fetcher: Fetcher, cache: DownloadCache, tmp_path: Path
) -> None:
    right = hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(InputError, match=f"must have the SHA-256 {'0' * 64}, got {right}"):
        fetcher.download(site.url, tmp_path / "a", sha256="0" * 64)
    assert list((tmp_path / "a").iterdir()) == []
    assert not cache.folder.exists()
    path = fetcher.download(site.url, tmp_path / "a", sha256=right.upper())
    assert path.read_bytes() == CONTENT


def test_a_download_in_pieces_has_the_digest_of_the_whole(
    site: Site, fetcher: Fetcher, tmp_path: Path
) -> None:
    site.cut = True
    right = hashlib.sha256(CONTENT).hexdigest()
    assert fetcher.download(site.url, tmp_path / "a", sha256=right).read_bytes() == CONTENT
    assert site.sent == [200, 200]
