"""What strangers may put into documents, archives and answers, searched for a way out.

Beside the folders that a worker may use lies a canary: nobody may read it, write it or link to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import ipaddress
import itertools
import os
import resource
import socket
import stat
import subprocess
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flowmesh_core.artifacts import network
from flowmesh_core.artifacts.fetch import Fetcher
from flowmesh_core.artifacts.layout import TaskFolders
from flowmesh_core.artifacts.network import NetworkPolicy, build_async_client, build_client
from flowmesh_core.artifacts.parcel import Parcel, Receipt
from flowmesh_core.artifacts.pipeline import ArtifactPipeline
from flowmesh_core.artifacts.unpack import UnpackLimits, unpack
from flowmesh_core.config import Settings
from flowmesh_core.contract import Destination, parse_task
from flowmesh_core.errors import ArchiveError, ArtifactError, ContractError, FlowmeshError
from flowmesh_core.executor import Artifact, Outcome
from flowmesh_core.stores.local import LocalStore

SECRET = b"the canary's own words"
SHA256 = hashlib.sha256(SECRET).hexdigest()
LIMITS = UnpackLimits(max_members=30, max_bytes=1 << 20, max_ratio=100, ratio_from_bytes=1 << 16)
quick = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Steps of a path: plain, climbing, empty, hidden, names of planted links, and what no disk holds.
STEPS = st.sampled_from(
    [
        *("a", "b", "t1", "..", ".", "", "~", "out", "leak", "loop", "canary", "..\\", "\0", "C:"),
        *(".inputs", ".t1.attempt-1", "\ud800", "ü", "n" * 256, "%2e%2e", "-rf", "\n"),
    ]
)
PATHS = st.builds(
    lambda start, steps: start + "/".join(steps),
    st.sampled_from(["", "/", "//", "../", "{outside}/", "{root}/", "file://", "./", "~/"]),
    st.lists(STEPS, max_size=5),
) | st.text(max_size=20)


@attrs.frozen
class World:
    """``results`` and ``work`` may be used; ``outside`` must stay as it is."""

    root: Path

    @classmethod
    @contextlib.contextmanager
    def made(cls) -> Iterator[World]:
        with tempfile.TemporaryDirectory() as name:
            world = cls(Path(name).resolve())
            for folder in ("results", "work", "outside"):
                (world.root / folder).mkdir()
            (world.outside / "canary").write_bytes(SECRET)
            (world.root / "canary").write_bytes(SECRET)
            yield world
            world.assert_untouched()

    @property
    def outside(self) -> Path:
        return self.root / "outside"

    def fill(self, text: str) -> str:
        return text.replace("{outside}", str(self.outside)).replace("{root}", str(self.root))

    def assert_untouched(self) -> None:
        assert {p.name for p in self.root.iterdir()} == {"results", "work", "outside", "canary"}
        assert [p.name for p in self.outside.iterdir()] == ["canary"]
        for canary in (self.outside / "canary", self.root / "canary"):
            assert canary.read_bytes() == SECRET
            assert canary.stat().st_nlink == 1

    def plant_links(self, folder: Path) -> None:
        """Leave what a hostile executor would."""
        (folder / "out").symlink_to(self.outside)
        (folder / "leak").symlink_to(self.outside / "canary")
        (folder / "loop").symlink_to("loop")
        (folder / "a").mkdir()
        (folder / "a" / "b").write_bytes(b"harmless")
        (folder / "a" / "out").symlink_to("../../..")


def assert_says_nothing(folder: Path, *also: bytes) -> None:
    """Look for the canary's words and digest in every file that lies in a folder itself."""
    contents = [p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
    for content in (*contents, *also):
        assert SECRET not in content
        assert SHA256.encode() not in content


@contextlib.contextmanager
def no_large_files() -> Iterator[None]:
    """Should an attack succeed, let it not fill the disk of whoever runs the tests."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Names and paths of a document.


class Eavesdropper(LocalStore):
    """Keeps what it is told to send."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.sent = b""

    async def send(self, parcel: Parcel, destination: Destination) -> Receipt:
        async for block in parcel.blocks():
            self.sent += block
        return await super().send(parcel, destination)


def name_artifact(path: str, packed: bool) -> Artifact:
    """Go past the class's own check, which is not to be relied upon here."""
    artifact = Artifact("x", archive=packed)
    object.__setattr__(artifact, "path", path)
    return artifact


@settings(quick, max_examples=150)
@given(
    task_id=st.just("t1") | PATHS,
    where=st.just("") | PATHS,
    listed=st.lists(PATHS, max_size=3),
    export=st.just("rows.jsonl") | PATHS,
    artifacts=st.lists(st.tuples(PATHS, st.booleans()), max_size=2),
)
@example("../../x", "", [], "rows.jsonl", [])
@example("t1", "{outside}", [], "rows.jsonl", [])
@example("t1", "", ["leak", "out/canary"], "rows.jsonl", [])
@example("t1", "", ["{outside}/canary"], "out/rows.jsonl", [])
@example("t1", "", [], "rows.jsonl", [("leak", False)])
@example("t1", "", [], "rows.jsonl", [("out", True)])
@example("t1", "", [], "rows.jsonl", [("{outside}/canary", False)])
@example("t1", "", [], "rows.jsonl", [("../../canary", False)])
@example("t1", "", ["{outside}/canary", "a\0b", "\ud800", "n" * 300], "x", [("a", True)])
def test_no_name_in_a_document_reads_or_writes_elsewhere(
    task_id: str, where: str, listed: list[str], export: str, artifacts: list[tuple[str, bool]]
) -> None:
    with World.made() as world:
        store = Eavesdropper(Settings())
        output: dict[str, Any] = {"artifacts": [world.fill(name) for name in listed]}
        if where:
            output["destination"] = {"type": "local", "path": world.fill(where)}
        post = {"jsonl_export": {"path": world.fill(export), "fields": {"o": "output"}}}
        named = [name_artifact(world.fill(path), packed) for path, packed in artifacts]
        outcome = Outcome(result={"items": [{"output": "x"}]}, artifacts=named)
        with contextlib.suppress(ContractError, ArtifactError), no_large_files():
            spec = {"taskType": "x", "output": output, "postprocess": post}
            task = parse_task({"spec": spec}, task_id=world.fill(task_id))
            attempt = TaskFolders(world.root / "results").begin(task.task_id, task.destination)
            world.plant_links(attempt.folder)
            pipeline = ArtifactPipeline(lambda _kind: store)
            asyncio.run(pipeline.finish(task, attempt, outcome))
        assert_says_nothing(world.root / "results", store.sent)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "n" * 300, "a/" + "b" * 5000, "leak/x"])
def test_a_listed_name_that_no_disk_can_hold_is_missing_and_costs_no_task(name: str) -> None:
    with World.made() as world:
        task = parse_task({"spec": {"taskType": "x"}}, task_id="t1")
        output = attrs.evolve(task, common=task.common.model_copy(deep=True))
        output.common.output.artifacts.append(name)
        attempt = TaskFolders(world.root / "results").begin("t1", task.destination)
        world.plant_links(attempt.folder)
        pipeline = ArtifactPipeline(lambda _kind: LocalStore(Settings()))
        asyncio.run(pipeline.finish(output, attempt, Outcome(result={})))
        assert b'"missing"' in (world.root / "results" / "t1" / "manifest.json").read_bytes()


@settings(quick, max_examples=80)
@given(name=PATHS)
def test_no_id_leads_to_another_folder(name: str) -> None:
    with World.made() as world:
        name, results = world.fill(name), world.root / "results"
        world.plant_links(results)
        (results / "out").unlink()  # the operator's own folder holds no such links
        folders = TaskFolders(results)
        fetcher = Fetcher(policy=NetworkPolicy(), results_dir=results)
        for use in (folders.worker_log, fetcher.locate_task):
            with contextlib.suppress(ContractError):
                found = use(name)
                assert found is None or found.resolve().is_relative_to(results)


# Archives.

NAMES = st.builds(
    lambda start, steps: start + "/".join(steps),
    st.sampled_from(["", "", "", "/", "./", "../", "{outside}/"]),
    st.lists(st.sampled_from(["a", "b", "c", "d", "..", ".", "", "canary"]), max_size=4),
)
TARGETS = st.builds(
    lambda start, steps: start + "/".join(steps),
    st.sampled_from(["", "", "../", "../../", "/", "{outside}/"]),
    st.lists(st.sampled_from(["a", "b", "c", "..", "..", ".", "outside", "canary"]), max_size=5),
)
KINDS = st.sampled_from(
    [
        *(tarfile.REGTYPE, tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.SYMTYPE),
        *(tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE, b"S", b"Z"),
    ]
)
OVERRIDES = st.dictionaries(
    st.sampled_from(["path", "linkpath", "GNU.sparse.name"]), TARGETS, max_size=2
) | st.dictionaries(
    st.sampled_from(["size", "GNU.sparse.realsize", "GNU.sparse.size", "GNU.sparse.map"]),
    st.sampled_from(["0", "-1", "7", "99999999999", "0,5,9999999,1", "x"]),
    max_size=3,
)
MEMBERS = st.lists(
    st.tuples(
        NAMES, KINDS, TARGETS, st.binary(max_size=30), OVERRIDES, st.sampled_from([0o777, 0])
    ),
    max_size=7,
)


def write_tar(path: Path, members: list[Any], world: World) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, kind, target, content, overrides, mode in members:
            member = tarfile.TarInfo(world.fill(name))
            member.type, member.linkname, member.mode = kind, world.fill(target), mode | 0o6000
            member.pax_headers = {key: world.fill(value) for key, value in overrides.items()}
            member.size = len(content) if kind in (tarfile.REGTYPE, tarfile.CONTTYPE) else 0
            archive.addfile(member, io.BytesIO(content))


def assert_confined(folder: Path, archive: Path) -> None:
    """Look at an unpacked folder as whoever uses it would: through its links."""
    total_bytes = 0
    for path in folder.rglob("*"):
        kind = path.lstat().st_mode
        assert stat.S_ISREG(kind) or stat.S_ISDIR(kind) or stat.S_ISLNK(kind)
        assert stat.S_ISLNK(kind) or not kind & (stat.S_ISUID | stat.S_ISGID | stat.S_IWOTH)
        assert Path(os.path.realpath(path)).is_relative_to(folder)
        if path.is_file():
            assert SECRET not in path.read_bytes()
            total_bytes += 0 if path.is_symlink() else path.stat().st_size
    assert total_bytes <= LIMITS.max_bytes + archive.stat().st_size


def attack(world: World, archive: Path, *, second_opinion: bool) -> bool:
    """Unpack; return whether it was taken."""
    out = world.root / "work" / "deep" / "out"
    out.parent.mkdir()
    taken = True
    with contextlib.ExitStack() as stack:
        stack.enter_context(no_large_files())
        if not second_opinion and hasattr(tarfile, "data_filter"):
            stack.enter_context(mock.patch.object(tarfile, "data_filter", None))
        try:
            unpack(archive, out, limits=LIMITS)
        except ArchiveError:
            taken = False
    if taken:
        assert_confined(out, archive)
    assert [p.name for p in out.parent.iterdir()] == (["out"] if taken else [])
    return taken


FILE: tuple[Any, ...] = (tarfile.REGTYPE, "", b"x", {}, 0o777)


@settings(quick, max_examples=300)
@given(members=MEMBERS, second_opinion=st.booleans())
@example([("a", tarfile.SYMTYPE, "{outside}", b"", {}, 0), ("a/x", *FILE)], False)
@example([("a", tarfile.REGTYPE, "", b"x", {"path": "../../x"}, 0)], False)
@example([("a", tarfile.SYMTYPE, "b", b"", {"linkpath": "{outside}"}, 0)], False)
@example([("a", tarfile.LNKTYPE, "{outside}/canary", b"", {}, 0)], False)
@example([("a", *FILE), ("a/b", *FILE)], False)
@example([("a", tarfile.DIRTYPE, "", b"", {}, 0), ("a", *FILE)], False)
@example([("a", tarfile.REGTYPE, "", b"x", {"size": "-1"}, 0)], False)
@example([("d/d/d", tarfile.SYMTYPE, "../..", b"", {}, 0), ("a", tarfile.SYMTYPE, "d/d/d/../..", b"", {}, 0)], False)  # fmt: skip  # noqa: E501 - one archive
def test_no_tar_leads_out(members: list[Any], second_opinion: bool) -> None:
    with World.made() as world:
        archive = world.root / "results" / "evil.tar"
        try:
            write_tar(archive, members, world)
        except (ValueError, tarfile.TarError):
            return  # the library will not even write it
        attack(world, archive, second_opinion=second_opinion)


@settings(quick, max_examples=100)
@given(
    head=st.binary(min_size=512, max_size=512) | st.just(tarfile.TarInfo("a").tobuf()),
    changes=st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), max_size=6),
    tail=st.binary(max_size=1500),
)
def test_no_forged_header_leads_out(
    head: bytes, changes: list[tuple[int, int]], tail: bytes
) -> None:
    forged = bytearray(head)
    for at, value in changes:
        forged[at] = value
    forged[148:156] = b" " * 8
    forged[148:156] = b"%06o\0 " % sum(forged)
    with World.made() as world:
        archive = world.root / "results" / "evil.tar"
        archive.write_bytes(forged + tail)
        attack(world, archive, second_opinion=False)


@settings(quick, max_examples=100)
@given(
    members=st.lists(
        st.tuples(
            *(NAMES, st.binary(max_size=40)),
            st.sampled_from([0, stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, 0o120777]),
        ),
        max_size=6,
    ),
    claimed=st.none() | st.integers(0, 1 << 31),
)
@example([("a", b"{outside}", stat.S_IFLNK), ("a/x", b"x", 0)], None)
@example([("../../x", b"x", 0)], None)
@example([("a", b"x", 0), ("a", b"y", 0)], None)
@example([("a", b"x" * 40, 0)], 7)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_no_zip_leads_out(members: list[tuple[str, bytes, int]], claimed: int | None) -> None:
    with World.made() as world:
        archive = world.root / "results" / "evil.zip"
        with zipfile.ZipFile(archive, "w") as made:
            for name, content, mode in members:
                info = zipfile.ZipInfo(world.fill(name))
                info.external_attr = mode << 16
                made.writestr(info, world.fill(content.decode("latin-1")))
            if claimed is not None and made.filelist:
                made.filelist[0].file_size = claimed
        attack(world, archive, second_opinion=True)


@pytest.mark.skipif(not hasattr(os, "O_PATH"), reason="sparse files by GNU tar")
@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_a_hole_weighs_what_it_unpacks_to(form: str) -> None:
    with World.made() as world:
        with (world.root / "work" / "hole").open("wb") as file:
            file.truncate(8 << 20)
        archive = world.root / "results" / "evil.tar"
        command = [
            "tar",
            "-C",
            str(world.root / "work"),
            f"--format={form}",
            "-Scf",
            str(archive),
            "hole",
        ]
        subprocess.run(command, check=True)
        assert archive.stat().st_size < 1 << 16
        assert not attack(world, archive, second_opinion=True)


@pytest.mark.parametrize("second_opinion", [True, False])
def test_links_through_paths_too_long_to_follow_lead_nowhere_else(second_opinion: bool) -> None:
    """Resolving gives up on paths above PATH_MAX, the kernel goes on link by link."""
    long, steps = "d" * 230, "abcdefghijklmnop"
    for depth in (14, 16):
        members: list[Any] = []
        for level in range(depth):
            below = f"{long}/" * level
            members.append((below + long, tarfile.DIRTYPE, "", b"", {}, 0o777))
            members.append((below + steps[level], tarfile.SYMTYPE, long, b"", {}, 0))
        through = "/".join(steps[:depth])
        members += [
            (f"{through}/l", tarfile.SYMTYPE, "../" * depth, b"", {}, 0),
            ("escape", tarfile.SYMTYPE, f"{through}/l/../../../../outside", b"", {}, 0),
            ("escape/evil", *FILE),
        ]
        for first in (len(members) - 3, len(members) - 2):
            with World.made() as world:
                archive = world.root / "results" / "evil.tar"
                write_tar(archive, members[: len(members) - 3] + members[first:], world)
                assert not attack(world, archive, second_opinion=second_opinion)


# URLs.

METADATA = ipaddress.IPv4Address("169.254.169.254")
FORBIDDEN_V4 = st.sampled_from([METADATA, ipaddress.IPv4Address("169.254.0.1")]) | st.sampled_from(
    list(map(ipaddress.IPv4Address, ("100.100.100.200", "168.63.129.16", "192.0.0.192")))
)


@st.composite
def spelled(draw: st.DrawFn) -> str:
    """An address that no worker may open, as one of the ways in which hosts are written."""
    address = draw(FORBIDDEN_V4)
    if draw(st.booleans()):
        prefix = draw(st.sampled_from(["::", "::ffff:", "::ffff:0:", "64:ff9b::", "64:ff9b:1::"]))
        low = int(address)
        return (
            f"[{prefix}{draw(st.sampled_from([str(address), f'{low >> 16:x}:{low & 65535:x}']))}]"
        )
    count = draw(st.integers(1, 4))
    octets = list(address.packed)
    numbers = [*octets[: count - 1], int.from_bytes(bytes(octets[count - 1 :]), "big")]
    ways = st.sampled_from(["{}", "0x{:x}", "0X{:X}", "0{:o}", "000{:o}", "0x000{:x}"])
    return ".".join(draw(ways).format(number) for number in numbers)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """A name service of our own: what a host leads to, one answer after the other."""
    known: dict[str, list[str]] = {}

    def resolve(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        host = host.decode() if isinstance(host, bytes) else host
        if answers := known.get(host):
            host = answers.pop(0) if len(answers) > 1 else answers[0]
        elif not set(host) <= set("0123456789abcdefxABCDEFX.:%"):
            raise socket.gaierror(f"no such name: {host!r}")
        return real(host, port, *args, **kwargs)

    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return known


@settings(quick, max_examples=200)
@given(
    host=spelled(),
    scheme=st.sampled_from(["http", "https", "HTTP"]),
    user=st.sampled_from(["", "u:p@", "good.example@", "good.example:80@", "a@b@", "%00@"]),
    rest=st.sampled_from(["", "/", ":80/x", ":8080/", "?q=@good.example", "#@good.example"]),
)
def test_no_spelling_of_a_forbidden_address_is_opened(
    host: str, scheme: str, user: str, rest: str
) -> None:
    url = f"{scheme}://{user}{host}{rest}"
    for text in (url, _as_sent(url)):
        with pytest.raises(ArtifactError, match="link-local or metadata"):
            NetworkPolicy().check(text)


def _as_sent(url: str) -> str:
    try:
        return str(httpx.URL(url))
    except httpx.InvalidURL:  # then nothing is sent
        return url


URL_PIECES = st.sampled_from(
    [
        *("http://", "https://", "HTTP://", "file:", "//", "/", "\\", "@", ":", "?", "#", "%40"),
        *("good.example", "evil.example", "orchestrator.example", "169.254.169.254", "[::1]"),
        *(
            ".",
            "[",
            "]",
            "80",
            "8000",
            "\t",
            "\n",
            " ",
            "%2f",
            "ü",
            "。",
            "\0",
            "GOOD.example",
            "*",
        ),
    ]
)
URLS = st.lists(URL_PIECES, max_size=8).map("".join) | st.lists(URL_PIECES, max_size=6).map(
    lambda pieces: "http://" + "".join(pieces)
)


@settings(quick, max_examples=300)
@given(url=URLS)
@example("http://good.example\\@evil.example/")
@example("http://good.example@evil.example/")
@example("http://evil.example#@good.example/")
@example("http://evil.example?@good.example/")
@example("http://orchestrator.example:8000@evil.example/")
@example("http://good.example.evil.example/")
def test_what_is_checked_is_what_is_asked(names: dict[str, list[str]], url: str) -> None:
    """Two readers of one URL that disagree are the oldest way past a check."""
    names.update({"good.example": ["127.0.0.1"], "evil.example": ["127.0.0.1"]})
    home = "http://orchestrator.example:8000"
    policy = NetworkPolicy(allow=("good.example",), orchestrator_url=home, token="s3cret")
    try:
        policy.check(url)
        headers = policy.headers_for(url)
        asked = httpx.URL(url)
    except (ArtifactError, httpx.InvalidURL):
        return
    assert asked.scheme in ("http", "https")
    is_home = (asked.scheme, asked.host, asked.port) == ("http", "orchestrator.example", 8000)
    assert asked.host == "good.example" or is_home
    assert ("Authorization" in headers) == is_home
    policy.check(str(asked))


@settings(quick, max_examples=60)
@given(
    scheme=st.sampled_from(["file", "ftp", "gopher", "data", "jar", "dict", "ws", ""]),
    rest=st.sampled_from([":///etc/passwd", "://good.example/", ":/etc/passwd", "//x", "://"]),
    lead=st.sampled_from(["", " ", "\t", "\n"]),
)
def test_no_other_scheme_is_opened(scheme: str, rest: str, lead: str) -> None:
    with pytest.raises(ArtifactError, match=r"must be an http|is no URL"):
        NetworkPolicy().check(lead + scheme + rest)


@attrs.define
class Site:
    """A real server on an address of this machine; `plan` says where each path redirects to."""

    host: str
    plan: dict[str, str] = attrs.field(factory=dict)
    seen: list[Mapping[str, str]] = attrs.field(factory=list)
    server: ThreadingHTTPServer = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.seen.append({k.lower(): v for k, v in self.headers.items()} | {":": self.path})
                target = site.plan.get(self.path)
                self.send_response(307 if target else 200)
                if target:
                    self.send_header("Location", target)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_args: object) -> None:
                """Be quiet."""

        self.server = ThreadingHTTPServer((self.host, 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, path: str = "/", host: str = "") -> str:
        return f"http://{host or self.host}:{self.server.server_port}{path}"


@pytest.fixture
def new_site() -> Iterator[Callable[[str], Site]]:
    sites: list[Site] = []

    def start(host: str) -> Site:
        sites.append(Site(host))
        return sites[-1]

    yield start
    for site in sites:
        site.server.shutdown()
        site.server.server_close()


@pytest.fixture
def pair(new_site: Callable[[str], Site]) -> tuple[Site, Site]:
    return new_site("127.0.0.1"), new_site("127.0.0.1")


def ask(url: str, policy: NetworkPolicy, headers: Mapping[str, str], *, is_async: bool) -> int:
    """Ask with one of the two clients; return the status."""
    if not is_async:
        with build_client(policy, timeout_s=5) as client:
            return client.get(url, headers=policy.headers_for(url, headers)).status_code

    async def main() -> int:
        async with build_async_client(policy, timeout_s=5) as client:
            response = await client.get(url, headers=policy.headers_for(url, headers))
            return response.status_code

    return asyncio.run(main())


@settings(quick, max_examples=30)
@given(
    hops=st.lists(st.sampled_from(["home", "foreign"]), max_size=5),
    last=st.sampled_from(["", "", "file:///etc/passwd", "ftp://x/"]) | spelled(),
    header=st.sampled_from(["Authorization", "authorization", "X-Api-Key", "Cookie", "X-S3cret"]),
    is_async=st.booleans(),
)
def test_no_chain_of_redirects_carries_a_secret_away_or_opens_what_is_forbidden(
    pair: tuple[Site, Site], hops: list[str], last: str, header: str, is_async: bool
) -> None:
    home, foreign = pair
    for site in pair:
        site.plan.clear()
        site.seen.clear()
    sites = {"home": home, "foreign": foreign}
    policy = NetworkPolicy(orchestrator_url=home.url(), token="t0ken")
    stops = [home, *(sites[hop] for hop in hops)]
    for number, (site, following) in enumerate(itertools.pairwise(stops)):
        site.plan[f"/{number}"] = following.url(f"/{number + 1}")
    if last:
        target = last if ":/" in last else f"http://{last}/"
        stops[-1].plan[f"/{len(hops)}"] = target
    try:
        status = ask(home.url("/0"), policy, {header: "mine"}, is_async=is_async)
        assert not last
        assert status == 200
    except (ArtifactError, httpx.UnsupportedProtocol, httpx.InvalidURL, httpx.RemoteProtocolError):
        assert last
    assert len(home.seen) + len(foreign.seen) == len(stops)
    for headers in foreign.seen:
        assert not {"authorization", header.lower(), "cookie"} & set(headers)
        assert not {"mine", "t0ken", "Bearer t0ken"} & set(headers.values())
    left = hops.index("foreign") if "foreign" in hops else len(hops)
    for headers in home.seen[left + 1 :]:
        assert "mine" not in headers.values(), "who left gets nothing back"


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("host", ["rebound.example", "1.1.1.1%.rebound.example"])
def test_a_name_that_leads_elsewhere_the_second_time_is_asked_nothing(
    new_site: Callable[[str], Site],
    names: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    is_async: bool,
) -> None:
    forbidden = (*network._FORBIDDEN, ipaddress.ip_network("127.0.0.2/32"))
    monkeypatch.setattr(network, "_FORBIDDEN", forbidden)
    site = new_site("127.0.0.2")
    names[host] = ["127.0.0.1", "127.0.0.2"]
    with pytest.raises(ArtifactError, match=r"leads to 127\.0\.0\.2, a link-local"):
        ask(site.url(host=host), NetworkPolicy(), {}, is_async=is_async)
    assert site.seen == []
    assert names[host] == ["127.0.0.2"], "the name was asked for twice"


def test_a_name_that_leads_to_the_metadata_service_is_refused(
    names: dict[str, list[str]], tmp_path: Path
) -> None:
    for number, address in enumerate(["169.254.169.254", "fe80::1", "::ffff:169.254.169.254"]):
        names[f"n{number}.example"] = [address]
        fetcher = Fetcher(policy=NetworkPolicy(), results_dir=tmp_path)
        with pytest.raises(FlowmeshError, match="a link-local or metadata address"):
            fetcher.download(f"http://n{number}.example/latest", tmp_path / "in")
    assert not list(tmp_path.rglob("*"))
