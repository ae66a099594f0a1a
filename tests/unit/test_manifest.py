from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowmesh_core.artifacts.manifest import Seen, build_manifest
from flowmesh_core.errors import ManifestError

NAMES = st.sampled_from(
    ["a.bin", "model", "logs", "artifacts", "responses.json", "manifest.json", ".inputs", "v1.5"]
)
LISTED = st.lists(
    st.sampled_from(["./a.bin ", "model/", "nope", "artifacts/x", ".inputs", " ", "."])
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "t1"
    for name in ("logs", "artifacts"):
        (folder / name).mkdir(parents=True)
    (folder / "responses.json").write_bytes(b'{"ok": true}')
    return folder


def listing(folder: Path, expected: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    manifest = build_manifest("t1", folder, expected=expected)
    entries = manifest["entries"]
    assert len({entry["name"] for entry in entries}) == len(entries), "an entry came twice"
    return {entry["name"]: entry for entry in entries}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def entry(
    name: str, kind: str, required: bool, state: dict[str, Any], **rest: Any
) -> dict[str, Any]:
    return {"name": name, "path": name, "type": kind, "required": required, **state, **rest}


def test_manifest_is_exactly_as_the_contract_has_it(folder: Path) -> None:
    (folder / "artifacts" / "sub").mkdir()
    (folder / "artifacts" / "sub" / "x").write_bytes(b"12345")
    (folder / "artifacts" / "y").write_bytes(b"678")
    (folder / "final_model").mkdir()
    (folder / "out.jsonl").write_bytes(b"{}\n")
    (folder / "manifest.json").write_bytes(b"an earlier one")
    manifest = build_manifest("t1", folder, expected=["logs/", "model.tar.gz"])
    now = manifest["generated_at"]
    here = {"status": "present", "updated_at": now}
    result = {"size": 12, "sha256": digest(b'{"ok": true}')}
    assert manifest == {
        "task_id": "t1",
        "generated_at": now,
        "entries": [
            entry("artifacts", "artifact", True, here, size=8, file_count=2),
            entry("logs", "logs", True, here, size=0, file_count=0),
            entry("model.tar.gz", "artifact", True, {"status": "missing"}),
            entry("responses.json", "result", True, here, **result),
            entry("final_model", "directory", False, here, size=0, file_count=0),
            entry("out.jsonl", "artifact", False, here, size=3, sha256=digest(b"{}\n")),
        ],
    }
    assert datetime.fromisoformat(now).utcoffset() == timedelta(0)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("responses.json", "result"),
        ("logs", "logs"),
        ("logs/run.txt", "logs"),
        ("artifacts", "artifact"),
        ("artifacts/deep/model", "artifact"),
        ("metrics.csv", "artifact"),
        ("v1.5/weights", "directory"),
        ("v1.5", "artifact"),
        ("final_model", "directory"),
    ],
)
def test_type_follows_from_the_name(folder: Path, name: str, kind: str) -> None:
    assert listing(folder, [name])[name]["type"] == kind


def test_expected_names_are_trimmed_and_listed_once(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"x")
    entries = listing(folder, [" ./a.bin", "a.bin", "./././a.bin ", "logs//", "", "  "])
    assert sorted(entries) == ["a.bin", "artifacts", "logs", "responses.json"]
    assert entries["a.bin"]["required"] is True


def test_a_nested_expected_file_is_hashed(folder: Path) -> None:
    (folder / "artifacts" / "model.bin").write_bytes(b"w" * 3_000_000)
    entry = listing(folder, ["artifacts/model.bin"])["artifacts/model.bin"]
    assert entry["size"] == 3_000_000
    assert entry["sha256"] == digest(b"w" * 3_000_000)


def test_a_digest_that_the_caller_knows_is_taken_over(folder: Path) -> None:
    manifest = build_manifest("t1", folder, seen=Seen(digests={"responses.json": "known"}))
    assert [e["sha256"] for e in manifest["entries"] if e["type"] == "result"] == ["known"]


def test_a_folder_that_the_caller_has_measured_is_not_walked_again(folder: Path) -> None:
    manifest = build_manifest("t1", folder, seen=Seen(sizes={"artifacts": (7, 2)}))
    entry = next(e for e in manifest["entries"] if e["name"] == "artifacts")
    assert (entry["size"], entry["file_count"]) == (7, 2)


@pytest.mark.parametrize("name", ["secret.txt", "keys", "artifacts/passwd", "artifacts/up/secret"])
def test_a_link_out_of_the_folder_counts_as_absent(folder: Path, name: str) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (folder / "secret.txt").symlink_to(outside / "secret")
    (folder / "keys").symlink_to(outside)
    (folder / "artifacts" / "passwd").symlink_to("/etc/passwd")
    (folder / "artifacts" / "up").symlink_to(outside)
    found = listing(folder, [name])[name]
    assert found == entry(name, found["type"], True, {"status": "missing"})
    unlisted = listing(folder)
    assert unlisted["secret.txt"]["status"] == "missing"
    assert (unlisted["artifacts"]["size"], unlisted["artifacts"]["file_count"]) == (0, 0)


@pytest.mark.parametrize("name", ["/etc/passwd", "../t1/responses.json", "..", "."])
def test_an_expected_path_out_of_the_folder_tells_nothing_of_it(folder: Path, name: str) -> None:
    assert listing(folder, [name])[name]["status"] == "missing"


def test_a_link_inside_the_folder_is_listed(folder: Path) -> None:
    (folder / "model-3").write_bytes(b"w")
    (folder / "latest").symlink_to("model-3")
    assert listing(folder)["latest"]["sha256"] == digest(b"w")


def test_links_in_circles_and_to_nothing_do_no_harm(folder: Path) -> None:
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "artifacts" / "again").symlink_to(folder)
    entries = listing(folder)
    assert [entries[name]["status"] for name in ("circle", "dangling")] == ["missing", "missing"]
    assert entries["artifacts"]["file_count"] == 0


def test_a_pipe_that_an_executor_left_blocks_nobody(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    os.mkfifo(folder / "artifacts" / "pipe")
    found: dict[str, Any] = {}
    thread = threading.Thread(target=lambda: found.update(listing(folder)), daemon=True)
    thread.start()
    thread.join(timeout=10)
    assert not thread.is_alive(), "the manifest waits for somebody to write to the pipe"
    assert "sha256" not in found["pipe"]
    assert found["artifacts"]["file_count"] == 0


def test_the_attempts_own_hidden_files_are_never_listed(folder: Path) -> None:
    (folder / ".inputs").mkdir()
    entries = listing(folder, [".inputs"])
    assert entries[".inputs"]["status"] == "missing", "it does not outlive the attempt"
    assert ".inputs" not in listing(folder)


def test_a_folder_that_is_gone_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"task t1: cannot list .*/gone"):
        build_manifest("t1", tmp_path / "gone")


@settings(max_examples=60, deadline=None)
@given(files=st.dictionaries(NAMES, st.binary(max_size=50)), expected=LISTED)
@example(files={}, expected=["nope"])
def test_required_come_first_and_each_list_is_sorted(
    files: dict[str, bytes], expected: list[str]
) -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        entries = build_manifest("t1", folder, expected=expected)["entries"]
    required = [entry["name"] for entry in entries if entry["required"]]
    others = [entry["name"] for entry in entries if not entry["required"]]
    assert [entry["name"] for entry in entries] == sorted(required) + sorted(others)
    assert {"artifacts", "logs", "responses.json"} <= set(required)
    for entry in entries:
        there = entry["name"] in files and not entry["name"].startswith(".")
        assert entry["status"] == ("present" if there else "missing")
        if there:
            assert entry["sha256"] == digest(files[entry["name"]])
            assert entry["size"] == len(files[entry["name"]])
