"""The error tree: stable codes, one message from many problems."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator

import pytest

from flowmesh_core import errors
from flowmesh_core.errors import (
    ContractError,
    CrashError,
    ExecutionError,
    ExecutorUnavailableError,
    FlowmeshError,
    TransportError,
    UploadError,
)

# Codes are API: a line here changes only together with the wire format.
CODES = {
    "FlowmeshError": ("flowmesh", False),
    "ConfigError": ("config", False),
    "ContractError": ("contract", False),
    "MergeError": ("merge", False),
    "TransportError": ("transport", True),
    "PluginError": ("plugin", False),
    "PluginLoadError": ("plugin.load", False),
    "PluginConflictError": ("plugin.conflict", False),
    "ExecutorError": ("executor", False),
    "UnknownTaskTypeError": ("executor.unknown_task_type", False),
    "ExecutorUnavailableError": ("executor.unavailable", False),
    "ExecutionError": ("executor.failed", False),
    "DeadlineError": ("deadline", False),
    "CancelledError": ("cancelled", False),
    "CrashError": ("crash", True),
    "ResourceError": ("resource", False),
    "InputError": ("input", False),
    "ArtifactError": ("artifact", False),
    "ManifestError": ("artifact.manifest", False),
    "ArchiveError": ("artifact.archive", False),
    "UploadError": ("artifact.upload", True),
}


def tree(cls: type[FlowmeshError] = FlowmeshError) -> Iterator[type[FlowmeshError]]:
    yield cls
    for below in cls.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from tree(below)


def test_every_class_has_its_stable_code() -> None:
    assert {cls.__name__: (cls.code, cls.retriable) for cls in tree()} == CODES


def test_every_class_is_exported_and_drawn() -> None:
    assert set(errors.__all__) == set(CODES)
    drawn = set(re.findall(r"\w+Error", errors.__doc__ or ""))
    assert drawn == set(CODES)


def test_code_of_a_class_begins_with_that_of_its_parent() -> None:
    for cls in tree():
        for parent in cls.__mro__[1:]:
            if parent in (FlowmeshError, Exception) or not issubclass(parent, FlowmeshError):
                break
            assert cls.code.startswith(f"{parent.code}.")


def test_one_error_can_be_retriable_without_changing_its_class() -> None:
    assert TransportError("x", retriable=False).retriable is False
    assert FlowmeshError("x", retriable=True).retriable is True
    assert FlowmeshError("x").retriable is False
    assert TransportError("x").retriable is True


def test_problems_become_one_message_with_what_was_read_in_front() -> None:
    error = ContractError(iter(["a must be a number, got 'x'", "b is required"]), where="task 7f3c")
    assert str(error) == "task 7f3c: a must be a number, got 'x'; b is required"
    assert error.problems == ("a must be a number, got 'x'", "b is required")
    assert error.where == "task 7f3c"
    assert str(ContractError("alone")) == "alone"
    assert ContractError("alone").problems == ("alone",)


def test_errors_keep_what_callers_ask_for() -> None:
    crash = CrashError("gone", exit_code=137, signal="SIGKILL", oom=True)
    assert (crash.exit_code, crash.signal, crash.oom) == (137, "SIGKILL", True)
    missing = ExecutorUnavailableError("no vllm", needs=["vllm"], install="pip install x")
    assert (missing.needs, missing.install) == (("vllm",), "pip install x")


@pytest.mark.parametrize(
    "error",
    [
        FlowmeshError("x", retriable=True),
        ContractError(["a", "b"], where="task 1"),
        CrashError("gone", exit_code=1, signal="SIGSEGV", oom=True),
        ExecutorUnavailableError("no", needs=("a",), install="pip install a"),
    ],
)
def test_error_crosses_a_process_boundary_whole(error: FlowmeshError) -> None:
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is type(error)
    assert str(copied) == str(error)
    assert vars(copied) == vars(error)


# Across processes.

EVERY_KIND = [
    FlowmeshError("plain", retriable=True),
    ContractError(["a must be b", "c is required"], where="task t"),
    ExecutorUnavailableError("no", needs=["x"], install="pip install x"),
    CrashError("gone", exit_code=3),
    CrashError("full", signal="SIGKILL", oom=True, retriable=False),
    UploadError("refused"),
]


@pytest.mark.parametrize("error", EVERY_KIND, ids=lambda error: type(error).__name__)
def test_an_error_is_the_same_on_the_other_side(error: FlowmeshError) -> None:
    there = FlowmeshError.from_dict(json.loads(json.dumps(error.to_dict())))
    assert type(there) is type(error)
    assert str(there) == str(error)
    assert (there.code, there.retriable) == (error.code, error.retriable)
    assert json.loads(json.dumps(vars(there))) == json.loads(
        json.dumps({**vars(error), "code": error.code, "retriable": error.retriable})
    )


def test_a_class_that_only_one_side_knows_arrives_as_its_base_with_its_code() -> None:
    class AcmeError(ExecutionError):
        code = "acme.broken"
        retriable = True

    error = AcmeError("no voice")
    error.response = object()
    there = FlowmeshError.from_dict(json.loads(json.dumps(error.to_dict())))
    assert type(there) is ExecutionError
    assert (there.code, there.retriable, str(there)) == ("acme.broken", True, "no voice")


@pytest.mark.parametrize("kind", ["Iterable", "Any", "system", ""])
def test_a_kind_that_is_no_error_of_ours_becomes_a_plain_one(kind: str) -> None:
    fields = {"code": "later", "retriable": False}
    there = FlowmeshError.from_dict({"kind": kind, "message": "m", "fields": fields})
    assert type(there) is FlowmeshError
    assert there.code == "later"


def test_memory_that_ran_out_has_a_code_of_its_own() -> None:
    assert CrashError("x").code == "crash"
    assert CrashError("x", oom=True).code == "crash.out_of_memory"
