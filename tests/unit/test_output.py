"""What a child prints reaches its log, whoever holds the other end of the pipe."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest

from flowmesh_core.places.output import OutputPump


@attrs.define
class Sink:
    """Collects what it is given."""

    received: dict[str, bytes] = attrs.field(factory=dict)
    pause_s: float = 0.0

    def write(self, stream: str, data: bytes) -> None:
        time.sleep(self.pause_s)
        self.received[stream] = self.received.get(stream, b"") + data


@attrs.define
class Child:
    """The writing ends, and the pump at the other ones."""

    out: int
    err: int
    pump: OutputPump
    sink: Sink

    def close(self) -> None:
        for fd in {self.out, self.err} - {-1}:
            os.close(fd)
        self.out = self.err = -1
        self.pump.join(5)


@pytest.fixture
def child() -> Iterator[Child]:
    (out_read, out), (err_read, err) = os.pipe(), os.pipe()
    sink = Sink()
    child = Child(out, err, OutputPump(out_read, err_read, sink), sink)
    yield child
    child.close()


def drained(pump: OutputPump) -> None:
    asyncio.run(asyncio.wait_for(pump.drain(), 10))


def test_both_streams_arrive_whole(child: Child) -> None:
    os.write(child.out, b"a" * 3000)
    os.write(child.err, b"oops\n")
    child.close()
    assert child.sink.received == {"stdout": b"a" * 3000, "stderr": b"oops\n"}
    assert child.pump.tail == "oops\n"


def test_ten_megabytes_without_a_line_end_arrive_while_the_writer_waits(child: Child) -> None:
    data = os.urandom(10_000_000)
    view = memoryview(data)
    while view:
        view = view[os.write(child.out, view) :]
    child.close()
    assert child.sink.received["stdout"] == data


def test_drain_returns_when_what_was_printed_is_in_the_log(child: Child) -> None:
    child.sink.pause_s = 0.05
    for number in range(5):
        os.write(child.out, f"{number}\n".encode())
    drained(child.pump)
    assert child.sink.received["stdout"] == b"0\n1\n2\n3\n4\n"


def test_drain_ends_although_the_child_prints_without_end(child: Child) -> None:
    ended = threading.Event()

    def print_on() -> None:
        while not ended.is_set():
            os.write(child.out, b"x" * 4096)

    thread = threading.Thread(target=print_on)
    thread.start()
    try:
        for _ in range(20):
            drained(child.pump)
    finally:
        ended.set()
        thread.join()


def test_what_comes_after_a_redirection_goes_to_the_new_sink(child: Child) -> None:
    os.write(child.out, b"first\n")
    drained(child.pump)
    second = Sink()
    child.pump.redirect(second)
    os.write(child.out, b"second\n")
    drained(child.pump)
    assert child.sink.received == {"stdout": b"first\n"}
    assert second.received == {"stdout": b"second\n"}


def test_one_closed_stream_leaves_the_other_open(child: Child) -> None:
    os.close(child.out)
    child.out = child.err
    os.write(child.err, b"still here\n")
    drained(child.pump)
    assert child.sink.received == {"stderr": b"still here\n"}


def test_drain_after_the_end_returns_at_once(child: Child) -> None:
    os.write(child.out, b"last words")
    child.close()
    drained(child.pump)
    assert child.sink.received == {"stdout": b"last words"}


def test_only_the_end_of_the_errors_is_kept_for_the_reason(child: Child) -> None:
    os.write(child.err, b"early\n" + b"." * 5000 + b"late\n")
    child.close()
    assert child.pump.tail.endswith("late\n")
    assert len(child.pump.tail) == 4096


def test_every_descriptor_and_thread_is_given_back() -> None:
    def count() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    before = count()
    for _ in range(20):
        (out_read, out), (err_read, err) = os.pipe(), os.pipe()
        child = Child(out, err, OutputPump(out_read, err_read, Sink()), Sink())
        child.close()
    waited: Callable[[], bool] = lambda: count() == before  # noqa: E731
    until = time.monotonic() + 5
    while not waited() and time.monotonic() < until:
        time.sleep(0.01)
    assert count() == before
