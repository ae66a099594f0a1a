"""Training functions for ``test_launch.py``; each rank imports this file."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any, NoReturn

from flowmesh_trl.job import Link, TrainingJob

from flowmesh_core import CancelledError, InputError


def _rank() -> int:
    return int(os.environ["RANK"])


def reduce(job: TrainingJob, link: Link) -> dict[str, Any]:
    """Sum the ranks over gloo, report, print."""
    import psutil
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    value = torch.tensor([float(_rank() + 1)])
    dist.all_reduce(value)
    sys.stdout.write(f"rank {_rank()} prints\n")
    link.progress(step=1, total=2, loss=value / 2, kind="numbers")
    link.log(f"rank {_rank()} logs")
    sockets = psutil.Process().net_connections("inet")
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WORLD_SIZE")
    return {
        "sum": value.item(),
        "spec": job.spec,
        "remote": sorted({pair.raddr.ip for pair in sockets if pair.raddr}),
        **{name: os.environ[name] for name in names},
    }


def refuse(job: TrainingJob, _link: Link) -> None:
    """Rank 1 refuses; rank 0 loses its peer and says so."""
    if _rank() == 0:
        _lose_peer(job)
    _meet_peer(job)
    sys.stderr.write("the file is not there\n")
    raise InputError("no rows in rows.jsonl", retriable=True)


def _meet_peer(job: TrainingJob) -> int:
    """Connect the two ranks, whichever comes first, until this process ends."""
    pipe = job.folder / "peer"
    with contextlib.suppress(FileExistsError):
        os.mkfifo(pipe)
    return os.open(pipe, os.O_WRONLY if _rank() == 1 else os.O_RDONLY)


def _lose_peer(job: TrainingJob) -> NoReturn:
    """Fail as a collective does: not before the other rank is gone."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun may see first that it is
    os.read(_meet_peer(job), 1)
    raise RuntimeError("connection closed by peer")


def fail_at_length(job: TrainingJob, _link: Link) -> None:
    """Raise what notes when its text is first asked for."""

    class LongError(RuntimeError):
        def __str__(self) -> str:
            with contextlib.suppress(FileExistsError), (job.folder / "told-at").open("x") as file:
                file.write(str(time.monotonic()))
            return "much to tell"

    raise LongError


def run_out_of_memory(_job: TrainingJob, _link: Link) -> None:
    """Rank 0 fails as torch does."""
    if _rank() == 0:
        raise MemoryError("cannot allocate 3 GiB")
    time.sleep(60)


def die(job: TrainingJob, _link: Link) -> None:
    """Rank 1 is killed; rank 0 loses its peer and says so."""
    if _rank() == 0:
        _lose_peer(job)
    _meet_peer(job)
    sys.stdout.write("last words\n")
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def exit_quietly(_job: TrainingJob, _link: Link) -> None:
    """Rank 1 exits without an error."""
    if _rank() == 1:
        os._exit(3)
    time.sleep(60)


def stop_when_asked(job: TrainingJob, link: Link) -> None:
    """Save for a second once asked, in every rank; rank 0 is done first."""
    link.progress(step=1)
    while not link.stopping:
        time.sleep(0.02)
    time.sleep(_rank())
    (job.folder / f"saved-{_rank()}").touch()
    raise CancelledError("stopped at step 1")


def never_stop(job: TrainingJob, link: Link) -> None:
    """Say the pids of this rank, torchrun and a helper that left the group; heed nothing."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pids = [os.getppid(), os.getpid()]
    if job.spec.get("helper", True):
        pids.append(subprocess.Popen(["sleep", "600"], start_new_session=True).pid)
    passing = job.folder / f"pids-{_rank()}.new"
    passing.write_text(json.dumps(pids))
    passing.rename(job.folder / f"pids-{_rank()}.json")
    while not (job.folder / "pids-1.json").exists():
        time.sleep(0.02)
    link.progress(step=1)
    time.sleep(600)


def tell_environment(_job: TrainingJob, _link: Link) -> dict[str, str]:
    """Return what Accelerate told this rank."""
    names = ("ACCELERATE_USE_FSDP", "WORLD_SIZE")
    return {name: os.environ[name] for name in names}


def tell_job(job: TrainingJob, _link: Link) -> dict[str, Any]:
    """Return what lies on disk of the job while it runs."""
    path = job.folder / ".launch" / "job.json"
    return {"text": path.read_text(), "mode": path.stat().st_mode & 0o777}


def end_early(_job: TrainingJob, _link: Link) -> None:
    """End the process as if all were well."""
    os._exit(0)
