"""The worker's end of one child process and of the engine that is loaded in it.

Lives on the worker's event loop. Whatever the child does, each task that was given to it gets one
answer: its outcome, or the reason why the process ended.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import attrs

from flowmesh_core.errors import CrashError, FlowmeshError
from flowmesh_core.executor import Capability, ExecutorInfo, Outcome
from flowmesh_core.masking import SecretMask
from flowmesh_core.places.base import Job, PlaceContext
from flowmesh_core.places.child import PROTOCOL_VERSION
from flowmesh_core.places.crash import OomKills, explain_exit
from flowmesh_core.places.frames import Decoder, encode
from flowmesh_core.places.keeping import Keeper, KeptProcess
from flowmesh_core.places.memory import MemoryWatch, Watch, tree_pids
from flowmesh_core.places.output import OutputPump
from flowmesh_core.task_log import TaskLog
from flowmesh_core.telemetry.probes import usable_memory_bytes

__all__ = ["EngineProcess", "StaleEngineError"]

_log = logging.getLogger(__name__)
_UNLOAD_S = 10.0
_KILL_S = 15.0
_SWEEP_S = 1.0
_HANG_UP_S = 0.5
_SLEEP_S = 30.0
# Nothing of the working folder is importable: a folder named like a library would hide it.
_MAIN = "import sys; sys.path[:1] = []; from flowmesh_core.places.child import main; main()"


class StaleEngineError(CrashError):
    """A warm process had ended before it heard of its next task, which another one may run."""


@attrs.define(eq=False)
class _Conversation:
    """What is said about one task."""

    job: Job
    group: tuple[int, ...]
    answer: asyncio.Future[tuple[Outcome, bool]]
    children: dict[int, Future[Outcome]] = attrs.field(factory=dict)
    taken: bool = False
    stopped: bool = False


class _Protocol(asyncio.Protocol):
    """Decodes what the child says."""

    def __init__(self, engine: EngineProcess) -> None:
        self._engine = engine
        self._decoder = Decoder()

    def data_received(self, data: bytes) -> None:
        try:
            for channel, message in self._decoder.feed(data):
                self._engine.take(channel, message)
        except Exception as exc:  # noqa: BLE001 - whatever it said, the worker goes on
            self._engine.distrust(f"it said what cannot be read: {exc}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._engine.hung_up()


class EngineProcess:
    """One child process.

    Args:
        info: The executor that it runs.
        context: The worker.
    """

    def __init__(self, info: ExecutorInfo, context: PlaceContext) -> None:
        self.info = info
        self.users = 0
        # Held while it falls asleep, and while its next task waits for room.
        self.turn = asyncio.Lock()
        self.asleep = False
        self.gave_back: Mapping[str, int] = {}
        self.served = 0
        self.started: asyncio.Future[None]
        self.expiry: asyncio.TimerHandle | None = None
        self.idle_since = time.monotonic()
        self.usable = True
        self.concurrent = Capability.CONCURRENT in info.capabilities
        self._context = context
        self._mask = SecretMask({})
        self._unusable: FlowmeshError | None = None
        self._conversations: dict[int, _Conversation] = {}
        self._channels = itertools.count(1)
        self._distrusted = ""
        self._answered: asyncio.Future[None] | None = None
        self._resting = False
        self._swept = 0.0
        self._sweep_due = False

    # Begin.

    async def start(self, keeper: Keeper, memory: MemoryWatch, env: Mapping[str, str]) -> None:
        """Start the process; it loads nothing until its first task comes.

        Raises:
            CrashError: It could not be started.
        """
        self._loop = asyncio.get_running_loop()
        self._hung_up = self._loop.create_future()
        engines = self._context.folder / "engines"
        engines.mkdir(exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=f"{self.info.name}-", dir=engines))
        (self._folder / "logs").mkdir()
        self._log = TaskLog(
            self._folder,
            mask=lambda: self._mask,
            publish=lambda _stream, _offset, _data: None,
            max_bytes=self._context.settings.task_log_max_bytes,
        )
        try:
            ours = await self._spawn(keeper, env)
        except BaseException:
            self._log.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        self._ended = self._process.ended
        self._watch: Watch = memory.watch(self._process.minder_pid, None, self._exceeded)
        self._transport, _ = await self._loop.create_connection(lambda: _Protocol(self), sock=ours)
        self._over = self._loop.create_task(self._conclude())
        self._send(0, self._start_message())

    async def _spawn(self, keeper: Keeper, env: Mapping[str, str]) -> socket.socket:
        """Start the process and the reading of its output; return our end of its socket."""
        ours, theirs = socket.socketpair()
        out, child_out = os.pipe()
        err, child_err = os.pipe()
        python = self._context.pythons.get(self.info.environment, sys.executable)
        try:
            self._process: KeptProcess = await keeper.spawn(
                [str(python), "-c", _MAIN],
                env=env,
                cwd=self._folder,
                control=theirs.fileno(),
                stdout=child_out,
                stderr=child_err,
            )
        except BaseException:
            ours.close()
            os.close(out)
            os.close(err)
            raise
        finally:
            theirs.close()
            os.close(child_out)
            os.close(child_err)
        self._pump = OutputPump(out, err, self._log)
        return ours

    def _start_message(self) -> dict[str, Any]:
        return {
            "protocol": PROTOCOL_VERSION,
            "info": self.info.to_dict(),
            "log_level": self._context.settings.log_level,
            "plugin_files": [str(path.absolute()) for path in self._context.plugin_files],
        }

    # One task.

    def run_group(self, jobs: Sequence[Job]) -> list[asyncio.Task[Outcome]]:
        """Run tasks as one batch; the child begins when it has heard of all."""
        channels = tuple(next(self._channels) for _ in jobs)
        return [
            asyncio.ensure_future(self.run(job, channel, channels))
            for job, channel in zip(jobs, channels, strict=True)
        ]

    async def run(self, job: Job, channel: int = 0, group: tuple[int, ...] = ()) -> Outcome:
        """Run one task.

        Args:
            job: The task.
            channel: Given by ``run_group``.
            group: The channels of all its members.

        Raises:
            CrashError: The process ended before it answered.
            asyncio.CancelledError: The caller gave up; the process and all it started have ended,
                unless other members of its group still run.
        """
        channel = channel or next(self._channels)
        group = group or (channel,)
        conversation = _Conversation(job, group, self._loop.create_future())
        await self._pump.drain()
        if not self._conversations:
            self._pump.forget()
            self._oom_kills = OomKills()
        self._conversations[channel] = conversation
        self._mask = self._mask.joined(job.mask)
        self._direct_output()
        try:
            if self._ended.done():
                raise self._gone()
            job.ctx.check()  # the wish to stop may be older than the process
            self._limit_memory()
            self._send(channel, {"do": "run", "group": group, **_describe(job)})
            self.asleep = False  # it wakes by itself
            outcome, usable = await conversation.answer
            if not usable:
                self.usable, self._unusable = False, outcome.error
            self.served += 1
            await self._pump.drain()
            return outcome
        except CrashError as exc:
            if self.served and not conversation.taken:
                raise StaleEngineError(str(exc)) from exc
            raise
        except asyncio.CancelledError:
            if any(member in self._conversations for member in group if member != channel):
                raise  # they must not suffer, and the process will be ended with the last
            self.distrust(f"task {job.ctx.task_id}, which ran in it too, did not stop")
            await asyncio.wait([self._ended], timeout=_KILL_S)
            raise
        finally:
            del self._conversations[channel]
            self._direct_output()
            if self._conversations:
                self._limit_memory()
            if conversation.stopped and not self.concurrent and self._started_others():
                self.usable = False  # nobody waits for them any more

    def stop(self, task_id: str, grace_s: float) -> None:
        """Ask the executor to stop a task."""
        for channel, conversation in self._conversations.items():
            if conversation.job.ctx.task_id == task_id:
                conversation.stopped = True
                self._send(channel, {"do": "stop", "grace_s": grace_s})

    def _direct_output(self) -> None:
        """What is printed belongs to a task while it is the only one; else to the engine."""
        jobs = [conversation.job for conversation in self._conversations.values()]
        self._pump.redirect(jobs[0].log if len(jobs) == 1 else self._log)

    def _limit_memory(self) -> None:
        limits = [conversation.job.memory_bytes for conversation in self._conversations.values()]
        known = [limit for limit in limits if limit is not None]
        bounded = len(known) == len(limits) and not self._resting
        self._watch.limit_bytes = max(known, default=None) if bounded else None

    async def sleep(self) -> bool:
        """Ask the executor to give back its GPUs' memory; comes while no task runs.

        What it keeps moves to the host, beyond any task's limit, until it is awake again.

        Returns:
            Whether it says that it sleeps. One that does not answer in time is ended.
        """
        answered = self._answered = self._loop.create_future()
        over: set[asyncio.Future[Any]] = {answered, self._ended}
        self._resting = True
        self._limit_memory()
        self._send(0, {"do": "sleep"})
        done, _ = await asyncio.wait(over, timeout=_SLEEP_S, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            self.distrust(f"it did not fall asleep within {_SLEEP_S:g} s")
            await asyncio.wait([self._ended], timeout=_KILL_S)
        return self.asleep and self.usable

    # What the child says.

    def take(self, channel: int, message: Mapping[str, Any]) -> None:
        """Act on one message."""
        what = message["say"]
        if what == "refused":
            return self.distrust(FlowmeshError.from_dict(message["error"]).args[0])
        if what in ("asleep", "awake"):
            return self._note_sleep(what, message)
        conversation = self._conversations.get(channel)
        if conversation is None or conversation.answer.done():
            return None  # of a task that was given up
        ctx = conversation.job.ctx
        if what == "taken":
            conversation.taken = True
        elif what == "progress":
            ctx.on_progress(message["values"])
        elif what == "log":
            ctx.on_log(message["level"], message["message"])
        elif what == "ready" and Capability.SERVICE in self.info.capabilities:
            self._pump.redirect(self._log)
            ctx.on_ready(Outcome.from_dict(message["outcome"]), message["ttl_s"])
        elif what == "run_task":
            self._start_child(channel, conversation, message)
        elif what == "give_up" and message["number"] in conversation.children:
            conversation.children[message["number"]].cancel()
        elif what == "outcome":
            outcome = Outcome.from_dict(message["outcome"])
            conversation.answer.set_result((outcome, message["usable"]))
        return None

    def _note_sleep(self, what: str, message: Mapping[str, Any]) -> None:
        if what == "awake":
            self._resting = False
            self._limit_memory()
        elif self._answered is not None and not self._answered.done():
            # It wakes for what was sent meanwhile.
            self.asleep = message["done"] and not self._conversations
            self._answered.set_result(None)

    def _start_child(
        self, channel: int, conversation: _Conversation, message: Mapping[str, Any]
    ) -> None:
        future = conversation.job.ctx.start_child(message["spec"])
        number = message["number"]
        conversation.children[number] = future

        def answer(done: Future[Outcome]) -> None:
            conversation.children.pop(number, None)
            reply = {"do": "child", "number": number, "outcome": _settled(done).to_dict()}
            self._loop.call_soon_threadsafe(self._send, channel, reply)

        future.add_done_callback(answer)

    def _send(self, channel: int, message: Mapping[str, Any]) -> None:
        for frame in encode(channel, message):
            self._transport.write(frame)

    # End.

    def distrust(self, reason: str) -> None:
        """End the process at once, and everything that it started."""
        self.usable = False
        self._distrusted = self._distrusted or reason
        self._process.kill()

    def hung_up(self) -> None:
        """Note that no more will be said; a process that goes on living is of no use."""
        self.usable = False
        if not self._hung_up.done():
            self._hung_up.set_result(None)
        self._loop.call_later(_HANG_UP_S, self._end_silent)

    def _end_silent(self) -> None:
        if not self._ended.done():
            self.distrust("it closed its connection to the worker")

    def _exceeded(self, used_bytes: int) -> None:
        """End a process that took more memory than its task may have; from another thread."""
        self._loop.call_soon_threadsafe(
            self.distrust, f"it used {used_bytes} bytes, more than its task may"
        )

    async def _conclude(self) -> None:
        """When everything has ended, give those that still wait the reason."""
        await self._ended
        self.usable = False
        await asyncio.wait([self._hung_up], timeout=_HANG_UP_S)
        await asyncio.to_thread(self._pump.join, _KILL_S)
        self._watch.stop()
        self._transport.close()
        for conversation in self._conversations.values():
            if not conversation.answer.done():
                conversation.answer.set_exception(self._gone())
        self._log.close()
        if not self._crashed():
            shutil.rmtree(self._folder, ignore_errors=True)

    def _crashed(self) -> bool:
        status = self._ended.result()
        return status.code != 0 and not self._distrusted

    def _gone(self) -> FlowmeshError:
        if self._unusable is not None:  # the engine could not be loaded, for whoever waited too
            return self._unusable
        status = self._ended.result()
        if self._distrusted and not self._watch.exceeded:
            return CrashError(
                f"executor {self.info.name}: its process was ended: {self._distrusted}"
            )
        return explain_exit(
            what=f"executor {self.info.name}",
            code=status.code,
            signal=status.signal,
            output_tail=self._mask.text(self._pump.tail),
            watch=self._watch,
            machine_limit_bytes=usable_memory_bytes(),
            oom_kills=self._oom_kills.since(),
        )

    def _sweep(self) -> None:
        """End what a task left behind, detached from the executor's own processes."""
        self._swept = time.monotonic()
        self._process.end_orphans()

    def _started_others(self) -> bool:
        return len(tree_pids(self._process.pid)) > 1

    def rest(self) -> None:
        """Note that no task runs now."""
        self.idle_since = time.monotonic()
        if self.idle_since - self._swept > _SWEEP_S:
            self._sweep()
        elif not self._sweep_due:
            self._sweep_due = True
            self._loop.call_later(_SWEEP_S, self._sweep_if_idle)

    def _sweep_if_idle(self) -> None:
        self._sweep_due = False
        if not self.users and self.usable:
            self._sweep()

    async def end(self) -> None:
        """Unload by ending the process; when this returns it is gone, and its memory with it."""
        self.usable = False
        if not self._ended.done():
            self._send(0, {"do": "unload"})
            await asyncio.wait([self._ended], timeout=_UNLOAD_S)
        if not self._ended.done():
            _log.warning("executor %s did not unload within %g s", self.info.name, _UNLOAD_S)
            self.distrust("it did not unload")
            await asyncio.wait([self._ended], timeout=_KILL_S)
        await asyncio.wait([self._over], timeout=_KILL_S)

    @property
    def memory_bytes(self) -> int:
        """Host memory that the process and its descendants used when last looked at."""
        return self._watch.last_bytes


def _settled(done: Future[Outcome]) -> Outcome:
    if done.cancelled():
        return Outcome(error=FlowmeshError("the child task was given up"))
    error = done.exception()
    if error is None:
        return done.result()
    if not isinstance(error, FlowmeshError):
        error = FlowmeshError(f"the child task failed: {error!r}")
    return Outcome(error=error)


def _describe(job: Job) -> dict[str, Any]:
    ctx = job.ctx
    return {
        "task_id": ctx.task_id,
        "task_type": ctx.task_type,
        "spec": job.spec,
        "raw_spec": None if ctx.raw_spec is job.spec else ctx.raw_spec,
        "metadata": ctx.metadata,
        "folder": str(ctx.folder.absolute()),
        "inputs": ctx.inputs.to_dict(),
        "attempt": ctx.attempt,
        "final_folder": str(ctx.final_folder.absolute()),
        "previous": ctx.previous and str(ctx.previous.absolute()),
        "devices": ctx.devices,
        "remaining_s": ctx.remaining_s,
        "batch_scale": ctx.batch_scale,
    }
