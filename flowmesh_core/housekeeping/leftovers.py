"""Finds what tasks and engines left on disk, without following a link."""

from __future__ import annotations

import contextlib
import enum
import json
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import attrs

from flowmesh_core.artifacts.layout import MANIFEST_NAME
from flowmesh_core.contract import check_task_id
from flowmesh_core.errors import ContractError
from flowmesh_core.housekeeping.journal import folder_key

__all__ = [
    "Leftover",
    "State",
    "find_engines",
    "find_tasks",
    "identify",
    "is_anything_left",
    "is_way_clear",
    "measure",
]

# What lies beside a task's folder: an attempt, what a commit replaces, what was being removed.
_BESIDE = re.compile(r"\.(?P<id>.+)\.(?:attempt-[0-9]+|replaced|(?P<gone>removed-[0-9a-f]{8}))")


class State(enum.Enum):
    """What a worker has to do with a leftover."""

    HELD = "held"  # by a worker that lives, or because another task's folder lies in it
    UNREPORTED = "unreported"
    REPORTED = "reported"
    ENDED = "ended"  # no task's any more


@attrs.frozen(kw_only=True)
class Leftover:
    """What there is of one task: its folder and what lies beside; or one folder of another kind.

    Attributes:
        folder: The task's, which need not be there.
        key: The folder as journals have it; empty for what is no task's any more.
        parts: Each path with its device and inode.
        changed_at: When the latest of them changed; seconds since the epoch.
        size_bytes: Of all regular files; 0 until it is measured.
        state: What its worker has to do with it.
        at: When it was reported; when it changed if it was not.
    """

    folder: Path
    key: str
    parts: Mapping[Path, tuple[int, int]]
    changed_at: float
    size_bytes: int = 0
    state: State = State.ENDED
    at: float = attrs.field(default=attrs.Factory(lambda self: self.changed_at, takes_self=True))

    @property
    def is_of_its_task(self) -> bool:
        """Whether the folder, if it is there, has the manifest of the task of its name."""
        return self.folder not in self.parts or _has_manifest(self.folder)

    @property
    def is_as_found(self) -> bool:
        """Whether all its parts are there still, and no others under their names."""
        try:
            found = {path: path.lstat() for path in self.parts}
        except FileNotFoundError:
            return False
        return self.parts == identify(found)


def find_tasks(
    root: Path, elsewhere: Collection[Path], known: Collection[str]
) -> Iterator[Leftover]:
    """Find what there is of every task, and what a removal that was cut short left of one.

    Args:
        root: Looked through as a whole.
        elsewhere: Further places; nothing is looked for there but tasks that are known.
        known: Folders as journals have them.
    """
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        found, others = _look_into(folder, root, known)
        waiting += others
        yield from found
    for parent in sorted({Path(key).parent for key in known if key.startswith("/")}):
        if is_way_clear(parent, elsewhere):
            found, _ = _look_into(parent, root, known)
            yield from (leftover for leftover in found if str(leftover.folder) in known)


def is_way_clear(folder: Path, places: Iterable[Path]) -> bool:
    """Whether a folder lies in one of the places, with no link and nothing hidden on the way."""
    ways = [folder.relative_to(place).parts for place in places if folder.is_relative_to(place)]
    clear = any(not any(step.startswith(".") for step in way) for way in ways)
    return clear and folder == Path(os.path.realpath(folder))


def _look_into(
    folder: Path, root: Path, known: Collection[str]
) -> tuple[list[Leftover], list[Path]]:
    """Return what there is of tasks, and the folders in which there may be more."""
    tasks: dict[str, list[Path]] = {}
    remains: list[tuple[str, Path]] = []
    others: list[Path] = []
    for path in _list_folders(folder):
        beside = _BESIDE.fullmatch(path.name)
        if beside and beside["gone"]:
            remains.append((beside["id"], path))
        elif beside:
            tasks.setdefault(beside["id"], []).append(path)
        elif path.name.startswith("."):
            continue
        elif (path / MANIFEST_NAME).is_file() or folder_key(root, path) in known:
            tasks.setdefault(path.name, []).append(path)
        else:
            others.append(path)
    keyed = [(name, folder_key(root, folder / name), paths) for name, paths in tasks.items()]
    keyed += [(name, "", [path]) for name, path in remains]
    built = [_build(folder / name, key, paths) for name, key, paths in keyed if _is_task_id(name)]
    return [leftover for leftover in built if leftover is not None], others


def _build(folder: Path, key: str, paths: Iterable[Path]) -> Leftover | None:
    found: dict[Path, os.stat_result] = {}
    for path in paths:
        with contextlib.suppress(OSError):  # it went just now
            found[path] = path.lstat()
    if not found:
        return None
    return Leftover(
        folder=folder,
        key=key,
        parts=identify(found),
        # A rename is no change of a folder, but to be put back it must be left for a moment.
        changed_at=max(s.st_mtime if key else s.st_ctime for s in found.values()),
    )


def identify(found: Mapping[Path, os.stat_result]) -> dict[Path, tuple[int, int]]:
    """Return the device and inode of each."""
    return {path: (status.st_dev, status.st_ino) for path, status in found.items()}


def find_engines(worker: Path, *, before: float) -> Iterator[Leftover]:
    """Find the folders of a worker's engines in which nothing has changed since a time."""
    for path in _list_folders(worker / "engines"):
        found = _build(path, "", [path])
        if found is not None and (leftover := measure(found)).changed_at < before:
            yield attrs.evolve(leftover, at=leftover.changed_at)


def measure(leftover: Leftover) -> Leftover:
    """Return it with its size, and with the time at which anything in it changed.

    It is held if another task's folder lies in it, whether or not a journal knows of that.
    """
    found = [each for path in leftover.parts for each in _list_all(path)]
    inner = (path.parent for path, _ in found if path.name == MANIFEST_NAME)
    holds = any(folder not in leftover.parts and _has_manifest(folder) for folder in inner)
    return attrs.evolve(
        leftover,
        size_bytes=sum(status.st_size for _, status in found if stat.S_ISREG(status.st_mode)),
        changed_at=max((status.st_mtime for _, status in found), default=leftover.changed_at),
        state=State.HELD if holds and leftover.key else leftover.state,
    )


def is_anything_left(folder: Path) -> bool:
    """Whether there is a task's folder or what lies beside it; attempts begin at 1 or 2."""
    beside = (f".{folder.name}.{kind}" for kind in ("attempt-1", "attempt-2", "replaced"))
    return any(os.path.lexists(folder.with_name(name)) for name in (folder.name, *beside))


def _list_folders(folder: Path) -> list[Path]:
    """Return the folders in a folder, links left out; none when it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def _list_all(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Return a folder and all in it that is no link, each with its status."""
    waiting = [os.fspath(folder)]
    while waiting:
        path = waiting.pop()
        with contextlib.suppress(OSError):  # it went just now, or cannot be read
            yield Path(path), os.lstat(path)
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    elif not entry.is_symlink():
                        yield Path(entry.path), entry.stat(follow_symlinks=False)


def _has_manifest(folder: Path) -> bool:
    """Whether there is a manifest of the task of the folder's name."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("task_id") == folder.name


def _is_task_id(name: str) -> bool:
    try:
        return check_task_id(name) == name
    except ContractError:
        return False
