"""What was reported goes when it is old or too much; nothing else ever does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh_core.artifacts.layout import MANIFEST_NAME, RESULT_NAME, Attempt, TaskFolders
from flowmesh_core.artifacts.manifest import build_manifest
from flowmesh_core.config import load_settings
from flowmesh_core.contract import Destination
from flowmesh_core.errors import ArtifactError
from flowmesh_core.events import TASK_SUCCEEDED, TaskEvent
from flowmesh_core.housekeeping.cleaning import Cleaner, Housekeeping, Limits, Plan, Removed
from flowmesh_core.housekeeping.history import History
from flowmesh_core.housekeeping.journal import Hold, Journal, parse_words
from flowmesh_core.housekeeping.leftovers import State
from flowmesh_core.plugins import Plugins, load_plugins
from flowmesh_core.quantities import parse_duration_s, parse_size_bytes
from flowmesh_core.testing import wait_for
from flowmesh_core.transports.local import LocalTransport
from flowmesh_core.worker import Worker

HERE = Destination(type="local")
DAY_S = 86_400.0
WEEK = Limits(older_than_s=7 * DAY_S)
SLACK_S = 61.0


def wait_until_gone(path: Path) -> None:
    wait_for(lambda: not path.exists())


@attrs.define
class Place:
    """A results folder, the journal of one worker in it, and a clock that can be set ahead."""

    root: Path
    folders: TaskFolders
    journal: Journal
    ahead_s: float = 0.0
    allowed: tuple[Path, ...] = ()

    def begin(self, task_id: str, path: str = "") -> Attempt:
        return self.folders.begin(task_id, Destination(type="local", path=path or None))

    def write(self, task_id: str, path: str = "", size_bytes: int = 10) -> Path:
        """Write a task's folder as a worker does."""
        attempt = self.begin(task_id, path)
        attempt.write(RESULT_NAME, b"x" * size_bytes)
        manifest = build_manifest(task_id, attempt.folder)
        attempt.write(MANIFEST_NAME, json.dumps(manifest).encode())
        attempt.commit()
        return attempt.final

    def report(self, *folders: Path) -> None:
        self.journal.settle(Hold({folder.name: folder for folder in folders}), self.ids(*folders))
        assert self.journal.flush()

    def ids(self, *folders: Path) -> list[str]:
        return [folder.name for folder in folders]

    def hold(self, *folders: Path) -> Hold:
        hold = self.journal.hold({folder.name: folder for folder in folders})
        assert self.journal.flush()
        return hold

    def crash(self) -> None:
        """End the worker's life without a word, and begin that of its successor."""
        os.close(self.journal._mark_lock)
        self.journal._mark_lock = -1
        self.journal.close()
        self.journal = open_journal(self.root)

    def housekeeping(self, limits: Limits = WEEK) -> Housekeeping:
        return Housekeeping(
            self.root, self.allowed, limits=limits, clock=lambda: time.time() + self.ahead_s
        )

    def clean(self, limits: Limits = WEEK) -> set[str]:
        """Remove what the limits do not let stay; return the names of what went."""
        housekeeping = self.housekeeping(limits)
        removed = housekeeping.remove(housekeeping.plan())
        assert not removed.failed
        return {leftover.folder.name for leftover in removed.gone}

    def names(self) -> set[str]:
        return {path.name for path in self.root.iterdir()} - {".workers"}

    def lines(self, worker_id: str = "w1") -> list[dict[str, Any]]:
        path = self.root / ".workers" / worker_id / "reported.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines() if line]


def open_journal(root: Path, worker_id: str = "w1") -> Journal:
    journal = Journal(root, TaskFolders(root).worker_log(worker_id).parent)
    journal.open()
    return journal


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    root, other = tmp_path / "results", tmp_path / "allowed"
    other.mkdir()
    folders = TaskFolders(root, [other])
    place = Place(root, folders, open_journal(root), allowed=(other,))
    yield place
    place.journal.close()


# By age.


def test_what_was_reported_goes_when_it_is_old_and_not_before(place: Place) -> None:
    place.report(place.write("t1"), place.write("team-1", "teams/blue"))
    place.ahead_s = 7 * DAY_S - 5
    assert place.clean() == set()
    place.ahead_s = 7 * DAY_S + 5
    assert place.clean() == {"t1", "team-1"}
    assert place.names() == {"teams"}
    assert not list((place.root / "teams" / "blue").iterdir())


def test_the_age_begins_with_the_last_report(place: Place) -> None:
    folder = place.write("t1")
    path = place.root / ".workers" / "w1" / "reported.jsonl"
    path.write_text(json.dumps({"folder": "t1", "at": time.time() - 30 * DAY_S}) + "\n")
    os.utime(folder, (0, time.time() - 31 * DAY_S))
    assert place.housekeeping().plan().going
    place.report(folder)
    assert place.clean() == set()


def test_what_was_never_reported_stays(place: Place) -> None:
    place.write("t1")
    place.begin("t2")
    place.ahead_s = 1000 * DAY_S
    assert place.clean(Limits(older_than_s=0, max_bytes=0)) == set()
    plan = place.housekeeping(Limits(older_than_s=0)).plan()
    assert plan.count_staying(State.UNREPORTED) == 2
    assert place.names() == {"t1", ".t2.attempt-1"}


def test_attempts_go_with_their_task(place: Place) -> None:
    place.begin("failed")
    second = place.begin("failed").final
    whole = place.write("whole")
    place.begin("whole")
    aside = place.root / ".whole.replaced"
    aside.mkdir()
    place.report(second, whole)
    place.ahead_s = 8 * DAY_S
    assert place.clean() == {"failed", "whole"}
    assert place.names() == set()


def test_what_a_document_put_elsewhere_goes_from_there_too(place: Place) -> None:
    (allowed,) = place.allowed
    reported = place.write("t1", str(allowed / "deep"))
    place.hold(place.write("t2", str(allowed / "deep")))
    place.crash()
    place.write("t3", str(allowed / "deep"))
    (allowed / "deep" / "mine").mkdir()
    place.report(reported)
    place.ahead_s = 8 * DAY_S
    limits = Limits(older_than_s=0, max_bytes=0, unreported=True)
    staying = place.housekeeping(limits).plan().staying
    assert [leftover.folder.name for leftover in staying] == ["t2"]
    assert place.clean(limits) == {"t1"}
    assert {path.name for path in (allowed / "deep").iterdir()} == {"t2", "t3", "mine"}


def test_a_folder_that_is_not_allowed_any_more_is_left_alone(place: Place) -> None:
    reported = place.write("t1", str(place.allowed[0]))
    place.report(reported)
    place.ahead_s = 8 * DAY_S
    housekeeping = place.housekeeping()
    plan = housekeeping.plan()
    place.allowed = ()
    assert place.housekeeping().plan() == Plan()
    assert place.housekeeping().remove(plan) == Removed()
    assert reported.exists()


# By size.


def test_the_oldest_go_until_the_rest_fits(place: Place) -> None:
    for name in ("c", "a", "b"):
        place.report(place.write(name, size_bytes=10_000))
        time.sleep(0.01)
    place.write("unreported", size_bytes=10_000)
    assert place.clean(Limits(max_bytes=50_000)) == set()
    assert place.clean(Limits(max_bytes=25_000)) == {"c", "a"}
    assert place.names() == {"b", "unreported"}
    assert place.clean(Limits(max_bytes=0)) == {"b"}


def test_a_plan_says_how_large_what_goes_is(place: Place) -> None:
    folder = place.write("t1", size_bytes=5000)
    (folder / "logs" / "stdout.log").write_bytes(b"x" * 3000)
    (folder / "logs" / "link").symlink_to(folder / RESULT_NAME)
    place.report(folder)
    place.ahead_s = 8 * DAY_S
    manifest_bytes = (folder / MANIFEST_NAME).stat().st_size
    (going,) = place.housekeeping().plan().going
    assert going.size_bytes == 8000 + manifest_bytes
    assert folder.exists()


# Held.


def test_what_a_living_worker_holds_stays_whatever_the_limits(place: Place) -> None:
    folder = place.write("t1")
    place.report(folder)
    place.hold(folder, place.begin("t2").final)
    place.ahead_s = 100 * DAY_S
    limits = Limits(older_than_s=0, max_bytes=0, unreported=True)
    assert place.clean(limits) == set()
    assert place.housekeeping(limits).plan().count_staying(State.HELD) == 2


def test_what_was_taken_again_by_a_worker_that_died_counts_as_unreported(place: Place) -> None:
    folder = place.write("t1")
    place.report(folder)
    place.hold(folder)
    place.crash()
    place.ahead_s = 8 * DAY_S
    assert place.clean(Limits(older_than_s=0, max_bytes=0)) == set()
    assert place.clean() == set()  # also once the journal has been compacted
    assert place.clean(Limits(older_than_s=7 * DAY_S, unreported=True)) == {"t1"}


def test_what_another_worker_took_after_the_report_counts_as_unreported(place: Place) -> None:
    folder = place.write("t1")
    place.report(folder)
    time.sleep(0.01)
    other = open_journal(place.root, "w2")
    other.hold({"t1": folder})
    other.close()
    place.ahead_s = 8 * DAY_S
    assert place.clean() == set()
    assert place.clean() == set()  # also once the journals have been compacted


def test_another_workers_report_counts_for_what_a_dead_one_had_taken(place: Place) -> None:
    folder = place.write("t1")
    place.hold(folder)
    place.crash()
    other = open_journal(place.root, "w2")
    time.sleep(0.01)
    other.settle(Hold({"t1": folder}), ["t1"])
    other.close()
    place.ahead_s = 8 * DAY_S
    assert place.clean() == {"t1"}
    assert place.lines("w1") == place.lines("w2") == []


def test_a_report_that_comes_late_does_not_let_go_of_the_next_run(place: Place) -> None:
    folder = place.write("t1")
    first, _second = place.hold(folder), place.hold(folder)
    place.journal.settle(first, ["t1"])
    place.journal.flush()
    place.ahead_s = 8 * DAY_S
    assert place.clean() == set()
    place.crash()
    assert place.clean() == set()


def test_who_is_let_go_without_a_report_is_neither_held_nor_reported(place: Place) -> None:
    leader, child = place.write("leader"), place.write("child")
    place.journal.settle(place.hold(leader, child), ["leader"])
    place.journal.flush()
    place.ahead_s = 8 * DAY_S
    plan = place.housekeeping().plan()
    assert [leftover.folder for leftover in plan.going] == [leader]
    assert plan.count_staying(State.HELD) == 0
    assert place.clean(Limits(older_than_s=0, unreported=True)) == {"leader", "child"}


def test_a_repeated_failure_takes_back_nobody_elses_report(place: Place) -> None:
    child = place.write("child")
    place.report(child)
    place.journal.settle(Hold({"leader": place.root / "leader", "child": child}), ["leader"])
    place.journal.flush()
    place.ahead_s = 8 * DAY_S
    assert place.clean() == {"child"}


def test_a_process_that_is_killed_holds_nothing(place: Place) -> None:
    code = (
        "import sys, time, pathlib\n"
        "from flowmesh_core.housekeeping.journal import Journal\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "journal = Journal(root, root / '.workers' / 'w1')\n"
        "journal.open()\n"
        "journal.hold({'t1': root / 't1'})\n"
        "journal.flush()\n"
        "print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    place.write("t1")
    history = History(place.root)
    argv = [sys.executable, "-c", code, str(place.root)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        history.refresh()
        assert history.is_held("t1")
        process.send_signal(signal.SIGKILL)
    assert not history.is_held("t1")
    history.compact(lambda _key: False)
    assert [*(place.root / ".workers" / "w1").glob("*.alive")] == [place.journal._mark]


# Unreported, on demand.


def test_what_is_given_up_must_be_old_and_a_tasks(place: Place) -> None:
    folder = place.write("t1")
    place.begin("t2")
    model = place.root / "my-model"
    shutil.copytree(folder, model)
    limits = Limits(older_than_s=7 * DAY_S, unreported=True)
    place.ahead_s = 7 * DAY_S - 5
    assert place.clean(limits) == set()
    place.ahead_s = 7 * DAY_S + 5
    os.utime(folder / "logs", (place.ahead_s + time.time(),) * 2)  # something in it is young
    assert place.clean(limits) == {"t2"}
    os.utime(folder / "logs")
    assert place.clean(limits) == {"t1"}
    assert place.names() == {"my-model"}


def test_what_a_living_worker_may_have_just_begun_is_not_given_up(place: Place) -> None:
    limits = Limits(older_than_s=0, unreported=True)
    place.begin("t1")
    place.ahead_s = 5  # its worker has not written yet what it holds
    assert place.clean(limits) == set()
    place.journal.close()
    assert place.clean(limits) == {"t1"}


# Races.


def test_what_is_written_anew_after_the_plan_stays(place: Place) -> None:
    folder = place.write("t1", size_bytes=1)
    place.report(folder)
    place.ahead_s = 8 * DAY_S
    housekeeping = place.housekeeping()
    plan = housekeeping.plan()
    place.write("t1", size_bytes=2)
    assert housekeeping.remove(plan) == Removed()
    assert (folder / RESULT_NAME).stat().st_size == 2
    assert place.names() == {"t1"}


@pytest.mark.parametrize(
    ("before", "then"), [("report", "hold"), ("report", "report"), ("begin", "hold")]
)
def test_what_is_taken_or_reported_again_after_the_plan_is_put_back(
    place: Place, before: str, then: str
) -> None:
    folder = place.begin("t1").final
    place.begin("t1")
    if before == "report":
        place.report(folder)
    place.ahead_s = 8 * DAY_S
    housekeeping = place.housekeeping(Limits(older_than_s=7 * DAY_S, unreported=True))
    plan = housekeeping.plan()
    assert plan.going
    getattr(place, then)(folder)
    assert housekeeping.remove(plan) == Removed()
    assert place.names() == {".t1.attempt-1", ".t1.attempt-2"}


def test_a_clean_up_that_is_killed_leaves_what_was_written_anew(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place.write("t1", size_bytes=1)
    place.report(folder)
    place.ahead_s = 8 * DAY_S
    housekeeping = place.housekeeping()
    plan = housekeeping.plan()
    place.write("t1", size_bytes=2)
    # Killed before it can put anything back.
    monkeypatch.setattr("flowmesh_core.housekeeping.cleaning._put_back", lambda _moved: None)
    assert housekeeping.remove(plan) == Removed()
    assert place.names() == {"t1"}


def test_what_is_written_anew_just_before_the_rename_is_put_back(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place.write("t1", size_bytes=1)
    place.report(folder)
    place.ahead_s = 8 * DAY_S
    housekeeping = place.housekeeping()
    plan = housekeeping.plan()
    rename = Path.rename

    def write_first(path: Path, target: Path) -> Path:
        if path == folder and ".removed-" in target.name:
            monkeypatch.undo()
            place.write("t1", size_bytes=2)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", write_first)
    assert housekeeping.remove(plan) == Removed()
    assert (folder / RESULT_NAME).stat().st_size == 2
    assert place.names() == {"t1"}


@pytest.mark.parametrize("name", [".t1.removed-0123abcd", "t1"])
def test_another_folder_under_a_planned_name_stays(
    place: Place, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = place.write("t1")
    place.report(folder)
    folder.rename(place.root / name)
    place.ahead_s = 8 * DAY_S
    housekeeping = place.housekeeping()
    plan = housekeeping.plan()
    assert len(plan.going) == 1
    (place.root / name).rename(place.root / "aside")
    (place.root / name).mkdir()
    monkeypatch.setattr("flowmesh_core.housekeeping.cleaning._put_back", lambda _moved: None)
    assert housekeeping.remove(plan) == Removed()
    assert place.names() == {"aside", name}


def test_what_changed_after_its_report_stays(place: Place) -> None:
    folder = place.write("t1")
    place.report(folder)
    later = time.time() + SLACK_S
    os.utime(folder, (later, later))
    place.ahead_s = 8 * DAY_S
    assert place.clean() == set()


def test_what_a_killed_clean_up_left_goes_with_the_next_one(place: Place) -> None:
    remains = place.root / ".t1.removed-0123abcd"
    shutil.move(place.write("t1"), remains)
    assert place.clean() == set()  # it may be put back yet
    place.ahead_s = SLACK_S
    assert place.clean() == {"t1"}
    assert place.names() == set()


def test_two_clean_ups_at_once_do_not_disturb_each_other(place: Place) -> None:
    place.report(*(place.write(f"t{number}") for number in range(60)))
    place.ahead_s = 8 * DAY_S
    both = [place.housekeeping(), place.housekeeping()]
    plans = [housekeeping.plan() for housekeeping in both]
    gone: list[Removed] = []

    def remove(housekeeping: Housekeeping, plan: Plan) -> None:
        gone.append(housekeeping.remove(plan))

    threads = [threading.Thread(target=remove, args=pair) for pair in zip(both, plans, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(removed.failed for removed in gone)
    assert sum(len(removed.gone) for removed in gone) == 60
    assert place.names() == set()


def test_a_worker_that_commits_meanwhile_is_never_seen_half(place: Place) -> None:
    """One process works on the same task again and again, another cleans up without a pause."""
    code = (
        "import sys, pathlib\n"
        "from flowmesh_core.housekeeping.cleaning import Housekeeping, Limits\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "print('on', flush=True)\n"
        "gone = 0\n"
        "while not (root / 'stop').exists():\n"
        "    h = Housekeeping(root, limits=Limits(older_than_s=0))\n"
        "    gone += len(h.remove(h.plan()).gone)\n"
        "print(gone, flush=True)\n"
    )
    argv = [sys.executable, "-c", code, str(place.root)]
    missing = 0
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "on\n"
        try:
            for number in range(150):
                hold = place.hold(place.root / "t1")
                size_bytes = number + 1
                folder = place.write("t1", size_bytes=size_bytes)
                for _ in range(10):  # unreported and held: it must be there, whole
                    assert (folder / RESULT_NAME).stat().st_size == size_bytes
                    assert {path.name for path in folder.iterdir()} >= {"logs", MANIFEST_NAME}
                place.journal.settle(hold, ["t1"])
                place.journal.flush()
                if number % 10 == 0:
                    wait_until_gone(folder)
                with contextlib.suppress(FileNotFoundError):
                    before = folder.stat().st_ino
                    names = {path.name for path in folder.iterdir()}
                    if folder.stat().st_ino == before:
                        assert names == {RESULT_NAME, MANIFEST_NAME, "logs", "artifacts"}
                missing += not folder.exists()
        finally:
            (place.root / "stop").touch()
        assert int(process.stdout.read()) >= 15
    assert missing >= 15


# Links and other people's folders.


def test_nothing_is_removed_through_a_link(place: Place, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    moved = outside / "t1"
    shutil.move(place.write("t1"), moved)
    (place.root / "t1").symlink_to(moved)
    (place.root / "team").symlink_to(outside)
    (place.root / ".t1.attempt-1").symlink_to(moved)
    lines = [{"folder": name, "at": 1.0} for name in ("t1", "team/t1", str(moved), "../outside/t1")]
    lines += [{"folder": f"{place.allowed[0]}/../outside/t1", "at": 1.0}]
    (place.allowed[0] / "way").symlink_to(outside)
    lines += [{"folder": f"{place.allowed[0]}/way/t1", "at": 1.0}]
    os.utime(moved, (0, 0))
    path = place.root / ".workers" / "w1" / "reported.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    place.clean(Limits(older_than_s=0, max_bytes=0, unreported=True))
    assert (moved / RESULT_NAME).exists()
    assert (place.root / "t1").is_symlink()


def test_a_folder_that_became_a_link_after_the_plan_is_left_alone(
    place: Place, tmp_path: Path
) -> None:
    folder = place.write("t1", "team")
    place.report(folder)
    place.ahead_s = 8 * DAY_S
    housekeeping = place.housekeeping()
    plan = housekeeping.plan()
    shutil.move(place.root / "team", tmp_path / "team")
    (place.root / "team").symlink_to(tmp_path / "team")
    assert housekeeping.remove(plan) == Removed()
    assert (tmp_path / "team" / "t1" / RESULT_NAME).exists()


def test_a_journal_behind_a_link_says_nothing(place: Place, tmp_path: Path) -> None:
    place.write("t1")
    elsewhere = tmp_path / "w2"
    elsewhere.mkdir()
    line = json.dumps({"folder": "t1", "at": time.time()})
    (elsewhere / "reported.jsonl").write_text(f"{line}\n")
    (place.root / ".workers" / "w2").symlink_to(elsewhere)
    third = place.root / ".workers" / "w3"
    third.mkdir()
    (third / "reported.jsonl").symlink_to(elsewhere / "reported.jsonl")
    place.ahead_s = 8 * DAY_S
    assert place.clean() == set()


def test_a_task_folder_with_another_ones_in_it_stays(place: Place) -> None:
    outer = place.write("t1")
    inner = place.write("t2", "t1")
    place.report(outer)
    place.hold(inner)
    place.crash()
    place.ahead_s = 8 * DAY_S
    assert place.clean(Limits(older_than_s=0, max_bytes=0, unreported=True)) == set()
    assert inner.exists()


def test_a_folder_in_which_another_task_begins_after_the_plan_stays(place: Place) -> None:
    outer = place.write("t1")
    place.report(outer)
    place.ahead_s = 8 * DAY_S
    housekeeping = place.housekeeping()
    plan = housekeeping.plan()
    assert [leftover.folder for leftover in plan.going] == [outer]
    place.hold(place.begin("t2", "t1/deep").final)
    assert housekeeping.remove(plan) == Removed()
    assert (outer / "deep" / ".t2.attempt-1").exists()


@pytest.mark.parametrize(
    "limits",
    [WEEK, Limits(max_bytes=0), Limits(older_than_s=0, unreported=True)],
    ids=["age", "size", "unreported"],
)
def test_a_folder_with_anothers_manifest_in_it_stays_though_no_journal_knows(
    place: Place, limits: Limits
) -> None:
    outer = place.write("t1")
    inner = place.write("t2", "t1/deep")
    copy = place.write("t3") / "artifacts" / "model"  # a manifest, but of no task of that name
    shutil.copytree(inner, copy)
    if not limits.unreported:
        place.report(outer, place.root / "t3")
    place.ahead_s = 8 * DAY_S
    plan = place.housekeeping(limits).plan()
    assert [(each.folder, each.state) for each in plan.staying] == [(outer, State.HELD)]
    assert place.clean(limits) == {"t3"}
    assert (inner / RESULT_NAME).exists()


def test_what_is_no_tasks_is_left_alone(place: Place) -> None:
    (place.root / "notes").mkdir()
    (place.root / "notes" / "a.txt").write_text("mine")
    (place.root / ".hidden").mkdir()
    (place.root / "file").write_text("mine")
    place.ahead_s = 100 * DAY_S
    assert place.clean(Limits(older_than_s=0, max_bytes=0, unreported=True)) == set()
    assert place.names() == {"notes", ".hidden", "file"}


# Engines.


def engine_of(place: Place, worker_id: str, name: str, changed_at: float) -> Path:
    folder = place.folders.worker_log(worker_id).with_name("engines") / name
    (folder / "logs").mkdir(parents=True)
    for path in (folder / "logs", folder):
        os.utime(path, (changed_at, changed_at))
    return folder


def test_what_crashed_engines_left_goes_by_age(place: Place) -> None:
    now = time.time()
    old = engine_of(place, "dead", "llamacpp-a", now - 8 * DAY_S)
    young = engine_of(place, "dead", "llamacpp-b", now - 6 * DAY_S)
    earlier = engine_of(place, "w1", "vllm-c", now - 8 * DAY_S)
    assert place.clean(Limits(max_bytes=0)) == set()
    assert place.clean() == {"llamacpp-a", "vllm-c"}
    assert not old.exists()
    assert not earlier.exists()
    place.ahead_s = 30 * DAY_S
    loaded = engine_of(place, "w1", "vllm-d", now)
    assert place.clean() == {"llamacpp-b"}
    assert not young.exists()
    assert loaded.exists()  # it may be at work: its worker was there before it


def test_a_young_file_keeps_what_an_engine_left(place: Place) -> None:
    folder = engine_of(place, "dead", "llamacpp-a", time.time() - 8 * DAY_S)
    (folder / "logs" / "stderr.log").write_text("why")
    os.utime(folder / "logs", (0, 0))
    assert place.clean() == set()


# The journal.


def test_a_journal_has_one_line_for_each_folder_of_which_something_new_is_said(
    place: Place,
) -> None:
    folders = {f"t{number}": place.root / f"t{number}" for number in range(3)}
    hold = place.journal.hold(folders)
    place.journal.settle(hold, folders)
    place.journal.flush()
    assert [line["folder"] for line in place.lines()] == ["t0", "t1", "t2"]
    assert all(set(line) == {"folder", "at"} for line in place.lines())


def test_words_are_written_soon_without_being_asked_for(place: Place) -> None:
    place.journal.settle(Hold({"t1": place.root / "t1"}), ["t1"])
    path = place.root / ".workers" / "w1" / "reported.jsonl"
    wait_for(lambda: path.exists() and b"t1" in path.read_bytes(), timeout_s=2)


def test_a_line_cut_short_by_a_crash_swallows_no_other(place: Place) -> None:
    path = place.root / ".workers" / "w1" / "reported.jsonl"
    path.write_text('{"folder": "t0", "at": 1}\n{"folder": "t1", "a')
    history = History(place.root)
    history.refresh()
    place.report(place.root / "t2")
    history.refresh()
    assert history.folders == {"t0", "t2"}
    assert history.reported_at("t0") == 1


def test_a_journal_that_cannot_be_written_is_tried_again(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flowmesh_core.housekeeping.journal._PAUSE_S", 0.1)
    path = place.root / ".workers" / "w1" / "reported.jsonl"
    path.mkdir()
    place.journal.settle(Hold({"t1": place.root / "t1"}), ["t1"])
    wait_for(lambda: "cannot be written, trying again" in caplog.text)
    path.rmdir()
    wait_for(lambda: path.is_file() and b"t1" in path.read_bytes())


def test_a_worker_whose_folder_cannot_be_written_does_not_start(tmp_path: Path) -> None:
    journal = Journal(tmp_path, tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="nowhere cannot be written"):
        journal.open()


def test_a_worker_that_cannot_open_its_lock_does_not_start_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    (tmp_path / "reported.lock").mkdir()
    journal = Journal(tmp_path, tmp_path)
    with pytest.raises(ArtifactError, match=r"cannot be written: .*reported\.lock"):
        journal.open()
    journal.close()
    assert [path.name for path in tmp_path.iterdir()] == ["reported.lock"]


def test_compaction_keeps_what_still_counts(place: Place) -> None:
    there, gone, held = (place.root / name for name in ("there", "gone", "held"))
    place.write("there")
    for _ in range(5):
        place.report(there, gone)
    place.hold(held)
    assert len(place.lines()) == 11
    place.clean()
    assert [line["folder"] for line in place.lines()] == ["there", "held"]
    place.report(gone)
    assert place.lines()[-1]["folder"] == "gone"


def test_a_journal_keeps_its_owner_and_mode_when_somebody_else_cleans_up(place: Place) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    worker = place.root / ".workers" / "w1"
    place.report(place.write("t1"), place.root / "gone")
    for path in (worker, *worker.iterdir()):
        os.chown(path, 12345, 12346)
    journal = worker / "reported.jsonl"
    journal.chmod(0o640)
    inode = journal.stat().st_ino
    done = gc("--older-than", "7d", "--results-dir", str(place.root))
    assert done.returncode == 0, done.stderr
    assert [line["folder"] for line in place.lines()] == ["t1"]
    assert journal.stat().st_ino != inode
    assert journal.stat().st_mode & 0o777 == 0o640
    assert {(path.stat().st_uid, path.stat().st_gid) for path in worker.iterdir()} == {
        (12345, 12346)
    }


def test_a_journal_whose_owner_cannot_be_kept_stays_as_it_is(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    place.report(place.write("t1"), place.root / "gone")
    journal = place.root / ".workers" / "w1" / "reported.jsonl"
    os.chown(journal, 12345, 12346)

    def refuse(*_args: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.fchown", refuse)
    assert place.clean() == set()
    assert journal.stat().st_uid == 12345
    assert [line["folder"] for line in place.lines()] == ["t1", "gone"]
    assert "the journal in" in caplog.text
    assert not [*journal.parent.glob(".reported*")]


def test_a_clean_up_makes_no_lock_that_a_worker_could_not_open(place: Place) -> None:
    assert (place.root / ".workers" / "w1" / "reported.lock").exists()  # from the worker's start
    second = place.root / ".workers" / "w2"
    second.mkdir()
    (second / "reported.jsonl").write_text('{"folder": "gone", "at": 1}\n')
    assert place.clean() == set()
    assert [path.name for path in second.iterdir()] == ["reported.jsonl"]


def test_a_journal_of_which_nothing_is_gone_is_not_rewritten(place: Place) -> None:
    for name in ("t1", "t2", "t3"):
        place.report(place.write(name))
    journal = place.root / ".workers" / "w1" / "reported.jsonl"
    before = journal.stat()
    assert place.clean() == set()
    after = journal.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_no_word_is_missed_when_a_journal_was_rewritten_in_its_place(place: Place) -> None:
    """Two compactions can give the inode back that a reader knows, and appends its size."""
    journal = place.root / ".workers" / "w1" / "reported.jsonl"
    journal.write_text('{"folder": "a", "at": 1}\n')
    history = History(place.root)
    history.refresh()
    journal.write_text('{"folder": "b", "at": 1}\n{"folder": "c", "at": 1}\n')
    history.refresh()
    assert history.folders == {"b", "c"}


def test_nothing_is_lost_when_two_append_while_another_compacts(place: Place) -> None:
    code = (
        "import sys, pathlib\n"
        "from flowmesh_core.housekeeping.journal import Hold, Journal\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "journal = Journal(root, root / '.workers' / 'w1')\n"
        "for number in range(400):\n"
        "    name = f'{sys.argv[2]}-{number}'\n"
        "    journal.settle(Hold({name: root / name}), [name])\n"
        "    assert journal.flush()\n"
    )
    argv = [sys.executable, "-c", code, str(place.root)]
    processes = [subprocess.Popen([*argv, name]) for name in "ab"]
    history = History(place.root)
    compactions = 0
    while any(process.poll() is None for process in processes):
        # Folders with an even number are there, the others are gone.
        history.compact(lambda key: int(key.partition("-")[2]) % 2 == 0)
        compactions += 1
    assert [process.returncode for process in processes] == [0, 0]
    assert compactions > 10
    history.refresh()
    wanted = {f"{name}-{number}" for name in "ab" for number in range(0, 400, 2)}
    assert wanted <= history.folders
    history.compact(lambda key: key in wanted)
    assert {line["folder"] for line in place.lines()} == wanted


def test_a_worker_that_lives_can_say_nothing_while_folders_are_renamed(place: Place) -> None:
    history = History(place.root)
    with history.frozen():
        place.journal.hold({"t1": place.root / "t1"})
        time.sleep(0.3)
        history.refresh()
        assert not history.is_held("t1")
    place.journal.flush()
    history.refresh()
    assert history.is_held("t1")


@given(
    st.binary()
    | st.lists(
        st.sampled_from(
            ['{"folder":', '"a"', ',"at":', "1", "}", "\n", "[", '"held":', "null", "1e999", "[]"]
        )
    ).map(lambda words: "".join(words).encode())
)
def test_no_bytes_in_a_journal_break_its_reading(data: bytes) -> None:
    for folder, word in parse_words(data):
        assert isinstance(folder, str)
        assert isinstance(word.at, float)


@pytest.mark.parametrize(
    "line",
    ['{"folder": "t1\\u0000", "at": 1}', '{"folder": "t1", "at": 1, "held": "../x"}', "[" * 99_999,
     '{"folder": 1, "at": 1}', '{"folder": "t1", "at": 1%s}' % ("0" * 400), "{}", "1"],
)  # fmt: skip
def test_a_line_of_another_kind_says_nothing(line: str) -> None:
    assert [*parse_words(line.encode())] == []


# A worker, a thread, a local run.


def dispatch(task_id: str, **spec: Any) -> bytes:
    task = {"spec": {"taskType": "echo", **spec}}
    return json.dumps({"task_id": task_id, "task": task, "assigned_worker": "w1"}).encode()


async def work(
    results: Path,
    *bodies: bytes,
    listening: bool = True,
    plugins: Plugins | None = None,
    **options: Any,
) -> None:
    """Let a worker do the tasks over the local transport, then stop it."""
    settings = load_settings({}, worker_id="w1", results_dir=results, **options)
    transport = LocalTransport(settings)
    worker = Worker(settings, transport=transport, plugins=plugins)
    ended: list[str] = []
    if listening:
        transport.listen(lambda event: ended.append(event.type))
    working = asyncio.ensure_future(worker.run())
    for body in bodies:
        transport.submit(body)
    await asyncio.sleep(0.2)
    worker.stop()
    await working


def test_what_a_worker_reported_is_in_its_journal_when_it_has_left(tmp_path: Path) -> None:
    bad = dispatch("bad", output={"destination": {"type": "nobody"}})
    asyncio.run(work(tmp_path, dispatch("good"), bad))
    history = History(tmp_path)
    history.refresh()
    assert history.reported_at("good")
    assert history.reported_at("bad")
    assert not list((tmp_path / ".workers" / "w1").glob("*.alive"))


JOURNAL_READER = """
from flowmesh_core import Executor, ExecutorInfo, hookimpl

@hookimpl
def flowmesh_register_executors():
    target = f"{__name__}:Reader"
    return [ExecutorInfo(name="reader", task_types={"reader"}, target=target, places=["inline"])]

class Reader(Executor):
    def run(self, ctx):
        path = ctx.folder.parent / ".workers" / "w1" / "reported.jsonl"
        return {"journal": path.read_text() if path.exists() else ""}
"""


def test_a_task_of_which_something_is_left_is_held_on_disk_before_it_runs(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.journal.close()
    place.report(place.begin("again").final)
    monkeypatch.setattr("flowmesh_core.housekeeping.journal._GATHER_S", 30)
    (tmp_path / "reader.py").write_text(JOURNAL_READER)
    plugins = load_plugins(load_settings({}), files=[tmp_path / "reader.py"])
    bodies = [dispatch(name, taskType="reader") for name in ("again", "new")]
    asyncio.run(work(place.root, *bodies, plugins=plugins))
    result = json.loads((place.root / "again" / RESULT_NAME).read_text())
    last = json.loads(result["journal"].splitlines()[-1])
    assert last["held"]


def test_what_nobody_listened_to_is_not_reported(tmp_path: Path) -> None:
    asyncio.run(work(tmp_path, dispatch("t1"), listening=False))
    history = History(tmp_path)
    history.refresh()
    assert history.folders == {"t1"}
    assert history.reported_at("t1") is None
    assert (tmp_path / "t1" / RESULT_NAME).exists()


def test_an_event_that_cannot_leave_the_local_transport_is_not_confirmed() -> None:
    async def send(listening: bool) -> list[str]:
        transport = LocalTransport(load_settings({}))
        await transport.open()
        said: list[str] = []
        if listening:
            transport.listen(lambda event: said.append(event.type))
        event = TaskEvent(type=TASK_SUCCEEDED, task_id="t1")
        transport.send(event, lambda: said.append("confirmed"))
        assert said == []
        await transport.flush(1)
        return said

    assert asyncio.run(send(True)) == [TASK_SUCCEEDED, "confirmed"]
    assert asyncio.run(send(False)) == []


def test_a_worker_that_is_told_to_cleans_up_itself(place: Place) -> None:
    folder = place.write("old")
    place.report(folder)
    asyncio.run(work(place.root, dispatch("new"), gc_older_than_s=0.0))
    assert place.names() == {"new"}


def test_a_clean_up_comes_again_until_it_is_stopped(place: Place) -> None:
    cleaner = Cleaner(place.housekeeping(Limits(older_than_s=0)), interval_s=0.05)
    cleaner.start()
    for name in ("a", "b"):
        folder = place.write(name)
        place.report(folder)
        wait_until_gone(folder)
    cleaner.stop()
    wait_for(lambda: not cleaner._thread.is_alive())
    place.report(place.write("c"))
    time.sleep(0.15)
    assert place.names() == {"c"}


def test_a_clean_up_that_fails_comes_again(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    housekeeping = place.housekeeping(Limits(older_than_s=0))
    passes: list[int] = []

    class Failing(Housekeeping):
        def plan(self) -> Plan:
            passes.append(1)
            if len(passes) == 1:
                raise OSError("the disk is away")
            return housekeeping.plan()

    cleaner = Cleaner(Failing(place.root, limits=WEEK), interval_s=0.05)
    cleaner.start()
    wait_for(lambda: len(passes) > 1)
    cleaner.stop()
    assert "cannot be cleaned up: the disk is away" in caplog.text


# The command.


def gc(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flowmesh_core", "gc", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environ},
    )


def test_the_command_shows_first_and_then_removes(place: Place) -> None:
    folder = place.write("t1", size_bytes=4096)
    place.report(folder)
    place.write("t2")
    place.hold(place.begin("t3").final)
    options = ("--older-than", "0s", "--results-dir", str(place.root))
    dry = gc(*options, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    shown, summary = dry.stdout.splitlines()
    assert shown.startswith(f"{folder}: reported since 20")
    assert "would remove 1 folders, 4." in summary
    assert summary.endswith("KiB; staying: 0 reported, 1 unreported, 1 held")
    assert folder.exists()
    done = gc("--older-than", "0s", RESULTS_DIR=str(place.root))
    assert done.stdout.startswith("removed 1 folders, 4.")
    assert place.names() == {"t2", ".t3.attempt-1"}


def test_the_command_prints_json(place: Place) -> None:
    folder = place.write("t1", str(place.allowed[0]))
    place.report(folder)
    done = gc(
        *("--max-size", "0", "--json", "--results-dir", str(place.root)),
        FLOWMESH_ALLOWED_DIRS=str(place.allowed[0]),
    )
    told = json.loads(done.stdout)
    assert told["removed"][0]["folder"] == str(folder)
    assert told["removed"][0]["paths"] == [str(folder)]
    assert told["removed_bytes"] > 0
    assert told["dry_run"] is False
    assert told["staying"] == {"reported": 0, "unreported": 0, "held": 0}
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "give --older-than, --max-size or both"),
        (("--max-size", "1", "--unreported"), "give --older-than"),
        (("--older-than", "7"), "--older-than: must be a number with its unit"),
        (("--max-size", "much"), "--max-size: must be a size"),
        (("--older-than", "7d"), "RESULTS_DIR must be a folder that is there"),
    ],
)
def test_the_command_refuses_what_it_cannot_read(arguments: tuple[str, ...], says: str) -> None:
    done = gc(*arguments, RESULTS_DIR="/nowhere/at/all")
    assert done.returncode == 2
    assert says in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_the_command_says_what_it_cannot_lock_and_removes_nothing(place: Place) -> None:
    place.report(place.write("t1"))
    (place.root / ".workers" / "w1" / "reported.lock").unlink()
    done = gc("--older-than", "0s", "--results-dir", str(place.root))
    assert done.returncode == 1
    assert f"{place.root} cannot be cleaned up: " in " ".join(done.stderr.split())
    assert "reported.lock" in done.stderr
    assert "Traceback" not in done.stderr
    assert place.names() == {"t1"}


def test_what_cannot_be_deleted_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.report(place.write("t1"))
    place.ahead_s = 8 * DAY_S
    housekeeping = place.housekeeping()
    plan = housekeeping.plan()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_args, **_options: None)
        removed = housekeeping.remove(plan)
    (failed,) = removed.failed
    assert failed.name.startswith(".t1.removed-")
    place.ahead_s += SLACK_S
    assert place.clean() == {"t1"}


def test_what_flowmesh_run_has_told_counts_as_reported(tmp_path: Path) -> None:
    file, out = tmp_path / "echo.yaml", tmp_path / "out"
    file.write_text("spec: {taskType: echo, message: hi}")
    argv = [sys.executable, "-m", "flowmesh_core", "run", str(file), "--out", str(out)]
    subprocess.run(argv, capture_output=True, timeout=60, check=True)
    (folder,) = [path for path in out.iterdir() if not path.name.startswith(".")]
    gc("--older-than", "0s", "--results-dir", str(out))
    assert not folder.exists()


# Durations and sizes.


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("1.5h", 5400), ("7d", 7 * DAY_S), (" 2 w", 14 * DAY_S)]
)
def test_a_duration_has_a_unit(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize("text", ["7", "", "d", "-1d", "7 days", "1e3s", "nan"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a number with its unit, such as 90s"):
        parse_duration_s(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("12", 12),
        ("1k", 1024),
        ("1.5MiB", 3 << 19),
        ("50GB", 50 << 30),
        ("2 Ti", 2 << 40),
    ],
)
def test_a_size_counts_in_powers_of_1024(text: str, size: int) -> None:
    assert parse_size_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1X", "1 GiBs", "inf", "1iB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a size, such as 500MiB"):
        parse_size_bytes(text)
