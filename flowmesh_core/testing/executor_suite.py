"""What every executor must do; an author subclasses ``ExecutorSuite`` and names the executor.

Each check is one clause of ``docs/conformance.md``. What cannot be checked is skipped, with what
to give so that it can.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import pytest

from flowmesh_core.checking import check_result
from flowmesh_core.errors import ExecutorUnavailableError, FlowmeshError
from flowmesh_core.executor import Capability, Executor, ExecutorInfo
from flowmesh_core.importing import import_target
from flowmesh_core.merge import work_key
from flowmesh_core.registry import missing_packages
from flowmesh_core.testing.bench import Ran, parse_spec
from flowmesh_core.testing.declaration import (
    find_dropping_models,
    is_same_or_below,
    read_declaration,
)
from flowmesh_core.testing.findings import (
    NOT_PROMISED,
    REFUSALS,
    answer_of,
    find_changes,
    find_growth,
    find_misfits,
    find_missing,
    find_piles,
    find_stuck,
    find_swaps,
    is_there,
    judge_rows,
    same,
    short,
    tell,
    texts_of,
)
from flowmesh_core.testing.subject import Subject
from flowmesh_core.testing.watching import LONG_LINE, STATE

__all__ = ["ExecutorSuite"]

_UNICODE = "Zoë 漢字 🎉 e\u0301 \u202eabc\u202c \x07\t line\nbreak"
_LARGE = "word " * 2_000_000
_MEMORY_STEP_BYTES = 16 << 20
_TOLERANCE = 1e-3
_TOLD = 5


def _refuse(faults: Iterable[str]) -> None:
    told = list(faults)
    if told:
        pytest.fail("\n".join(told), pytrace=False)


def _skip(reason: str) -> NoReturn:
    pytest.skip(reason)


clause = pytest.mark.flowmesh_clause


class ExecutorSuite:
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

    # The declaration.

    @clause("installed")
    def test_it_is_installed(self, flowmesh_subject: Subject) -> None:
        """A worker finds it, and its declaration was written for this executor API."""
        _refuse([flowmesh_subject.problem] if flowmesh_subject.info is None else [])

    @clause("light")
    def test_its_declaration_needs_no_engine(self, flowmesh_subject: Subject) -> None:
        """What is declared can be read, and checked against, where the engine is not installed."""
        info = _declared(flowmesh_subject)
        if info.environment:
            _skip(f"it lives in environment {info.environment}; install it beside the kit")
        if not flowmesh_subject.plugin:
            _refuse(find_missing(info))
            _skip("a class was given: name an installed executor, or set plugin_files")
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
        _refuse(faults)

    @clause("models")
    def test_its_models_build_a_schema_and_lose_no_key(self, flowmesh_subject: Subject) -> None:
        """A key that a spec does not know is refused, or kept on purpose; never dropped."""
        info = _declared(flowmesh_subject)
        if info.environment or not (info.spec or info.result):
            _skip("it declares no spec and no result model here: set ExecutorInfo.spec and result")
        if find_missing(info):
            _skip("not before its models can be imported: see clause light")
        _refuse(find_misfits(info))
        for target in filter(None, (info.spec, info.result)):
            import_target(target).model_json_schema()
        dropping = find_dropping_models(import_target(info.spec), "spec") if info.spec else ()
        _refuse(
            f"{path} drops unknown keys, so that a misspelt one goes unnoticed; subclass "
            "StrictBlock or TaskSpec, or say extra='allow'"
            for path in dropping
        )

    # One run.

    @clause("example")
    def test_its_example_succeeds(self, flowmesh_subject: Subject) -> None:
        """The example runs to its end as it would on a worker."""
        _declared(flowmesh_subject)
        if flowmesh_subject.spec is None and flowmesh_subject.problem:
            if flowmesh_subject.plugin:
                _skip("not before its example can be imported: see clause light")
            _refuse([flowmesh_subject.problem])
        if flowmesh_subject.spec is None:
            lacking = missing_packages(flowmesh_subject.declared)
            if lacking and flowmesh_subject.declared.example:  # to be made with the engine, perhaps
                _skip(f"its example cannot be made without {', '.join(lacking)}")
            _refuse([f"there is no example: {flowmesh_subject.no_example}"])
        _with_example(flowmesh_subject)
        error = flowmesh_subject.first.outcome.error
        if error and error.code == ExecutorUnavailableError.code:
            _skip(f"it cannot run here: {error}")
        ends = flowmesh_subject.first.noted("run", "end")
        answered = any(note.get("faults") for note in ends)  # then that is judged by `result`
        _refuse([f"the example failed with {tell(error)}"] if error and not answered else [])

    @clause("result")
    def test_its_result_is_json_of_the_declared_model(self, flowmesh_subject: Subject) -> None:
        """Readers get what was promised, and every number arrives."""
        _with_example(flowmesh_subject)
        notes = flowmesh_subject.first.noted("run", "end")
        faults = list(dict.fromkeys(fault for note in notes for fault in note.get("faults", ())))
        result = flowmesh_subject.first.outcome.result
        if not faults:
            _first(flowmesh_subject)
            problems = check_result(_declared(flowmesh_subject), result)
            faults = [f"not the result that it declares: {problem}" for problem in problems]
        _refuse(faults)

    @clause("artifacts")
    def test_the_artifacts_that_it_names_are_there(self, flowmesh_subject: Subject) -> None:
        """Whatever an outcome names can be shipped."""
        first = _first(flowmesh_subject)
        if not first.outcome.artifacts:
            _skip("its example names no artifact")
        missing = [file.path for file in first.outcome.artifacts if not is_there(first, file)]
        _refuse(f"its outcome names {path!r}, which is not in ctx.folder" for path in missing)

    @clause("retry")
    def test_another_attempt_succeeds(self, flowmesh_subject: Subject) -> None:
        """A task that is tried again finds what the attempt before it left, and does not mind."""
        _first(flowmesh_subject)
        error = flowmesh_subject.story[1].outcome.error
        _refuse([f"a second attempt at its example failed with {tell(error)}"] if error else [])

    @clause("state")
    def test_the_process_is_as_it_was(self, flowmesh_subject: Subject) -> None:
        """``run`` changes nothing that the next task, or the worker, shares with it."""
        _first(flowmesh_subject)
        if unknown := self.may_change.keys() - STATE:
            known = ", ".join(STATE)
            _refuse([f"may_change: {name!r} must be one of {known}" for name in sorted(unknown)])
        _ = flowmesh_subject.growth  # that refuses, cancels and groups
        calls = ("load", "run", "run_group") if flowmesh_subject.inline else ("run", "run_group")
        changes = find_changes(flowmesh_subject.bench.read_journal(), calls, self.may_change)
        _refuse(list(dict.fromkeys(changes))[:_TOLD])

    @clause("threads")
    def test_no_thread_is_left(self, flowmesh_subject: Subject) -> None:
        """A warm task ends with the threads that were there after the one before it."""
        _first(flowmesh_subject)
        _refuse(find_growth(flowmesh_subject, "threads", "thread"))

    @clause("processes")
    def test_no_process_is_left(self, flowmesh_subject: Subject) -> None:
        """The same with processes that it started."""
        _first(flowmesh_subject)
        _refuse(find_growth(flowmesh_subject, "processes", "process"))

    @clause("descriptors")
    def test_no_descriptor_is_left(self, flowmesh_subject: Subject) -> None:
        """The same with open files, sockets and pipes."""
        _first(flowmesh_subject)
        _refuse(find_growth(flowmesh_subject, "descriptors", "open descriptor of"))

    @clause("isolation")
    def test_nothing_of_a_task_reaches_the_next(self, flowmesh_subject: Subject) -> None:
        """What one owner's task held is in no result, file or report of another owner's."""
        _first(flowmesh_subject)
        *_, (after, _) = flowmesh_subject.marked
        if after.outcome.error:
            _refuse([f"its example failed after another task with {tell(after.outcome.error)}"])
        faults = [
            f"{where} holds {mark}, which only an earlier task of another owner had"
            for ran, marks in flowmesh_subject.marked
            for where, text in texts_of(ran).items()
            for mark in marks
            if mark in text
        ]
        _refuse(faults or find_piles(flowmesh_subject))

    @clause("log")
    def test_long_lines_arrive_whole(self, flowmesh_subject: Subject) -> None:
        """What is printed and logged beside it still reaches the task's logs."""
        _first(flowmesh_subject)
        ran = flowmesh_subject.bench.run(flowmesh_subject.example, "kit-prints", do="print")
        names = (
            ["task.log"] if flowmesh_subject.inline else ["task.log", "stdout.log", "stderr.log"]
        )
        logs = {name: ran.folder / "logs" / name for name in names}
        _refuse(
            f"a line of 1 MB did not arrive in logs/{name}; leave sys.stdout and sys.stderr alone"
            for name, path in logs.items()
            if not path.exists() or LONG_LINE not in path.read_text("utf-8", "replace")
        )

    # Refusals.

    @clause("refused")
    def test_what_it_cannot_do_is_refused_by_its_name(self, flowmesh_subject: Subject) -> None:
        """A wrong document is a contract or an input error, which says what to change."""
        _refuse(
            f"refused[{number}] must fail with one of {', '.join(REFUSALS)}, got {tell(error)}; "
            "let the spec model refuse it, or raise InputError"
            for number, error in enumerate(_refusals(flowmesh_subject))
            if error is None or error.code not in REFUSALS
        )

    @clause("final")
    def test_what_it_refuses_is_not_tried_again(self, flowmesh_subject: Subject) -> None:
        """A document that is wrong here is wrong everywhere."""
        _refuse(
            f"refused[{number}] is retriable, and would fail the same again: {tell(error)}"
            for number, error in enumerate(_refusals(flowmesh_subject))
            if error is not None and error.retriable
        )

    @clause("unicode")
    def test_texts_of_every_script_are_answered(self, flowmesh_subject: Subject) -> None:
        """Rows hold what people write."""
        _first(flowmesh_subject)
        _refuse(judge_rows(flowmesh_subject, "unicode", [_UNICODE]))

    @clause("empty")
    def test_empty_texts_are_answered_or_refused(self, flowmesh_subject: Subject) -> None:
        """A row without text, and no row at all."""
        _first(flowmesh_subject)
        faults = judge_rows(flowmesh_subject, "empty", [""])
        _refuse([*faults, *judge_rows(flowmesh_subject, "none", [])])

    @clause("large")
    def test_ten_megabytes_are_answered_or_refused(self, flowmesh_subject: Subject) -> None:
        """One row of 10 MB ends nobody's process."""
        _first(flowmesh_subject)
        _refuse(judge_rows(flowmesh_subject, "large", [_LARGE]))

    # Ends.

    @clause("cancel")
    def test_a_cancel_ends_it_within_the_grace(self, flowmesh_subject: Subject) -> None:
        """An executor that stops by itself keeps its engine; one that does not is killed."""
        _long_spec(flowmesh_subject)
        alone, *group = flowmesh_subject.cancelled
        if alone.outcome.ok:
            _refuse(["it ended before it could be cancelled; let long_spec run for seconds"])
        ran = [alone, *(one for one in group if one.journal)]  # the rest had to wait
        faults = [find_stuck(one, f"its cancel (grace_s {self.grace_s:g})") for one in ran]
        _refuse(dict.fromkeys(chain.from_iterable(faults)))

    @clause("deadline")
    def test_its_deadline_ends_it(self, flowmesh_subject: Subject) -> None:
        """The same when its time is over."""
        spec, limit_s = _long_spec(flowmesh_subject), 0.5
        while limit_s < self.limit_s:
            started = time.monotonic()
            ran = flowmesh_subject.bench.run(
                {**spec, "timeoutSec": limit_s}, f"kit-late-{limit_s:g}"
            )
            if ran.noted("run", "begin"):
                break
            limit_s *= 2  # its engine takes so long to load
        if ran.outcome.ok and time.monotonic() - started < limit_s:
            _refuse([f"it ended within {limit_s:g} s; let long_spec run for longer"])
        _refuse(find_stuck(ran, f"its deadline (grace_s {self.grace_s:g})"))

    @clause("progress")
    def test_progress_never_falls_and_ends_at_one(self, flowmesh_subject: Subject) -> None:
        """Whoever watches sees how far it is."""
        first = _first(flowmesh_subject)
        fractions = [value for note in first.noted("run", "end") for value in note["fractions"]]
        if not fractions:
            _skip("its example reports no fraction: call ctx.progress")
        faults = [f"progress fell from {a:g} to {b:g}" for a, b in pairwise(fractions) if b < a]
        faults += [
            f"progress is {value:g}, not 0 to 1" for value in fractions if not 0 <= value <= 1
        ]
        if not faults and fractions[-1] != 1:
            faults = [f"progress ended at {fractions[-1]:g} of a task that succeeded, not at 1"]
        _refuse(faults)

    # A warm engine.

    @clause("warm")
    def test_a_second_run_does_not_load_again(self, flowmesh_subject: Subject) -> None:
        """Tasks that agree on ``engine_key`` share what was loaded for the first."""
        first = _first(flowmesh_subject)
        if Capability.SERVICE in _declared(flowmesh_subject).capabilities:
            _skip("a service's engine ends with it")
        last = flowmesh_subject.story[2]
        if {note["pid"] for note in last.journal} != {note["pid"] for note in first.journal}:
            _refuse(["its process did not outlive its first tasks"])
        loads = [*last.noted("load", "begin"), *flowmesh_subject.story[1].noted("load", "begin")]
        _refuse(
            [f"load was called {len(loads)} times for three tasks of one engine"] * (len(loads) > 1)
        )

    @clause("devices")
    def test_it_uses_no_other_devices(self, flowmesh_subject: Subject) -> None:
        """What its process, and what that starts, may see is what the worker lent it."""
        _first(flowmesh_subject)
        if flowmesh_subject.inline:
            _skip("it runs in the worker's own process; declare the place 'process' for GPUs")
        pairs = [note["devices"] for note in flowmesh_subject.bench.read_journal()]
        changed = {
            f"{name} became {now.get(name)!r}, it was lent {lent.get(name)!r}"
            for lent, now in pairs
            for name in {*lent, *now}
            if lent.get(name) != now.get(name)
        }
        _refuse(sorted(changed))

    # What capabilities promise.

    @clause("ready")
    def test_a_service_says_that_it_is_up(self, flowmesh_subject: Subject) -> None:
        """``service``: ``ctx.ready`` is called, and ``run`` goes on."""
        _promises(flowmesh_subject, Capability.SERVICE)
        up = _first(flowmesh_subject).served
        _refuse([] if up else ["its run ended without a call of ctx.ready"])

    @clause("service-end")
    def test_a_service_ends_when_it_is_cancelled(self, flowmesh_subject: Subject) -> None:
        """``service``: it takes down what it put up."""
        _promises(flowmesh_subject, Capability.SERVICE)
        first = _first(flowmesh_subject)
        if not first.served:
            _skip("not before it is up: see clause ready")
        _refuse(find_stuck(first, f"its cancel (grace_s {self.grace_s:g})"))

    @clause("shrink")
    def test_a_smaller_batch_answers_the_same(self, flowmesh_subject: Subject) -> None:
        """``shrink``: half the batch gives the same answers."""
        _promises(flowmesh_subject, Capability.SHRINK)
        first = _first(flowmesh_subject)
        half = flowmesh_subject.bench.run(flowmesh_subject.example, "kit-half", do="half")
        if half.outcome.error:
            _refuse([f"with half the batch its example failed with {tell(half.outcome.error)}"])
        whole, less = (self.answer(ran.outcome.result) for ran in (first, half))
        _refuse(
            []
            if same(whole, less, _TOLERANCE)
            else [f"half the batch answers {short(less)}, the whole {short(whole)}"]
        )

    @clause("answers")
    def test_a_group_answers_every_member_once(self, flowmesh_subject: Subject) -> None:
        """``group``: exactly one answer for each."""
        _promises(flowmesh_subject, Capability.GROUP)
        ran = _together(flowmesh_subject)
        notes = [note for one in ran.values() for note in one.noted("run_group", "end")]
        groups = list({json.dumps(note): note for note in notes}.values())
        faults = []
        # Which of two equal ones is asked for both is chance.
        work = {
            name: json.dumps(spec, default=str) for name, spec in flowmesh_subject.members.items()
        }
        if not any(len({work[name] for name in note["tasks"]}) > 1 for note in groups):
            faults.append("run_group was given no two members that differ; see group_key")
        for note in groups:
            counts = Counter(note["answered"])
            faults += [
                f"run_group answered {task_id} {counts[task_id]} times, not once"
                for task_id in dict.fromkeys([*note["tasks"], *counts])
                if counts[task_id] != 1 or task_id not in note["tasks"]
            ]
        _refuse(faults)

    @clause("own")
    def test_a_member_gets_its_own_answer(self, flowmesh_subject: Subject) -> None:
        """``group`` and ``concurrent``: nobody gets what another one asked for."""
        ran = _answered_together(flowmesh_subject)
        faults = []
        for name, one in ran.items():
            told = json.dumps(one.outcome.result)
            faults += [
                f"{name} was answered with {mark}, which another member asked for"
                for mark in flowmesh_subject.strangers(name)
                if mark in told
            ]
        _refuse(faults or find_swaps(self.answer, flowmesh_subject))

    @clause("neighbours")
    def test_a_bad_member_spoils_no_neighbour(self, flowmesh_subject: Subject) -> None:
        """``group`` and ``concurrent``: a failure is its own task's alone."""
        _promises(flowmesh_subject, Capability.GROUP, Capability.CONCURRENT)
        if not self.refused:
            _skip("give refused: specs that it must refuse, in one group with spec")
        _answered_together(flowmesh_subject)
        bad = {
            f"kit-bad-{n}": flowmesh_subject.resolve(spec) for n, spec in enumerate(self.refused)
        }
        good = {f"kit-good-{n}": spec for n, spec in enumerate(flowmesh_subject.members.values())}
        ran = flowmesh_subject.bench.run_together({**good, **bad})
        _refuse(
            f"{name} failed beside a bad member with {tell(ran[name].outcome.error)}"
            for name in good
            if ran[name].outcome.error
        )

    @clause("identical")
    def test_identical_members_get_the_same_answer(self, flowmesh_subject: Subject) -> None:
        """``group`` and ``concurrent``: deterministic work that is equal is done once."""
        ran = _answered_together(flowmesh_subject)
        first, *_, last = ran
        if work_key(parse_spec(flowmesh_subject.members[first])) is None:
            _skip("chance decides about its answers: give an inference spec with temperature 0")
        equal = [ran[name] for name in (first, last)]
        computed = [
            one for one in equal if one.noted("run", "end") or one.noted("run_group", "end")
        ]
        faults = [f"{last} was computed again, and is {first} once more"] * (len(computed) - 1)
        one, other = (self.answer(ran.outcome.result) for ran in equal)
        _refuse(faults if same(one, other, 0.0) else [f"{last} is answered otherwise than {first}"])

    @clause("invariant")
    def test_an_answer_does_not_depend_on_neighbours(self, flowmesh_subject: Subject) -> None:
        """``batch_invariant``: the answer in a group is the answer alone."""
        _promises(flowmesh_subject, Capability.BATCH_INVARIANT)
        ran = _answered_together(flowmesh_subject)
        faults = []
        for name, alone in flowmesh_subject.alone.items():
            pair = [self.answer(one.outcome.result) for one in (alone, ran[name])]
            if not same(pair[0], pair[1], 0.0):
                faults.append(
                    f"{name} is answered {short(pair[1])} beside others, {short(pair[0])} alone"
                )
        _refuse(faults)

    @clause("concurrent")
    def test_two_tasks_run_at_once(self, flowmesh_subject: Subject) -> None:
        """``concurrent``: a task begins while another one runs."""
        _promises(flowmesh_subject, Capability.CONCURRENT)
        spec = _long_spec(flowmesh_subject)
        ran = flowmesh_subject.bench.overlap({"kit-one": spec, "kit-two": spec})
        notes = [
            note
            for note in flowmesh_subject.bench.read_journal()
            if note["call"] == "run" and {*note["tasks"]} & {*ran}
        ]
        both = [note["edge"] for note in notes][:2] == ["begin", "begin"]
        _refuse(
            []
            if both
            else [
                "one task began only when the other had ended; let run be a coroutine that does "
                "not block its loop"
            ]
        )

    # Once its engines are unloaded.

    @clause("files")
    def test_it_writes_below_its_folder_alone(self, flowmesh_subject: Subject) -> None:
        """Nothing is left in the home, among temporary files, beside the task's folder."""
        _first(flowmesh_subject)
        assert flowmesh_subject.closed  # what the engine kept while it was loaded is gone
        strays = flowmesh_subject.stray_files()
        _refuse(f"it left {path}; write below ctx.folder" for path in strays[:5])

    @clause("unload")
    def test_unloading_twice_is_harmless(self, flowmesh_subject: Subject) -> None:
        """``unload`` may come twice."""
        _first(flowmesh_subject)
        journal, _ = flowmesh_subject.closed
        ends = [note for note in journal if note["call"].startswith("unload")]
        if not ends:
            _skip("it was never unloaded: its process was ended before")
        times = {"unload": "the first time", "unload_again": "the second time"}
        raised = [note for note in ends if note.get("error")]
        faults = [f"unload raised {times[note['call']]}: {note['error']}" for note in raised]
        begun = {note["pid"] for note in ends} - {note["pid"] for note in ends if "error" in note}
        _refuse([*faults, *(f"unload did not end in process {pid}" for pid in begun)])

    @clause("memory")
    def test_unloading_gives_the_memory_back(self, flowmesh_subject: Subject) -> None:
        """Its process ends; what runs inline can be loaded again and again."""
        _first(flowmesh_subject)
        journal, alive = flowmesh_subject.closed
        notes = [note for note in journal if note["call"] == "memory"]
        steps = [b - a for note in notes for a, b in pairwise(note["resident_bytes"])]
        faults = [f"process {pid} outlived its engine" for pid in alive]
        if steps and min(steps) > _MEMORY_STEP_BYTES:
            faults.append(f"loading and unloading again keeps {min(steps) >> 20} MiB each time")
        _refuse(faults)


# What checks wait for.


def _declared(subject: Subject) -> ExecutorInfo:
    if subject.info is None:
        _skip("not before it is installed: see clause installed")
    return subject.info


def _with_example(subject: Subject) -> None:
    if find_misfits(_declared(subject)):
        _skip("not before its models are pydantic's: see clause models")
    if subject.spec is None:
        _skip("not without an example: see clause example")


def _first(subject: Subject) -> Ran:
    _with_example(subject)
    if not subject.first.outcome.ok:
        _skip("not before its example succeeds: see clauses example and result")
    return subject.first


def _long_spec(subject: Subject) -> Mapping[str, Any]:
    _first(subject)
    if Capability.SERVICE in _declared(subject).capabilities:
        _skip("a service runs until it is cancelled: see clause service-end")
    if subject.suite.long_spec is None:
        _skip("give long_spec: one that runs for seconds")
    return subject.resolve(subject.suite.long_spec)


def _refusals(subject: Subject) -> list[FlowmeshError | None]:
    _first(subject)
    if not subject.suite.refused:
        _skip("give refused: specs that it must refuse")
    return [ran.outcome.error for ran in subject.refusals]


def _promises(subject: Subject, *any_of: Capability) -> None:
    if not {*any_of} & _declared(subject).capabilities:
        names = " or ".join(f"Capability.{item.name}" for item in any_of)
        _skip(f"{NOT_PROMISED} {names}")


def _together(subject: Subject) -> dict[str, Ran]:
    _promises(subject, Capability.GROUP, Capability.CONCURRENT)
    _first(subject)
    if not subject.members:
        _skip("give variants: specs with other answers, in one group with spec")
    return subject.together


def _answered_together(subject: Subject) -> dict[str, Ran]:
    ran = _together(subject)
    if any(one.outcome.error for one in ran.values()):
        _skip("not before all members succeed: see clause answers")
    return ran
