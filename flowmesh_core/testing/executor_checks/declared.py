"""Whether an executor is found, and can be read and checked against without its engine."""

from __future__ import annotations

from collections import Counter

from flowmesh_core.importing import import_target
from flowmesh_core.registry import find_misfits
from flowmesh_core.testing.declaration import (
    find_dropping_models,
    is_same_or_below,
    read_declaration,
)
from flowmesh_core.testing.executor_checks.gates import info_of
from flowmesh_core.testing.executor_checks.given import Given
from flowmesh_core.testing.findings import find_missing
from flowmesh_core.testing.subject import Subject
from flowmesh_core.testing.verdicts import clause, refuse, skip

__all__ = ["DeclarationChecks"]


class DeclarationChecks(Given):
    """Of what is declared, before anything runs."""

    @clause("installed")
    def test_it_is_installed(self, flowmesh_subject: Subject) -> None:
        """A worker finds it, and its declaration was written for this executor API."""
        refuse([flowmesh_subject.problem] if flowmesh_subject.info is None else [])

    @clause("light")
    def test_its_declaration_needs_no_engine(self, flowmesh_subject: Subject) -> None:
        """What is declared can be read, and checked against, where the engine is not installed."""
        info = info_of(flowmesh_subject)
        if info.environment:
            skip(f"it lives in environment {info.environment}; install it beside the kit")
        if not flowmesh_subject.plugin:
            refuse(find_missing(info))
            skip("a class was given: name an installed executor, or set plugin_files")
        reading = read_declaration(info, flowmesh_subject.plugin, self.plugin_files)
        engines = [name for name in info.needs if is_same_or_below(name, reading.modules)]
        faults = [*reading.problems]
        faults += [f"declaring it imports {name}, which it declares to need" for name in engines]
        if not engines and len(reading.modules) > self.import_budget:
            packages = Counter(name.partition(".")[0] for name in reading.modules).most_common(4)
            told = ", ".join(f"{name} ({count})" for name, count in packages)
            faults.append(
                f"declaring it loads {len(reading.modules)} modules, the budget is "
                f"{self.import_budget} (import_budget); most are of {told}"
            )
        refuse(faults)

    @clause("models")
    def test_its_models_build_a_schema_and_lose_no_key(self, flowmesh_subject: Subject) -> None:
        """A key that a spec does not know is refused, or kept on purpose; never dropped."""
        info = info_of(flowmesh_subject)
        if info.environment or not (info.spec or info.result):
            skip("it declares no spec and no result model here: set ExecutorInfo.spec and result")
        if find_missing(info):
            skip("not before its models can be imported: see clause light")
        refuse(find_misfits(info))
        for target in filter(None, (info.spec, info.result)):
            import_target(target).model_json_schema()
        dropping = find_dropping_models(import_target(info.spec), "spec") if info.spec else ()
        refuse(
            f"{path} drops unknown keys, so that a misspelt one goes unnoticed; subclass "
            "StrictBlock or TaskSpec, or say extra='allow'"
            for path in dropping
        )
