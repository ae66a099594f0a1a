"""Removes old task folders, by age and by size, and never one that was not reported.

What counts is what workers wrote in their journals. A folder is renamed before it is deleted, so
that nobody sees half of one, and while no worker can say that it takes the task again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

import attrs

from flowmesh_core.config import Settings
from flowmesh_core.housekeeping.history import History
from flowmesh_core.housekeeping.leftovers import (
    Leftover,
    State,
    find_engines,
    find_tasks,
    identify,
    is_anything_left,
    is_way_clear,
    measure,
)

__all__ = ["Cleaner", "Housekeeping", "Limits", "Plan", "Removed", "build_cleaner"]

_log = logging.getLogger(__name__)
_INTERVAL_S = 3600.0
# How much is renamed at once, while no worker may write its journal.
_BATCH = 64
# Clocks of workers and of file servers differ.
_SLACK_S = 60.0
# A worker writes in its journal what it holds a moment after it has begun, later on a slow disk.
_UNSAID_S = 10.0


@attrs.frozen(kw_only=True)
class Limits:
    """What may stay.

    Attributes:
        older_than_s: What was reported longer ago goes.
        max_bytes: What all task folders together may have; the longest reported go first.
        unreported: What was not reported goes too once it has not changed for ``older_than_s``,
            unless a worker that lives holds it.
    """

    older_than_s: float | None = None
    max_bytes: int | None = None
    unreported: bool = False


@attrs.frozen(kw_only=True)
class Plan:
    """What goes, and which tasks' folders stay."""

    going: tuple[Leftover, ...] = ()
    staying: tuple[Leftover, ...] = ()

    def count_staying(self, state: State) -> int:
        """Return how many of those that stay are in a state."""
        return sum(leftover.state is state for leftover in self.staying)


@attrs.frozen(kw_only=True)
class Removed:
    """What went, and what could not be deleted."""

    gone: tuple[Leftover, ...] = ()
    failed: tuple[Path, ...] = ()


class Housekeeping:
    """Finds and removes what the limits do not let stay.

    Args:
        results_dir: ``RESULTS_DIR``.
        allowed_dirs: The further folders in which tasks may lie; only what was reported there is
            ever touched.
        limits: What may stay.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        results_dir: Path,
        allowed_dirs: Iterable[Path] = (),
        *,
        limits: Limits,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._root = Path(os.path.realpath(results_dir.expanduser()))
        self._allowed = [Path(os.path.realpath(folder)) for folder in allowed_dirs]
        self._limits = limits
        self._clock = clock
        self._history = History(self._root)

    # Decide.

    def plan(self) -> Plan:
        """Decide what goes; nothing is changed."""
        self._history.refresh()
        known, outer = self._history.folders, self._find_outer()
        found = [self._judge(each, outer) for each in find_tasks(self._root, self._allowed, known)]
        going: list[Leftover] = []
        staying: list[Leftover] = []
        for leftover in sorted(found, key=lambda leftover: leftover.at):
            (going if self._is_over_age(leftover) else staying).append(leftover)
        going = [measure(leftover) for leftover in going]
        staying += [leftover for leftover in going if leftover.state is State.HELD]
        going = [leftover for leftover in going if leftover.state is not State.HELD]
        if self._limits.max_bytes is not None:
            staying = [measure(leftover) for leftover in staying]
            going += self._choose_by_size(staying, self._limits.max_bytes)
        gone = {leftover.folder for leftover in going if leftover.key}
        return Plan(
            going=(*going, *self._find_engines()),
            staying=tuple(each for each in staying if each.folder not in gone),
        )

    def _find_outer(self) -> set[str]:
        """Return the folders in which there is one of which a journal says something."""
        return {str(folder) for key in self._history.folders for folder in Path(key).parents}

    def _judge(self, leftover: Leftover, outer: Collection[str]) -> Leftover:
        if not leftover.key:
            return leftover
        if self._history.is_held(leftover.key) or leftover.key in outer:
            return attrs.evolve(leftover, state=State.HELD)
        at = self._history.reported_at(leftover.key)
        # What changed after the report is another worker's, whose journal is not here.
        if at is None or leftover.changed_at > at + _SLACK_S:
            return attrs.evolve(leftover, state=State.UNREPORTED)
        return attrs.evolve(leftover, state=State.REPORTED, at=at)

    def _is_over_age(self, leftover: Leftover) -> bool:
        if leftover.state is State.ENDED:  # and will not be put back any more
            return self._clock() - leftover.at > _SLACK_S
        if leftover.state is State.UNREPORTED:
            return self._is_given_up(leftover)
        return leftover.state is State.REPORTED and self._is_old(leftover.at)

    def _is_given_up(self, leftover: Leftover) -> bool:
        """Whether what was not reported goes."""
        ours = leftover.is_of_its_task and leftover.folder.is_relative_to(self._root)
        if not (self._limits.unreported and ours):
            return False
        changed_at = measure(leftover).changed_at
        begun_just_now = self._clock() - changed_at < _UNSAID_S and self._history.has_living
        return self._is_old(changed_at) and not begun_just_now

    def _is_old(self, at: float) -> bool:
        age_s = self._limits.older_than_s
        return age_s is not None and self._clock() - at > age_s

    def _choose_by_size(self, staying: Iterable[Leftover], max_bytes: int) -> Iterator[Leftover]:
        """Choose what was reported, the oldest first, until the rest fits."""
        over_bytes = sum(leftover.size_bytes for leftover in staying) - max_bytes
        for leftover in staying:
            if over_bytes > 0 and leftover.state is State.REPORTED:
                over_bytes -= leftover.size_bytes
                yield leftover

    def _find_engines(self) -> Iterator[Leftover]:
        """Find the folders of engines that crashed: one at work is younger than its worker."""
        if self._limits.older_than_s is None:
            return
        for worker, begun_at in self._history.list_workers():
            before = self._clock() - self._limits.older_than_s
            if is_way_clear(worker / "engines", [worker]):
                yield from find_engines(worker, before=min(before, begun_at - _SLACK_S))

    # Remove.

    def remove(self, plan: Plan) -> Removed:
        """Remove what a plan says, but for what has changed since.

        Raises:
            OSError: A journal cannot be read, or its writer not be kept from writing.
        """
        gone: list[Leftover] = []
        failed: list[Path] = []
        for start in range(0, len(plan.going), _BATCH):
            moved: list[Path] = []
            with self._history.frozen():
                outer = self._find_outer()
                for leftover in plan.going[start : start + _BATCH]:
                    try:
                        away = self._take_away(leftover, outer)
                    except OSError as exc:
                        _log.warning("%s cannot be removed: %s", leftover.folder, exc)
                        failed.append(leftover.folder)
                        continue
                    gone += [leftover] if away else []
                    moved += away
            for path in moved:
                shutil.rmtree(path, ignore_errors=True)
            failed += filter(os.path.lexists, moved)
        self._history.compact(lambda key: is_anything_left(self._root / key))
        return Removed(gone=tuple(gone), failed=tuple(failed))

    def _take_away(self, leftover: Leftover, outer: Collection[str]) -> list[Path]:
        """Rename what is to go; change nothing when it is not what was planned any more.

        Raises:
            OSError: It cannot be renamed; nothing is changed.
        """
        # Before anything is renamed: a clean-up that is killed puts nothing back.
        if not (self._is_as_planned(leftover, outer) and leftover.is_as_found):
            return []
        moved: dict[Path, Path] = {}
        try:
            for path in leftover.parts:
                away = path.with_name(f".{leftover.folder.name}.removed-{secrets.token_hex(4)}")
                path.rename(away)
                moved[path] = away
            found = {path: away.lstat() for path, away in moved.items()}
        except OSError as exc:
            _put_back(moved)
            if isinstance(exc, FileNotFoundError):  # another clean-up was faster
                return []
            raise
        if leftover.parts == identify(found):
            return [*moved.values()]
        _put_back(moved)  # a worker was, whose journal is elsewhere
        return []

    def _is_as_planned(self, leftover: Leftover, outer: Collection[str]) -> bool:
        """Whether nobody has said anything else of it since."""
        if not leftover.key:
            return True
        if self._history.is_held(leftover.key) or leftover.key in outer:
            return False
        at = self._history.reported_at(leftover.key)
        same = leftover.state is not State.REPORTED or at == leftover.at
        return same and is_way_clear(leftover.folder.parent, [self._root, *self._allowed])


class Cleaner:
    """Cleans up on a thread, once an hour.

    Args:
        housekeeping: What to do.
        interval_s: From the end of one pass to the next; the first is at once.
    """

    def __init__(self, housekeeping: Housekeeping, *, interval_s: float = _INTERVAL_S) -> None:
        self._housekeeping = housekeeping
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flowmesh-cleaner", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Begin no other pass; one at work is not waited for: another ends what it began."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                removed = self._housekeeping.remove(self._housekeeping.plan())
            except OSError as exc:
                _log.warning("the results folder cannot be cleaned up: %s", exc)
            else:
                if removed.gone:
                    size_bytes = sum(leftover.size_bytes for leftover in removed.gone)
                    _log.info("removed %d old folders, %d bytes", len(removed.gone), size_bytes)
            self._stopped.wait(self._interval_s)


def build_cleaner(settings: Settings) -> Cleaner | None:
    """Return what cleans up within the operator's limits; None when there are none."""
    limits = Limits(older_than_s=settings.gc_older_than_s, max_bytes=settings.gc_max_bytes)
    if limits == Limits():
        return None
    return Cleaner(Housekeeping(settings.results_dir, settings.allowed_dirs, limits=limits))


def _put_back(moved: Mapping[Path, Path]) -> None:
    for path, away in moved.items():
        # Refused when a new one has come: then it has replaced this one.
        with contextlib.suppress(OSError):
            away.rename(path)
