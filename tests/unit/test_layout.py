from __future__ import annotations

import json
import os
import signal
import string
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowmesh_core.artifacts.layout import MANIFEST_NAME, RESULT_NAME, Attempt, TaskFolders, confine
from flowmesh_core.contract import Destination
from flowmesh_core.errors import ArtifactError, ContractError

HERE = Destination()
# Steps with which a path could try to leave: parents, links, roots, other spellings.
STEPS = st.sampled_from(
    [
        "..",
        ".",
        "",
        "a",
        "b",
        "t1",
        "out",
        "loop",
        "inside",
        ".workers",
        ".hid",
        "\0",
        "\ud800",
        "~",
    ]
)
PATHS = st.builds(
    lambda root, steps: root + "/".join(steps),
    st.sampled_from(["", "/", "{results}/", "{allowed}/", "{outside}/"]),
    st.lists(STEPS, max_size=6),
)
PLAIN = st.text(string.ascii_letters + string.digits + "-_", min_size=1, max_size=12)


class World:
    """A results folder full of links that lead elsewhere, an allowed folder, and the outside."""

    def __init__(self, root: Path) -> None:
        self.outside, self.allowed, self.results = (root / n for n in ("outside", "ok", "results"))
        for folder in (self.outside, self.allowed, self.results):
            folder.mkdir()
            (folder / "mark").write_text("kept")
        for folder in (self.allowed, self.results):
            (folder / "out").symlink_to(self.outside)
            (folder / "loop").symlink_to(folder / "loop")
            (folder / "inside").symlink_to(folder)
        self.folders = TaskFolders(self.results, [self.allowed])

    def fill(self, path: str) -> str:
        places = {"results": self.results, "allowed": self.allowed, "outside": self.outside}
        for name, place in places.items():
            path = path.replace(f"{{{name}}}", str(place))
        return path

    def assert_outside_untouched(self) -> None:
        assert sorted(entry.name for entry in self.outside.parent.iterdir()) == [
            *("ok", "outside", "results")
        ]
        assert [entry.name for entry in self.outside.iterdir()] == ["mark"]
        assert all((self.results / name).exists() for name in ("mark", "out", "inside"))


def strictly_within(path: Path, *roots: Path) -> bool:
    real = os.path.realpath(path)
    return any(real.startswith(os.path.realpath(root) + os.sep) for root in roots)


def begin(results: Path, task_id: str = "t1", destination: Destination = HERE) -> Attempt:
    return TaskFolders(results).begin(task_id, destination)


def write_whole(attempt: Attempt, text: str = "1") -> None:
    attempt.write(RESULT_NAME, f'{{"n": {text}}}'.encode())
    attempt.write(MANIFEST_NAME, text.encode())
    attempt.commit()


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@settings(max_examples=150, deadline=None)
@given(path=PATHS, task_id=st.sampled_from(["t1", "a", "results", "ok", "mark-2"]))
@example(path=".", task_id="results")
@example(path="..", task_id="results")
@example(path="{allowed}", task_id="ok")
@example(path="inside/out", task_id="t1")
@example(path=".t1.attempt-1", task_id="t1")
@example(path="loop", task_id="t1")
@example(path="a" * 300, task_id="t1")
def test_no_destination_path_writes_outside_the_allowed_folders(path: str, task_id: str) -> None:
    with tempfile.TemporaryDirectory() as root:
        world = World(Path(root))
        # Past the contract's own check of the text, which is not to be relied upon here.
        destination = Destination.model_construct(path=world.fill(path))
        try:
            attempt = world.folders.begin(task_id, destination)
        except (ContractError, ArtifactError):
            world.assert_outside_untouched()
            return
        for folder in (attempt.folder, attempt.final):
            assert strictly_within(folder, world.results, world.allowed)
        write_whole(attempt)
        world.assert_outside_untouched()
        assert (attempt.final / RESULT_NAME).is_file()
        assert attempt.final.name == task_id


@settings(max_examples=150, deadline=None)
@given(path=PATHS)
@example(path="")
@example(path=".")
@example(path="a/../../x")
def test_no_relative_path_leads_out_of_the_task_folder(path: str) -> None:
    with tempfile.TemporaryDirectory() as root:
        world = World(Path(root))
        try:
            found = confine(world.results, world.fill(path))
        except ArtifactError:
            return
        assert strictly_within(found, world.results)
        assert ".." not in found.parts


@pytest.mark.parametrize("path", ["a.jsonl", "./a.jsonl", "deep/er/a", "inside/a", "a/.b"])
def test_a_path_inside_the_task_folder_is_accepted(tmp_path: Path, path: str) -> None:
    (tmp_path / "inside").symlink_to(tmp_path)
    assert confine(tmp_path, path) == tmp_path / path


@pytest.mark.parametrize("path", ["../a", "/etc/a", "", "a/../b", ".inputs/a", "out/a"])
def test_a_path_that_leaves_or_does_not_last_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "out").symlink_to("/etc")
    with pytest.raises(ArtifactError, match="must stay inside the task's folder and not begin"):
        confine(tmp_path, path)


@given(task_id=PLAIN)
def test_plain_ids_keep_their_name_so_that_no_two_share_a_folder(task_id: str) -> None:
    with tempfile.TemporaryDirectory() as root:
        folders = TaskFolders(Path(root))
        assert folders.task_folder(task_id, HERE) == Path(root) / task_id
        assert folders.task_folder(task_id, Destination(path="deep/er")).name == task_id


@pytest.mark.parametrize("task_id", ["../x", "a/b", "", ".", "..", ".hidden", "a\0b", "/etc"])
def test_an_id_that_is_no_plain_name_never_becomes_a_folder(tmp_path: Path, task_id: str) -> None:
    with pytest.raises(ContractError, match="task_id must be a plain name"):
        begin(tmp_path / "results", task_id)
    assert names(tmp_path) == ["results"]
    assert names(tmp_path / "results") == []


def test_destination_path_gets_the_task_id_unless_it_ends_with_it(tmp_path: Path) -> None:
    folders = TaskFolders(tmp_path)
    assert folders.task_folder("t1", Destination(path="runs")) == tmp_path / "runs" / "t1"
    assert folders.task_folder("t1", Destination(path="runs/t1")) == tmp_path / "runs" / "t1"
    absolute = Destination(path=str(tmp_path / "x"))
    assert folders.task_folder("t1", absolute) == tmp_path / "x" / "t1"


def test_http_destination_ignores_its_path(tmp_path: Path) -> None:
    http = Destination(type="http", url="http://host/results", path="/etc")
    assert TaskFolders(tmp_path).task_folder("t1", http) == tmp_path / "t1"


def test_refused_destination_names_task_path_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        ContractError, match=r"task t1: .*destination\.path '/etc/x'.*FLOWMESH_ALLOWED_DIRS"
    ):
        begin(tmp_path, destination=Destination(path="/etc/x"))


def test_results_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"RESULTS_DIR .*file/results cannot be created"):
        TaskFolders(tmp_path / "file" / "results")


def test_a_task_folder_appears_whole(tmp_path: Path) -> None:
    attempt = begin(tmp_path)
    assert attempt.number == 1
    assert attempt.previous is None
    assert not attempt.final.exists()
    (attempt.folder / "artifacts" / "a.bin").write_bytes(b"x")
    write_whole(attempt)
    assert names(tmp_path) == ["t1"]
    assert names(tmp_path / "t1") == ["artifacts", "logs", MANIFEST_NAME, RESULT_NAME]
    assert (tmp_path / "t1" / "artifacts" / "a.bin").read_bytes() == b"x"


def test_a_failed_attempt_is_the_next_ones_previous_until_one_succeeds(tmp_path: Path) -> None:
    first = begin(tmp_path)
    (first.folder / "checkpoint").write_text("step 10")
    second = begin(tmp_path)
    third = begin(tmp_path)
    assert [a.number for a in (first, second, third)] == [1, 2, 3]
    assert second.previous == first.folder
    assert third.previous == second.folder
    assert (first.folder / "checkpoint").read_text() == "step 10"
    write_whole(third)
    assert names(tmp_path) == ["t1"]


def test_commit_replaces_what_an_earlier_run_left(tmp_path: Path) -> None:
    first = begin(tmp_path)
    (first.folder / "model").mkdir()
    (first.folder / "model" / "old.bin").write_text("old")
    (first.folder / "notes").write_text("a file first")
    write_whole(first, "1")
    again = begin(tmp_path)
    assert again.previous == tmp_path / "t1"
    assert again.number == 2
    (again.folder / "model").write_text("a file now")
    (again.folder / "notes").mkdir()
    write_whole(again, "2")
    assert names(tmp_path) == ["t1"]
    assert (tmp_path / "t1" / "model").read_text() == "a file now"
    assert (tmp_path / "t1" / "notes").is_dir()
    assert json.loads((tmp_path / "t1" / RESULT_NAME).read_bytes()) == {"n": 2}


def test_what_was_gathered_for_the_attempt_alone_is_left_behind(tmp_path: Path) -> None:
    attempt = begin(tmp_path)
    (attempt.folder / ".inputs").mkdir()
    (attempt.folder / ".inputs" / "model.bin").write_bytes(b"big")
    (attempt.folder / ".lock").write_text("an executor's own dot file")
    (attempt.folder / ".link").symlink_to(tmp_path)
    write_whole(attempt)
    assert names(tmp_path / "t1") == ["artifacts", "logs", MANIFEST_NAME, RESULT_NAME]


def test_an_id_whose_cleaning_was_interrupted_can_run_again(tmp_path: Path) -> None:
    for _ in range(3):
        attempt = begin(tmp_path)
    write_whole(attempt)
    (tmp_path / ".t1.attempt-1").mkdir()
    assert begin(tmp_path).number == 2


def test_a_file_where_the_task_folder_belongs_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "t1").write_text("someone's file")
    with pytest.raises(ArtifactError, match=r"task t1: .*/t1 is there already and is no folder"):
        begin(tmp_path)
    assert (tmp_path / "t1").read_text() == "someone's file"


def test_a_link_where_the_task_folder_belongs_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    results = tmp_path / "results"
    results.mkdir()
    (results / "t1").symlink_to(elsewhere)
    with pytest.raises(ArtifactError, match="is there already and is no folder"):
        begin(results)
    assert names(elsewhere) == []


@pytest.mark.parametrize("name", [RESULT_NAME, MANIFEST_NAME])
def test_writing_the_result_follows_no_link_that_an_executor_left(
    tmp_path: Path, name: str
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("kept")
    attempt = begin(tmp_path / "results")
    (attempt.folder / name).symlink_to(precious)
    with pytest.raises(OSError, match=name):
        attempt.write(name, b"{}")
    assert precious.read_text() == "kept"


def test_worker_log_lies_beside_the_tasks_and_no_task_can_reach_it(tmp_path: Path) -> None:
    folders = TaskFolders(tmp_path)
    log = folders.worker_log("w1")
    assert log == tmp_path / ".workers" / "w1" / "worker.log"
    assert log.parent.is_dir()
    with pytest.raises(ContractError, match=r"destination\.path '\.workers'"):
        folders.begin("w1", Destination(path=".workers"))
    with pytest.raises(ContractError, match="must be a plain name"):
        folders.worker_log("../w1")


def test_a_reader_that_polls_never_sees_a_result_without_its_manifest(tmp_path: Path) -> None:
    seen, torn, done = 0, [], threading.Event()

    def poll() -> None:
        nonlocal seen
        while not done.is_set():
            for number in range(150):
                folder = tmp_path / f"t{number}"
                if (folder / RESULT_NAME).exists():
                    seen += 1
                    if not (folder / MANIFEST_NAME).exists():
                        torn.append(folder)

    reader = threading.Thread(target=poll)
    reader.start()
    try:
        for number in range(150):
            write_whole(begin(tmp_path, f"t{number}"), str(number))
    finally:
        done.set()
        reader.join()
    assert torn == []
    assert seen > 0


# Runs one task per kill point in a forked process that kills itself at its n-th step on disk.
KILLED = """
import os, signal, sys
from pathlib import Path
from flowmesh_core.artifacts.layout import MANIFEST_NAME, RESULT_NAME, TaskFolders
from flowmesh_core.artifacts.pipeline import ArtifactPipeline
from flowmesh_core.contract import Destination, parse_task
from flowmesh_core.executor import Outcome
import asyncio

root, earlier = Path(sys.argv[1]), sys.argv[2] == "again"
task = parse_task({"spec": {"taskType": "x"}}, task_id="t1")
pipeline = ArtifactPipeline(lambda kind: None)

def run_once(results, number):
    attempt = TaskFolders(results).begin("t1", Destination())
    (attempt.folder / "artifacts" / "a.bin").write_text(str(number))
    (attempt.folder / "model").mkdir()
    (attempt.folder / "model" / "w.bin").write_text(str(number))
    asyncio.run(pipeline.finish(task, attempt, Outcome(result={"number": number})))

def killer(results, point):
    left = point
    def step(event, arguments):
        nonlocal left
        # What is removed file by file is named without its folder.
        removal = event in ("os.remove", "os.rmdir")
        ours = removal or str(results) in str(arguments)
        if ours and event.startswith(("os.", "open", "shutil.")):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    return step

point, status = 0, 1
while status:
    point += 1
    results = root / str(point)
    if earlier:
        run_once(results, 1)
    child = os.fork()
    if child == 0:
        sys.addaudithook(killer(results, point))
        run_once(results, 2)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(point, os.WTERMSIG(status), flush=True)
"""


@pytest.mark.parametrize("history", ["first", "again"])
def test_a_process_killed_at_any_step_leaves_no_result_or_a_whole_task(
    tmp_path: Path, history: str
) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    root = tmp_path / "runs"
    done = subprocess.run(
        [sys.executable, str(script), str(root), history],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(lines) > 15, "too few kill points to prove anything"
    assert {ended for _, ended in lines[:-1]} == {signal.SIGKILL}
    outcomes = {numbers_in(root / str(point) / "t1") for point, _ in lines}
    assert outcomes == ({(), (2,)} if history == "first" else {(1,), (), (2,)})
    for point, _ in lines:
        write_whole(begin(root / str(point)), "3")
        assert json.loads((root / str(point) / "t1" / RESULT_NAME).read_bytes()) == {"n": 3}


def numbers_in(folder: Path) -> tuple[int, ...]:
    """Return the one number that every file of a whole task agrees on; nothing when absent."""
    if not (folder / RESULT_NAME).exists():
        return ()
    manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
    listed = {entry["name"] for entry in manifest["entries"] if entry["status"] == "present"}
    assert listed == {"artifacts", "logs", "model", RESULT_NAME}
    files = ("artifacts/a.bin", "model/w.bin")
    found = {int((folder / name).read_text()) for name in files}
    found.add(json.loads((folder / RESULT_NAME).read_bytes())["number"])
    assert len(found) == 1, "the folder mixes two runs"
    return tuple(found)


def test_fsync_writes_the_same_folder(tmp_path: Path) -> None:
    attempt = begin(tmp_path)
    attempt.write(RESULT_NAME, b"{}", fsync=True)
    attempt.write("large", b"x" * 3_000_000, fsync=True)
    attempt.commit(fsync=True)
    assert (tmp_path / "t1" / "large").stat().st_size == 3_000_000
