"""What checks wait for: each returns what a check needs, or skips it and says what is lacking."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowmesh_core.errors import FlowmeshError
from flowmesh_core.executor import Capability, ExecutorInfo
from flowmesh_core.registry import find_misfits
from flowmesh_core.testing.bench import Ran
from flowmesh_core.testing.findings import NOT_PROMISED
from flowmesh_core.testing.subject import Subject
from flowmesh_core.testing.verdicts import skip

__all__ = [
    "answered_together",
    "first_of",
    "info_of",
    "long_spec_of",
    "promises",
    "refusals_of",
    "together_of",
    "with_example",
]


def info_of(subject: Subject) -> ExecutorInfo:
    """Return the declaration."""
    if subject.info is None:
        skip("not before it is installed: see clause installed")
    return subject.info


def with_example(subject: Subject) -> None:
    """Go on if its example can be run."""
    if find_misfits(info_of(subject)):
        skip("not before its models are pydantic's: see clause models")
    if subject.spec is None:
        skip("not without an example: see clause example")


def first_of(subject: Subject) -> Ran:
    """Return the run of its example, which succeeded."""
    with_example(subject)
    if not subject.first.outcome.ok:
        skip("not before its example succeeds: see clauses example and result")
    return subject.first


def long_spec_of(subject: Subject) -> Mapping[str, Any]:
    """Return what runs for long."""
    first_of(subject)
    if Capability.SERVICE in info_of(subject).capabilities:
        skip("a service runs until it is cancelled: see clause service-end")
    if subject.suite.long_spec is None:
        skip("give long_spec: one that runs for seconds")
    return subject.resolve(subject.suite.long_spec)


def refusals_of(subject: Subject) -> list[FlowmeshError | None]:
    """Return what came of each of ``refused``."""
    first_of(subject)
    if not subject.suite.refused:
        skip("give refused: specs that it must refuse")
    return [ran.outcome.error for ran in subject.refusals]


def promises(subject: Subject, *any_of: Capability) -> None:
    """Go on if it declares one of some capabilities."""
    if not {*any_of} & info_of(subject).capabilities:
        names = " or ".join(f"Capability.{item.name}" for item in any_of)
        skip(f"{NOT_PROMISED} {names}")


def together_of(subject: Subject) -> dict[str, Ran]:
    """Return what came of several members at once."""
    promises(subject, Capability.GROUP, Capability.CONCURRENT)
    first_of(subject)
    if not subject.members:
        skip("give variants: specs with other answers, in one group with spec")
    return subject.together


def answered_together(subject: Subject) -> dict[str, Ran]:
    """Return the same if all of them succeeded."""
    ran = together_of(subject)
    if any(one.outcome.error for one in ran.values()):
        skip("not before all members succeed: see clause answers")
    return ran
