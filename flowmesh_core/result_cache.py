"""Results of deterministic tasks, kept by what they were made from.

A result counts for another task only when nothing that could change it differs: the spec but for
its delivery, the owner, the executor and the versions of what it needs, and the content of every
file that is read. What cannot be told to be equal (chance, a hub id without a commit) is neither
looked up nor kept; neither is a result with files.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from flowmesh_core.bounded_folder import BoundedFolder
from flowmesh_core.contract import Task
from flowmesh_core.errors import ContractError
from flowmesh_core.executor import OWNER_FIELDS, ExecutorInfo, Outcome
from flowmesh_core.inputs import Inputs
from flowmesh_core.merge import canonical_json, work_key
from flowmesh_core.plugins import code_version, installed_version
from flowmesh_core.wire import decode_json, encode_json, utc_now

__all__ = ["ResultCache", "result_key"]

# Larger files count by name, size and time of change: reading weights takes longer than using them.
_READ_BYTES = 64 << 20
_COMMIT_LENGTH = 40
_BLOCK_BYTES = 1 << 20


def result_key(info: ExecutorInfo, task: Task, inputs: Inputs) -> str | None:
    """Return a digest that two tasks share only if they have the same result; reads files.

    Args:
        info: The executor that serves the task.
        task: Its spec with the secrets in it; only the digest is ever stored.
        inputs: What was gathered for it.

    Returns:
        None when chance decides, or when it cannot be told what is read or run.
    """
    upstream = {stage: _made(document) for stage, document in task.common.upstream.items()}
    work = work_key(attrs.evolve(task, spec={**task.spec, "_upstreamResults": upstream}))
    if work is None or info.environment or not _is_pinned(inputs):
        return None
    packages = ("flowmesh-core", *(name.partition(".")[0] for name in info.needs))
    versions = [code_version(info.target), *map(installed_version, packages)]
    if not all(versions):
        return None
    try:
        files = [_identity(path) for path in inputs.paths()]
    except OSError:
        return None
    names = [file.name for file in inputs.files]
    owner = [task.metadata.get(name) for name in OWNER_FIELDS]
    rows = inputs.rows.to_dict() if inputs.rows and inputs.rows.path is None else None
    text = canonical_json([info.name, versions, owner, task.task_type, files, names, rows]) + work
    return hashlib.sha256(text.encode()).hexdigest()


def _made(document: Any) -> Any:
    """Return what an earlier stage answered, without when, where and for whom it was done."""
    wrapped = isinstance(document, Mapping) and "result" in document
    result = document["result"] if wrapped else document
    if isinstance(result, Mapping):
        return {key: value for key, value in result.items() if key != "cached"}
    return result


def _is_pinned(inputs: Inputs) -> bool:
    """Whether all that is read lies here, or is a commit that never changes."""
    models = [model for model in (inputs.model, *inputs.models.values()) if model]
    hub_only = [model for model in models if model.path is None]
    rows = inputs.rows
    return all(len(model.revision or "") == _COMMIT_LENGTH for model in hub_only) and not (
        rows is not None and rows.kind == "dataset" and rows.path is None
    )


def _identity(path: Path) -> list[Any]:
    """Return what tells a file's or a folder's content from any other."""
    if path.is_dir():
        files = sorted(found for found in path.rglob("*") if found.is_file())
        return [[str(file.relative_to(path)), _file_identity(file)] for file in files]
    return [_file_identity(path)]


def _file_identity(path: Path) -> Any:
    found = path.stat()
    if found.st_size > _READ_BYTES:
        return [os.path.realpath(path), found.st_size, found.st_mtime_ns]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@attrs.define(eq=False)
class Flight:
    """Work that is being done.

    Attributes:
        owner: Who does it: those of one batch do not wait for each other.
        ended: Done when it has ended, well or not.
        unkeepable: It went well and cannot be kept, so that nobody need wait for the next one.
    """

    owner: object
    ended: asyncio.Future[None] = attrs.field(
        factory=lambda: asyncio.get_running_loop().create_future()
    )
    unkeepable: bool = False


class ResultCache:
    """Results on disk, and which of them this process is working on.

    Args:
        folder: Of the results; several workers may share it.
        max_bytes: What they may have together; the longest unused go first.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = BoundedFolder(folder, max_bytes)
        self._flights: dict[str, Flight] = {}

    def in_flight(self, key: str) -> Flight | None:
        """Return the work that is being done here on a key."""
        return self._flights.get(key)

    @contextlib.contextmanager
    def flight(self, key: str, owner: object) -> Iterator[Flight]:
        """Work on a key; those who come meanwhile find the first who does."""
        flight = Flight(owner)
        first = self._flights.setdefault(key, flight)
        try:
            yield flight
        finally:
            if first is flight:
                del self._flights[key]
            flight.ended.set_result(None)

    def find(self, key: str) -> Outcome | None:
        """Return a result that was kept, marked as such; a damaged one is none."""
        path = self._folder.path / key
        try:
            entry = decode_json(path.read_bytes())
            source = {"task_id": str(entry["cached"]["task_id"]), "at": entry["cached"]["at"]}
            result = {**entry["result"], "cached": source}
        except (OSError, ContractError, LookupError, TypeError, ValueError):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now, and so the last to go
        return Outcome(result=result)

    def keep(self, key: str, task_id: str, outcome: Outcome) -> bool:
        """Keep a result, unless it names files or is too large; return whether it is kept.

        A cache that cannot be written is no reason to fail.
        """
        source = {"task_id": task_id, "at": utc_now()}
        content = encode_json({"cached": source, "result": outcome.result})
        if outcome.artifacts or len(content) > self._folder.max_bytes:
            return False
        try:
            with self._folder.appearing(self._folder.path / key) as part:
                part.write_bytes(content)
        except OSError:
            return False
        return True

    def make_room(self) -> None:
        """Remove the longest unused results until the rest fits, if that may be needed."""
        with contextlib.suppress(OSError):
            self._folder.make_room()
