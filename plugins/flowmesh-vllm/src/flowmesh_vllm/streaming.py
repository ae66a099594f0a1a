"""What answers say so far, as progress a few times a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

__all__ = ["PartialAnswers"]

_INTERVAL_S = 0.25


class PartialAnswers:
    """Collects the text of answers that are being written.

    Args:
        report: Gets a message and ``partial``: one ``{index, choice, output}`` for each answer that
            has grown since the last report, with all of its text so far.
        clock: Monotonic, in seconds.
    """

    def __init__(
        self, report: Callable[..., None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._report = report
        self._clock = clock
        self._grown: dict[tuple[int, int], str] = {}
        self._due_s = 0.0

    def listener(self, index: int, choice: int) -> Callable[[str], None]:
        """Return what takes the text of one answer."""

        def take(text: str) -> None:
            self._grown[index, choice] = text
            if self._clock() >= self._due_s:
                self._due_s = self._clock() + _INTERVAL_S
                self._send()

        return take

    def _send(self) -> None:
        partial: list[dict[str, Any]] = [
            {"index": index, "choice": choice, "output": text}
            for (index, choice), text in sorted(self._grown.items())
        ]
        self._grown.clear()
        self._report("writing", partial=partial)
