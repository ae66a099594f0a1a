"""What every executor must do; an author subclasses ``ExecutorSuite`` and names the executor.

Each check is one clause of ``docs/conformance.md``. What cannot be checked is skipped, with what
to give so that it can.
"""

from __future__ import annotations

from flowmesh_core.testing.executor_checks.declared import DeclarationChecks
from flowmesh_core.testing.executor_checks.ends import EndChecks
from flowmesh_core.testing.executor_checks.engine import EngineChecks
from flowmesh_core.testing.executor_checks.example import ExampleChecks
from flowmesh_core.testing.executor_checks.members import MemberChecks
from flowmesh_core.testing.executor_checks.process import ProcessChecks
from flowmesh_core.testing.executor_checks.promises import PromiseChecks
from flowmesh_core.testing.executor_checks.refusals import RefusalChecks
from flowmesh_core.testing.executor_checks.unloaded import UnloadedChecks

__all__ = ["ExecutorSuite"]


class ExecutorSuite(  # pytest begins with the checks of the last
    UnloadedChecks,
    MemberChecks,
    PromiseChecks,
    EngineChecks,
    EndChecks,
    RefusalChecks,
    ProcessChecks,
    ExampleChecks,
    DeclarationChecks,
):
    """Subclass it as ``class TestMine(ExecutorSuite)`` and set ``executor``.

    Attributes:
        executor: Name of an installed executor, or a class, which then runs in this process.
        info: The class's declaration.
        plugin_files: Single-file plugins that count as installed.
        spec: A document's ``spec`` that runs within seconds, or a callable that gets an empty
            folder and returns one; the declaration's ``example`` by default. Those below are given
            alike, and get ``taskType`` and ``executor`` when they have none.
        refused: Specs that it must refuse.
        long_spec: One that runs for seconds, to be cancelled.
        variants: Specs with other answers, that may run in one group with ``spec``.
        may_change: Parts of the process's state (``watching.STATE``) that ``run`` may change, each
            with the reason.
        settings: Fields of ``Settings`` that the examination needs.
        grace_s: What a cancel and a deadline leave it.
        limit_s: Longest that one task may take.
        import_budget: Modules that the declaration may load beside the core.
    """
