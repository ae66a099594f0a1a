"""Task folders: the only place where text from the wire becomes a path.

::

    <results>/<task_id>/{responses.json, manifest.json, logs/, artifacts/, ...}
    <results>/.<task_id>.attempt-<n>/    what an attempt writes; renamed when it succeeds
    <results>/.workers/<worker_id>/worker.log

A task's folder appears by one rename, so that it is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import attrs

from flowmesh_core.contract import Destination, check_task_id
from flowmesh_core.errors import ArtifactError, ContractError

__all__ = ["MANIFEST_NAME", "RESULT_NAME", "Attempt", "TaskFolders", "confine"]

RESULT_NAME = "responses.json"
MANIFEST_NAME = "manifest.json"
# Present in every task folder, whatever the executor writes.
_ALWAYS = ("logs", "artifacts")


def confine(folder: Path, relative: str) -> Path:
    """Return ``folder / relative``, which must stay inside the folder, links resolved.

    Raises:
        ArtifactError: It would leave the folder, or begins with a dot and so would not last: the
            attempt's own files do.
    """
    path = folder / relative
    steps = _steps_below(path, folder)
    if not steps or steps[0].startswith(".") or ".." in PurePosixPath(relative).parts:
        raise ArtifactError(
            f"path {relative!r} must stay inside the task's folder and not begin with '.'"
        )
    return path


def _steps_below(path: Path, folder: Path) -> tuple[str, ...]:
    """Return the names from the folder down to the path, links resolved; none if it leads out."""
    try:
        return Path(os.path.realpath(path)).relative_to(os.path.realpath(folder)).parts
    except ValueError:  # also for text that no file system can hold as a name
        return ()


@attrs.frozen(kw_only=True)
class Attempt:
    """One attempt at a task.

    Attributes:
        number: From 1, one above the highest that left a folder behind.
        folder: Where this attempt writes.
        final: The task's folder, which gets the content on commit.
        previous: What the latest earlier attempt left, or None.
    """

    task_id: str
    number: int
    folder: Path
    final: Path
    previous: Path | None = None

    def write(self, name: str, content: bytes, *, fsync: bool = False) -> None:
        """Write a file of the attempt's folder."""
        # Raw descriptors: this runs twice per task and `open` costs a third more.
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        handle = os.open(self.folder / name, flags, 0o644)
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(handle, view) :]
            if fsync:
                os.fsync(handle)
        finally:
            os.close(handle)

    def commit(self, *, fsync: bool = False) -> None:
        """Rename the attempt to the task's folder, replacing what an earlier run left there.

        What begins with a dot was for this attempt only and is removed.
        """
        names = os.listdir(self.folder)  # noqa: PTH208 - the hot path of every task
        try:
            os.rename(self.folder, self.final)  # noqa: PTH104 - as above
        except OSError:
            if not self.final.is_dir():
                raise
            self._replace_final()
        # Only now: had this failed, the attempt would still be whole.
        for name in names:
            if name.startswith("."):
                _discard(self.final / name)
        if self.number > 1:
            self._remove_earlier()
        if fsync:
            _sync_folder(self.final.parent)

    @contextlib.contextmanager
    def leaving_out(self, names: Iterable[str]) -> Iterator[None]:
        """Hide paths that the commit is to remove; they come back if the block fails."""
        moved: list[tuple[Path, Path]] = []
        try:
            for path in map(self.folder.joinpath, names):
                if path.exists():
                    moved.append((path, path.rename(self.folder / f".shipped-{len(moved)}")))
            yield
        except BaseException:
            for path, hidden in reversed(moved):
                with contextlib.suppress(OSError):
                    hidden.rename(path)
            raise

    @property
    def _aside(self) -> Path:
        return self.final.with_name(f".{self.task_id}.replaced")

    def _replace_final(self) -> None:
        shutil.rmtree(self._aside, ignore_errors=True)
        self.final.rename(self._aside)
        self.folder.rename(self.final)

    def _remove_earlier(self) -> None:
        """Remove what came before, latest first: a gap would hide the attempts behind it."""
        shutil.rmtree(self._aside, ignore_errors=True)
        for number in range(self.number - 1, 0, -1):
            shutil.rmtree(_attempt_folder(self.final, number), ignore_errors=True)


def _discard(path: Path) -> None:
    """Remove a file or a folder; what cannot be removed does no harm where it is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _attempt_folder(final: Path, number: int) -> Path:
    return final.with_name(f".{final.name}.attempt-{number}")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class TaskFolders:
    """Makes and finds task folders.

    Args:
        results_dir: ``RESULTS_DIR``; created when missing.
        allowed_dirs: Further absolute folders that ``destination.path`` may name.
    """

    def __init__(self, results_dir: Path, allowed_dirs: Iterable[Path] = ()) -> None:
        self.root = results_dir.expanduser().absolute()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise ArtifactError(f"RESULTS_DIR {self.root} cannot be created: {exc}") from exc
        self._allowed = (self.root, *allowed_dirs)

    def task_folder(self, task_id: str, destination: Destination) -> Path:
        """Return the folder of a task without creating it.

        Raises:
            ContractError: ``destination.path`` leaves the folders that the operator allows.
        """
        check_task_id(task_id)
        if not destination.path or destination.type == "http":
            return self.root / task_id
        folder = self.root / destination.path
        if folder.name != task_id:
            folder = folder / task_id
        if not any(map(_is_visible, (_steps_below(folder, place) for place in self._allowed))):
            raise ContractError(
                f"spec.output.destination.path {destination.path!r} must lie in RESULTS_DIR or in "
                "a folder of FLOWMESH_ALLOWED_DIRS, and no part of it may begin with '.'",
                where=f"task {task_id}",
            )
        return folder

    def begin(self, task_id: str, destination: Destination) -> Attempt:
        """Create the folder of a new attempt.

        Raises:
            ContractError: As ``task_folder``.
            ArtifactError: It cannot be created.
        """
        final = self.task_folder(task_id, destination)
        try:
            number, previous = _next_attempt(final)
            folder = _attempt_folder(final, number)
            _make_folder(folder)
        except (OSError, ValueError) as exc:  # ValueError: no name for a file system
            raise ArtifactError(f"task {task_id}: cannot create {final}: {exc}") from exc
        return Attempt(
            task_id=task_id, number=number, folder=folder, final=final, previous=previous
        )

    def worker_log(self, worker_id: str) -> Path:
        """Return the worker's log file; its folder exists afterwards."""
        folder = self.root / ".workers" / check_task_id(worker_id)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / "worker.log"


def _is_visible(steps: tuple[str, ...]) -> bool:
    """Whether there are steps and none is hidden: attempts and logs are, and are not to be hit."""
    return bool(steps) and not any(step.startswith(".") for step in steps)


def _next_attempt(final: Path) -> tuple[int, Path | None]:
    """Return the number of the next attempt and what the latest one before it left."""
    there = _is_folder(final)
    prefix = f"{final.parent}/.{final.name}.attempt-"
    number = 1
    # A run after a whole one begins at 2, so the first folder may be missing.
    while any(os.path.exists(f"{prefix}{n}") for n in (number, number + 1)):  # noqa: PTH110 - hot path
        number += 1
    if number > 1:
        return number, _attempt_folder(final, number - 1)
    return (2, final) if there else (1, None)


def _is_folder(path: Path) -> bool:
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    if not stat.S_ISDIR(mode):
        raise FileExistsError(f"{path} is there already and is no folder")
    return True


def _make_folder(folder: Path) -> None:
    try:
        os.mkdir(folder)  # noqa: PTH102 - the hot path of every task
    except FileNotFoundError:
        folder.mkdir(parents=True)
    for name in _ALWAYS:
        os.mkdir(folder / name)  # noqa: PTH102 - as above
