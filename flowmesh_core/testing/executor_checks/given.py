"""What the author of an executor gives the kit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from flowmesh_core.executor import Executor, ExecutorInfo
from flowmesh_core.testing.findings import answer_of

__all__ = ["Given"]


class Given:
    """What the checks read of the suite of which they are a part; ``ExecutorSuite`` explains it."""

    executor: ClassVar[type[Executor] | str] = ""
    info: ClassVar[ExecutorInfo | None] = None
    plugin_files: ClassVar[Sequence[Path]] = ()
    spec: ClassVar[Any] = None
    refused: ClassVar[Sequence[Any]] = ()
    long_spec: ClassVar[Any] = None
    variants: ClassVar[Sequence[Any]] = ()
    may_change: ClassVar[Mapping[str, str]] = {}
    settings: ClassVar[Mapping[str, Any]] = {}
    grace_s: ClassVar[float] = 5.0
    limit_s: ClassVar[float] = 300.0
    import_budget: ClassVar[int] = 150

    @staticmethod
    def answer(result: Mapping[str, Any]) -> Any:
        """Return the part of a result that equal work answers equally."""
        return answer_of(result)
