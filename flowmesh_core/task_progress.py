"""A task's progress: every report on disk, the latest one a few times a second to subscribers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flowmesh_core.task_log import OpenFolder
from flowmesh_core.wire import encode_json, utc_now

__all__ = ["METRICS_NAME", "ProgressRecorder"]

_log = logging.getLogger(__name__)
METRICS_NAME = "metrics.jsonl"


class ProgressRecorder:
    """Takes the reports of one task from any thread; raises for none of them.

    There is no timer: a report within the interval waits for the next one, or for ``close``.

    Args:
        folder: The attempt's folder; it may be renamed later.
        publish: Gets the values of a report; must neither block nor raise.
        interval_s: Least seconds between two of them.
        clock: Monotonic clock in seconds.
    """

    def __init__(
        self,
        folder: Path,
        publish: Callable[[Mapping[str, Any]], None],
        *,
        interval_s: float = 0.2,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = OpenFolder(folder)
        self._publish = publish
        self._interval_s = interval_s
        self._clock = clock
        self._lock = threading.Lock()
        self._closed = False
        self._highest = 0.0
        self._latest: Mapping[str, Any] | None = None
        self._due = float("-inf")

    def report(self, values: Mapping[str, Any]) -> None:
        """Record one report and publish it when the interval is over.

        A ``fraction`` is kept within 0 to 1 and never falls; one that is no number becomes None.
        """
        with self._lock:
            if self._closed:
                return
            if "fraction" in values:
                values = {**values, "fraction": self._rising(values["fraction"])}
            if not self._record(values):
                return
            now = self._clock()
            if now >= self._due:
                self._due = now + self._interval_s
                self._latest = None
                self._publish(values)
            else:
                self._latest = values

    def _rising(self, fraction: Any) -> float | None:
        if not isinstance(fraction, (int, float)) or fraction != fraction:
            return None
        self._highest = max(self._highest, min(1.0, fraction))
        return self._highest

    def _record(self, values: Mapping[str, Any]) -> bool:
        try:
            line = encode_json({"ts": utc_now(), **values})
        except (TypeError, ValueError, RecursionError) as exc:
            _log.warning("a report of progress is left out: %s", exc)
            return False
        # Unbuffered: what was reported before a crash is there to be read.
        self._folder.append(METRICS_NAME, line + b"\n")
        return True

    def close(self) -> None:
        """Publish the last report if it waits; what comes later is dropped without a word."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._latest is not None:
                self._publish(self._latest)
            self._folder.close()
