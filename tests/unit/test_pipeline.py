from __future__ import annotations

import asyncio
import hashlib
import io
import json
import shutil
import tarfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from flowmesh_core.artifacts import manifest as manifest_module
from flowmesh_core.artifacts import pipeline as pipeline_module
from flowmesh_core.artifacts.layout import Attempt, TaskFolders
from flowmesh_core.artifacts.manifest import build_manifest
from flowmesh_core.artifacts.parcel import Parcel, Receipt
from flowmesh_core.artifacts.pipeline import ArtifactPipeline
from flowmesh_core.config import Settings
from flowmesh_core.contract import Destination, Task, parse_task
from flowmesh_core.errors import ArchiveError, ArtifactError, ContractError, UploadError
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


class Vault(Shelf):
    """Reads a file as it grows, and can be told to fail or to give no proof."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.verified = True

    async def send(self, parcel: Parcel, destination: Destination) -> Receipt:
        if self.error:
            raise self.error
        assert not parcel.final.exists(), "the task was committed before its files were shipped"
        content = b"".join([block async for block in parcel.blocks()])
        await parcel.whole()
        self.files.append((parcel.path.name, content))
        told = {"url": f"vault://{parcel.task_id}/{parcel.path.name}", "uploaded": True}
        return Receipt(told=told, verified=self.verified)


class Desk:
    """One task on its way from an outcome to a written folder."""

    def __init__(
        self,
        results: Path,
        store: Store,
        *,
        options: Mapping[str, Any] | None = None,
        fsync: bool = False,
        **spec: Any,
    ) -> None:
        self.task: Task = parse_task({"spec": {"taskType": "x", **spec}}, task_id="t1")
        self.folders = TaskFolders(results)
        self.attempt: Attempt = self.folders.begin("t1", self.task.destination)
        self.pipeline = ArtifactPipeline(lambda _kind: store, fsync=fsync, **(options or {}))

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


@pytest.fixture
def vault(settings: Settings) -> Vault:
    return Vault(settings)


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


# Folders that are packed.

WEIGHTS = bytes(range(256)) * 9000
ELSEWHERE = {"destination": {"type": "vault"}}
MODEL = Artifact("final_model", archive=True)


def trained(desk: Desk, path: str = "final_model") -> None:
    folder = desk.attempt.folder / path
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "config.json").write_bytes(b"{}")
    step = desk.attempt.folder / "checkpoints" / "step-1"
    step.mkdir(parents=True)
    (step / "state.pt").write_bytes(b"state")


def names_in(archive: bytes | Path) -> set[str]:
    file = io.BytesIO(archive if isinstance(archive, bytes) else archive.read_bytes())
    with tarfile.open(fileobj=file) as tar:
        return set(tar.getnames())


MODEL_FILES = {"final_model", "final_model/config.json", "final_model/model.safetensors"}


def test_a_folder_is_shipped_packed_with_the_contracts_keys(tmp_path: Path, vault: Vault) -> None:
    desk = Desk(tmp_path, vault, output=ELSEWHERE)
    trained(desk)
    written = desk.finish({"ok": True}, MODEL)
    ((name, content),) = vault.files
    assert names_in(content) == MODEL_FILES
    local = tmp_path / "t1" / "final_model"
    assert written == desk.read()
    assert written == {
        "ok": True,
        "final_model_path": str(local),
        "final_model_archive": name,
        "final_model_archive_path": f"{local}.tar.gz",
        "final_model_archive_bytes": len(content),
        "final_model_archive_url": "vault://t1/final_model.tar.gz",
        "final_model_archive_uploaded": True,
    }
    assert Path(written["final_model_archive_path"]).read_bytes() == content
    assert Path(written["final_model_path"], "config.json").read_bytes() == b"{}"


def test_a_local_task_keeps_the_archive_beside_the_folder(tmp_path: Path, local: Store) -> None:
    desk = Desk(tmp_path, local)
    trained(desk, "final_lora")
    written = desk.finish({}, Artifact("final_lora", archive=True))
    archive = tmp_path / "t1" / "final_lora.tar.gz"
    assert names_in(archive) == {name.replace("model", "lora", 1) for name in MODEL_FILES}
    assert written == {
        "final_lora_path": str(tmp_path / "t1" / "final_lora"),
        "final_lora_archive": "final_lora.tar.gz",
        "final_lora_archive_path": str(archive),
        "final_lora_archive_bytes": archive.stat().st_size,
        "final_lora_archive_url": str(archive),
    }


@pytest.mark.parametrize(
    ("path", "key", "prefix"),
    [
        ("checkpoints/final_model/", "", "final_model"),
        ("checkpoints/step-1", "best", "best"),
    ],
)
def test_keys_begin_with_the_folders_name_or_the_one_that_is_asked_for(
    tmp_path: Path, vault: Vault, path: str, key: str, prefix: str
) -> None:
    desk = Desk(tmp_path, vault, output=ELSEWHERE)
    trained(desk, "checkpoints/final_model")
    written = desk.finish({}, Artifact(path, result_key=key, archive=True))
    assert set(written) == {
        *(f"{prefix}_{rest}" for rest in ("path", "archive", "archive_path")),
        *(f"{prefix}_archive_{rest}" for rest in ("bytes", "url", "uploaded")),
    }
    archive = tmp_path / "t1" / f"{path.rstrip('/')}.tar.gz"
    assert written[f"{prefix}_archive_path"] == str(archive)
    assert archive.is_file()


def test_what_was_hashed_on_the_way_is_not_hashed_again(
    tmp_path: Path, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_module, "_sha256", lambda path: f"hashed {path.name} again")
    listed = ["final_model/model.safetensors", "single.bin", "other.bin"]
    desk = Desk(tmp_path, vault, output={**ELSEWHERE, "artifacts": listed})
    trained(desk)
    for name in ("single.bin", "other.bin"):
        (desk.attempt.folder / name).write_bytes(b"one")
    desk.finish({}, MODEL, Artifact("./single.bin"))
    digests = {e["name"]: e.get("sha256") for e in desk.read("manifest.json")["entries"]}
    archive = (tmp_path / "t1" / "final_model.tar.gz").read_bytes()
    assert digests["final_model.tar.gz"] == hashlib.sha256(archive).hexdigest()
    assert digests["final_model/model.safetensors"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert digests["single.bin"] == hashlib.sha256(b"one").hexdigest()
    assert digests["other.bin"] == "hashed other.bin again"


def test_a_packed_folder_is_listed_as_it_was_measured_on_the_way(
    tmp_path: Path, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    walked: list[str] = []
    real = manifest_module._measure

    def watched(folder: str) -> tuple[int, int]:
        walked.append(Path(folder).name)
        return real(folder)

    monkeypatch.setattr(manifest_module, "_measure", watched)
    desk = Desk(tmp_path, vault, output=ELSEWHERE)
    trained(desk)
    desk.finish({}, MODEL)
    (entry,) = [e for e in desk.read("manifest.json")["entries"] if e["name"] == "final_model"]
    assert (entry["size"], entry["file_count"]) == real(str(tmp_path / "t1" / "final_model"))
    assert "final_model" not in walked


def test_a_failed_upload_keeps_folder_and_archive_in_the_attempt(
    tmp_path: Path, vault: Vault
) -> None:
    vault.error = UploadError("the vault is shut")
    desk = Desk(tmp_path, vault, output=ELSEWHERE, options={"cleanup_after_upload": True})
    trained(desk)
    with pytest.raises(UploadError, match="the vault is shut"):
        desk.finish({}, MODEL)
    desk.assert_nothing_written()
    assert names_in(desk.attempt.folder / "final_model.tar.gz") == MODEL_FILES
    assert (desk.attempt.folder / "checkpoints" / "step-1" / "state.pt").exists()


def test_an_optional_upload_that_fails_leaves_the_result_without_an_address(
    tmp_path: Path, vault: Vault, caplog: pytest.LogCaptureFixture
) -> None:
    vault.error = UploadError("the vault is shut")
    options = {"upload_optional": True, "cleanup_after_upload": True}
    desk = Desk(tmp_path, vault, output=ELSEWHERE, options=options)
    trained(desk)
    (desk.attempt.folder / "a.bin").write_bytes(b"A")
    written = desk.finish({}, MODEL, Artifact("a.bin", result_key="a"))
    assert set(written) == {
        *("final_model_path", "final_model_archive"),
        *("final_model_archive_path", "final_model_archive_bytes"),
    }
    assert names_in(Path(written["final_model_archive_path"])) == MODEL_FILES
    assert "task t1 goes on without: the vault is shut" in caplog.text


def test_a_folder_that_cannot_be_packed_says_so_and_is_not_sent(
    tmp_path: Path, vault: Vault
) -> None:
    desk = Desk(tmp_path, vault, output=ELSEWHERE)
    trained(desk)
    (desk.attempt.folder / "final_model" / "zz").symlink_to("/etc")
    with pytest.raises(ArchiveError, match="'zz' is a link that leads out of it"):
        desk.finish({}, MODEL)
    assert vault.files == []
    desk.assert_nothing_written()
    assert not (desk.attempt.folder / "final_model.tar.gz").exists()


@pytest.mark.parametrize(
    "artifact", [MODEL, Artifact("model.bin", archive=True), Artifact("checkpoints")]
)
def test_a_folder_for_a_file_or_a_file_for_a_folder_was_not_written(
    tmp_path: Path, vault: Vault, artifact: Artifact
) -> None:
    desk = Desk(tmp_path, vault, output=ELSEWHERE)
    (desk.attempt.folder / "checkpoints").mkdir()
    (desk.attempt.folder / "model.bin").write_bytes(b"x")
    with pytest.raises(
        ArtifactError, match=rf"task t1: artifact .*{artifact.path} was not written"
    ):
        desk.finish({}, artifact)


def test_a_folder_outside_is_never_packed(tmp_path: Path, vault: Vault) -> None:
    desk = Desk(tmp_path / "results", vault, output=ELSEWHERE)
    (tmp_path / "keys").mkdir()
    (desk.attempt.folder / "final_model").symlink_to(tmp_path / "keys")
    with pytest.raises(ArtifactError, match="must stay inside the task's folder"):
        desk.finish({}, MODEL)


def test_files_that_would_replace_each_other_at_the_destination_are_refused(
    tmp_path: Path, vault: Vault
) -> None:
    desk = Desk(tmp_path, vault, output=ELSEWHERE)
    trained(desk)
    trained_too = Artifact("checkpoints/final_model", archive=True)
    with pytest.raises(ArtifactError, match=r"several artifacts are named final_model\.tar\.gz"):
        desk.finish({}, MODEL, trained_too)


def test_a_store_that_knows_nothing_of_growing_files_gets_them_whole(
    tmp_path: Path, shelf: Shelf
) -> None:
    desk = Desk(tmp_path, shelf, output={"destination": {"type": "shelf"}})
    trained(desk)
    written = desk.finish({}, MODEL)
    ((name, content),) = shelf.files
    assert (name, names_in(content)) == ("final_model.tar.gz", MODEL_FILES)
    assert written["final_model_archive_url"] == "shelf://t1/final_model.tar.gz"


def test_progress_of_an_upload_is_told(tmp_path: Path, settings: Settings) -> None:
    class Talker(Vault):
        async def send(self, parcel: Parcel, destination: Destination) -> Receipt:
            parcel.on_sent(1)
            parcel.on_sent(2)
            receipt = await super().send(parcel, destination)
            parcel.on_sent(parcel.size_bytes or 0)
            return receipt

    told: list[tuple[str, Mapping[str, Any]]] = []
    options = {"on_progress": lambda task_id, values: told.append((task_id, values))}
    desk = Desk(tmp_path, Talker(settings), output=ELSEWHERE, options=options)
    trained(desk)
    size_bytes = desk.finish({}, MODEL)["final_model_archive_bytes"]
    assert [task_id for task_id, _ in told] == ["t1", "t1"]
    assert [values["sent_bytes"] for _, values in told] == [1, size_bytes]
    assert told[1][1]["message"] == "uploading final_model.tar.gz"


def test_a_task_that_is_given_up_stops_packing(tmp_path: Path, vault: Vault) -> None:
    desk = Desk(tmp_path, vault, output=ELSEWHERE)
    trained(desk)
    with (desk.attempt.folder / "final_model" / "large").open("wb") as file:
        file.truncate(8 << 30)

    async def give_up() -> None:
        outcome = Outcome(result={}, artifacts=[MODEL])
        finishing = asyncio.ensure_future(desk.pipeline.finish(desk.task, desk.attempt, outcome))
        while not (desk.attempt.folder / "final_model.tar.gz").exists():
            await asyncio.sleep(0.01)
        finishing.cancel()
        with pytest.raises(asyncio.CancelledError, match=r"^$"):
            await finishing

    started = time.monotonic()
    asyncio.run(give_up())
    assert time.monotonic() - started < 5
    assert not (desk.attempt.folder / "final_model.tar.gz").exists()
    assert vault.files == []


# Clearing away.


def clear(results: Path, store: Store, path: str = "final_model") -> tuple[Desk, Any]:
    options = {"cleanup_after_upload": True}
    desk = Desk(results, store, output=ELSEWHERE, options=options)
    trained(desk, path)
    return desk, desk.finish({}, Artifact(path, archive=True))


@pytest.mark.parametrize("path", ["final_model", "checkpoints/final_model"])
def test_what_a_store_verifiably_has_is_cleared_away(
    tmp_path: Path, vault: Vault, path: str
) -> None:
    desk, written = clear(tmp_path, vault, path)
    assert sorted(p.name for p in (tmp_path / "t1").iterdir()) == [
        *("artifacts", "logs", "manifest.json", "responses.json")
    ]
    assert set(written) == {
        *("final_model_archive", "final_model_archive_bytes"),
        *("final_model_archive_url", "final_model_archive_uploaded"),
    }
    assert {e["name"] for e in desk.read("manifest.json")["entries"]} == {
        *("artifacts", "logs", "responses.json")
    }
    assert names_in(vault.files[0][1]) == MODEL_FILES


def test_what_a_store_gives_no_proof_of_stays(tmp_path: Path, vault: Vault) -> None:
    vault.verified = False
    _desk, written = clear(tmp_path, vault)
    assert names_in(Path(written["final_model_archive_path"])) == MODEL_FILES
    assert (tmp_path / "t1" / "checkpoints" / "step-1" / "state.pt").exists()


def test_checkpoints_stay_when_no_model_was_shipped(tmp_path: Path, vault: Vault) -> None:
    options = {"cleanup_after_upload": True}
    desk = Desk(tmp_path, vault, output=ELSEWHERE, options=options)
    trained(desk)
    (desk.attempt.folder / "log.txt").write_bytes(b"x")
    desk.finish({}, Artifact("log.txt"))
    assert (tmp_path / "t1" / "checkpoints" / "step-1" / "state.pt").exists()
    assert (tmp_path / "t1" / "log.txt").exists()


def test_nothing_is_cleared_away_unless_the_operator_asks(tmp_path: Path, vault: Vault) -> None:
    desk = Desk(tmp_path, vault, output=ELSEWHERE)
    trained(desk)
    desk.finish({}, MODEL)
    assert {"final_model", "final_model.tar.gz", "checkpoints"} <= {
        path.name for path in (tmp_path / "t1").iterdir()
    }


@pytest.mark.parametrize("failing", ["encode", "write", "rename"])
def test_what_was_cleared_away_is_back_when_the_task_could_not_be_committed(
    tmp_path: Path, vault: Vault, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    desk = Desk(tmp_path, vault, output=ELSEWHERE, options={"cleanup_after_upload": True})
    trained(desk, "checkpoints/final_model")
    (desk.attempt.folder / ".cache").mkdir()
    if failing == "write":
        (desk.attempt.folder / "manifest.json").mkdir()
    if failing == "rename":
        desk.attempt.final.write_text("somebody's file")
    before = {p for p in desk.attempt.folder.rglob("*") if p.name != "responses.json"}
    result = {"image": object()} if failing == "encode" else {}
    with pytest.raises(ArtifactError, match=r"task t1: (cannot write|the result is not JSON)"):
        desk.finish(result, Artifact("checkpoints/final_model", archive=True))
    added = {p.name for p in set(desk.attempt.folder.rglob("*")) - before}
    assert added <= {"final_model.tar.gz", "responses.json", "manifest.json"}
    assert before <= set(desk.attempt.folder.rglob("*"))
    assert vault.files


def test_a_cleared_task_leaves_nothing_hidden(tmp_path: Path, vault: Vault) -> None:
    desk, _written = clear(tmp_path, vault)
    assert not [p for p in desk.attempt.final.rglob("*") if p.name.startswith(".")]
    assert [p.name for p in tmp_path.iterdir()] == ["t1"]
