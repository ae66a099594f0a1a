"""The queue of what may be lost: joined, bounded, in order, other tasks' messages left alone."""

from __future__ import annotations

import json
import time

import pytest

from flowmesh_core.events import LOG_CHUNK_BYTES, TASK_PROGRESS, LogChunk, TaskEvent
from flowmesh_core.transports.lossy import LossyQueue, Waiting

ALL = 1 << 30


class Bench:
    """A queue that counts how often it woke its reader."""

    def __init__(self, max_bytes: int = ALL) -> None:
        self.wakes = 0
        self.queue = LossyQueue(self._wake, max_bytes=max_bytes)
        self._offsets: dict[tuple[str, str], int] = {}

    def _wake(self) -> None:
        self.wakes += 1

    def log(self, data: bytes, task_id: str = "a", stream: str = "stdout", skip: int = 0) -> None:
        """Put what stands next in a log, perhaps after something that is missing."""
        offset = self._offsets.get((task_id, stream), 0) + skip
        self._offsets[task_id, stream] = offset + len(data)
        self.queue.put_log(
            LogChunk(task_id=task_id, worker_id="w1", stream=stream, offset=offset, data=data)
        )

    def progress(self, task_id: str, **payload: object) -> None:
        self.queue.put_progress(TaskEvent(type=TASK_PROGRESS, task_id=task_id, payload=payload))


def texts(messages: list[Waiting]) -> list[str]:
    return [json.loads(message.to_json()).get("data", "progress") for message in messages]


def test_pieces_that_follow_each_other_become_one_message() -> None:
    bench = Bench()
    bench.log(b"one ")
    bench.log(b"err", stream="stderr")
    bench.log(b"two ")
    bench.log(b"other", task_id="b")
    bench.log(b"three")
    messages = bench.queue.take(ALL)
    assert texts(messages) == ["one two three", "err", "other"]
    assert [json.loads(message.to_json())["offset"] for message in messages] == [0, 0, 0]
    assert [message.channel for message in messages] == ["tasks.logs:a"] * 2 + ["tasks.logs:b"]
    assert bench.wakes == 1


def test_a_gap_a_full_message_and_one_that_left_begin_another() -> None:
    bench = Bench()
    bench.log(b"x" * (LOG_CHUNK_BYTES - 1))
    bench.log(b"y")
    bench.log(b"z")
    bench.log(b"after a gap", skip=5)
    assert [len(message.data) for message in bench.queue.take(ALL)] == [LOG_CHUNK_BYTES, 1, 11]
    bench.log(b"later")
    (message,) = bench.queue.take(ALL)
    assert json.loads(message.to_json())["offset"] == LOG_CHUNK_BYTES + 1 + 5 + 11
    assert bench.wakes == 2


def test_one_batch_is_taken_at_a_time_oldest_first() -> None:
    bench = Bench()
    for number in range(5):
        bench.log(b"%d" % number * 1000, skip=1)
    taken = [texts(bench.queue.take(2000)) for _ in range(4)]
    assert [[text[0] for text in batch] for batch in taken] == [["0", "1"], ["2", "3"], ["4"], []]


def test_the_messages_of_one_task_leave_and_the_others_keep_their_order() -> None:
    bench = Bench()
    bench.log(b"b1", task_id="b")
    bench.log(b"a1")
    bench.progress("a")
    bench.log(b"c1", task_id="c")
    bench.log(b"a2", stream="stderr")
    assert texts(bench.queue.take(ALL, {"a"})) == ["a1", "progress", "a2"]
    bench.log(b"+", task_id="b")
    assert texts(bench.queue.take(ALL)) == ["b1+", "c1"]


def test_when_too_much_waits_the_oldest_go_and_are_counted() -> None:
    bench = Bench(max_bytes=10_000)
    for number in range(100):
        bench.log(b"%03d" % number + bytes(997), skip=1)
    kept = [bytes(message.data[:3]) for message in bench.queue.take(ALL)]
    assert kept == [b"094", b"095", b"096", b"097", b"098", b"099"]
    assert bench.queue.dropped == 94
    for _ in range(100):
        bench.progress("a", text="x" * 1000)
    assert 5 <= len(bench.queue.take(ALL)) <= 8


def test_a_growing_message_counts_with_all_that_joined_it() -> None:
    bench = Bench(max_bytes=10_000)
    for _ in range(100):
        bench.log(b"x" * 1000)
    assert sum(message.size_bytes for message in bench.queue.take(ALL)) <= 10_000
    bench.log(b"and it goes on")
    assert texts(bench.queue.take(ALL)) == ["and it goes on"]


def test_what_could_not_be_sent_is_first_again_a_second_later() -> None:
    bench = Bench()
    bench.log(b"one")
    messages = bench.queue.take(ALL)
    bench.log(b"two")
    bench.queue.put_back(messages)
    assert bench.queue.wait_s() > 0.5
    assert texts(bench.queue.take(ALL)) == ["one", "two"]


def test_what_is_put_back_goes_first_when_there_is_no_room() -> None:
    bench = Bench(max_bytes=2000)
    bench.log(b"1" * 1000)
    messages = bench.queue.take(ALL)
    bench.log(b"2" * 1000)
    bench.queue.put_back(messages)
    assert bench.queue.count_lost() == 2
    assert [text[0] for text in texts(bench.queue.take(ALL))] == ["2"]
    assert bench.queue.dropped == 1


def test_messages_wait_a_moment_for_more_and_never_when_some_are_left() -> None:
    bench = Bench()
    assert bench.queue.wait_s() == float("inf")
    bench.log(b"x" * 1000)
    assert 0 < bench.queue.wait_s() <= 0.02
    time.sleep(0.03)
    bench.log(b"y" * 1000, skip=1)
    assert bench.queue.wait_s() == 0
    bench.queue.take(1000)
    assert bench.queue.wait_s() == 0
    bench.queue.take(1000)
    assert bench.queue.wait_s() == float("inf")


def test_progress_that_is_no_json_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.progress("a", what=object())
    bench.progress("a", fraction=0.5)
    (message,) = bench.queue.take(ALL)
    assert message.channel == "tasks.progress:a"
    assert json.loads(message.to_json())["payload"] == {"fraction": 0.5}
    assert "task a: progress cannot be sent" in caplog.text
