"""Which executor serves a task, and why not another one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowmesh_core.errors import (
    ExecutorUnavailableError,
    PluginConflictError,
    PluginError,
    PluginLoadError,
    UnknownTaskTypeError,
)
from flowmesh_core.executor import Capability, Executor, ExecutorInfo, as_executor_class
from flowmesh_core.importing import import_target, is_importable
from flowmesh_core.inputs import detect_model_format
from flowmesh_core.validation import as_model

__all__ = ["ExecutorRegistry", "find_misfits", "missing_packages"]


def missing_packages(info: ExecutorInfo) -> tuple[str, ...]:
    """Return which of the packages that an executor needs are not installed where it runs."""
    if info.environment:
        return info.missing
    return tuple(name for name in info.needs if not is_importable(name))


def find_misfits(info: ExecutorInfo) -> list[str]:
    """Return which models of a declaration are none; what cannot be imported is not looked at."""
    faults = []
    for field in ("spec", "result"):
        target = getattr(info, field)
        if not target or info.environment:
            continue
        with contextlib.suppress(PluginLoadError):
            found = import_target(target)
            try:
                as_model(found, target)
            except PluginLoadError as exc:
                faults.append(f"ExecutorInfo.{field}: {exc}")
    return faults


class ExecutorRegistry:
    """Finds the executor for a task.

    Args:
        infos: Declarations, as ``Plugins.executors`` has them.
        preferences: Names per task type, best first (``FLOWMESH_PREFER``).
        gpu_count: GPUs that this worker may use.
        choose: ``flowmesh_choose_executor``, or None.
        pythons: Interpreter of each further environment, by its name.
    """

    def __init__(
        self,
        infos: Iterable[ExecutorInfo] = (),
        *,
        preferences: Mapping[str, Sequence[str]] | None = None,
        gpu_count: int = 0,
        choose: Callable[..., str | None] | None = None,
        pythons: Mapping[str, Path] | None = None,
    ) -> None:
        self._infos = {info.name: info for info in infos}
        self._classes: dict[str, type[Executor]] = {}
        self._from_code: set[str] = set()
        self._preferences = preferences or {}
        self._gpu_count = gpu_count
        self._choose = choose
        self.pythons = pythons or {}

    @property
    def infos(self) -> tuple[ExecutorInfo, ...]:
        """Every declaration, by name."""
        return tuple(self._infos[name] for name in sorted(self._infos))

    @property
    def task_types(self) -> tuple[str, ...]:
        """Every task type that some executor declares, sorted."""
        return tuple(sorted({kind for info in self._infos.values() for kind in info.task_types}))

    def register(self, info: ExecutorInfo, cls: type[Executor] | None = None) -> None:
        """Add an executor from code, as notebooks and tests do.

        Raises:
            PluginConflictError: The name is taken.
            PluginLoadError: The class is no ``Executor``, or has nothing to run tasks with; or a
                model that is declared is none.
        """
        if info.name in self._infos:
            raise PluginConflictError(f"executor name {info.name!r} is already registered")
        if cls is not None:
            if misfits := find_misfits(info):
                raise PluginLoadError(f"executor {info.name!r}: {'; '.join(misfits)}")
            self._classes[info.name] = as_executor_class(cls, info.target)
            self._from_code.add(info.name)
        self._infos[info.name] = info

    def places(self, info: ExecutorInfo) -> tuple[str, ...]:
        """Return where an executor can run; a class that came from code only exists here."""
        return ("inline",) if info.name in self._from_code else info.places

    def load_class(self, info: ExecutorInfo) -> type[Executor]:
        """Import the executor's class.

        Raises:
            PluginLoadError: It cannot be imported, is no ``Executor``, has nothing to run tasks
                with or lives in another environment.
        """
        cls = self._classes.get(info.name)
        if cls is None and info.environment:
            raise PluginLoadError(
                f"executor {info.name!r} lives in environment {info.environment} and cannot be "
                "imported here; run it in the place 'process'"
            )
        if cls is None:
            cls = as_executor_class(import_target(info.target), info.target)
            self._classes[info.name] = cls
        return cls

    def resolve(
        self,
        task_type: str,
        spec: Mapping[str, Any],
        *,
        enforce_cpu: bool = False,
        executor: str | None = None,
    ) -> ExecutorInfo:
        """Return the executor that serves a task.

        Args:
            task_type: ``spec.taskType``.
            spec: The whole ``spec``; ``model.source`` tells the model's format.
            enforce_cpu: Leave out executors that cannot do without a GPU.
            executor: Ask for one by name (``spec.executor``).

        Raises:
            UnknownTaskTypeError: No executor declares the type; names the known ones.
            ExecutorUnavailableError: Some declare it and none can serve this task here; says why
                for each and what to install.
        """
        declared = [info for info in self.infos if task_type in info.task_types]
        if not declared:
            known = ", ".join(self.task_types) or "none"
            raise UnknownTaskTypeError(
                f"task type {task_type!r} is not known here; known are {known}"
            )
        reasons = {
            info.name: self._why_not(info, spec, enforce_cpu=enforce_cpu, executor=executor)
            for info in declared
        }
        usable = [info for info in declared if not reasons[info.name]]
        if not usable:
            raise _unavailable(task_type, declared, reasons)
        on_gpu = bool(self._gpu_count) and not enforce_cpu
        ranked = sorted(usable, key=lambda info: self._rank(task_type, info, on_gpu=on_gpu))
        return self._pick(task_type, spec, ranked)

    def _why_not(
        self,
        info: ExecutorInfo,
        spec: Mapping[str, Any],
        *,
        enforce_cpu: bool,
        executor: str | None,
    ) -> str:
        if executor and info.name != executor:
            return f"is not {executor!r}, which spec.executor asks for"
        if info.needs_gpu and (enforce_cpu or not self._gpu_count):
            return "needs a GPU" + (", and enforce_cpu is set" if enforce_cpu else "")
        missing = missing_packages(info)
        if missing:
            where = f"in environment {info.environment}" if info.environment else "here"
            run = "run there" if info.environment else "run"
            hint = f"; {run}: {info.install}" if info.install else ""
            return f"needs the package {', '.join(missing)}, not installed {where}{hint}"
        found = detect_model_format(_model_source(spec)) if info.model_formats else ""
        if found and found not in info.model_formats:
            loads = ", ".join(sorted(info.model_formats))
            return f"loads {loads} models, and spec.model.source is {found}"
        return ""

    def _rank(
        self, task_type: str, info: ExecutorInfo, *, on_gpu: bool
    ) -> tuple[int, bool, int, str]:
        preferred = list(self._preferences.get(task_type, ()))
        place = preferred.index(info.name) if info.name in preferred else len(preferred)
        uses_gpu = on_gpu and Capability.GPU in info.capabilities
        return (place, not uses_gpu, -info.rank(on_gpu=uses_gpu), info.name)

    def _pick(
        self, task_type: str, spec: Mapping[str, Any], ranked: Sequence[ExecutorInfo]
    ) -> ExecutorInfo:
        if self._choose is None:
            return ranked[0]
        chosen = self._choose(task_type=task_type, spec=spec, candidates=ranked)
        if chosen is None:
            return ranked[0]
        for info in ranked:
            if info.name == chosen:
                return info
        names = ", ".join(info.name for info in ranked)
        raise PluginError(f"flowmesh_choose_executor answered {chosen!r}, expected one of {names}")


def _model_source(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    model = spec.get("model")
    source = model.get("source") if isinstance(model, Mapping) else None
    return source if isinstance(source, Mapping) else {}


def _unavailable(
    task_type: str, declared: Sequence[ExecutorInfo], reasons: Mapping[str, str]
) -> ExecutorUnavailableError:
    told = "; ".join(f"executor {info.name!r} {reasons[info.name]}" for info in declared)
    missing = [name for info in declared for name in missing_packages(info)]
    install = next((info.install for info in declared if info.install and missing), "")
    return ExecutorUnavailableError(
        f"task type {task_type!r}: {told}", needs=missing, install=install
    )
