"""Train in several processes: start them through torchrun, listen to them, leave none behind.

All that passes between here and the ranks lies in ``.launch`` of the attempt's folder: the job,
what rank 0 reports, the flag that stops it, and the error of each rank that failed. The folder is
gone when ``launch`` returns or raises; what the ranks print stays in ``logs``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import attrs
import psutil

from flowmesh_core import CancelledError, ExecutorUnavailableError
from flowmesh_trl.failures import explain
from flowmesh_trl.job import Link, TrainingJob
from flowmesh_trl.rank import TRAIN

__all__ = ["check_launch", "launch"]

_POLL_S = 0.1
_TERM_S = 5.0  # between SIGTERM and SIGKILL
_PATIENCE_S = 5.0  # for processes that were killed
_CORE = {"output", "checkpoint", "resources"}  # blocks that the core has dealt with
_SECRET = {"headers", "download_headers"}  # what they were for is at hand


def check_launch(training: Mapping[str, Any]) -> None:
    """Raise when a package is missing that the training's configuration needs.

    Raises:
        ExecutorUnavailableError: It names the field, the package and the command to run.
    """
    if training.get("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        raise ExecutorUnavailableError(
            "spec.training.deepspeed needs the package deepspeed, not installed here;"
            " run: pip install deepspeed",
            needs=("deepspeed",),
            install="pip install deepspeed",
        )


def launch(
    job: TrainingJob,
    link: Link,
    *,
    processes: int,
    devices: Sequence[str],
    target: str = TRAIN,
    grace_s: float | None = None,
) -> dict[str, Any]:
    """Train in several processes of this machine and return rank 0's summary.

    Blocks. When the link says stop, the ranks are asked to save and end; whoever wants them ended
    sooner gives a grace, or ends this process: when it dies, they die. No process of it is
    left when this returns or raises.

    Args:
        job: Its folder gets ``logs/rank-<n>.log``, and ``logs/launcher.log``.
        link: Hears rank 0; its log gets the last lines of another rank that failed.
        processes: How many ranks.
        devices: GPUs that they may see; none on CPU.
        target: ``module:function`` that each rank calls with the job and a link.
        grace_s: How long ranks may take to stop once asked; as long as they need without it.

    Raises:
        FlowmeshError: What the rank that failed first raised, with its number.
        CrashError: That rank was ended by a signal, or exited without an error.
        CancelledError: The ranks did not stop within the grace.
        ExecutorUnavailableError: See ``check_launch``.
    """
    training = job.spec.get("training") or {}
    check_launch(training)
    folder = job.folder / ".launch"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    try:
        _write_job(job, folder / "job.json")
        command = _build_command(folder, processes, target, training.get("accelerate_config"))
        environment = _build_environment(devices, processes)
        with _Ranks(command, environment, job=job, link=link, grace_s=grace_s) as ranks:
            ranks.watch()
        return ranks.conclude(processes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_job(job: TrainingJob, path: Path) -> None:
    """Write what the ranks need, for this user alone; what lies on disk keeps no secret of it."""
    kept = {key: block for key, block in job.spec.items() if key not in _CORE}
    spec = {
        key: _without_secrets(block) if key in ("data", "model", "reward_model") else block
        for key, block in kept.items()
    }
    path.touch(mode=0o600)
    path.write_text(json.dumps(attrs.evolve(job, spec=spec).to_dict()), encoding="utf-8")


def _without_secrets(value: Any) -> Any:
    if not isinstance(value, Mapping):  # rows in a list may have such a column
        return value
    return {key: _without_secrets(item) for key, item in value.items() if key not in _SECRET}


def _build_command(
    folder: Path, processes: int, target: str, accelerate_config: Any
) -> tuple[str, ...]:
    agent = (sys.executable, "-m", "flowmesh_trl.agent", str(folder / "failures.json"))
    script = ("-m", "flowmesh_trl.rank", str(folder), "--target", target)
    logs = ("--log_dir", str(folder / "torchrun"), "--max_restarts", "0")
    if not accelerate_config:
        count = ("--standalone", "--nproc_per_node", str(processes), "--local_addr", "127.0.0.1")
        return (*agent, "torchrun", *count, *logs, *script)
    path = accelerate_config
    if isinstance(accelerate_config, Mapping):
        path = folder / "accelerate.json"
        path.write_text(json.dumps(accelerate_config), encoding="utf-8")
    return (
        *(*agent, "accelerate", "--config_file", str(path), "--num_processes", str(processes)),
        *("--num_machines", "1", "--machine_rank", "0", "--gpu_ids", "all"),
        *("--main_process_ip", "127.0.0.1", "--main_process_port", "0", *logs, *script),
    )


def _build_environment(devices: Sequence[str], processes: int) -> dict[str, str]:
    """Return the ranks' environment: this process's, with their GPUs, threads and addresses."""
    own = os.environ  # noqa: TID251 - only read, to be handed on
    foreign = ("PET_", "TORCHELASTIC_")  # would change what torchrun does
    loopback = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    return {
        **loopback,
        **{name: value for name, value in own.items() if not name.startswith(foreign)},
        "CUDA_VISIBLE_DEVICES": ",".join(devices),
        "OMP_NUM_THREADS": str(threads),
    }


class _Ranks:
    """torchrun and its ranks, from start to end."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        job: TrainingJob,
        link: Link,
        grace_s: float | None,
    ) -> None:
        self._job, self._link, self._grace_s = job, link, grace_s
        self._folder = job.folder / ".launch"
        logs = job.folder / "logs"
        logs.mkdir(exist_ok=True)
        self._reports = _Tail(self._folder / "reports.jsonl")
        self._output = _Tail(logs / "rank-0.log")
        self._unread = ""
        self._summary: dict[str, Any] | None = None
        self._deadlines: list[tuple[float, Callable[[], None]]] | None = None
        self._overdue = False
        with (logs / "launcher.log").open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own modules
                command,
                stdin=subprocess.PIPE,  # the ranks' lifeline: never written to while all is well
                stdout=log,
                stderr=log,
                env=dict(environment),
                start_new_session=True,
            )

    def __enter__(self) -> _Ranks:
        return self

    def __exit__(self, *_exc: object) -> None:
        try:
            self._end()
            self._listen()
        finally:
            self._reports.close()
            self._output.close()

    def watch(self) -> None:
        """Return when torchrun has ended; stop it when the link says so."""
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_POLL_S)
                return
            self._listen()
            if self._deadlines is None and self._link.stopping:
                self._ask_to_stop()
            while self._deadlines and time.monotonic() >= self._deadlines[0][0]:
                self._overdue = True
                self._deadlines.pop(0)[1]()

    def conclude(self, processes: int) -> dict[str, Any]:
        """Return the summary, or raise what went wrong; only after the end."""
        if self._process.returncode == 0 and self._summary is not None:
            return self._summary
        if self._overdue:
            raise CancelledError(
                f"task {self._job.task_id} was cancelled; its ranks did not stop within"
                f" {self._grace_s:g} s and were ended"
            )
        raise explain(
            self._job.folder, processes, agent_code=self._process.returncode, say=self._link.log
        )

    def _ask_to_stop(self) -> None:
        (self._folder / "stop").touch()
        if self._grace_s is None:
            self._deadlines = []
            return
        now = time.monotonic()
        self._deadlines = [
            (now + self._grace_s, self._process.terminate),  # torchrun hands it on
            (now + self._grace_s + _TERM_S, self._kill),
        ]

    def _listen(self) -> None:
        sys.stdout.write(self._output.read())
        *lines, self._unread = (self._unread + self._reports.read()).split("\n")
        for line in lines:
            message = json.loads(line)
            if "progress" in message:
                self._link.progress(**message["progress"])
            elif "log" in message:
                self._link.log(message["log"])
            else:
                self._summary = message["summary"]

    def _end(self) -> None:
        """Leave no process behind, whatever state they are in."""
        if self._process.poll() is None:
            self._kill()
            self._process.wait()
        lifeline = self._process.stdin
        assert lifeline is not None  # noqa: S101 - for the type checker
        with lifeline, contextlib.suppress(BrokenPipeError):
            os.write(lifeline.fileno(), b"end " * 64)  # whoever lost torchrun reads a byte of it
            # A pipe that nobody can read any more is in error: then all who inherited it are gone.
            poll = select.poll()
            poll.register(lifeline, 0)
            if not poll.poll(_PATIENCE_S * 1000):
                self._link.log("some processes of the training did not end when killed")

    def _kill(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            torchrun = psutil.Process(self._process.pid)
            for process in (torchrun, *torchrun.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)


class _Tail:
    """What has been added to a file that another process writes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def read(self) -> str:
        """Return what is new; nothing while there is no file."""
        if self._file is None:
            if not self._path.exists():
                return ""
            self._file = self._path.open(encoding="utf-8", errors="replace", newline="")
        return self._file.read()

    def close(self) -> None:
        """Close the file, if it is open."""
        if self._file is not None:
            self._file.close()
