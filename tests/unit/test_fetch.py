from __future__ import annotations

import gzip
import hashlib
import io
import random
import stat
import tarfile
import threading
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import attrs
import pytest

from flowmesh_core.artifacts.fetch import Fetcher
from flowmesh_core.artifacts.network import NetworkPolicy
from flowmesh_core.artifacts.unpack import UnpackLimits, archive_kind, unpack
from flowmesh_core.errors import ArchiveError, ArtifactError, ContractError, InputError

CONTENT = random.Random(7).randbytes(300_000)


@attrs.define
class Site:
    """A real server. `script` holds what happens to the next requests: a status, `cut`, `ok`."""

    url: str
    content: bytes = CONTENT
    headers: dict[str, str] = attrs.field(factory=lambda: {"ETag": '"one"'})
    script: list[str] = attrs.field(factory=list)
    seen: list[Mapping[str, str]] = attrs.field(factory=list)
    ranges: bool = True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def do_GET(self) -> None:
        site = self.site
        site.seen.append({name.lower(): value for name, value in self.headers.items()})
        step = site.script.pop(0) if site.script else "ok"
        if step.isdecimal():
            self._answer(int(step), b"no")
        elif step.startswith("http"):
            self._answer(302, b"", {"Location": step})
        else:
            self._send_content(cut=step == "cut", shifted=step == "shifted")

    def _send_content(self, *, cut: bool, shifted: bool) -> None:
        site = self.site
        start = 0
        wanted = self.headers.get("Range")
        if wanted and site.ranges and self.headers.get("If-Range") == site.headers.get("ETag"):
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        body = site.content[start + shifted :]
        headers = dict(site.headers)
        if start:
            size = len(site.content)
            headers["Content-Range"] = f"bytes {start + shifted}-{size - 1}/{size}"
        self._answer(206 if start else 200, body, headers, cut_at=len(body) // 2 if cut else None)

    def _answer(
        self,
        status: int,
        body: bytes,
        headers: Mapping[str, str] | None = None,
        cut_at: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut_at])
        self.close_connection = cut_at is not None

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def new_site() -> Iterator[Callable[[], Site]]:
    servers: list[ThreadingHTTPServer] = []

    def start() -> Site:
        class Handler(_Handler):
            pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Handler.site = Site(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return Handler.site

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def site(new_site: Callable[[], Site]) -> Site:
    return new_site()


@pytest.fixture
def pauses() -> list[float]:
    return []


@pytest.fixture
def fetcher(tmp_path: Path, pauses: list[float]) -> Fetcher:
    return Fetcher(policy=NetworkPolicy(), results_dir=tmp_path / "results", sleep=pauses.append)


# Downloads.


def test_download_brings_the_whole_file_and_leaves_nothing_else(
    site: Site, fetcher: Fetcher, tmp_path: Path, pauses: list[float]
) -> None:
    path = fetcher.download(f"{site.url}/a/model.tar.gz?sig=1", tmp_path / "in")
    assert path == tmp_path / "in" / "model.tar.gz"
    assert path.read_bytes() == CONTENT
    assert list((tmp_path / "in").iterdir()) == [path]
    assert pauses == []


def test_server_errors_are_tried_again_with_growing_pauses(
    site: Site, fetcher: Fetcher, tmp_path: Path, pauses: list[float]
) -> None:
    site.script = ["500", "429", "503"]
    assert fetcher.download(f"{site.url}/x", tmp_path).read_bytes() == CONTENT
    assert len(site.seen) == 4
    assert pauses == [0.5, 1.0, 2.0]


def test_download_that_never_succeeds_fails_as_retriable_without_showing_the_query(
    site: Site, fetcher: Fetcher, tmp_path: Path
) -> None:
    site.script = ["502"] * 9
    with pytest.raises(InputError, match="in 5 tries, last: HTTP 502") as caught:
        fetcher.download(f"{site.url}/x?sig=s3cret", tmp_path)
    assert caught.value.retriable
    assert "s3cret" not in str(caught.value)
    assert len(site.seen) == 5
    assert list(tmp_path.iterdir()) == []


def test_nobody_listening_is_a_retriable_error(fetcher: Fetcher, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="could not be downloaded in 5 tries, last: ConnectError"):
        fetcher.download("http://127.0.0.1:9/x", tmp_path)


@pytest.mark.parametrize(("status", "hint"), [(404, ""), (401, "; check its headers, or ORCH")])
def test_refusal_is_final(
    site: Site, fetcher: Fetcher, tmp_path: Path, status: int, hint: str
) -> None:
    site.script = [str(status)]
    with pytest.raises(InputError, match=f"was refused: HTTP {status}{hint}") as caught:
        fetcher.download(f"{site.url}/x", tmp_path)
    assert not caught.value.retriable
    assert len(site.seen) == 1


def test_cut_download_goes_on_where_it_stopped(
    site: Site, fetcher: Fetcher, tmp_path: Path
) -> None:
    site.script = ["cut", "cut"]
    assert fetcher.download(f"{site.url}/x", tmp_path).read_bytes() == CONTENT
    assert [seen.get("range") for seen in site.seen] == [None, "bytes=150000-", "bytes=225000-"]
    assert site.seen[1]["if-range"] == '"one"'


def test_file_that_changed_meanwhile_is_fetched_from_the_start(
    site: Site, fetcher: Fetcher, tmp_path: Path
) -> None:
    site.script = ["cut"]

    def change(_pause_s: float) -> None:
        site.content, site.headers = CONTENT[::-1], {"ETag": '"two"'}

    fetcher = attrs.evolve(fetcher, sleep=change)
    assert fetcher.download(f"{site.url}/x", tmp_path).read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"weak"'}])
def test_without_a_strong_mark_a_cut_download_starts_anew(
    site: Site, fetcher: Fetcher, tmp_path: Path, headers: dict[str, str]
) -> None:
    site.headers, site.script = headers, ["cut"]
    assert fetcher.download(f"{site.url}/x", tmp_path).read_bytes() == CONTENT
    assert "range" not in site.seen[1]


def test_server_that_ignores_ranges_still_yields_the_right_file(
    site: Site, fetcher: Fetcher, tmp_path: Path
) -> None:
    site.ranges, site.script = False, ["cut"]
    assert fetcher.download(f"{site.url}/x", tmp_path).read_bytes() == CONTENT
    assert "range" in site.seen[1]


def test_rest_from_the_wrong_place_is_not_glued_on(
    site: Site, fetcher: Fetcher, tmp_path: Path
) -> None:
    site.script = ["cut", "shifted"]
    assert fetcher.download(f"{site.url}/x", tmp_path).read_bytes() == CONTENT
    assert [seen.get("range") for seen in site.seen] == [None, "bytes=150000-", None]


def test_range_that_cannot_be_had_starts_the_download_anew(
    site: Site, fetcher: Fetcher, tmp_path: Path
) -> None:
    site.script = ["cut", "416"]
    assert fetcher.download(f"{site.url}/x", tmp_path).read_bytes() == CONTENT
    assert "range" not in site.seen[2]


def test_encoding_that_was_not_asked_for_is_undone(
    site: Site, fetcher: Fetcher, tmp_path: Path
) -> None:
    site.content = gzip.compress(b"text")
    site.headers["Content-Encoding"] = "gzip"
    assert fetcher.download(f"{site.url}/x", tmp_path).read_bytes() == b"text"
    assert site.seen[0]["accept-encoding"] == "identity"


def test_encoded_download_that_was_cut_is_never_resumed(
    site: Site, fetcher: Fetcher, tmp_path: Path
) -> None:
    site.content, site.script = gzip.compress(CONTENT), ["cut"]
    site.headers["Content-Encoding"] = "gzip"
    assert fetcher.download(f"{site.url}/x", tmp_path).read_bytes() == CONTENT
    assert "range" not in site.seen[1]


@pytest.mark.parametrize("announced", [True, False])
def test_file_above_the_limit_is_refused(
    site: Site, fetcher: Fetcher, tmp_path: Path, announced: bool
) -> None:
    if not announced:
        site.content = gzip.compress(bytes(400_000))
        site.headers["Content-Encoding"] = "gzip"
    with pytest.raises(InputError, match="at most 200000 bytes, got"):
        fetcher.download(f"{site.url}/x", tmp_path, max_bytes=200_000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("filename", "path", "expected"),
    [
        ("mine.bin", "/x", "mine.bin"),
        ("../../etc/cron.d/x", "/y", "x"),
        ("..", "/a/model.bin", "model.bin"),
        (".bashrc", "/model.bin", "model.bin"),
        ("a\\..\\b", "/model.bin", "model.bin"),
        ("a\x00b", "/model.bin", "model.bin"),
        ("x" * 201, "/model.bin", "model.bin"),
        (None, "/a%2F..%2Fb", "b"),
        (None, "/%2e%2e", "download"),
        (None, "/", "download"),
        (None, "", "download"),
    ],
)
def test_file_name_never_leaves_the_folder(
    site: Site, fetcher: Fetcher, tmp_path: Path, filename: str | None, path: str, expected: str
) -> None:
    found = fetcher.download(f"{site.url}{path}", tmp_path / "in", filename=filename)
    assert found == tmp_path / "in" / expected
    assert [entry.name for entry in tmp_path.rglob("*") if entry.is_file()] == [expected]


def test_local_files_and_redirects_to_the_metadata_service_are_refused(
    site: Site, fetcher: Fetcher, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="must be an http:// or https:// URL"):
        fetcher.download("file:///etc/passwd", tmp_path)
    site.script = ["http://169.254.169.254/latest/"]
    with pytest.raises(ArtifactError, match="link-local or metadata"):
        fetcher.download(f"{site.url}/x", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_token_reaches_the_orchestrator_and_no_other_server(
    new_site: Callable[[], Site], tmp_path: Path
) -> None:
    orchestrator, other = new_site(), new_site()
    policy = NetworkPolicy(orchestrator_url=orchestrator.url, token="s3cret")
    fetcher = Fetcher(policy=policy, results_dir=tmp_path)
    orchestrator.script = [f"{other.url}/mirror"]
    fetcher.download(f"{other.url}/x", tmp_path / "a")
    fetcher.download(f"{orchestrator.url}/x", tmp_path / "b")
    assert orchestrator.seen[0]["authorization"] == "Bearer s3cret"
    assert ["authorization" in seen for seen in other.seen] == [False, False]


def test_download_needs_little_memory(site: Site, fetcher: Fetcher, tmp_path: Path) -> None:
    site.content = random.Random(1).randbytes(1 << 20) * 48
    tracemalloc.start()
    try:
        path = fetcher.download(f"{site.url}/x", tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert hashlib.sha256(site.content).digest() == hashlib.sha256(path.read_bytes()).digest()
    assert peak < 24 << 20


# Earlier tasks.


def test_task_folder_is_found_by_its_plain_id_alone(fetcher: Fetcher, tmp_path: Path) -> None:
    (tmp_path / "results" / "t1").mkdir(parents=True)
    assert fetcher.locate_task("t1") == tmp_path / "results" / "t1"
    assert fetcher.locate_task("t2") is None
    with pytest.raises(ContractError, match="task_id must be a plain name"):
        fetcher.locate_task("../results")


# Archives.

LIMITS = UnpackLimits(max_members=50, max_bytes=1 << 20, max_ratio=100, ratio_from_bytes=1 << 16)
TREE = {"final_model/config.json": b"{}", "final_model/sub/weights.bin": CONTENT, "empty": b""}


def _tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def _member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.mode = kind, target, 0o644
    return member


def _file(name: str, content: bytes = b"x") -> tuple[tarfile.TarInfo, bytes]:
    return _member(name), content


def _link(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return _member(name, tarfile.SYMTYPE, target), b""


def _zip(path: Path, files: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def _tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz", "zip"])
def test_archive_is_recognised_by_content_and_unpacked_whole(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "named-wrongly.bin"
    if mode == "zip":
        _zip(path, TREE)
    else:
        _tar(path, [_file(name, content) for name, content in TREE.items()], mode)
    assert archive_kind(path) == ("zip" if mode == "zip" else "tar")
    assert _tree(unpack(path, tmp_path / "out", limits=LIMITS)) == TREE
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["named-wrongly.bin", "out"]


@pytest.mark.parametrize("content", [b"", b"GGUF" + bytes(2000), bytes(4096), b"PK", b"\x1f\x8b"])
def test_other_files_are_no_archives(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.tar.gz"
    path.write_bytes(content)
    assert archive_kind(path) == ""
    with pytest.raises(ArchiveError, match="must be an archive of format auto, got no archive"):
        unpack(path, tmp_path / "out", limits=LIMITS)


def test_compressed_rows_are_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "hello"}\n' * 100))
    assert archive_kind(path) == ""


def test_saved_torch_weights_are_not_taken_for_an_archive(tmp_path: Path) -> None:
    path = _zip(tmp_path / "final_model.pt", {"archive/data.pkl": b"x", "archive/data/0": b"y"})
    assert zipfile.is_zipfile(path)
    assert archive_kind(path) == ""


@pytest.mark.parametrize(
    ("archive_format", "message"),
    [
        ("zip", "must be an archive of format zip, got tar"),
        ("rar", "archive_format must be one of auto, zip, tar, .*, got 'rar'"),
    ],
)
def test_archive_must_be_what_the_document_says(
    tmp_path: Path, archive_format: str, message: str
) -> None:
    path = _tar(tmp_path / "a.tar", [_file("x")])
    with pytest.raises(ArchiveError, match=message):
        unpack(path, tmp_path / "out", archive_format, limits=LIMITS)


OUTSIDE = "outside|out of the archive|absolute|behind a link|no earlier file"


@pytest.mark.parametrize("second_opinion", [True, False])
@pytest.mark.parametrize(
    "members",
    [
        [_file("../evil")],
        [_file("a/../../evil")],
        [_file("/tmp/flowmesh-evil")],
        [_link("out", "/etc")],
        [_link("out", "..")],
        [_link("a/out", "../../..")],
        [_link("out", ".."), _file("out/evil")],
        # Each link alone stays inside by its text; together they lead out.
        [_link("d/e/f/s", "../../.."), _link("t", "d/e/f/s/../..")],
        [_link("t", "d/e/f/s/../x"), _link("d/e/f/s", "../../..")],
        [_link("here", "."), _file("here/evil")],
        [(_member("hard", tarfile.LNKTYPE, "../../etc/passwd"), b"")],
        [(_member("hard", tarfile.LNKTYPE, "/etc/passwd"), b"")],
        [(_member("hard", tarfile.LNKTYPE, "never-there"), b"")],
        [_link("soft", "x"), (_member("hard", tarfile.LNKTYPE, "soft"), b"")],
    ],
    ids=lambda members: ", ".join(f"{m.name}>{m.linkname}" for m, _ in members),
)
def test_tar_members_that_lead_out_are_refused_on_every_python(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    members: list[tuple[tarfile.TarInfo, bytes]],
    second_opinion: bool,
) -> None:
    if not second_opinion:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    path = _tar(folder / "evil.tar", members)
    with pytest.raises(ArchiveError, match=OUTSIDE):
        unpack(path, folder / "out", limits=LIMITS)
    # Nothing of it stays, neither inside nor outside.
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if not p.is_dir()] == [
        "a/b/evil.tar"
    ]
    assert not Path("/tmp/flowmesh-evil").exists()


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_devices_and_pipes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: bytes
) -> None:
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    path = _tar(tmp_path / "a.tar", [(_member("dev", kind), b"")])
    with pytest.raises(ArchiveError, match="must be a file, a folder or a link"):
        unpack(path, tmp_path / "out", limits=LIMITS)


def test_links_that_stay_inside_are_kept(tmp_path: Path) -> None:
    members = [
        _file("blobs/1", b"weights"),
        _link("model/weights.bin", "../blobs/1"),
        (_member("model/copy.bin", tarfile.LNKTYPE, "blobs/1"), b""),
    ]
    out = unpack(_tar(tmp_path / "a.tar", members), tmp_path / "out", limits=LIMITS)
    assert (out / "model" / "weights.bin").is_symlink()
    assert (out / "model" / "weights.bin").read_bytes() == b"weights"
    assert (out / "model" / "copy.bin").read_bytes() == b"weights"


def test_modes_of_an_archive_give_no_rights_but_execution(tmp_path: Path) -> None:
    script, shared = _member("run.sh"), _member("data")
    script.mode, shared.mode = 0o6777, 0o666
    path = _tar(tmp_path / "a.tar", [(script, b"x"), (shared, b"x")])
    out = unpack(path, tmp_path / "out", limits=LIMITS)
    assert stat.S_IMODE((out / "run.sh").stat().st_mode) == 0o755
    assert not (out / "data").stat().st_mode & (stat.S_IXUSR | stat.S_IWOTH)


def test_member_that_comes_twice_is_refused(tmp_path: Path) -> None:
    path = _tar(tmp_path / "a.tar", [_link("x", "y"), _file("x")])
    with pytest.raises(ArchiveError, match=r"cannot be unpacked: .*File exists"):
        unpack(path, tmp_path / "out", limits=LIMITS)


def test_zip_members_that_lead_out_are_refused(tmp_path: Path) -> None:
    for name in ("../evil", "/evil", "a/../../evil"):
        path = _zip(tmp_path / "a.zip", {name: b"x"})
        with pytest.raises(ArchiveError, match="lies outside the archive"):
            unpack(path, tmp_path / "out", limits=LIMITS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.zip"]


def test_zip_links_are_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(ArchiveError, match="'link' must be a file or a folder"):
        unpack(tmp_path / "a.zip", tmp_path / "out", limits=LIMITS)


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_too_many_members_are_refused(tmp_path: Path, kind: str) -> None:
    names = [f"f{i}" for i in range(51)]
    if kind == "tar":
        path = _tar(tmp_path / "a", [_file(name) for name in names])
    else:
        path = _zip(tmp_path / "a", dict.fromkeys(names, b"x"))
    with pytest.raises(ArchiveError, match="'f50' is one more than 50, the limit"):
        unpack(path, tmp_path / "out", limits=LIMITS)


@pytest.mark.parametrize("kind", ["w:gz", "w:xz", "zip"])
def test_bombs_are_refused_by_their_ratio(tmp_path: Path, kind: str) -> None:
    bomb = bytes(900_000)
    if kind == "zip":
        path = _zip(tmp_path / "a", {"bomb": bomb})
    else:
        path = _tar(tmp_path / "a", [_file("bomb", bomb)], kind)
    with pytest.raises(ArchiveError, match="unpacks to more than 100 times the archive's size"):
        unpack(path, tmp_path / "out", limits=LIMITS)
    assert not (tmp_path / "out").exists()


def test_sum_of_sizes_is_limited(tmp_path: Path) -> None:
    path = _tar(tmp_path / "a", [_file(f"f{i}", CONTENT) for i in range(4)])
    with pytest.raises(ArchiveError, match="'f3' takes the sum of sizes above 1048576 bytes"):
        unpack(path, tmp_path / "out", limits=LIMITS)


def test_header_that_claims_to_be_huge_does_not_fill_memory(tmp_path: Path) -> None:
    header = _member("././@PaxHeader", tarfile.XHDTYPE)
    header.size = 200 << 20
    path = tmp_path / "a.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        for _ in range(200):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(ArchiveError, match="larger than any real one"):
            unpack(path, tmp_path / "out", limits=LIMITS)
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz", "zip"])
def test_archive_that_was_cut_off_leaves_nothing(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a"
    if mode == "zip":
        _zip(path, TREE)
    else:
        _tar(path, [_file(name, content) for name, content in TREE.items()], mode)
    path.write_bytes(path.read_bytes()[:200_000])
    with pytest.raises(ArchiveError, match=r"cannot be unpacked|got no archive"):
        unpack(path, tmp_path / "out", limits=LIMITS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_damaged_archive_is_noticed(tmp_path: Path) -> None:
    for mode in ("w:gz", "zip"):
        path = tmp_path / "a"
        if mode == "zip":
            _zip(path, TREE, zipfile.ZIP_STORED)
        else:
            _tar(path, [_file(name, content) for name, content in TREE.items()], mode)
        content = bytearray(path.read_bytes())
        content[150_000] ^= 0xFF
        path.write_bytes(content)
        with pytest.raises(ArchiveError, match="cannot be unpacked"):
            unpack(path, tmp_path / "out", limits=LIMITS)


def test_folder_with_content_is_not_replaced(tmp_path: Path) -> None:
    path = _tar(tmp_path / "a.tar", [_file("x")])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(ArchiveError, match="not empty"):
        unpack(path, tmp_path / "out", limits=LIMITS)
    assert (tmp_path / "out" / "mine").read_text() == "kept"
