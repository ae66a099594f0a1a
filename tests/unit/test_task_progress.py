"""Progress: every report on disk, few to subscribers, the last one always."""

from __future__ import annotations

import json
import math
import resource
import threading
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowmesh_core.task_progress import METRICS_NAME, ProgressRecorder


class Bench:
    """A recorder, its clock, and what it published at which time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = 100.0
        self.said: list[tuple[float, Mapping[str, Any]]] = []
        self.recorder = ProgressRecorder(folder, self._note, clock=lambda: self.now)

    def _note(self, values: Mapping[str, Any]) -> None:
        self.said.append((self.now, values))

    def lines(self, folder: Path | None = None) -> list[dict[str, Any]]:
        text = ((folder or self.folder) / METRICS_NAME).read_text()
        assert text.endswith("\n")
        return [json.loads(line, parse_constant=pytest.fail) for line in text.split("\n")[:-1]]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_every_report_is_a_line_with_its_time_as_soon_as_it_is_made(bench: Bench) -> None:
    for step in range(3):
        bench.recorder.report({"fraction": step / 4, "message": "train", "loss": 1.5})
        assert len(bench.lines()) == step + 1
    first = bench.lines()[0]
    assert first.pop("ts").endswith("+00:00")
    assert first == {"fraction": 0.0, "message": "train", "loss": 1.5}
    bench.recorder.close()


def test_the_first_report_goes_out_at_once_and_then_one_per_interval(bench: Bench) -> None:
    for step in range(100):
        bench.recorder.report({"step": step})
        bench.now += 0.0625
    bench.recorder.close()
    times = [time for time, _ in bench.said]
    assert times[0] == 100.0
    assert {after - before for before, after in pairwise(times[:-1])} == {0.25}
    assert len(times) == 26
    assert bench.said[-1][1] == {"step": 99}
    assert len(bench.lines()) == 100


def test_the_last_report_comes_with_the_close_and_only_once(bench: Bench) -> None:
    bench.recorder.report({"step": 1})
    bench.recorder.report({"step": 2})
    assert [values for _, values in bench.said] == [{"step": 1}]
    bench.recorder.close()
    bench.recorder.close()
    assert [values for _, values in bench.said] == [{"step": 1}, {"step": 2}]


def test_a_last_report_that_went_out_is_not_said_again(bench: Bench) -> None:
    bench.recorder.report({"step": 1})
    bench.recorder.report({"step": 2})
    bench.now += 1
    bench.recorder.report({"step": 3})
    bench.recorder.close()
    assert [values for _, values in bench.said] == [{"step": 1}, {"step": 3}]


@pytest.mark.parametrize(
    ("reported", "published"),
    [
        ([0.5, 0.25, 0.75], [0.5, 0.5, 0.75]),
        ([-1, 7, 0.5], [0.0, 1.0, 1.0]),
        ([0.5, math.nan, None, 0.4], [0.5, None, None, 0.5]),
        ([-math.inf, math.inf], [0.0, 1.0]),
        (["half", [1], 1], [None, None, 1.0]),
    ],
)
def test_a_fraction_stays_in_its_range_and_never_falls(
    bench: Bench, reported: list[Any], published: list[Any]
) -> None:
    for fraction in reported:
        bench.recorder.report({"fraction": fraction})
        bench.now += 1
    bench.recorder.close()
    assert [values["fraction"] for _, values in bench.said] == published
    assert [line["fraction"] for line in bench.lines()] == published


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(st.none() | st.floats() | st.integers() | st.text(max_size=3), max_size=20))
def test_any_fractions_make_valid_json_that_rises(
    tmp_path_factory: pytest.TempPathFactory, fractions: list[Any]
) -> None:
    bench = Bench(tmp_path_factory.mktemp("any"))
    for fraction in fractions:
        bench.recorder.report({"fraction": fraction, "loss": fraction})
    bench.recorder.close()
    kept = [line["fraction"] for line in bench.lines()] if fractions else []
    numbers = [fraction for fraction in kept if fraction is not None]
    assert len(kept) == len(fractions)
    assert numbers == sorted(numbers)
    assert all(0 <= number <= 1 for number in numbers)


def test_numbers_that_json_lacks_become_null_and_a_report_that_is_no_json_is_left_out(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.recorder.report({"loss": math.nan, "grads": [math.inf, 1.0]})
    bench.recorder.report({"what": object()})
    bench.recorder.report({"huge": 10**5000})
    bench.recorder.report({"loss": 1.0})
    bench.recorder.close()
    told = [{key: line[key] for key in line if key != "ts"} for line in bench.lines()]
    assert told == [{"loss": None, "grads": [None, 1.0]}, {"loss": 1.0}]
    assert caplog.text.count("a report of progress is left out") == 2
    assert bench.said[-1][1] == {"loss": 1.0}


def test_reports_of_many_threads_are_all_there(bench: Bench) -> None:
    def work(name: str) -> None:
        for number in range(200):
            bench.recorder.report({"name": name, "fraction": number / 200})

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bench.recorder.close()
    lines = bench.lines()
    assert [sum(line["name"] == name for line in lines) for name in "abcd"] == [200] * 4
    assert [line["fraction"] for line in lines] == sorted(line["fraction"] for line in lines)


def test_a_full_disk_stops_no_report(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        for step in range(20):
            bench.recorder.report({"step": step})
            bench.now += 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    bench.recorder.close()
    assert len(bench.said) == 20
    assert (bench.folder / METRICS_NAME).stat().st_size == 200
    assert [entry.levelname for entry in caplog.records] == ["WARNING"]


def test_a_service_reports_on_after_its_folder_was_renamed(tmp_path: Path) -> None:
    folder = tmp_path / ".t1.attempt-1"
    folder.mkdir()
    bench = Bench(folder)
    final = folder.rename(tmp_path / "t1")
    bench.recorder.report({"requests": 1})
    bench.recorder.close()
    bench.recorder.report({"requests": 2})
    assert [line["requests"] for line in bench.lines(final)] == [1]
    assert len(bench.said) == 1
    assert not folder.exists()


def test_a_task_that_reports_nothing_leaves_no_file(bench: Bench) -> None:
    bench.recorder.close()
    assert list(bench.folder.iterdir()) == []
