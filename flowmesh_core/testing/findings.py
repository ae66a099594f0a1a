"""What the checks of ``ExecutorSuite`` look for; each function returns its faults as sentences."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from flowmesh_core.errors import FlowmeshError
from flowmesh_core.executor import Artifact, ExecutorInfo
from flowmesh_core.importing import import_target
from flowmesh_core.testing.bench import Ran
from flowmesh_core.testing.declaration import TARGETS
from flowmesh_core.testing.subject import Subject

__all__ = [
    "REFUSALS",
    "answer_of",
    "find_changes",
    "find_growth",
    "find_missing",
    "find_stuck",
    "find_swaps",
    "is_there",
    "judge_rows",
    "read_files",
    "same",
    "short",
    "tell",
]

# Codes of errors that tell a document what is wrong with it.
REFUSALS = ("contract", "input")
# What differs from run to run of the same work.
_VOLATILE = {"usage", "metadata", "endpoint", "pid", "latency_sec", "expires_at"}


def answer_of(result: Mapping[str, Any]) -> Any:
    """Return the part of a result that equal work answers equally; suites may replace it."""
    items = result.get("items")
    if not isinstance(items, list):
        return {key: value for key, value in result.items() if key not in _VOLATILE}
    return [
        {key: value for key, value in item.items() if key not in _VOLATILE}
        if isinstance(item, Mapping)
        else item
        for item in items
    ]


def tell(error: FlowmeshError | None) -> str:
    """Return an error with its code."""
    return f"{error.code}: {error}" if error else "success"


def find_missing(info: ExecutorInfo) -> list[str]:
    """Return which of the targets of a declaration cannot be imported."""
    missing = []
    for target in filter(None, (getattr(info, field) for field in TARGETS)):
        try:
            import_target(target)
        except FlowmeshError as exc:
            missing.append(str(exc))
    return missing


def is_there(ran: Ran, file: Artifact) -> bool:
    """Return whether a task has written what its outcome names."""
    path = ran.folder / file.path
    return path.is_dir() if file.archive else path.exists()


def find_changes(
    before: Mapping[str, Any], after: Mapping[str, Any], allowed: Mapping[str, str]
) -> Iterable[str]:
    """Yield what differs of a process between two notes, but for what an author allows."""
    for name, old in before["state"].items():
        new = after["state"][name]
        if old == new or name in allowed:
            continue
        if isinstance(old, Mapping):
            keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
            yield f"changed the {name}: {', '.join(keys)}"
        elif isinstance(old, (str, int)) and not name.startswith("sys."):
            yield f"changed the {name} from {old} to {new}"
        else:
            yield f"changed the {name}"


def find_growth(subject: Subject, kind: str, what: str) -> list[str]:
    """Return what a warm task left that the one before it had not."""
    ends = [note for ran in subject.story[1:] for note in ran.noted("run", "end")]
    ends = [note for note in ends if "left" in note]
    if len({note["pid"] for note in ends}) != 1:
        pytest.skip("its process did not outlive its first tasks, so that no two can be compared")
    before, after = ends[-2]["left"][kind], ends[-1]["left"][kind]
    grown = Counter(after) - Counter(before)
    return [f"each run leaves {count} more {what} {name}" for name, count in grown.items()]


def read_files(folder: Path) -> dict[str, str]:
    """Return the text of every file below a folder, by its relative name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_text("utf-8", "replace") for path in files}


def judge_rows(subject: Subject, name: str, texts: Sequence[str]) -> list[str]:
    """Run the example with other rows; return what is wrong with the outcome."""
    rows = subject.rows(texts)
    if rows is None:
        pytest.skip("it reads no rows: the input 'rows' is not declared")
    outcome = subject.bench.run({**subject.example, **rows}, f"kit-rows-{name}").outcome
    if outcome.error and (outcome.error.code not in REFUSALS or outcome.error.retriable):
        return [
            f"rows that are {name} must be answered, or refused with one of "
            f"{', '.join(REFUSALS)} that is not retriable, got {tell(outcome.error)}"
        ]
    items = outcome.result.get("items")
    if isinstance(items, list) and len(items) != len(texts) and outcome.ok:
        return [f"{len(texts)} rows that are {name} were answered with {len(items)} items"]
    return []


def find_stuck(ran: Ran, what: str) -> list[str]:
    """Return whether a task that was to end had to be given up."""
    if not ran.noted("run", "begin"):
        return [f"it failed before it ran: {tell(ran.outcome.error)}"]
    if ran.noted("run", "end"):
        return []
    return [
        f"run had not ended after {what} and was given up; look at ctx.cancelled, or let a "
        "coroutine's CancelledError pass"
    ]


def find_swaps(answer: Callable[[Mapping[str, Any]], Any], subject: Subject) -> list[str]:
    """Find members that got exactly what another one gets alone, and not their own."""
    alone = {name: answer(ran.outcome.result) for name, ran in subject.alone.items()}
    faults = []
    for name, ran in subject.together.items():
        got = answer(ran.outcome.result)
        others = [other for other in alone if same(got, alone[other], 0.0)]
        if others and not same(alone[name], alone[others[0]], 0.0):
            faults.append(f"{name} was given the answer of {others[0]}")
    return faults


def same(one: Any, other: Any, tolerance: float) -> bool:
    """Return whether JSON data are equal; numbers within a part of their size."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(
            same(one[key], other[key], tolerance) for key in one
        )
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(
            same(a, b, tolerance) for a, b in zip(one, other, strict=True)
        )
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= tolerance * max(1.0, abs(one))
    equal: bool = one == other
    return equal


def short(value: Any) -> str:
    """Return JSON data as a message shows them."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
