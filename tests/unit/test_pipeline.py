from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from flowmesh_core.artifacts import pipeline as pipeline_module
from flowmesh_core.artifacts.layout import Attempt, TaskFolders
from flowmesh_core.artifacts.manifest import build_manifest
from flowmesh_core.artifacts.pipeline import ArtifactPipeline
from flowmesh_core.config import Settings
from flowmesh_core.contract import Destination, Task, parse_task
from flowmesh_core.errors import ArtifactError, ContractError, UploadError
from flowmesh_core.executor import Artifact, Outcome
from flowmesh_core.stores.base import Store
from flowmesh_core.stores.local import LocalStore

ITEMS = [{"output": "a", "prompt": "p"}, {"output": "b", "prompt": "q"}]


class Shelf(Store):
    """Keeps what it is given, and notes whether the task was announced already."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.files: list[tuple[str, bytes]] = []
        self.delivered: list[Mapping[str, Any]] = []
        self.error: UploadError | None = None

    async def upload(
        self, task_id: str, path: Path, final: Path, destination: Destination
    ) -> dict[str, Any]:
        if self.error:
            raise self.error
        assert not final.exists(), "the task was committed before its files were shipped"
        self.files.append((path.name, path.read_bytes()))
        return {"url": f"shelf://{task_id}/{path.name}", "uploaded": True}

    async def deliver(
        self, task_id: str, result: Mapping[str, Any], destination: Destination
    ) -> None:
        self.delivered.append(result)


class Desk:
    """One task on its way from an outcome to a written folder."""

    def __init__(self, results: Path, store: Store, *, fsync: bool = False, **spec: Any) -> None:
        self.task: Task = parse_task({"spec": {"taskType": "x", **spec}}, task_id="t1")
        self.folders = TaskFolders(results)
        self.attempt: Attempt = self.folders.begin("t1", self.task.destination)
        self.pipeline = ArtifactPipeline(lambda _kind: store, fsync=fsync)

    def finish(self, result: Mapping[str, Any], *artifacts: Artifact) -> Mapping[str, Any]:
        fields: dict[str, Any] = {"result": result, "artifacts": artifacts}
        return asyncio.run(self.pipeline.finish(self.task, self.attempt, Outcome(**fields)))

    def read(self, name: str = "responses.json") -> Any:
        return json.loads((self.attempt.final / name).read_bytes())

    def assert_nothing_written(self) -> None:
        assert not (self.attempt.final / "responses.json").exists()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(results_dir=tmp_path)


@pytest.fixture
def local(settings: Settings) -> LocalStore:
    return LocalStore(settings)


@pytest.fixture
def shelf(settings: Settings) -> Shelf:
    return Shelf(settings)


@pytest.mark.parametrize("fsync", [False, True])
def test_a_result_is_written_with_a_manifest_that_knows_its_digest(
    tmp_path: Path, local: Store, fsync: bool
) -> None:
    desk = Desk(tmp_path, local, fsync=fsync)
    result = {"ok": True, "text": "grün", "n": [1, 2.5, None]}
    assert desk.finish(result) == result
    body = (tmp_path / "t1" / "responses.json").read_bytes()
    assert json.loads(body) == result
    assert "grün".encode() in body
    entries = {entry["name"]: entry for entry in desk.read("manifest.json")["entries"]}
    assert entries["responses.json"]["sha256"] == hashlib.sha256(body).hexdigest()
    assert entries["responses.json"]["size"] == len(body)


def test_nan_becomes_null_so_that_every_reader_can_read_it(tmp_path: Path, local: Store) -> None:
    desk = Desk(tmp_path, local)
    desk.finish({"loss": float("nan"), "best": float("inf")})
    assert desk.read() == {"loss": None, "best": None}


def test_a_result_that_is_not_json_names_task_and_place(tmp_path: Path, local: Store) -> None:
    desk = Desk(tmp_path, local)
    with pytest.raises(ArtifactError, match=r"task t1: the result is not JSON: items\[1\]\.image"):
        desk.finish({"items": [{}, {"image": object()}]})
    desk.assert_nothing_written()


def test_a_result_that_holds_itself_is_an_error_and_no_crash(tmp_path: Path, local: Store) -> None:
    circle: dict[str, Any] = {}
    circle["again"] = circle
    desk = Desk(tmp_path, local)
    with pytest.raises(ArtifactError, match="task t1: the result is not JSON"):
        desk.finish(circle)
    desk.assert_nothing_written()


def test_expected_artifacts_are_listed_and_not_uploaded(tmp_path: Path, shelf: Shelf) -> None:
    output = {"artifacts": ["model.bin", "absent.bin"]}
    desk = Desk(tmp_path, shelf, output=output)
    (desk.attempt.folder / "model.bin").write_bytes(b"weights")
    desk.finish({})
    entries = {entry["name"]: entry for entry in desk.read("manifest.json")["entries"]}
    assert entries["model.bin"]["required"] is True
    assert entries["model.bin"]["sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert entries["absent.bin"]["status"] == "missing"
    assert shelf.files == []


def test_local_export_has_an_address_that_a_later_stage_can_read(
    tmp_path: Path, local: Store
) -> None:
    export = {"jsonl_export": {"path": "artifacts/out.jsonl", "fields": {"text": "output"}}}
    desk = Desk(tmp_path, local, postprocess=export)
    written = desk.finish({"items": ITEMS})["jsonl_export"]
    assert desk.read()["jsonl_export"] == written
    path = str(tmp_path / "t1" / "artifacts" / "out.jsonl")
    assert written == {
        **dict.fromkeys(("path", "worker_path", "url", "download_url"), path),
        "relative_path": "artifacts/out.jsonl",
        "record_count": 2,
        "fields": ["text"],
    }
    assert Path(path).read_text() == '{"text": "a"}\n{"text": "b"}\n'


def test_export_without_items_says_what_it_needs(tmp_path: Path, local: Store) -> None:
    desk = Desk(tmp_path, local, postprocess={"jsonl_export": {"path": "o"}})
    with pytest.raises(ArtifactError, match=r"task t1: .*needs a result with items"):
        desk.finish({"echo": 1})
    desk.assert_nothing_written()


def test_export_that_cannot_be_read_names_the_key(tmp_path: Path, local: Store) -> None:
    desk = Desk(tmp_path, local, postprocess={"jsonl_export": {"path": "o", "feilds": {}}})
    with pytest.raises(ContractError, match=r"task t1: spec\.postprocess\.jsonl_export.*'fields'"):
        desk.finish({"items": ITEMS})


@pytest.mark.parametrize("post", [None, {}, {"jsonl_export": None}])
def test_an_empty_postprocess_does_nothing(tmp_path: Path, local: Store, post: Any) -> None:
    desk = Desk(tmp_path, local, postprocess=post)
    assert desk.finish({"a": 1}) == {"a": 1} == desk.read()


def test_what_the_store_tells_joins_the_result_under_the_artifacts_key(
    tmp_path: Path, shelf: Shelf
) -> None:
    desk = Desk(tmp_path, shelf, output={"destination": {"type": "shelf"}})
    (desk.attempt.folder / "a.bin").write_bytes(b"A")
    (desk.attempt.folder / "artifacts" / "b.bin").write_bytes(b"B")
    result = {"model": {"bytes": 1}, "ok": True}
    written = desk.finish(
        result, Artifact("a.bin", result_key="model"), Artifact("artifacts/b.bin")
    )
    told = {"bytes": 1, "url": "shelf://t1/a.bin", "uploaded": True}
    assert written == {"model": told, "ok": True} == desk.read()
    assert shelf.files == [("a.bin", b"A"), ("b.bin", b"B")]
    assert result == {"model": {"bytes": 1}, "ok": True}, "the executor's own result is untouched"


def test_a_named_artifact_that_was_not_written_fails_the_task(tmp_path: Path, shelf: Shelf) -> None:
    desk = Desk(tmp_path, shelf)
    with pytest.raises(ArtifactError, match=r"task t1: artifact model\.gguf was not written"):
        desk.finish({}, Artifact("model.gguf"))
    desk.assert_nothing_written()


def test_a_named_artifact_is_never_shipped_from_outside(tmp_path: Path, shelf: Shelf) -> None:
    desk = Desk(tmp_path / "results", shelf)
    (tmp_path / "secret").write_text("secret")
    (desk.attempt.folder / "model.gguf").symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match="must stay inside the task's folder"):
        desk.finish({}, Artifact("model.gguf"))
    assert shelf.files == []


def test_a_failed_upload_leaves_no_result_but_the_attempt(tmp_path: Path, shelf: Shelf) -> None:
    shelf.error = UploadError("the shelf is full")
    desk = Desk(tmp_path, shelf)
    (desk.attempt.folder / "a.bin").write_bytes(b"A")
    with pytest.raises(UploadError, match="the shelf is full"):
        desk.finish({}, Artifact("a.bin"))
    desk.assert_nothing_written()
    assert desk.folders.begin("t1", Destination()).previous == desk.attempt.folder


@pytest.mark.parametrize("name", ["responses.json", "manifest.json"])
def test_a_folder_in_the_results_place_is_an_error_that_may_pass(
    tmp_path: Path, local: Store, name: str
) -> None:
    desk = Desk(tmp_path, local)
    (desk.attempt.folder / name).mkdir()
    with pytest.raises(ArtifactError, match=rf"task t1: cannot write .*{name}") as caught:
        desk.finish({})
    assert caught.value.retriable
    desk.assert_nothing_written()


def test_an_executor_that_deleted_its_own_folder_is_told(tmp_path: Path, local: Store) -> None:
    desk = Desk(tmp_path, local)
    shutil.rmtree(desk.attempt.folder)
    with pytest.raises(ArtifactError, match="task t1: cannot write"):
        desk.finish({})


def test_long_writing_leaves_the_event_loop_and_short_writing_stays(
    tmp_path: Path, local: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    real = build_manifest

    def watched(*args: Any, **kwargs: Any) -> dict[str, Any]:
        threads.append(threading.current_thread())
        return real(*args, **kwargs)

    monkeypatch.setattr(pipeline_module, "build_manifest", watched)
    here = threading.current_thread()
    Desk(tmp_path / "short", local).finish({"a": 1})
    assert threads == [here]
    Desk(tmp_path / "large", local).finish({"a": "x" * 300_000})
    Desk(tmp_path / "synced", local, fsync=True).finish({})
    Desk(tmp_path / "listed", local, output={"artifacts": ["artifacts/big.bin"]}).finish({})
    beside = Desk(tmp_path / "beside", local)
    (beside.attempt.folder / "model.bin").write_bytes(b"x")
    beside.finish({})
    assert len(threads) == 5
    assert here not in threads[1:]


def test_local_delivery_asks_no_store_and_any_other_gets_the_result(
    tmp_path: Path, shelf: Shelf
) -> None:
    desk = Desk(tmp_path, shelf)
    asyncio.run(desk.pipeline.deliver(desk.task, {"a": 1}))
    assert shelf.delivered == []
    elsewhere = Desk(tmp_path, shelf, output={"destination": {"type": "shelf"}})
    asyncio.run(elsewhere.pipeline.deliver(elsewhere.task, {"a": 1}))
    assert shelf.delivered == [{"a": 1}]
