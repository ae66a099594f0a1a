"""Every error that flowmesh raises on purpose, each with a stable code.

::

    FlowmeshError
    ├── ConfigError, ContractError (problems), MergeError, TransportError (retriable)
    ├── PluginError ── PluginLoadError, PluginConflictError
    ├── ExecutorError ── UnknownTaskTypeError, ExecutorUnavailableError (needs, install),
    │                    ExecutionError
    ├── DeadlineError, CancelledError, CrashError (exit_code, signal, oom), ResourceError
    ├── InputError
    └── ArtifactError ── ManifestError, ArchiveError, UploadError (retriable)

Codes are API and travel in events; message texts are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "ArchiveError",
    "ArtifactError",
    "CancelledError",
    "ConfigError",
    "ContractError",
    "CrashError",
    "DeadlineError",
    "ExecutionError",
    "ExecutorError",
    "ExecutorUnavailableError",
    "FlowmeshError",
    "InputError",
    "ManifestError",
    "MergeError",
    "PluginConflictError",
    "PluginError",
    "PluginLoadError",
    "ResourceError",
    "TransportError",
    "UnknownTaskTypeError",
    "UploadError",
]


class FlowmeshError(Exception):
    """Root of the tree.

    Attributes:
        code: Stable dotted name of the kind of failure, carried by events.
        retriable: Whether the same task may succeed when it is tried again unchanged.
    """

    code = "flowmesh"
    retriable = False

    def __init__(self, message: str, *, retriable: bool | None = None) -> None:
        super().__init__(message)
        if retriable is not None:
            self.retriable = retriable

    def to_dict(self) -> dict[str, Any]:
        """Return the error as data that ``from_dict`` reads in another process.

        A class that is not of this tree is told as its nearest base, with its own code.
        """
        known = next(cls for cls in type(self).__mro__ if cls.__module__ == __name__)
        plain = (str, int, float, tuple, list, type(None))
        fields = {key: value for key, value in vars(self).items() if isinstance(value, plain)}
        fields |= {"code": self.code, "retriable": self.retriable}
        return {"kind": known.__name__, "message": str(self), "fields": fields}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> FlowmeshError:
        """Build an error from ``to_dict``; a kind of a later version becomes a plain one."""
        known = {name: globals()[name] for name in __all__}
        cls = known.get(data["kind"], FlowmeshError)
        error: FlowmeshError = cls.__new__(cls)
        error.args = (data["message"],)
        vars(error).update(data["fields"])
        return error


class ConfigError(FlowmeshError):
    """A variable, option or settings value cannot be used."""

    code = "config"


class ContractError(FlowmeshError):
    """A message or document breaks the task contract.

    Args:
        problems: One sentence per fault, each naming the field.
        where: What was read: ``task 7f3c`` or ``workflow.yaml``.
    """

    code = "contract"

    def __init__(self, problems: Iterable[str] | str, *, where: str = "") -> None:
        self.problems: Sequence[str] = (problems,) if isinstance(problems, str) else tuple(problems)
        self.where = where
        text = "; ".join(self.problems)
        super().__init__(f"{where}: {text}" if where else text)


class MergeError(FlowmeshError):
    """A group run did not answer each of its tasks exactly once."""

    code = "merge"


class TransportError(FlowmeshError):
    """The queue or the bus cannot be reached, or refused what was sent."""

    code = "transport"
    retriable = True


class PluginError(FlowmeshError):
    """A plugin, driver or declaration cannot be used."""

    code = "plugin"


class PluginLoadError(PluginError):
    """A plugin could not be imported or registered."""

    code = "plugin.load"


class PluginConflictError(PluginError):
    """Two distributions claim one name."""

    code = "plugin.conflict"


class ExecutorError(FlowmeshError):
    """An executor could not be found or could not do its work."""

    code = "executor"


class UnknownTaskTypeError(ExecutorError):
    """No installed executor declares the task type."""

    code = "executor.unknown_task_type"


class ExecutorUnavailableError(ExecutorError):
    """An executor for the task type is installed but cannot serve this task here.

    Args:
        message: What is missing and what to do.
        needs: Import names that are not installed.
        install: The command that installs them.
    """

    code = "executor.unavailable"

    def __init__(self, message: str, *, needs: Iterable[str] = (), install: str = "") -> None:
        super().__init__(message)
        self.needs = tuple(needs)
        self.install = install


class ExecutionError(ExecutorError):
    """The executor ran and failed."""

    code = "executor.failed"


class DeadlineError(FlowmeshError):
    """The task did not end before its deadline."""

    code = "deadline"


class CancelledError(FlowmeshError):
    """The task was cancelled before it ended."""

    code = "cancelled"


class CrashError(FlowmeshError):
    """The process that ran the task ended on its own, or ran out of memory.

    Its code is ``crash``, and ``crash.out_of_memory`` when memory ran out.

    Args:
        message: What happened.
        exit_code: Exit status, when the process exited.
        signal: Name such as ``SIGKILL``, when a signal ended it.
        oom: Whether memory ran out.
    """

    code = "crash"
    retriable = True

    def __init__(
        self,
        message: str,
        *,
        exit_code: int | None = None,
        signal: str | None = None,
        oom: bool = False,
        retriable: bool | None = None,
    ) -> None:
        super().__init__(message, retriable=retriable)
        self.exit_code = exit_code
        self.signal = signal
        self.oom = oom
        if oom:
            self.code = "crash.out_of_memory"


class ResourceError(FlowmeshError):
    """The request for resources cannot be read or can never be met here."""

    code = "resource"


class InputError(FlowmeshError):
    """Data, a model or a checkpoint that the task names cannot be read."""

    code = "input"


class ArtifactError(FlowmeshError):
    """Results or artifacts cannot be written, listed, packed or shipped."""

    code = "artifact"


class ManifestError(ArtifactError):
    """The manifest cannot be built."""

    code = "artifact.manifest"


class ArchiveError(ArtifactError):
    """An archive cannot be written or is not safe to unpack."""

    code = "artifact.archive"


class UploadError(ArtifactError):
    """A result or file could not be delivered to its destination."""

    code = "artifact.upload"
    retriable = True
