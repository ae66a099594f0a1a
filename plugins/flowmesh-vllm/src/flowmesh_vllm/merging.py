"""Merges adapters into a model before vLLM loads it, in a process of its own.

That process ends before vLLM starts: its memory is certainly free then, and this one has not
imported torch before vLLM has set up the environment for it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from flowmesh_core import (
    AdapterRef,
    ExecutionError,
    ExecutorUnavailableError,
    FlowmeshError,
)
from flowmesh_vllm.weights import Weights

__all__ = ["merged"]

_INSTALL = "pip install 'flowmesh-vllm[engine]'"
_NEEDS = ("torch", "transformers", "peft")


@contextmanager
def merged(weights: Weights, folder: Path, *, trust_remote_code: bool) -> Iterator[Weights]:
    """Lend weights in which nothing is left to be merged; blocks for as long as merging takes.

    Args:
        weights: What to load.
        folder: Of the attempt; the merged model lies in ``.merged`` in it, and is removed at the
            end of the context: an engine must have read it by then.
        trust_remote_code: Whether the repository's own code may run.

    Raises:
        InputError: The model or an adapter cannot be read, or they do not fit.
        ExecutorUnavailableError: A package is not installed.
        ExecutionError: The disk is full, or the process was ended; retriable then.
    """
    if not weights.merged:
        yield weights
        return
    _check_packages()
    target = folder.absolute() / ".merged"
    try:
        shutil.rmtree(target, ignore_errors=True)  # of an earlier try
        _merge_elsewhere(weights, target, trust_remote_code=trust_remote_code)
        revision = weights.revision if weights.tokenizer else None  # else it was the model's
        yield attrs.evolve(weights, model=str(target), revision=revision, merged=())
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _check_packages() -> None:
    lacking = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if lacking:
        raise ExecutorUnavailableError(
            f"merging adapters needs {', '.join(lacking)}, not installed here; run: {_INSTALL}",
            needs=lacking,
            install=_INSTALL,
        )


def _merge_elsewhere(weights: Weights, target: Path, *, trust_remote_code: bool) -> None:
    job = {
        "model": weights.model,
        "revision": weights.revision,
        "adapters": [adapter.to_dict() for adapter in weights.merged],
        "target": str(target),
        "trust_remote_code": trust_remote_code,
    }
    target.mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-m", "flowmesh_vllm.merging"],
        input=json.dumps(job).encode(),
        stdout=subprocess.PIPE,  # the answer; what the libraries say goes to the task's log
        cwd=target,  # empty: files of the task must not be imported in place of packages
        check=False,
    )
    if done.returncode == 0:
        if answer := json.loads(done.stdout):
            raise FlowmeshError.from_dict(answer)
        return
    names = ", ".join(adapter.name for adapter in weights.merged)
    raise _describe_end(f"merging {names} into {weights.model}", done.returncode)


def _describe_end(what: str, code: int) -> ExecutionError:
    if code > 0:
        return ExecutionError(f"{what} failed with exit code {code}; the log says why")
    return ExecutionError(
        f"{what} was ended by {signal.Signals(-code).name}; it needs free memory of the size of"
        " the model's weights on the host",
        retriable=True,
    )


def main() -> None:
    """Do the job on stdin, and say on stdout what went wrong, or null."""
    job = json.load(sys.stdin)
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)  # libraries print
        json.dump(_attempt(job), answer)


def _attempt(job: dict[str, Any]) -> dict[str, Any] | None:
    try:
        from flowmesh_vllm.merger import merge  # noqa: PLC0415 - here torch may be imported
    except ImportError as exc:
        error = ExecutorUnavailableError(
            f"merging adapters: {exc}; run: {_INSTALL}", install=_INSTALL
        )
        return error.to_dict()
    adapters = tuple(map(AdapterRef.from_dict, job.pop("adapters")))
    try:
        merge(**{**job, "target": Path(job["target"])}, adapters=adapters)
    except FlowmeshError as exc:
        return exc.to_dict()
    return None


if __name__ == "__main__":
    main()
