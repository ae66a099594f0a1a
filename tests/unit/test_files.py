from __future__ import annotations

import asyncio
import functools
import glob
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh_core import FileRef, FilesBlock
from flowmesh_core.artifacts.fetch import Fetcher
from flowmesh_core.artifacts.network import NetworkPolicy
from flowmesh_core.config import load_settings
from flowmesh_core.contract import parse_task
from flowmesh_core.errors import InputError
from flowmesh_core.inputs import Inputs, resolve_inputs
from flowmesh_core.local_run import LocalRun, plan
from flowmesh_core.plugins import load_plugins
from flowmesh_core.testing import run_task

READER = """
from flowmesh_core import Executor, ExecutorInfo, FilesBlock, TaskSpec, hookimpl

class Spec(TaskSpec):
    files: FilesBlock | None = None

class Reads(Executor):
    def run(self, ctx):
        texts = {file.name: file.path.read_text() for file in ctx.inputs.files}
        return {"ok": True, "texts": texts, "block": str(ctx.spec.files)}

@hookimpl
def flowmesh_register_executors():
    return [
        ExecutorInfo(
            name="acme.reads",
            task_types={"acme.reads"},
            target=f"{__name__}:Reads",
            spec=f"{__name__}:Spec",
            inputs={"files"},
        )
    ]
"""


@attrs.define
class Site:
    url: str
    folder: Path
    seen: list[tuple[str, str | None]] = attrs.field(factory=list)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A real server over a folder."""
    folder = tmp_path / "site"

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            found.seen.append((self.path, self.headers.get("X-Key")))
            super().do_GET()

        def log_message(self, *_args: object) -> None:
            pass

    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    )
    found = Site(f"http://127.0.0.1:{server.server_port}", folder)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The worker's folder."""
    folder = tmp_path / "root [1]"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def write(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def resolve(files: Any, *, policy: NetworkPolicy | None = None) -> Inputs:
    task = parse_task({"spec": {"files": files}}, task_id="t1")
    folder = Path.cwd().parent / "attempt"
    fetcher = Fetcher(
        policy=policy or NetworkPolicy(), results_dir=folder, attempts=1, sleep=lambda _s: None
    )
    return resolve_inputs(task, {"files"}, fetcher=fetcher, folder=folder)


def names(*paths: str, **options: Any) -> list[str]:
    return [file.name for file in resolve({"paths": list(paths), **options}).files]


# Paths.


def test_a_folder_is_read_in_sorted_order_its_own_files_first(root: Path) -> None:
    write(root, "docs/b.md", "docs/a/z.md", "docs/a/a/x.md", "docs/c.md", "docs/B/y.md")
    files = resolve({"paths": ["docs"]}).files
    assert [file.name for file in files] == ["b.md", "c.md", "B/y.md", "a/z.md", "a/a/x.md"]
    assert files[0] == FileRef(path=root / "docs" / "b.md", name="b.md")
    assert all(file.path.read_text() == f"docs/{file.name}" for file in files)


def test_what_begins_with_a_dot_is_read_only_when_it_is_named(root: Path) -> None:
    write(root, "docs/.env", "docs/.git/config", "docs/a.md")
    assert names("docs") == ["a.md"]
    assert names("docs/**") == ["a.md"]
    for pattern in ("docs/.*", "docs/**/.env", "docs/?git/*", "docs/*/config"):
        with pytest.raises(InputError, match="leads to no file"):
            names(pattern)
    assert names("docs/.env", "docs/.git") == [".env", "config"]


def test_links_that_lead_out_are_left_out_and_folders_are_entered_once(root: Path) -> None:
    write(root, "secret/key", "docs/a.md", "docs/sub/b.md")
    docs = root / "docs"
    (docs / "inside.md").symlink_to("sub/b.md")
    (docs / "outside.md").symlink_to(root / "secret" / "key")
    (docs / "climbing.md").symlink_to("../secret/key")
    (docs / "over.md").symlink_to("outside.md")
    (docs / "out").symlink_to(root / "secret")
    (docs / "round").symlink_to(docs)
    (docs / "dangling").symlink_to("gone")
    (docs / "itself").symlink_to("itself")
    (root / "alias").symlink_to(docs)
    expected = ["a.md", "inside.md", "sub/b.md"]
    assert names("docs") == names("docs/**") == names("alias") == expected
    assert names("docs/*/*") == ["sub/b.md"]
    assert names("docs/outside.md", "docs/out") == ["outside.md", "key"]


def test_only_files_count(root: Path) -> None:
    write(root, "docs/a.md")
    os.mkfifo(root / "docs" / "pipe")
    assert names("docs") == ["a.md"]
    with pytest.raises(InputError, match="'docs/pipe' leads to no file"):
        resolve({"paths": ["docs/pipe"]})


def test_a_name_with_wildcards_that_exists_means_itself(root: Path) -> None:
    write(root, "a[1].md", "a1.md")
    assert names("a[1].md") == ["a[1].md"]
    assert names("a[12].md") == ["a1.md"]


def test_a_file_that_is_named_twice_counts_once_and_where_it_was_named_first(root: Path) -> None:
    write(root, "docs/sub/a.md", "docs/b.md")
    found = names("docs/sub", "docs", "docs/**/*.md", str(root / "docs/b.md"), max_files=2)
    assert found == ["a.md", "b.md"]


PART = st.sampled_from(["**", "*", "a", "b", "?", "[ab]", "*.md", "a*", "[!a]*", "ab.md"])
TREE = [
    *("a/a/ab.md", "a/b/x.md", "a/b/ab.md", "b/a/b/c.txt", "b/ab.md", "b/b/b/b", "ab.md", "c.txt"),
    *("a/a/a/a/ab.md", "a/x"),
]


@given(parts=st.lists(PART, min_size=1, max_size=5))
def test_a_pattern_means_what_it_means_to_the_standard_library(parts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), *TREE)
        (Path(folder) / "empty").mkdir()
        pattern = f"{folder}/{'/'.join(parts)}"
        matches = glob.glob(pattern, recursive=True)  # noqa: PTH207 - pathlib's has other rules
        expected = {path for path in matches if path[-1] != "/" and Path(path).is_file()}
        if not set("*?[") & set(pattern) and Path(pattern).is_dir():
            expected = {str(path) for path in Path(pattern).rglob("*") if path.is_file()}
        try:
            found = [str(file.path) for file in resolve({"paths": [pattern]}).files]
        except InputError:
            found = []
    assert set(found) == expected
    assert len(found) == len(expected)


def test_a_pattern_of_many_wildcards_takes_no_longer(root: Path) -> None:
    write(root, "/".join(["a"] * 60) + "/" + "a" * 200)
    assert len(names("**/" * 3000 + "*")) == 1
    assert len(names("**/a/" * 20 + "*a" * 50)) == 1
    with pytest.raises(InputError, match="leads to no file"):
        names("**/*/" * 70 + "a")


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"paths": ["gone"]}, "spec.files: 'gone' leads to no file on this worker"),
        ({"paths": ["empty"]}, "spec.files: 'empty' leads to no file on this worker"),
        ({"paths": ["*.pdf", "a.md"]}, "spec.files: '*.pdf' leads to no file on this worker"),
        ({"paths": ["*/../a.md"]}, "spec.files: '*/../a.md' leads to no file on this worker"),
        ({"paths": ["gone/*"]}, "spec.files: 'gone/*' leads to no file on this worker"),
        ({"paths": ["a\0b", "a\0*"]}, r"'a\x00*' leads to no file on this worker"),
        ({"urls": ["file:///etc/passwd"]}, "'file:///etc/passwd' leads to no file"),
        ({"urls": ["http://169.254.169.254/x"]}, "a link-local or metadata address"),
        ({}, "spec.files: one of paths, urls is required"),
        ({"paths": [""]}, "spec.files.paths[0] "),
        ({"path": ["a.md"]}, "spec.files: unknown key 'path', did you mean 'paths'?"),
        ({"paths": "a.md"}, "spec.files.paths must be a list, got 'a.md'"),
        (["a.md"], "spec.files must be an object, got list"),
        ({"paths": ["a.md"], "max_files": 0}, "spec.files.max_files must be greater"),
        ({"paths": ["."], "max_files": 2}, "spec.files: max_files allows 2 files, there are more"),
        ({"paths": ["."], "max_bytes": 9}, "spec.files: max_bytes allows 9 bytes, the files have"),
    ],
)
def test_files_that_cannot_be_had_are_named(root: Path, files: Any, problem: str) -> None:
    write(root, "a.md", "b.md", "c.md")
    (root / "empty").mkdir()
    with pytest.raises(InputError, match=r"^task t1: ") as caught:
        resolve(files)
    assert problem in str(caught.value)
    assert not caught.value.retriable


def test_limits_are_reached_exactly(root: Path) -> None:
    write(root, "a.md", "b.md")
    assert names(".", max_files=2, max_bytes=8) == ["a.md", "b.md"]


def test_all_problems_are_told_at_once(root: Path) -> None:
    with pytest.raises(InputError, match=r"'one' leads .*; 'two' leads .*; http://127"):
        resolve({"paths": ["one", "two"], "urls": ["http://127.0.0.1:9/x"]})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read_is_an_error(root: Path) -> None:
    write(root, "docs/a.md", "docs/closed/b.md")
    (root / "docs" / "closed").chmod(0)
    with pytest.raises(InputError, match=r"'docs' cannot be read: .*Permission denied"):
        resolve({"paths": ["docs"]})
    (root / "docs" / "closed").chmod(0o700)


def test_a_task_without_files_has_none(root: Path) -> None:
    assert resolve(None) == Inputs()


# URLs.


def test_urls_are_downloaded_with_the_documents_headers(root: Path, site: Site) -> None:
    write(site.folder, "one/a.md", "two/a.md")
    urls = [f"{site.url}/one/a.md", f"{site.url}/two/a.md?sig=1"]
    files = resolve({"urls": urls, "headers": {"X-Key": "s3cret"}}).files
    assert [(file.name, file.url) for file in files] == [("a.md", urls[0]), ("a.md", urls[1])]
    assert [file.path.read_text() for file in files] == ["one/a.md", "two/a.md"]
    assert all(".inputs" in file.path.parts for file in files)
    assert site.seen == [("/one/a.md", "s3cret"), ("/two/a.md?sig=1", "s3cret")]


def test_a_path_may_be_a_url_and_a_url_a_path(root: Path, site: Site) -> None:
    write(site.folder, "a.md")
    write(root, "b.md")
    files = resolve({"paths": [f"{site.url}/a.md"], "urls": [str(root / "b.md")]}).files
    assert [(file.name, file.url is None) for file in files] == [("a.md", False), ("b.md", True)]


def test_what_a_server_refuses_is_final_and_what_is_down_may_come_back(
    root: Path, site: Site
) -> None:
    site.folder.mkdir()
    for urls, retriable in (
        ([f"{site.url}/gone"], False),
        (["http://127.0.0.1:9/x"], True),
        ([f"{site.url}/gone", "http://127.0.0.1:9/x"], False),
    ):
        with pytest.raises(InputError, match=r"^task t1: spec\.files: http") as caught:
            resolve({"urls": urls, "headers": {"X-Key": "s3cret"}})
        assert caught.value.retriable is retriable
        assert "s3cret" not in str(caught.value)


def test_a_download_is_cut_off_at_the_limit(root: Path, site: Site) -> None:
    write(site.folder, "large")
    (site.folder / "large").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="/large must have at most 99 bytes, got 100"):
        resolve({"urls": [f"{site.url}/large"], "max_bytes": 99})
    write(root, "a.md")
    with pytest.raises(InputError, match="max_bytes allows 103 bytes"):
        resolve({"paths": ["a.md"], "urls": [f"{site.url}/large"], "max_bytes": 103})


def test_the_operators_hosts_hold(root: Path, site: Site) -> None:
    with pytest.raises(InputError, match="add it to FLOWMESH_HTTP_ALLOW"):
        resolve({"urls": [site.url]}, policy=NetworkPolicy(allow=("files.invalid",)))
    assert site.seen == []


def test_headers_are_secrets() -> None:
    block = FilesBlock.model_validate({"urls": ["http://h"], "headers": {"X-Key": "s3cret"}})
    assert "s3cret" not in repr(block)


# On the way to the executor.


def test_files_travel_as_json_and_move_with_their_place(root: Path) -> None:
    write(root, "docs/a.md", "docs/b.md")
    (root / "docs" / "\udcff").touch()
    inputs = resolve({"paths": ["docs"]})
    assert Inputs.from_dict(json.loads(json.dumps(inputs.to_dict()))) == inputs
    assert inputs.paths() == tuple(file.path for file in inputs.files)
    places = {path: Path("/there") / path.name for path in inputs.paths()}
    moved = inputs.moved(places).files
    assert [file.path for file in moved[:2]] == [Path("/there/a.md"), Path("/there/b.md")]
    assert [file.name for file in moved] == [file.name for file in inputs.files]


def test_an_executor_reads_them_in_its_own_process(root: Path) -> None:
    write(root, "docs/a.md", "docs/sub/b.md")
    (root / "acme.py").write_text(READER)
    files = {"paths": ["docs"], "headers": {"X-Key": "s3cret"}}
    run = run_task("acme.reads", {"files": files}, plugin_files=[root / "acme.py"])
    assert run.error is None
    assert run.result["texts"] == {"a.md": "docs/a.md", "sub/b.md": "docs/sub/b.md"}
    assert "s3cret" not in run.result["block"]


def test_an_earlier_stage_may_say_which_files(root: Path, tmp_path: Path) -> None:
    write(root, "docs/a.md", "docs/b.md")
    (root / "acme.py").write_text(READER)
    stages = [
        {"name": "one", "spec": {"taskType": "echo", "found": ["docs/b.md", "docs"]}},
        {
            "name": "two",
            "spec": {"taskType": "acme.reads", "files": {"paths": "${one.result.echo.found}"}},
        },
    ]
    settings = load_settings({}, results_dir=tmp_path / "results", worker_id="local")
    workflow = plan({"spec": {"stages": stages}})
    plugins = load_plugins(settings, files=[root / "acme.py"])
    _, report = asyncio.run(LocalRun(workflow, settings, plugins).run())
    assert report.ok, report.error
    assert report.result["texts"] == {"b.md": "docs/b.md", "a.md": "docs/a.md"}
