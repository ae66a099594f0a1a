"""``python -m flowmesh_trl.agent``: torchrun, with what became of its processes as data.

Arguments: a file for the exit codes of processes that failed, ``torchrun`` or ``accelerate``, and
that command's own arguments. Accelerate turns its configuration into variables and then runs
torchrun itself. Standard input is the lifeline, as in each rank.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from flowmesh_trl.rank import hold_lifeline

__all__ = ["main"]


def _run_torchrun(argv: Sequence[str]) -> None:
    torchrun.run(torchrun.parse_args(argv))


def _run_accelerate(argv: Sequence[str]) -> None:
    # Seconds to import, and rarely wanted.
    launch: Any = importlib.import_module("accelerate.commands.launch")
    launch.launch_command(launch.launch_command_parser().parse_args(argv))


_TOOLS: dict[str, Callable[[Sequence[str]], None]] = {
    "torchrun": _run_torchrun,
    "accelerate": _run_accelerate,
}


def main(argv: Sequence[str]) -> int:
    """Run the tool; return the exit code."""
    report, tool, *arguments = argv
    threading.Thread(target=hold_lifeline, name="lifeline", daemon=True).start()
    try:
        _TOOLS[tool](arguments)
    except ChildFailedError as exc:
        exits = {rank: failure.exitcode for rank, failure in exc.failures.items()}
    except subprocess.CalledProcessError as exc:  # accelerate starts a single process itself
        exits = {0: exc.returncode}
    else:
        return 0
    Path(report).write_text(json.dumps(exits), encoding="utf-8")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
