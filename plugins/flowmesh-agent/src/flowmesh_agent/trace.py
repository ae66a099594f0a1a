"""What agents did: every event whole in ``trace.jsonl``, the gist of it in ``execution_log``.

Secrets are masked before anything is cut or written, and each line is on disk as soon as it is
written, so that it is there when the process is killed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import attrs

from flowmesh_core import SecretMask

__all__ = ["LOG_LINES", "Trace", "TraceFile"]

LOG_LINES = 1000
"""Lines of ``execution_log`` that a task has at most."""

_TEXT_CHARS = 300


@attrs.define(eq=False)
class TraceFile:
    """The trace of one task, whose items share it; use it as a context.

    Attributes:
        path: Of ``trace.jsonl``, which is made anew.
        mask: Of all that is written.
        log: ``execution_log`` so far; what no longer fits is only counted.
        dropped: Lines that are not in ``log``.
    """

    path: Path
    mask: SecretMask
    clock: Callable[[], float] = time.monotonic
    log: list[dict[str, Any]] = attrs.field(factory=list, init=False)
    dropped: int = attrs.field(default=0, init=False)
    _file: TextIO = attrs.field(init=False)
    _started: float = attrs.field(init=False)

    def __enter__(self) -> TraceFile:
        self._file = self.path.open("w", encoding="utf-8", errors="replace", buffering=1)
        self._started = self.clock()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._file.close()

    @property
    def execution_log(self) -> list[dict[str, Any]]:
        """The log as results have it: what was left out stands at its end."""
        return [*self.log, {"kind": "dropped", "count": self.dropped}] if self.dropped else self.log

    def add(self, item: int, kind: str, agent: str, fields: Mapping[str, Any]) -> None:
        """Write one event; see ``Trace.write``."""
        if self._file.closed:  # by a tool that outlived its task
            return
        masked = self.mask.value(dict(fields))
        begun = {"at_s": round(self.clock() - self._started, 3), "item": item, "agent": agent}
        self._file.write(_encode({**begun, "kind": kind, **masked}) + "\n")
        for shown, text in _gist(kind, masked):
            if len(self.log) < LOG_LINES:
                self.log.append({**begun, "kind": shown, "text": text[:_TEXT_CHARS]})
            else:
                self.dropped += 1


@attrs.frozen(kw_only=True)
class Trace:
    """The trace of one item; a ``TraceLog``."""

    file: TraceFile
    item: int

    def write(self, kind: str, agent: str, **fields: Any) -> None:
        """Add one event.

        Args:
            kind: ``request``, ``response``, ``tool_call``, ``tool_result``, ``plan``, ``answer``,
                ``warning``, ``error``, ``usage``.
            agent: Name of the worker; empty for the lead.
            fields: JSON data, secrets not yet masked.
        """
        self.file.add(self.item, kind, agent, fields)


def _encode(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _gist(kind: str, fields: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield kind and text of the log's line for an event; most have one, some none."""
    if kind == "response":
        called = ", ".join(str(call["tool"]) for call in fields.get("calls") or ())
        yield "step", str(fields.get("text") or (f"calls {called}" if called else ""))
    elif kind == "tool_call":
        arguments = fields.get("arguments")
        text = arguments if isinstance(arguments, str) else _encode(arguments)
        yield "tool", f"{fields.get('tool')} {text}"
    elif kind == "tool_result" and "error" in fields:
        yield "error", f"{fields.get('tool')}: {fields['error']}"
    elif kind in ("warning", "error"):
        yield kind, str(fields.get("message"))
    elif kind in ("plan", "answer"):
        yield kind, str(fields.get("text"))
