"""What the checks of ``ExecutorSuite`` look for; each function returns its faults as sentences."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest

from flowmesh_core.errors import FlowmeshError
from flowmesh_core.executor import Artifact, ExecutorInfo
from flowmesh_core.importing import import_target
from flowmesh_core.testing.bench import Ran
from flowmesh_core.testing.declaration import TARGETS
from flowmesh_core.testing.subject import Subject

__all__ = [
    "NOT_PROMISED",
    "REFUSALS",
    "answer_of",
    "find_changes",
    "find_growth",
    "find_missing",
    "find_piles",
    "find_stuck",
    "find_swaps",
    "is_refusal",
    "is_there",
    "judge_rows",
    "repeated",
    "same",
    "short",
    "tell",
    "texts_of",
]

_RUNS = 8
# How the reason begins why something need not be checked.
NOT_PROMISED = "it does not declare"
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


def is_refusal(error: FlowmeshError | None) -> bool:
    """Return whether it says that the document is wrong, here and everywhere."""
    return error is not None and error.code in REFUSALS and not error.retriable


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
    journal: Iterable[Mapping[str, Any]], calls: Sequence[str], allowed: Mapping[str, str]
) -> Iterator[str]:
    """Yield what differs of a process between the beginning and the end of each of some calls.

    Args:
        journal: All that was noted.
        calls: Names of methods.
        allowed: What an author lets them change.
    """
    begun = {}
    for note in journal:
        key = (note["pid"], note["call"], *note["tasks"])
        if note["edge"] == "begin":
            begun[key] = note
        elif note["call"] in calls:
            changes = _find_changes(begun.pop(key), note, allowed)
            yield from (f"{note['call']} {change}" for change in changes)


def _find_changes(
    before: Mapping[str, Any], after: Mapping[str, Any], allowed: Mapping[str, str]
) -> Iterator[str]:
    for name, old in before["state"].items():
        new = after["state"][name]
        if old == new or name in allowed:
            continue
        if isinstance(old, Mapping):
            keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
            yield f"changed the {name}: {', '.join(keys)}"
        elif isinstance(old, (str, int)) and not name.startswith("sys."):
            yield f"changed the {name} from {old} to {new}"
        elif isinstance(old, Sequence) and not isinstance(old, str):
            more = [f"+ {entry}" for entry in new if entry not in old]
            less = [f"- {entry}" for entry in old if entry not in new]
            yield f"changed the {name}: {', '.join([*more, *less]) or 'their order'}"
        else:
            yield f"changed the {name}"


def find_growth(subject: Subject, kind: str, what: str) -> list[str]:
    """Return what warm tasks leave more and more of."""
    if subject.growth is None:
        pytest.skip("its process did not outlive its first tasks, so that no two can be compared")
    return [
        f"each {run} leaves {count} more {what} {name}"
        for run, grown in subject.growth.items()
        for name, count in grown.get(kind, {}).items()
    ]


def find_piles(subject: Subject) -> list[str]:
    """Return the lists of its result that are longer after each run than after the one before."""
    runs = [*subject.story]
    while rising := _find_rising([ran.outcome.result for ran in runs]):
        if len(runs) == _RUNS:
            return [
                f"result.{key} grows from run to run, {lengths[0]} to {lengths[-1]} entries; keep "
                "nothing of a task"
                for key, lengths in rising.items()
            ]
        runs.append(subject.bench.run(subject.example, f"kit-more-{len(runs)}"))
    return []


def _find_rising(results: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    lists = [
        {key: len(value) for key, value in result.items() if isinstance(value, list)}
        for result in results
    ]
    lengths = {key: [one.get(key, 0) for one in lists] for key in lists[-1]}
    return {key: seen for key, seen in lengths.items() if all(a < b for a, b in pairwise(seen))}


def texts_of(ran: Ran) -> dict[str, str]:
    """Return the text of all that a task gave back, by where it is; files by their names."""
    files = [path for path in ran.folder.rglob("*") if path.is_file()]
    return {
        "its result": json.dumps(ran.outcome.result),
        "its reports": str(ran.progress),
        **{str(path.relative_to(ran.folder)): path.read_text("utf-8", "replace") for path in files},
    }


def judge_rows(subject: Subject, name: str, texts: Sequence[str]) -> list[str]:
    """Run the example with other rows; return what is wrong with the outcome."""
    rows = subject.rows(texts)
    if rows is None:
        pytest.skip("it reads no rows: the input 'rows' is not declared")
    outcome = subject.bench.run({**subject.example, **rows}, f"kit-rows-{name}").outcome
    if outcome.error and not is_refusal(outcome.error):
        return [
            f"rows that are {name} must be answered, or refused with one of "
            f"{', '.join(REFUSALS)} that is not retriable, got {tell(outcome.error)}"
        ]
    items = outcome.result.get("items")
    if not isinstance(items, list) or not outcome.ok or not _answers_rows(subject):
        return []
    if len(items) != len(texts):
        return [
            f"{len(texts)} rows that are {name} were answered with {len(items)} items, those of "
            "the example with one each; if it answers pieces of rows, give an example with a row "
            "that is long enough for several"
        ]
    return []


def _answers_rows(subject: Subject) -> bool:
    """Return whether its example's items are one per row."""
    ran = subject.story[-1]
    items = ran.outcome.result.get("items")
    return isinstance(items, list) and [len(items)] == [
        note.get("rows") for note in ran.noted("run", "end")
    ]


def find_stuck(ran: Ran, what: str) -> list[str]:
    """Return whether a task that was to end had to be given up."""
    calls = Counter(note["call"] for note in ran.journal if note["edge"] == "begin")
    calls.subtract(note["call"] for note in ran.journal if note["edge"] == "end")
    if not {"run", "run_group"} & calls.keys():
        return [f"it failed before it ran: {tell(ran.outcome.error)}"]
    return [
        f"{call} had not ended after {what} and was given up; look at ctx.cancelled, or let a "
        "coroutine's CancelledError pass"
        for call in ("run_group", "run")
        if calls[call] > 0
    ]


def find_swaps(answer: Callable[[Mapping[str, Any]], Any], subject: Subject) -> list[str]:
    """Find members that got exactly what one that asked for other things gets alone."""
    specs = subject.members
    alone = {name: answer(ran.outcome.result) for name, ran in subject.alone.items()}
    faults = []
    for name, ran in subject.together.items():
        got = answer(ran.outcome.result)
        strangers = (other for other in alone if specs[other] != specs[name])
        others = [other for other in strangers if same(got, alone[other], 0.0)]
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


def repeated(one: Any, other: Any, tolerance: float) -> Any:
    """Return the part of an answer that another run of the same work repeats; None for nothing."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        both = one.keys() & other.keys()
        return {
            key: one[key] for key in one if key in both and same(one[key], other[key], tolerance)
        }
    return one if same(one, other, tolerance) else None


def short(value: Any) -> str:
    """Return JSON data as a message shows them."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
