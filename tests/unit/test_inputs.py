from __future__ import annotations

import functools
import importlib
import importlib.util
import io
import json
import shutil
import sys
import tarfile
import tempfile
import threading
import tracemalloc
import zipfile
from collections.abc import Iterator, Mapping
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh_core.artifacts.fetch import Fetcher
from flowmesh_core.artifacts.network import NetworkPolicy
from flowmesh_core.contract import parse_task
from flowmesh_core.errors import ExecutorUnavailableError, InputError, PluginError
from flowmesh_core.inputs import (
    AdapterRef,
    Inputs,
    ModelRef,
    RowSource,
    detect_model_format,
    hub_cache_folder,
    resolve_inputs,
)

TOKEN = "s3cret"


@attrs.define
class Site:
    url: str
    folder: Path
    tokens: list[str | None] = attrs.field(factory=list)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A real server over a folder."""
    folder = tmp_path / "site"
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            found.tokens.append(self.headers.get("Authorization"))
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


@attrs.define
class Bench:
    """Resolves the inputs of one task's spec in folders of its own."""

    root: Path
    fetcher: Fetcher
    options: dict[str, Any] = attrs.field(factory=dict)

    def resolve(self, wanted: str, spec: Mapping[str, Any], **options: Any) -> Inputs:
        task = parse_task({"spec": dict(spec)}, task_id="t1")
        return resolve_inputs(
            task,
            frozenset(wanted.split()),
            fetcher=self.fetcher,
            folder=self.root / "attempt",
            **{"hub_cache": self.root / "hub", **options},
        )

    def rows(self, data: Any, **spec: Any) -> RowSource:
        rows = self.resolve("rows", {"data": data, **spec}).rows
        assert rows is not None
        return rows

    def model(self, source: Mapping[str, Any] | None, **options: Any) -> ModelRef:
        model = self.resolve("model", {"model": {"source": source}}, **options).model
        assert model is not None
        return model

    def checkpoint(self, **load: Any) -> Path:
        checkpoint = self.resolve("checkpoint", {"checkpoint": {"load": load}}).checkpoint
        assert checkpoint is not None
        return checkpoint

    def adapters(self, *adapters: Mapping[str, Any]) -> tuple[AdapterRef, ...]:
        return self.resolve("adapters", {"model": {"adapters": list(adapters)}}).adapters

    def task(self, task_id: str, *files: str) -> Path:
        """Leave what an earlier task would have left."""
        folder = self.root / "results" / task_id
        for name in files:
            _write(folder / name, name)
        return folder


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, _fetcher(tmp_path))


@pytest.fixture
def online(tmp_path: Path, site: Site) -> Bench:
    """A bench whose orchestrator is the site."""
    return Bench(tmp_path, _fetcher(tmp_path, orchestrator_url=site.url, token=TOKEN))


def _fetcher(root: Path, **policy: Any) -> Fetcher:
    return Fetcher(
        policy=NetworkPolicy(**policy),
        results_dir=root / "results",
        attempts=2,
        sleep=lambda _s: None,
    )


def _write(path: Path, content: str | bytes = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _tar(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
    return path


def _jsonl(path: Path, *records: Any) -> Path:
    return _write(path, "".join(json.dumps(record) + "\n" for record in records))


# Rows.


def test_list_yields_prompts_and_chats_with_their_metadata(bench: Bench) -> None:
    chat = [{"role": "user", "content": "hello"}]
    rows = bench.rows({"type": "list", "items": ["a", chat], "metadata": [{"k": 1}, {}]})
    assert [(row.index, row.prompt, row.metadata) for row in rows] == [
        (0, "a", {"k": 1}),
        (1, chat, {}),
    ]
    assert all(row.add_system_prompt for row in rows)
    assert list(rows.records()) == [{"k": 1, "prompt": "a"}, {"messages": chat}]
    assert rows.count() == 2


def test_metadata_has_a_second_name_on_the_wire(bench: Bench) -> None:
    rows = bench.rows({"type": "list", "items": ["a"], "items_metadata": [{"k": 1}]})
    assert [row.metadata for row in rows] == [{"k": 1}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"type": "list", "items": []}, r"spec\.data\.items .* at least 1 item"),
        ({"type": "list"}, r"spec\.data\.items is required"),
        ({"type": "list", "items": ["a", 5]}, r"items\[1\] must be text or a list .*, got int"),
        ({"type": "list", "items": [[{"text": "x"}]]}, r"items\[0\] .*got a list that is no chat"),
        (
            {"type": "list", "items": ["a", "b"], "metadata": [{}]},
            "metadata must have one entry per item, got 1 for 2 items",
        ),
        ({"type": "csv"}, r"spec\.data\.type must be one of dataset, .*, none, got 'csv'"),
        ({"items": ["a"]}, "type must be one of dataset, .* got None"),
        (["a"], r"spec\.data must be a mapping, got list"),
        ({"type": ["list"]}, r"type must be one of dataset, .* got \['list'\]"),
        ({"type": "static"}, r"spec\.data\.task is required"),
        ({"type": "jsonl"}, "one of download_url, url, path, worker_path is required"),
        ({"type": "jsonl", "path": "/no/rows.jsonl"}, "'/no/rows.jsonl' is no file on this worker"),
        ({"type": "jsonl", "path": "x", "limit": -1}, r"spec\.data\.limit must be greater"),
        ({"type": "dataset"}, r"spec\.data\.url is required"),
        (
            {"type": "dataset", "url": "x", "trust_remote_code": True},
            "operator of this worker does not allow; .*FLOWMESH_TRUST_REMOTE_CODE=1",
        ),
    ],
)
def test_data_that_cannot_be_read_says_what_is_wrong(bench: Bench, data: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf"^task t1: .*{message}"):
        bench.rows(data)


@pytest.mark.parametrize("spec", [{}, {"data": None}, {"data": {}}, {"data": {"type": "none"}}])
def test_task_without_data_has_no_rows(bench: Bench, spec: dict[str, Any]) -> None:
    assert bench.resolve("rows", spec).rows is None


def test_static_task_is_one_row(bench: Bench) -> None:
    assert [row.prompt for row in bench.rows({"type": "static", "task": "count"})] == ["count"]


@pytest.mark.parametrize("append", [None, False, True])
def test_graph_template_becomes_one_row_whose_system_prompt_must_be_asked_for(
    bench: Bench, append: bool | None
) -> None:
    template: dict[str, Any] = {
        "text": "{col1_label}={col1_value}",
        "columns": [{"label": "A", "expr": "one.items[0].output"}],
    }
    if append is not None:
        template["append_system_prompt"] = append
    rows = bench.rows(
        {"type": "graph_template", "template": template},
        _upstreamResults={"one": {"items": [{"output": "42"}]}},
    )
    assert [(row.prompt, row.add_system_prompt) for row in rows] == [("A=42", append is True)]


def test_graph_template_names_the_stage_it_misses(bench: Bench) -> None:
    data = {"type": "graph_template", "template": {"text": "x", "columns": [{"expr": "two.x"}]}}
    with pytest.raises(InputError, match=r"^task t1: spec\.data: column 1: .*no result of stage"):
        bench.rows(data, _upstreamResults={"one": {"x": 1}})


@pytest.mark.parametrize(
    ("record", "prompt", "metadata"),
    [
        ({"prompt": "p", "text": "t"}, "p", {"text": "t"}),
        ({"text": "t", "question": "q"}, "t", {"question": "q"}),
        ({"prompt": None, "question": "q", "id": 7}, "q", {"prompt": None, "id": 7}),
        ({"input": "i"}, "i", {}),
        (
            {"messages": [{"role": "user", "content": "x"}]},
            [{"role": "user", "content": "x"}],
            {},
        ),
    ],
)
def test_jsonl_takes_the_first_usual_column_and_keeps_the_others(
    bench: Bench, tmp_path: Path, record: dict[str, Any], prompt: Any, metadata: Any
) -> None:
    rows = bench.rows({"type": "jsonl", "path": str(_jsonl(tmp_path / "r", record))})
    assert [(row.prompt, row.metadata) for row in rows] == [(prompt, metadata)]
    assert list(rows.records()) == [record]


@pytest.mark.parametrize(
    ("columns", "metadata"),
    [
        ({"metadata_columns": ["id"]}, {"id": 1}),
        ({"metadata_columns": ["id", "absent"]}, {"id": 1}),
        ({"metadata_columns": {"id": "number", "q": "asked"}}, {"number": 1, "asked": "hi"}),
        ({"metadata_columns": []}, {}),
        ({}, {"id": 1, "more": 2}),
    ],
)
def test_metadata_columns_choose_and_rename(
    bench: Bench, tmp_path: Path, columns: dict[str, Any], metadata: Any
) -> None:
    path = _jsonl(tmp_path / "r", {"q": "hi", "id": 1, "more": 2})
    rows = bench.rows({"type": "jsonl", "path": str(path), "column": "q", **columns})
    assert [(row.prompt, row.metadata) for row in rows] == [("hi", metadata)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{broken", "line 3 must be a JSON object in UTF-8: Expecting"),
        (b"[1]", "line 3 must be a JSON object, got list"),
        (b'{"prompt": "\xff"}', "line 3 must be a JSON object in UTF-8: 'utf-8' codec"),
        (b"[" * 100_000, "line 3 must be a JSON object in UTF-8: "),
        (b'{"id": 1}', "line 3: a row needs one of prompt, text, .* got id; name it in data"),
        (b'{"prompt": 5}', "line 3: column 'prompt' must be text or a list of messages"),
    ],
)
def test_bad_line_is_named_by_file_and_number(
    bench: Bench, tmp_path: Path, line: bytes, message: str
) -> None:
    path = _write(tmp_path / "rows.jsonl", b'\xef\xbb\xbf{"prompt": "a"}\r\n\n' + line + b"\n")
    rows = iter(bench.rows({"type": "jsonl", "path": str(path)}))
    assert next(rows).prompt == "a"
    with pytest.raises(InputError, match=f"rows.jsonl, {message}"):
        next(rows)


def test_records_go_on_after_a_line_that_cannot_be_read(bench: Bench, tmp_path: Path) -> None:
    path = _write(tmp_path / "rows.jsonl", b'{"text": "a"}\n{broken\n{"text": "b"}\n')
    records = iter(bench.rows({"type": "jsonl", "path": str(path)}).records())
    assert next(records) == {"text": "a"}
    with pytest.raises(InputError, match=r"rows.jsonl, line 2 must be a JSON object"):
        next(records)
    assert list(records) == [{"text": "b"}]


def test_missing_column_is_named(bench: Bench, tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "r", {"prompt": "x"})
    with pytest.raises(InputError, match=r"line 1: a row needs the column 'q' .* got prompt"):
        list(bench.rows({"type": "jsonl", "path": str(path), "column": "q"}))


def test_file_that_vanished_since_is_an_error_of_the_input(bench: Bench, tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "r", {"prompt": "x"})
    rows = bench.rows({"type": "jsonl", "path": str(path)})
    path.unlink()
    with pytest.raises(InputError, match="r cannot be read: No such file"):
        list(rows)


def test_jsonl_is_brought_from_the_first_address_that_answers(online: Bench, site: Site) -> None:
    _jsonl(site.folder / "files" / "rows.jsonl", {"prompt": "x"})
    address = f"{site.url}/files/rows.jsonl"
    rows = online.rows(
        {"type": "jsonl", "download_url": f"{site.url}/gone", "url": address, "path": address}
    )
    assert [row.prompt for row in rows] == ["x"]
    assert rows.params["path"] == str(online.root / "attempt/.inputs/data/rows.jsonl")
    assert site.tokens == [f"Bearer {TOKEN}"] * 2


def test_jsonl_needs_little_memory_however_long_it_is(bench: Bench, tmp_path: Path) -> None:
    line = json.dumps({"prompt": "x" * 1000}) + "\n"
    path = _write(tmp_path / "big.jsonl", line * 30_000)
    rows = bench.rows(
        {"type": "jsonl", "path": str(path)}, shard={"index": 1, "total": 2, "contiguous": True}
    )
    tracemalloc.start()
    try:
        assert sum(1 for _ in rows) == 15_000
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
RECORDS = st.lists(
    st.fixed_dictionaries({"prompt": TEXT}, optional={"id": st.integers(), "note": TEXT}),
    max_size=30,
)


@given(records=RECORDS, ascii_only=st.booleans(), gap=st.sampled_from(["", "\n", "  \n"]))
def test_jsonl_gives_back_what_was_written(
    records: list[dict[str, Any]], ascii_only: bool, gap: str
) -> None:
    lines = (json.dumps(record, ensure_ascii=ascii_only) + "\n" + gap for record in records)
    with tempfile.TemporaryDirectory() as folder:
        path = _write(Path(folder) / "rows", "".join(lines))
        source = RowSource(kind="jsonl", params={"path": str(path)})
        assert list(source.records()) == records
        assert [row.prompt for row in source] == [record["prompt"] for record in records]
        assert source.count() == len(records)


@pytest.mark.parametrize("kind", ["list", "jsonl"])
@given(
    size=st.integers(0, 25),
    total=st.integers(1, 9),
    contiguous=st.booleans(),
    limit=st.none() | st.integers(0, 30),
)
def test_shards_of_a_source_are_disjoint_and_cover_it(
    kind: str, size: int, total: int, contiguous: bool, limit: int | None
) -> None:
    prompts = [f"p{i}" for i in range(size)]
    expected = list(enumerate(prompts))[:limit]
    with tempfile.TemporaryDirectory() as folder:
        whole = RowSource.from_prompts(prompts)
        if kind == "jsonl":
            path = _jsonl(Path(folder) / "r", *({"prompt": prompt} for prompt in prompts))
            whole = RowSource(kind="jsonl", params={"path": str(path)})
        shards = [
            attrs.evolve(
                whole, limit=limit, shard_index=i, shard_total=total, contiguous=contiguous
            )
            for i in range(total)
        ]
        parts = [[(row.index, row.prompt) for row in shard] for shard in shards]
        assert [shard.count() for shard in shards] == [len(part) for part in parts]
    assert sorted(row for part in parts for row in part) == expected
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    if contiguous:
        assert [row for part in parts for row in part] == expected


def test_shard_of_the_document_is_applied_once(bench: Bench) -> None:
    items = [f"p{i}" for i in range(5)]
    data = {
        "type": "list",
        "items": items,
        "max_samples": 4,
        "metadata": [{"i": i} for i in range(5)],
    }
    rows = bench.rows(data, shard={"index": 1, "total": 2, "contiguous": False})
    again = RowSource.from_dict(json.loads(json.dumps(rows.to_dict())))
    assert again == rows
    assert [(row.index, row.prompt, row.metadata) for row in again] == [
        (1, "p1", {"i": 1}),
        (3, "p3", {"i": 3}),
    ]


HAS_DATASETS = importlib.util.find_spec("datasets") is not None


@pytest.mark.skipif(HAS_DATASETS, reason="the package datasets is installed")
def test_dataset_without_its_library_says_how_to_get_it(bench: Bench) -> None:
    rows = bench.rows({"type": "dataset", "url": "org/name"})
    with pytest.raises(ExecutorUnavailableError, match="run: pip install datasets") as caught:
        list(rows)
    assert caught.value.needs == ("datasets",)


@pytest.mark.skipif(not HAS_DATASETS, reason="needs the package datasets")
@pytest.mark.parametrize("buffer_size", [None, 4])
def test_dataset_is_read_shuffled_and_shared_out(
    bench: Bench, tmp_path: Path, buffer_size: int | None
) -> None:
    path = _jsonl(tmp_path / "r.jsonl", *({"text": f"t{i}", "label": i} for i in range(10)))
    data = {
        "type": "dataset",
        "url": str(path),
        "shuffle": True,
        "metadata_columns": ["label"],
        "buffer_size": buffer_size,
    }
    parts = [list(bench.rows(data, shard={"index": i, "total": 3})) for i in range(3)]
    rows = [row for part in parts for row in part]
    assert [len(part) for part in parts] == [4, 3, 3]
    assert [row.index for row in rows] == list(range(10))
    assert sorted(str(row.prompt) for row in rows) == [f"t{i}" for i in range(10)]
    assert all(row.prompt == f"t{row.metadata['label']}" for row in rows)


class _Recorder:
    """Stands for the library, which this environment may lack: keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}

    def load_dataset(self, **arguments: Any) -> _Recorder:
        self.asked = arguments
        return self

    def shuffle(self, **arguments: Any) -> _Recorder:
        self.asked["shuffle"] = arguments
        return self

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from ({"text": f"t{i}", "prompt": "no", "id": i} for i in range(3))


@pytest.mark.parametrize(
    ("extra", "asked"),
    [
        ({}, {"split": "train"}),
        ({"name": "en", "split": "test", "revision": "v1"}, None),
        ({"shuffle": True}, {"split": "train", "shuffle": {"seed": 42}}),
        (
            {"shuffle": True, "seed": 1, "buffer_size": 9},
            {"split": "train", "streaming": True, "shuffle": {"seed": 1, "buffer_size": 9}},
        ),
    ],
)
def test_dataset_fields_reach_the_library(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any], asked: Any
) -> None:
    library = _Recorder()
    monkeypatch.setitem(sys.modules, "datasets", library)
    rows = list(bench.rows({"type": "dataset", "url": "org/name", **extra}))
    assert library.asked == {"path": "org/name", **(extra if asked is None else asked)}
    assert [(row.prompt, row.metadata) for row in rows] == [("t0", {}), ("t1", {}), ("t2", {})]


@pytest.mark.parametrize(
    ("extra", "metadata"),
    [
        ({"metadata_include_all": True}, {"prompt": "no", "id": 0}),
        ({"metadata_columns": {"id": "n"}}, {"n": 0}),
        ({"metadata_columns": {"id": "n"}, "metadata_include_all": True}, {"prompt": "no", "n": 0}),
    ],
)
def test_dataset_keeps_no_columns_but_those_asked_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any], metadata: Any
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", _Recorder())
    rows = bench.rows({"type": "dataset", "url": "org/name", **extra})
    assert next(iter(rows)).metadata == metadata


# Models.


def test_hub_id_without_a_file_is_left_to_the_engine(bench: Bench) -> None:
    assert bench.model({"identifier": "org/name", "revision": "v1"}) == ModelRef(
        identifier="org/name", hub_id="org/name", revision="v1", format="hf"
    )


def test_task_that_names_no_model_gets_the_operators(bench: Bench) -> None:
    assert bench.model(None, default_identifier="gpt2").hub_id == "gpt2"
    with pytest.raises(InputError, match=r"spec\.model\.source: identifier is required"):
        bench.model(None)


@pytest.mark.parametrize("revision", ["main", "v1", "0123abcd"])
def test_file_of_the_hub_is_found_in_its_cache(bench: Bench, revision: str) -> None:
    repository = bench.root / "hub" / "models--org--name"
    path = _write(repository / "snapshots" / "0123abcd" / "sub" / "m.gguf", "weights")
    _write(repository / "refs" / "main", "0123abcd\n")
    _write(repository / "refs" / "v1", "0123abcd")
    model = bench.model(
        {"identifier": "org/name", "file": "sub/m.gguf", "revision": revision}, offline=True
    )
    assert (model.path, model.format, model.hub_id) == (path, "gguf", "org/name")


def test_file_that_the_cache_lacks_is_an_error_that_says_what_to_do(bench: Bench) -> None:
    with pytest.raises(InputError, match=r"worker is offline; download the file .* type: file"):
        bench.model({"identifier": "org/name", "file": "m.gguf"}, offline=True)


def test_file_of_the_hub_is_downloaded_once(bench: Bench, site: Site) -> None:
    # The hub itself is out of reach here, so its address leads to the site.
    _write(site.folder / "org/name/resolve/main/sub/m.gguf", "weights")
    asked = []

    class Mirror(Fetcher):
        def download(self, url: str, folder: Path, **options: Any) -> Path:
            asked.append(url)
            return super().download(
                url.replace("https://huggingface.co", site.url), folder, **options
            )

    bench.fetcher = Mirror(policy=NetworkPolicy(), results_dir=bench.root)
    for _ in range(2):
        model = bench.model({"identifier": "org/name", "file": "sub/m.gguf"})
        assert model.path is not None
        assert model.path.read_text() == "weights"
    assert asked == ["https://huggingface.co/org/name/resolve/main/sub/m.gguf"]


def test_hub_that_refuses_names_the_library_that_can_log_in(bench: Bench) -> None:
    bench.fetcher = _fetcher(bench.root, allow=("nowhere.invalid",))
    with pytest.raises(InputError, match=r"host huggingface.co is not among those"):
        bench.model({"identifier": "org/name", "file": "m.gguf"})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"identifier": "/no/such/folder"}, "is no file or folder here, nor a hub id"),
        ({"identifier": "a/b/c"}, "nor a hub id"),
        ({"identifier": "org/..name"}, "nor a hub id"),
        ({"identifier": "org/name", "file": "../x"}, "file must stay inside its folder"),
        ({"identifier": "o/n", "file": "x", "revision": "../.."}, "revision must stay inside"),
        ({"type": "file"}, "path is required when type is 'file'"),
        (
            {"type": "file", "path": "/no/m.gguf"},
            "'/no/m.gguf' is no file or folder on this worker",
        ),
        ({"type": "local", "path": "a\0b"}, "is no file or folder on this worker"),
        ({"type": "local", "path": "x" * 5000}, "is no file or folder on this worker"),
        ({"type": "task"}, "taskId is required when type is 'task'"),
        ({"type": "s3"}, "type must be one of file, folder, .*package, task, got 's3'"),
        ({"type": "package"}, "package must be the import name of a package, got ''"),
        ({"type": "package", "package": "os.path"}, "must be the import name"),
        (
            {"type": "package", "package": "llm_nowhere"},
            "'llm_nowhere' is not installed here; run: pip install --no-deps llm-nowhere$",
        ),
        ({"identifier": 5}, r"spec\.model\.source\.identifier must be a string, got 5"),
        (
            {"identifier": "org/name", "trust_remote_code": True},
            "trust_remote_code runs code .* does not allow",
        ),
    ],
)
def test_model_that_cannot_be_had_says_why(
    bench: Bench, source: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=f"^task t1: .*{message}"):
        bench.model(source)


def test_code_of_a_repository_runs_only_when_both_agree(bench: Bench) -> None:
    asking = {"identifier": "org/name", "trust_remote_code": True}
    assert bench.model(asking, trust_remote_code=True).trust_remote_code
    assert not bench.model({"identifier": "org/name"}, trust_remote_code=True).trust_remote_code


def test_weights_of_a_package_are_found_without_importing_it(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llm_tiny"
    _write(package / "__init__.py", "raise RuntimeError('imported')")
    path = _write(package / "Tiny.Q4.gguf")
    monkeypatch.syspath_prepend(str(tmp_path))
    source = {"type": "package", "package": "llm_tiny", "file": "Tiny.Q4.gguf"}
    for block in (source, {"type": "package", "package": "llm_tiny"}):
        model = bench.model(block)
        assert model == ModelRef(identifier="llm_tiny/Tiny.Q4.gguf", path=path, format="gguf")
        assert detect_model_format(block) == "gguf"
    with pytest.raises(InputError, match=r"has no 'Big.gguf'; it has Tiny.Q4.gguf"):
        bench.model({**source, "file": "Big.gguf"})
    with pytest.raises(InputError, match=r"file must stay inside its folder, got '../x'"):
        bench.model({**source, "file": "../x"})
    _write(package / "Second.gguf")
    with pytest.raises(InputError, match=r"holds no single .gguf file; name one in file"):
        bench.model({"type": "package", "package": "llm_tiny"})


def test_a_package_may_come_and_go_while_a_worker_runs(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    source = {"type": "package", "package": "llm_later"}
    with pytest.raises(InputError, match=r"package 'llm_later' is not installed here"):
        bench.model(source)
    path = _write(tmp_path / "llm_later" / "Tiny.Q4.gguf")
    importlib.invalidate_caches()
    assert bench.model(source).path == path
    shutil.rmtree(path.parent)
    with pytest.raises(InputError, match=r"package 'llm_later' is not installed here"):
        bench.model(source)


@pytest.mark.parametrize("kind", ["folder", "local", "hub", "huggingface", "hf"])
def test_local_folder_is_a_model_under_any_kind_that_takes_paths(
    bench: Bench, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "model"
    _write(folder / "config.json", "{}")
    _write(folder / "extra.gguf")
    model = bench.model({"type": kind, "identifier": str(folder)})
    assert model == ModelRef(identifier=str(folder), path=folder, format="hf")
    chosen = bench.model({"type": kind, "identifier": str(folder), "file": "extra.gguf"})
    assert (chosen.path, chosen.format) == (folder / "extra.gguf", "gguf")


def test_folder_with_a_single_gguf_means_that_file(bench: Bench, tmp_path: Path) -> None:
    path = _write(tmp_path / "model" / "m.gguf")
    model = bench.model({"type": "folder", "path": str(path.parent), "identifier": "mine"})
    assert model == ModelRef(identifier="mine", path=path, format="gguf")


def test_earlier_task_can_be_the_model(bench: Bench) -> None:
    folder = bench.task("earlier", "final_model/config.json")
    model = bench.model({"type": "task", "taskId": "earlier"})
    assert model == ModelRef(identifier="task earlier", path=folder / "final_model", format="hf")


def test_kind_of_a_plugin_is_called_with_the_block(bench: Bench, tmp_path: Path) -> None:
    path = _write(tmp_path / "m.gguf")
    calls = []

    def resolver(source: Mapping[str, Any], *, offline: bool) -> str:
        calls.append((source["bucket"], offline))
        return str(path)

    source = {"type": "s3", "bucket": "b", "identifier": "x"}
    model = bench.model(source, sources={"s3": resolver}, offline=True)
    assert model == ModelRef(identifier="x", path=path, format="gguf")
    assert calls == [("b", True)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"identifier": "org/name"}, "hf"),
        ({"type": "hf", "identifier": "org/name", "file": "m.gguf"}, "gguf"),
        ({"identifier": "org/name", "filename": "m.gguf"}, "gguf"),
        ({"identifier": "/elsewhere/m.gguf"}, "gguf"),
        ({"type": "file", "path": "/elsewhere/m.gguf"}, "gguf"),
        ({"type": "folder", "path": "/elsewhere/model"}, ""),
        ({"type": "task", "taskId": "t"}, ""),
        ({"type": "s3", "identifier": "x"}, ""),
        ({"type": "package", "package": "llm_nowhere"}, ""),
        ({"type": "package", "package": "no.name"}, ""),
        ({"identifier": None}, ""),
        ({"identifier": 5}, ""),
        ({}, ""),
    ],
)
def test_format_is_told_from_the_block_alone(source: dict[str, Any], expected: str) -> None:
    assert detect_model_format(source) == expected


def test_format_of_local_folders_is_looked_up(tmp_path: Path) -> None:
    _write(tmp_path / "hf" / "config.json")
    _write(tmp_path / "one" / "m.gguf")
    _write(tmp_path / "two" / "a.gguf")
    _write(tmp_path / "two" / "b.gguf")
    found = {
        name: detect_model_format({"type": "folder", "path": str(tmp_path / name)})
        for name in ("hf", "one", "two")
    }
    assert found == {"hf": "hf", "one": "gguf", "two": ""}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"HF_HUB_CACHE": "/c", "HF_HOME": "/h"}, "/c"),
        ({"HF_HOME": "/h"}, "/h/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({}, "~/.cache/huggingface/hub"),
    ],
)
def test_hub_cache_lies_where_its_library_puts_it(environ: dict[str, str], expected: str) -> None:
    assert hub_cache_folder(environ) == Path(expected).expanduser()


# Checkpoints.


def test_path_that_exists_wins_whatever_the_type(bench: Bench, tmp_path: Path) -> None:
    bench.task("earlier", "final_model/config.json")
    path = _write(tmp_path / "mine" / "model.safetensors")
    other = {"taskId": "earlier", "url": "http://127.0.0.1:9/x"}
    assert bench.checkpoint(type="http", path=str(path), **other) == path
    assert bench.checkpoint(type="local", uri=str(path.parent)) == path.parent


def test_task_comes_before_the_url(bench: Bench) -> None:
    folder = bench.task("earlier", "final_model/config.json")
    found = bench.checkpoint(path="/not/here", taskId="earlier", url="http://127.0.0.1:9/x")
    assert found == folder / "final_model"


@pytest.mark.parametrize(
    "name",
    [
        "final_model/config.json",
        "final_lora/adapter_config.json",
        "checkpoints/final_model/config.json",
        "checkpoints/final_lora/adapter_config.json",
        "final_model.bin",
        "final_model.safetensors",
        "final_model.pt",
    ],
)
def test_weights_are_found_wherever_a_trainer_leaves_them(bench: Bench, name: str) -> None:
    folder = bench.task("earlier", name, "responses.json", "checkpoints/checkpoint-5/x", "logs/y")
    file = folder / name
    assert bench.checkpoint(task_id="earlier") == (
        file if name.startswith("final_model.") else file.parent
    )


@pytest.mark.parametrize("name", ["final_model.tar.gz", "checkpoints/final_lora.tgz"])
def test_archive_of_a_task_is_unpacked_when_the_folder_is_gone(bench: Bench, name: str) -> None:
    _tar(bench.root / "results/earlier" / name, "final/config.json")
    found = bench.checkpoint(task_id="earlier")
    assert found == bench.root / "attempt/.inputs/checkpoint/extracted/final"
    assert (found / "config.json").read_text() == "final/config.json"


def test_archive_beside_its_own_folder_is_no_second_candidate(bench: Bench) -> None:
    folder = bench.task("earlier", "final_model/config.json")
    _tar(folder / "final_model.tar.gz", "final_model/config.json")
    assert bench.checkpoint(task_id="earlier") == folder / "final_model"


def test_several_candidates_are_listed_and_one_can_be_chosen(bench: Bench) -> None:
    folder = bench.task("earlier", "final_model/config.json", "final_lora/adapter_config.json")
    message = "task earlier holds final_model and final_lora; name one of them in subdir"
    with pytest.raises(InputError, match=message):
        bench.checkpoint(task_id="earlier")
    assert bench.checkpoint(task_id="earlier", subdir="final_lora") == folder / "final_lora"


def test_task_folder_itself_is_never_the_checkpoint(bench: Bench) -> None:
    bench.task("earlier", "responses.json", "config.json")
    with pytest.raises(
        InputError, match=r"task earlier holds none of final_model, .*; to bring it"
    ):
        bench.checkpoint(task_id="earlier")


@pytest.mark.parametrize(
    ("load", "message"),
    [
        ({}, r"spec\.checkpoint\.load: one of path, taskId, url is required"),
        ({"path": "/not/here"}, "path '/not/here' does not exist on this worker"),
        (
            {"taskId": "gone"},
            r"task gone has no results here; .*ORCHESTRATOR_BASE_URL\) are needed",
        ),
        ({"taskId": "../x"}, "task_id must be a plain name"),
        ({"type": "s3", "path": "x"}, "type must be local or http, got 's3'"),
        ({"url": "file:///etc/passwd"}, "must be an http:// or https:// URL"),
        ({"url": "http://169.254.169.254/"}, "link-local or metadata"),
        ({"url": "x", "archive_format": "rar"}, r"spec\.checkpoint\.load\.archive_format must be"),
        ({"timeoutSec": 0}, r"spec\.checkpoint\.load\.timeout_?s?.* must be greater than 0"),
    ],
)
def test_checkpoint_that_cannot_be_had_is_an_error_and_never_the_base_model(
    bench: Bench, load: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=f"^task t1: .*{message}"):
        bench.checkpoint(**load)


def test_checkpoint_of_another_worker_comes_from_the_orchestrator_with_its_token(
    online: Bench, site: Site
) -> None:
    files = site.folder / "api/v1/results/earlier/files"
    _tar(files / "final_model.tar.gz", "final_model/config.json", "final_model/w.safetensors")
    found = online.checkpoint(type="http", taskId="earlier", filename="final_model.tar.gz")
    assert sorted(path.name for path in found.iterdir()) == ["config.json", "w.safetensors"]
    assert found.name == "final_model"
    assert site.tokens == [f"Bearer {TOKEN}"]


def test_base_url_of_the_document_gets_no_token(online: Bench, site: Site) -> None:
    _tar(site.folder / "api/v1/results/e/files/m.tar.gz", "m/config.json")
    elsewhere = site.url.replace("127.0.0.1", "localhost")
    online.checkpoint(type="http", task_id="e", filename="m.tar.gz", base_url=elsewhere)
    assert site.tokens == [None]


def test_file_name_on_the_orchestrator_cannot_climb(online: Bench) -> None:
    with pytest.raises(InputError, match="filename must stay inside its folder"):
        online.checkpoint(type="http", task_id="e", filename="../../../other")


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, "extracted/top"),
        ({"subdir": "top/inner"}, "extracted/top/inner"),
        ({"archive_format": "tar.gz"}, "extracted/top"),
        ({"archive_format": "none"}, "m.bin"),
        ({"archive_format": "none", "filename": "../other.bin"}, "other.bin"),
    ],
)
def test_downloaded_archive_is_entered_as_the_document_says(
    online: Bench, site: Site, extra: dict[str, Any], expected: str
) -> None:
    _tar(site.folder / "m.bin", "top/inner/config.json")
    found = online.checkpoint(type="http", url=f"{site.url}/m.bin", **extra)
    assert found == online.root / "attempt/.inputs/checkpoint" / expected


def test_archive_with_several_entries_is_its_own_root(online: Bench, site: Site) -> None:
    _tar(site.folder / "m.tar", "config.json", "w.bin")
    assert online.checkpoint(url=f"{site.url}/m.tar").name == "extracted"


def test_zip_is_recognised_and_saved_torch_weights_stay_whole(online: Bench, site: Site) -> None:
    for name, member in (("m.zip", "m/config.json"), ("m.pt", "archive/data.pkl")):
        with zipfile.ZipFile(site.folder / name, "w") as archive:
            archive.writestr(member, "x")
    assert online.checkpoint(url=f"{site.url}/m.zip").name == "m"
    assert online.checkpoint(url=f"{site.url}/m.pt").name == "m.pt"


@pytest.mark.parametrize("subdir", ["../..", "/etc"])
def test_subdir_cannot_climb(online: Bench, site: Site, subdir: str) -> None:
    _tar(site.folder / "m.tar", "top/config.json")
    with pytest.raises(InputError, match="subdir must stay inside its folder"):
        online.checkpoint(url=f"{site.url}/m.tar", subdir=subdir)


def test_task_without_a_checkpoint_has_none(bench: Bench) -> None:
    for block in ({}, {"checkpoint": None}, {"checkpoint": {"load": None}}):
        assert bench.resolve("checkpoint", block).checkpoint is None


# Adapters.


def test_adapters_come_from_paths_urls_and_tasks(online: Bench, site: Site) -> None:
    local = _write(online.root / "lora" / "adapter_config.json").parent
    task = online.task("earlier", "final_lora/adapter_config.json", "final_model/config.json")
    _tar(site.folder / "a.tar.gz", "deep/er/adapter_config.json", "deep/a.txt")
    remote = site.folder / "api/v1/results/far/files/final_lora.tar.gz"
    _tar(remote, "final_lora/adapter_config.json")
    found = online.adapters(
        {"path": str(local), "scale": 0.5, "apply": "merge"},
        {"name": "b", "url": f"{site.url}/a.tar.gz", "headers": {"X-A": "1"}},
        {"taskId": "earlier"},
        {"task_id": "far"},
    )
    inputs = online.root / "attempt/.inputs/adapters"
    assert found == (
        AdapterRef(name="lora_0", path=local, scale=0.5, apply="merge"),
        AdapterRef(name="b", path=inputs / "b/extracted/deep/er"),
        AdapterRef(name="lora_2", path=task / "final_lora"),
        AdapterRef(name="lora_3", path=inputs / "lora_3/extracted/final_lora"),
    )


def test_gguf_adapter_is_a_file_or_the_only_one_of_a_folder(bench: Bench, tmp_path: Path) -> None:
    path = _write(tmp_path / "lora" / "a.gguf")
    found = bench.adapters({"path": str(path)}, {"path": str(path.parent)})
    assert [adapter.path for adapter in found] == [path, path]


def test_shallowest_adapter_is_the_root(bench: Bench, tmp_path: Path) -> None:
    for place in ("a/deep", "m", "z/deep"):
        _write(tmp_path / "x" / place / "adapter_config.json")
    assert bench.adapters({"path": str(tmp_path / "x")})[0].path == tmp_path / "x/m"


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ([{"path": "x", "name": "../../.."}], "name must be a plain name of its own, got '../"),
        ([{"path": "x", "name": "a/b"}], "plain name of its own, got 'a/b'"),
        ([{"path": "x", "name": "a"}, {"path": "y", "name": "a"}], "of its own, got 'a'"),
        ([{"path": "x", "type": "ia3"}], "adapter 'lora_0': type must be lora, got 'ia3'"),
        ([{"path": "/not/here"}], r"spec\.model\.adapters: .*'/not/here' does not exist"),
        ([{"name": "a"}], r"spec\.model\.adapters\[0\].*one of path, url, taskId is required"),
    ],
)
def test_adapter_that_cannot_be_used_is_named(
    bench: Bench, adapters: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        bench.adapters(*adapters)
    assert not (bench.root / "attempt").exists()


def test_folder_that_is_no_adapter_is_refused(bench: Bench, tmp_path: Path) -> None:
    _write(tmp_path / "model" / "config.json")
    with pytest.raises(InputError, match=r"adapter 'lora_0': .* hold adapter_config.json"):
        bench.adapters({"path": str(tmp_path / "model")})


# All together.


def test_only_what_is_wanted_is_gathered(bench: Bench) -> None:
    spec = {
        "data": {"type": "list", "items": ["a"]},
        "model": {"source": {"identifier": "/not/here"}},
        "_upstreamResults": {"one": {"x": 1}},
    }
    inputs = bench.resolve("rows", spec)
    assert inputs.model is None
    assert inputs.upstream == {"one": {"x": 1}}
    assert bench.resolve("", spec) == Inputs(upstream={"one": {"x": 1}})


def test_every_problem_is_told_at_once(bench: Bench) -> None:
    spec = {
        "data": {"type": "csv"},
        "model": {"source": {"identifier": "/not/here"}, "adapters": [{"path": "/nor/here"}]},
        "checkpoint": {"load": {"path": "/neither"}},
    }
    with pytest.raises(InputError, match=r"^task t1: ") as caught:
        bench.resolve("rows model adapters checkpoint", spec)
    text = str(caught.value)
    for field in ("data.type ", "model.source:", "model.adapters:", "checkpoint.load:"):
        assert text.count(f"spec.{field}") == 1
    assert not caught.value.retriable


def test_problem_that_two_inputs_share_is_told_once(bench: Bench) -> None:
    with pytest.raises(InputError, match="must be an object") as caught:
        bench.resolve("model adapters", {"model": 5})
    assert str(caught.value) == "task t1: spec.model must be an object, got 5"


def test_server_that_is_down_makes_the_task_worth_another_try(bench: Bench) -> None:
    with pytest.raises(InputError, match="could not be downloaded in 2 tries") as caught:
        bench.checkpoint(url="http://127.0.0.1:9/m.tar")
    assert caught.value.retriable


def test_executor_that_wants_something_unknown_is_told_so(bench: Bench) -> None:
    with pytest.raises(PluginError, match=r"inputs must be of .*rows, got weights"):
        bench.resolve("weights", {})


def test_a_url_that_is_a_path_of_this_machine_is_read_there(bench: Bench, tmp_path: Path) -> None:
    weights = _write(tmp_path / "final" / "a.gguf")
    inputs = bench.resolve("checkpoint", {"checkpoint": {"load": {"url": str(weights)}}})
    assert inputs.checkpoint == weights


@pytest.mark.parametrize(
    ("data", "records"),
    [
        ({"prompts": ["a", "b"]}, [{"prompt": "a"}, {"prompt": "b"}]),
        ({"prompts": [[{"role": "user", "content": "hi"}]]}, [{"messages": ANY}]),
        (
            {"preferences": [{"prompt": "p", "chosen": "c", "rejected": "r"}]},
            [{"prompt": "p", "chosen": "c", "rejected": "r"}],
        ),
        ({"examples": [{"q": 1, "a": [2]}]}, [{"q": 1, "a": [2]}]),
        ({"type": "records", "items": [{"x": 1}]}, [{"x": 1}]),
        ({"examples": [{"x": 1}, {"x": 2}, {"x": 3}], "max_samples": 2}, [{"x": 1}, {"x": 2}]),
    ],
)
def test_training_documents_carry_rows_of_any_shape(
    bench: Bench, data: dict[str, Any], records: list[dict[str, Any]]
) -> None:
    rows = bench.rows(data)
    assert list(rows.records()) == records
    assert rows.count() == len(records)


@pytest.mark.parametrize("form", ["jsonl", "jsonl_path", "text"])
def test_training_documents_name_a_jsonl_file(bench: Bench, tmp_path: Path, form: str) -> None:
    file = str(_jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"}, {"text": "c"}))
    forms: dict[str, Any] = {
        "jsonl": {"jsonl": {"path": file, "text_field": "text", "max_samples": 1}},
        "jsonl_path": {"jsonl_path": file, "max_samples": 1},
        "text": {"jsonl": file, "max_samples": 1},
    }
    rows = bench.rows(forms[form])
    assert list(rows.records()) == [{"text": "a"}]


def test_training_documents_bring_a_jsonl_file_from_a_url(online: Bench, site: Site) -> None:
    _jsonl(site.folder / "rows.jsonl", {"text": "from afar"})
    rows = online.rows({"jsonl": {"url": f"{site.url}/rows.jsonl", "timeoutSec": 5}})
    assert list(rows.records()) == [{"text": "from afar"}]


def test_records_answer_like_rows_of_a_file(bench: Bench) -> None:
    rows = bench.rows({"examples": [{"text": "a", "id": 7}], "metadata_columns": ["id"]})
    assert [(row.index, row.prompt, row.metadata) for row in rows] == [(0, "a", {"id": 7})]
    nameless = bench.rows({"examples": [{"text": "a"}, {"id": 7}]})
    with pytest.raises(InputError, match="row 1: a row needs one of prompt, text"):
        list(nameless)


def test_rows_that_are_named_twice_are_refused(bench: Bench) -> None:
    with pytest.raises(InputError, match="must name its rows once, got jsonl_path and prompts"):
        bench.rows({"prompts": ["a"], "jsonl_path": "a.jsonl"})


def test_data_without_rows_names_what_would_be_some(bench: Bench) -> None:
    with pytest.raises(InputError, match=r"spec\.data\.type must be .*jsonl_path, dataset_n"):
        bench.rows({"promts": ["a"]})


def test_rows_to_evaluate_on_are_a_block_of_their_own(bench: Bench, tmp_path: Path) -> None:
    held = _jsonl(tmp_path / "held.jsonl", {"text": "x"}, {"text": "y"})
    data = {"prompts": ["a", "b"], "eval": {"jsonl": {"path": str(held)}}}
    spec = {"data": data, "shard": {"index": 1, "total": 2}}
    inputs = bench.resolve("rows eval_rows", spec)
    assert inputs.rows is not None
    assert inputs.eval_rows is not None
    assert list(inputs.rows.records()) == [{"prompt": "b"}]
    assert list(inputs.eval_rows.records()) == [{"text": "x"}, {"text": "y"}]
    assert held in inputs.paths()
    moved = inputs.moved({held: Path("/there/held.jsonl")}).eval_rows
    assert moved is not None
    assert moved.path == Path("/there/held.jsonl")
    assert bench.resolve("eval_rows", {"data": {"prompts": ["a"]}}).eval_rows is None
    with pytest.raises(InputError, match=r"spec\.data\.eval must be a mapping, got str"):
        bench.resolve("eval_rows", {"data": {"prompts": ["a"], "eval": "held"}})


def test_further_models_are_found_where_the_document_names_them(
    bench: Bench, tmp_path: Path
) -> None:
    judge = tmp_path / "judge"
    _write(judge / "config.json", "{}")
    spec = {
        "reward_model": {"identifier": str(judge), "type": "sentiment"},
        "teacher": {"source": {"type": "folder", "path": str(judge)}},
        "embedding": {"model": str(judge)},
    }
    models = ["reward_model", "teacher", "embedding.model", "nobody.at_all"]
    inputs = bench.resolve("", spec, models=models)
    assert {name: model.path for name, model in inputs.models.items()} == {
        "reward_model": judge,
        "teacher": judge,
        "embedding.model": judge,
    }
    assert inputs.moved({judge: Path("/there")}).models["teacher"].path == Path("/there")
    assert inputs.moved({judge: Path("/there")}).models["embedding.model"].path == Path("/there")
    assert inputs.paths() == (judge, judge, judge)


def test_a_text_names_a_further_model_as_an_identifier_does(bench: Bench, tmp_path: Path) -> None:
    _write(tmp_path / "one.gguf")
    for text in ("org/name", "bert", str(tmp_path / "one.gguf")):
        found = [
            bench.resolve("", {"judge": judge}, models=["judge"], default_identifier="x").models
            for judge in (text, {"identifier": text}, {"source": {"identifier": text}})
        ]
        assert found[0] == found[1] == found[2]
        assert found[0]["judge"].identifier == text
        assert (found[0]["judge"].hub_id is None) == text.endswith(".gguf")


def test_a_further_model_that_cannot_be_found_is_named(bench: Bench) -> None:
    for block, problem in [
        ({"identifier": "/no/such"}, r"spec\.reward_model: identifier '/no/such' is no file"),
        ({"type": "sentiment"}, r"spec\.reward_model: identifier is required"),
        ("/no/such", r"spec\.reward_model: identifier '/no/such' is no file"),
        ("a:b", r"spec\.reward_model: identifier 'a:b' is no file or folder here, nor a hub id"),
        ("", r"spec\.reward_model: identifier is required"),
        (["gpt2"], r"spec\.reward_model: must be an identifier, or a mapping .* got \['gpt2'\]"),
    ]:
        with pytest.raises(InputError, match=problem):
            bench.resolve(
                "", {"reward_model": block}, models=["reward_model"], default_identifier="x"
            )


def test_relative_paths_hold_in_any_working_folder(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _jsonl(tmp_path / "a.jsonl", {"text": "a"})
    for name in ("model/config.json", "lora/adapter_config.json", "start/config.json"):
        _write(tmp_path / name, "{}")
    wanted = "rows eval_rows files model adapters checkpoint"
    spec = {
        "data": {"jsonl_path": "a.jsonl", "eval": {"dataset_name": "a.jsonl"}},
        "model": {"source": {"identifier": "model"}, "adapters": [{"path": "lora"}]},
        "checkpoint": {"load": {"path": "start"}},
        "judge": {"identifier": "model"},
        "embedding": {"model": "model"},
        "files": {"paths": ["a.jsonl"]},
    }
    paths = bench.resolve(wanted, spec, models=["judge", "embedding.model"]).paths()
    assert len(paths) == 8
    assert all(path.is_absolute() for path in paths)


def test_inputs_travel_as_json(bench: Bench, tmp_path: Path) -> None:
    lora = _write(tmp_path / "lora" / "a.gguf")
    spec = {
        "data": {"type": "list", "items": ["a", "b"], "eval": {"examples": [{"text": "c"}]}},
        "model": {"source": {"identifier": "org/name"}, "adapters": [{"path": str(lora)}]},
        "reward_model": {"identifier": "org/judge"},
        "checkpoint": {"load": {"path": str(lora)}},
        "_upstreamResults": {"one": {"x": 1}},
    }
    wanted = "rows eval_rows model adapters checkpoint"
    inputs = bench.resolve(wanted, spec, models=["reward_model"])
    assert inputs.checkpoint == lora
    assert Inputs.from_dict(json.loads(json.dumps(inputs.to_dict()))) == inputs
    assert Inputs.from_dict(json.loads(json.dumps(Inputs().to_dict()))) == Inputs()


def test_what_an_engine_was_loaded_from_shows_when_it_is_replaced(tmp_path: Path) -> None:
    folder, own = tmp_path / "model", tmp_path / "task" / ".inputs" / "checkpoint"
    for path in (folder, own):
        path.mkdir(parents=True)
        (path / "model.safetensors").write_bytes(b"old")
    merged = AdapterRef(name="m", path=tmp_path / "gone", apply="merge")
    inputs = Inputs(
        model=ModelRef(identifier="mine", path=folder), checkpoint=own, adapters=(merged,)
    )
    before = inputs.weights_state()
    (own / "model.safetensors").write_bytes(b"other")  # each task brings its own
    assert inputs.weights_state() == before
    (folder / "model.safetensors").write_bytes(b"newer")
    assert inputs.weights_state() != before
    assert Inputs().weights_state() == ""
    further = Inputs(models={"judge": ModelRef(identifier="judge", path=folder)})
    before = further.weights_state()
    (folder / "model.safetensors").write_bytes(b"the newest")
    assert further.weights_state() != before
