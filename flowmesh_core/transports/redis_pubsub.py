"""The transport of the earlier orchestrator: Redis pub/sub, a worker hash and a heartbeat key.

Source: the contract's Redis wire. Pub/sub delivers at most once, so what can be done is done: the
worker subscribes before it announces itself, subscribes again after a lost connection, and a
thread that owns all writing repeats what did not get through, repeats an outcome that nobody was
subscribed to hear, and puts back a registration that somebody flushed.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import queue
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from typing import Any, TypeGuard

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError, RedisError
from redis.retry import Retry

from flowmesh_core.config import Settings
from flowmesh_core.contract import (
    TASK_EVENTS_CHANNEL,
    WORKER_CONTROL_CHANNEL,
)
from flowmesh_core.errors import TransportError
from flowmesh_core.events import (
    STATUS,
    TASK_FAILED,
    TASK_PROGRESS,
    TASK_STARTED,
    TASK_SUCCEEDED,
    LogChunk,
    TaskEvent,
    WorkerEvent,
)
from flowmesh_core.transports.base import Delivery, Transport
from flowmesh_core.transports.lossy import MAX_WAITING_BYTES, LossyQueue
from flowmesh_core.transports.registration import CHECK_INTERVAL_S, Registration
from flowmesh_core.wire import encode_json

__all__ = ["RedisPubSubTransport"]

_log = logging.getLogger(__name__)
_POLL_S = 0.5
_SOCKET_TIMEOUT_S = 10.0
_BATCH = 256
# How much of logs and progress may go before the next look at the events.
_LOSSY_BATCH_BYTES = 256 * 1024
_LINGER_S = 0.002
_UNHEARD_KEPT = 10_000
_LONGEST_PAUSE_S = 5.0

Event = TaskEvent | WorkerEvent
# An event, and what to call when it has left.
_Sending = tuple[Event, Callable[[], None] | None]
# What the publisher is given: that, or a flag to set when all before it has been written.
_Item = _Sending | threading.Event


def _connect(settings: Settings) -> redis.Redis:
    return redis.Redis.from_url(
        settings.redis_url,
        socket_timeout=_SOCKET_TIMEOUT_S,
        socket_connect_timeout=_SOCKET_TIMEOUT_S,
        socket_keepalive=True,
        health_check_interval=30,
        retry=Retry(NoBackoff(), 0),  # the threads here have a back-off of their own
    )


class _Backoff:
    """Growing pauses between tries, ended early when the transport closes."""

    def __init__(self, closed: threading.Event) -> None:
        self._closed = closed
        self._tries = 0

    def reset(self) -> None:
        self._tries = 0

    def wait(self) -> None:
        pause_s = min(_LONGEST_PAUSE_S, 0.1 * 2**self._tries) * random.uniform(0.7, 1.0)  # noqa: S311 - jitter
        self._tries = min(self._tries + 1, 10)
        self._closed.wait(pause_s)


def _is_writable(event: Event) -> bool:
    """Whether an event is JSON: one that is not must not hold up all that follow."""
    try:
        event.to_json()
    except (TypeError, ValueError, RecursionError) as exc:
        _log.error("event %s cannot be sent: %s", event.type, exc)
        return False
    return True


def _is_outcome(event: Event) -> TypeGuard[TaskEvent]:
    return isinstance(event, TaskEvent) and event.type in (TASK_SUCCEEDED, TASK_FAILED)


class _Publisher:
    """The thread that owns all writing: events in order, each repeated until Redis took it.

    Logs and progress go in between, one batch at a time, and before the outcome of their task.
    """

    def __init__(self, settings: Settings, closed: threading.Event) -> None:
        self.lossy = LossyQueue(lambda: self.put(()))
        self._settings = settings
        self._closed = closed
        self._queue: queue.SimpleQueue[Sequence[_Item]] = queue.SimpleQueue()
        self._registration = Registration(settings)
        self._unheard: collections.deque[_Sending] = collections.deque(maxlen=_UNHEARD_KEPT)
        self._refused = False
        self._thread = threading.Thread(target=self._run, name="flowmesh-publisher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, items: Sequence[_Item]) -> None:
        self._queue.put(items)

    @property
    def unheard(self) -> int:
        """Outcomes for which there has been no listener yet."""
        return len(self._unheard)

    def join(self, timeout_s: float) -> None:
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        client = _connect(self._settings)
        check_due = repeat_due = time.monotonic()
        try:
            while not self._closed.is_set():
                batch = self._take(min(_POLL_S, self.lossy.wait_s()))
                if batch:
                    self._insist(lambda batch=batch: self._write(client, batch))  # type: ignore[misc]
                if not self.lossy.wait_s():
                    self._attempt(lambda: self._publish_lossy(client, _LOSSY_BATCH_BYTES))
                now = time.monotonic()
                if now >= repeat_due:
                    self._attempt(lambda: self._repeat_unheard(client))
                    repeat_due = now + _POLL_S
                if now >= check_due:
                    self._attempt(lambda: self._registration.heal(client))
                    check_due = now + CHECK_INTERVAL_S
        finally:
            client.close()

    def _take(self, timeout_s: float) -> list[_Item]:
        batch: list[_Item] = []
        try:
            batch.extend(self._queue.get(timeout=timeout_s))
            while len(batch) < _BATCH:
                batch.extend(self._queue.get_nowait())
        except queue.Empty:
            pass
        return batch

    def _write(self, client: redis.Redis, batch: Sequence[_Item]) -> None:
        sendings = [item for item in batch if not isinstance(item, threading.Event)]
        ended = {event.task_id for event, _ in sendings if _is_outcome(event)}
        flushing = len(sendings) < len(batch)
        if ended or flushing:
            self._publish_lossy(client, MAX_WAITING_BYTES, None if flushing else ended)
        if sendings := [sending for sending in sendings if _is_writable(sending[0])]:
            self._send(client, sendings)
        for item in batch:
            if isinstance(item, threading.Event):
                item.set()

    def _send(self, client: redis.Redis, sendings: Sequence[_Sending]) -> None:
        positions: list[int] = []
        with client.pipeline() as pipe:
            for event, _ in sendings:
                positions.append(len(pipe))
                self._registration.apply(pipe, event)
            self._registration.finish(pipe)
            answers = pipe.execute()
        for position, (event, on_sent) in zip(positions, sendings, strict=True):
            # PUBLISH answers how many heard it; nobody did while the orchestrator reconnects.
            if _is_outcome(event) and not answers[position]:
                self._unheard.append((event, on_sent))
            elif on_sent is not None:
                on_sent()

    def _publish_lossy(
        self, client: redis.Redis, max_bytes: int, tasks: Collection[str] | None = None
    ) -> None:
        """Publish logs and progress, the oldest first.

        Raises:
            RedisError, OSError: The connection failed; they wait for another try.
        """
        messages = self.lossy.take(max_bytes, tasks)
        if not messages:
            return
        try:
            with client.pipeline(transaction=False) as pipe:
                for message in messages:
                    pipe.publish(message.channel, message.to_json())
                answers = pipe.execute(raise_on_error=False)
        except (RedisError, OSError):
            self.lossy.put_back(messages)
            raise
        self._note_refused([answer for answer in answers if isinstance(answer, Exception)])

    def _note_refused(self, errors: Sequence[Exception]) -> None:
        # Never tried again: a channel that is forbidden must not hold up events.
        if errors and not self._refused:
            _log.warning("redis refuses logs or progress, they are dropped: %s", errors[0])
        self._refused = self._refused or bool(errors)
        self.lossy.drop(len(errors))

    def _repeat_unheard(self, client: redis.Redis) -> None:
        sendings = list(self._unheard)
        if sendings and client.pubsub_numsub(TASK_EVENTS_CHANNEL)[0][1]:
            self._send(client, sendings)
            for _ in sendings:
                self._unheard.popleft()

    def _attempt(self, call: Callable[[], None]) -> None:
        try:
            call()
        except (RedisError, OSError) as exc:
            _log.debug("redis does not answer: %s", exc)

    def _insist(self, write: Callable[[], None]) -> None:
        backoff = _Backoff(self._closed)
        while not self._closed.is_set():
            try:
                return write()
            except (RedisError, OSError) as exc:
                _log.warning("cannot write to redis, trying again: %s", exc)
                backoff.wait()
        return None


class _Subscriber:
    """The thread that listens on two channels, tasks and control, for the event loop."""

    def __init__(
        self, settings: Settings, closed: threading.Event, deliver: Callable[[list[Delivery]], None]
    ) -> None:
        self._settings = settings
        self._closed = closed
        self._deliver = deliver
        self._subscribed = threading.Event()
        self._failure: TransportError | None = None
        # A message that does not contain this id cannot be for this worker: skipped unparsed.
        self._needle = encode_json(settings.worker_id).strip(b'"')
        self._control = WORKER_CONTROL_CHANNEL.format(worker_id=settings.worker_id).encode()
        self._thread = threading.Thread(target=self._run, name="flowmesh-subscriber", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait_subscribed(self) -> None:
        """Block until subscribed or given up, or raise what makes that impossible."""
        self._subscribed.wait()
        if self._failure is not None:
            raise self._failure

    def give_up(self) -> None:
        """Let ``wait_subscribed`` return although nothing may be subscribed."""
        self._subscribed.set()

    def join(self, timeout_s: float) -> None:
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        backoff = _Backoff(self._closed)
        while not self._closed.is_set():
            try:
                with _connect(self._settings) as client, client.pubsub() as pubsub:
                    self._listen(pubsub, backoff)
            except (AuthenticationError, AuthorizationError) as exc:
                if self._subscribed.is_set():
                    _log.error("redis refuses this worker, trying again: %s", exc)
                else:
                    return self._fail(exc)
            except (RedisError, OSError) as exc:
                _log.warning("cannot listen on redis, trying again: %s", exc)
            backoff.wait()
        self._subscribed.set()
        return None

    def _fail(self, exc: Exception) -> None:
        self._failure = TransportError(f"redis refuses REDIS_URL's credentials: {exc}")
        self._subscribed.set()

    def _listen(self, pubsub: Any, backoff: _Backoff) -> None:
        pubsub.subscribe(self._settings.task_topic, self._control.decode())
        while not self._closed.is_set():
            message = pubsub.get_message(timeout=_POLL_S)
            deliveries: list[Delivery] = []
            # All that has arrived goes to the loop at once: waking it costs more than a message.
            while message is not None:
                if message["type"] == "subscribe":
                    self._subscribed.set()
                    backoff.reset()
                elif message["type"] == "message" and self._concerns_us(message):
                    control = message["channel"] == self._control
                    deliveries.append(Delivery(message["data"], control=control))
                message = pubsub.get_message(timeout=0) if len(deliveries) < _BATCH else None
            if deliveries:
                self._deliver(deliveries)

    def _concerns_us(self, message: Mapping[str, Any]) -> bool:
        return message["channel"] == self._control or self._needle in message["data"]


class RedisPubSubTransport(Transport):
    """Redis pub/sub as the earlier orchestrator speaks it."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._closed = threading.Event()
        self._publisher = _Publisher(settings, self._closed)
        self._subscriber = _Subscriber(settings, self._closed, self._hand_over)
        self._queue: asyncio.Queue[Delivery | None] = asyncio.Queue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread = 0
        self._outgoing: list[_Sending] = []
        self._waking: asyncio.Handle | None = None

    async def open(self) -> None:
        """Start both threads and wait for the subscription."""
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._publisher.start()
        self._subscriber.start()
        await asyncio.to_thread(self._subscriber.wait_subscribed)

    def _hand_over(self, deliveries: list[Delivery]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._enqueue, deliveries)

    def _enqueue(self, deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            self._queue.put_nowait(delivery)

    async def deliveries(self) -> AsyncIterator[Delivery]:
        """Yield task messages that may be for this worker, and all of its control channel."""
        while (delivery := await self._queue.get()) is not None:
            yield delivery

    def stop_receiving(self) -> None:
        """End ``deliveries``, and ``open`` when it still waits for Redis."""
        self._subscriber.give_up()
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, None)

    def send(self, event: Event, on_sent: Callable[[], None] | None = None) -> None:
        """Queue an event for the publisher.

        Events of one turn of the loop leave as one transaction, and what announces a start waits
        a moment for the end of a short task: each time the publisher wakes costs as much as
        several events.
        """
        if isinstance(event, TaskEvent) and event.type == TASK_PROGRESS:
            self._publisher.lossy.put_progress(event)
            return
        if self._loop is None or threading.get_ident() != self._loop_thread:
            self._publisher.put(((event, on_sent),))
            return
        self._outgoing.append((event, on_sent))
        if event.type in (STATUS, TASK_STARTED):
            if self._waking is None:
                self._waking = self._loop.call_later(_LINGER_S, self._release)
        elif isinstance(event, TaskEvent):
            self._cancel_waking()
            self._waking = self._loop.call_soon(self._release)
        else:
            self._release()  # a registration must not be overtaken by another thread's heartbeat

    def send_log(self, chunk: LogChunk) -> None:
        """Queue a piece of a log, which may wait a moment for the next one to join it."""
        self._publisher.lossy.put_log(chunk)

    def _cancel_waking(self) -> None:
        if self._waking is not None:
            self._waking.cancel()
            self._waking = None

    def _release(self) -> None:
        self._cancel_waking()
        sendings, self._outgoing = self._outgoing, []
        self._publisher.put(sendings)

    async def flush(self, timeout_s: float) -> bool:
        """Wait until the publisher has written all that was queued before."""
        self._release()
        written = threading.Event()
        self._publisher.put((written,))
        return await asyncio.to_thread(written.wait, timeout_s)

    async def close(self) -> None:
        """Stop both threads."""
        if self._publisher.unheard:
            _log.warning("%d outcomes had no listener", self._publisher.unheard)
        if lost := self._publisher.lossy.count_lost():
            _log.warning("%d messages of logs and progress were not sent", lost)
        self._closed.set()
        await asyncio.to_thread(self._join)

    def _join(self) -> None:
        self._subscriber.join(2 * _POLL_S + 1)
        self._publisher.join(2 * _POLL_S + 1)
