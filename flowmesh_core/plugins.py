"""Plugins: found through entry points, loaded under a guard, reported one by one.

Nothing here imports an engine. A plugin that cannot be used is reported and left out; the process
starts without it. Block lists and version checks act before import.
"""

from __future__ import annotations

import enum
import importlib
import importlib.util
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import pluggy

from flowmesh_core import __version__, hookspecs
from flowmesh_core.config import Settings
from flowmesh_core.errors import (
    ExecutorUnavailableError,
    PluginConflictError,
    PluginError,
    PluginLoadError,
    UnknownTaskTypeError,
)
from flowmesh_core.executor import API_VERSION, Capability, Executor, ExecutorInfo
from flowmesh_core.inputs import detect_model_format

__all__ = [
    "ExecutorRegistry",
    "PluginReport",
    "PluginState",
    "Plugins",
    "extensions",
    "import_target",
    "is_importable",
    "load_driver",
    "load_plugins",
]

_log = logging.getLogger(__name__)
_CORE = "flowmesh-core"
_HOOKS = frozenset(name for name in vars(hookspecs) if name.startswith("flowmesh_"))


class PluginState(str, enum.Enum):
    """What became of a plugin at start."""

    LOADED = "loaded"
    DISABLED = "disabled"
    MISSING = "missing"
    """A package that the plugin's module itself imports is not installed."""
    BROKEN = "broken"
    CONFLICT = "conflict"


@attrs.frozen(kw_only=True)
class PluginReport:
    """One row of ``flowmesh plugins list``; ``import_s`` in seconds."""

    name: str
    distribution: str
    version: str
    state: PluginState
    reason: str = ""
    import_s: float = 0.0
    executors: tuple[ExecutorInfo, ...] = ()
    hooks: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        row = attrs.asdict(self, recurse=False)
        row.update(state=self.state.value, hooks=list(self.hooks))
        row["executors"] = [info.to_dict() for info in self.executors]
        return row


@attrs.define
class _Candidate:
    """A plugin on its way from entry point to report."""

    name: str
    distribution: str
    version: str
    module_name: str
    load: Callable[[], Any]
    state: PluginState = PluginState.LOADED
    reason: str = ""
    import_s: float = 0.0
    module: Any = None
    executors: tuple[ExecutorInfo, ...] = ()

    def refuse(self, state: PluginState, reason: str) -> None:
        self.state, self.reason, self.executors = state, reason, ()

    def report(self) -> PluginReport:
        hooks = (name for name in dir(self.module) if name in _HOOKS)
        return PluginReport(
            name=self.name,
            distribution=self.distribution,
            version=self.version,
            state=self.state,
            reason=self.reason,
            import_s=self.import_s,
            executors=self.executors,
            hooks=tuple(hooks) if self.state is PluginState.LOADED else (),
        )


class Plugins:
    """All plugins of the process: the hook manager, the reports, the declared executors."""

    def __init__(self, manager: pluggy.PluginManager, reports: Sequence[PluginReport]) -> None:
        self.manager = manager
        self.reports = tuple(reports)

    @property
    def executors(self) -> tuple[ExecutorInfo, ...]:
        """Every executor that a loaded plugin declares, by name."""
        found = (info for report in self.reports for info in report.executors)
        return tuple(sorted(found, key=lambda info: info.name))

    def build_registry(self, settings: Settings, *, gpu_count: int) -> ExecutorRegistry:
        """Return the registry of what is loaded, ranked as the operator wants it."""
        return ExecutorRegistry(
            self.executors,
            preferences=settings.executor_preferences,
            gpu_count=gpu_count,
            choose=self.manager.hook.flowmesh_choose_executor,
        )

    def observe(self, hook: str, **arguments: Any) -> None:
        """Call an observing hook; an implementation that raises is logged and changes nothing."""
        for impl in getattr(self.manager.hook, hook).get_hookimpls():
            try:
                impl.function(*(arguments[name] for name in impl.argnames))
            except (Exception, SystemExit):  # noqa: BLE001 - an observer must not decide about a task
                _log.exception("plugin %s: hook %s raised", impl.plugin_name, hook)

    def heartbeat_fields(self) -> dict[str, Any]:
        """Collect ``flowmesh_heartbeat_fields`` from every plugin that answers."""
        return self._collect("flowmesh_heartbeat_fields")

    def model_sources(self) -> dict[str, Callable[..., Path]]:
        """Return the resolvers of further kinds of ``model.source``, imported when called."""
        declared = self._collect("flowmesh_register_model_sources")
        return {kind: _lazy_call(target) for kind, target in declared.items()}

    def _collect(self, hook: str) -> dict[str, Any]:
        """Join the mappings that a hook's implementations return, leaving out what raises."""
        answers: dict[str, Any] = {}
        for impl in getattr(self.manager.hook, hook).get_hookimpls():
            try:
                answers.update(impl.function())
            except (Exception, SystemExit):  # noqa: BLE001 - as in observe
                _log.exception("plugin %s: %s raised", impl.plugin_name, hook)
        return answers


def _lazy_call(target: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return import_target(target)(*args, **kwargs)

    return call


def load_plugins(settings: Settings, *, files: Iterable[Path] = ()) -> Plugins:
    """Discover and load every plugin that the settings allow.

    Args:
        settings: ``only_plugins``, ``disable_plugins``, ``strict_plugins`` are read.
        files: Single-file plugins, loaded after the installed ones.

    Raises:
        PluginError: With ``strict_plugins``, or for one of ``files``: the first that is refused.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    installed = [_from_entry_point(point) for point in _sorted_entry_points("flowmesh")]
    asked_for = [_from_file(Path(path)) for path in files]
    candidates = installed + asked_for
    for candidate in candidates:
        _apply_lists(candidate, settings)
    _refuse_duplicates(candidates)
    for candidate in candidates:
        if candidate.state is PluginState.LOADED:
            _load(candidate, manager)
    _refuse_claimed_names(candidates, manager)
    for candidate in candidates:
        must = settings.strict_plugins or candidate in asked_for
        _complain(candidate, raise_now=must)
    return Plugins(manager, [candidate.report() for candidate in candidates])


def _sorted_entry_points(group: str) -> list[EntryPoint]:
    return sorted(entry_points(group=group), key=lambda point: (point.name, _distribution(point)))


def _distribution(point: EntryPoint) -> str:
    return str(point.dist.name) if point.dist else "unknown"


def _from_entry_point(point: EntryPoint) -> _Candidate:
    version = point.dist.version if point.dist else "0"
    return _Candidate(point.name, _distribution(point), version, point.module, point.load)


def _from_file(path: Path) -> _Candidate:
    # The module gets a name of its own, so that `target=f"{__name__}:Class"` can be imported.
    name = re.sub(r"\W", "_", f"flowmesh_plugin_{path.stem}")
    return _Candidate(path.stem, str(path), "0", name, lambda: _import_file(path, name))


def _import_file(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise PluginLoadError(f"plugin file {path} must be an existing .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _apply_lists(candidate: _Candidate, settings: Settings) -> None:
    if candidate.name in settings.disable_plugins:
        candidate.refuse(PluginState.DISABLED, "named in FLOWMESH_DISABLE_PLUGINS")
    elif settings.only_plugins and candidate.name not in settings.only_plugins:
        candidate.refuse(PluginState.DISABLED, "not named in FLOWMESH_ONLY_PLUGINS")


def _refuse_duplicates(candidates: Sequence[_Candidate]) -> None:
    allowed = [c for c in candidates if c.state is PluginState.LOADED]
    for one in allowed:
        others = [c for c in allowed if c.name == one.name and c is not one]
        if others and one.distribution != _CORE:
            owners = ", ".join(sorted({one.distribution, *(c.distribution for c in others)}))
            reason = f"plugin name {one.name!r} is claimed by {owners}; uninstall all but one"
            one.refuse(PluginState.CONFLICT, reason)


def _load(candidate: _Candidate, manager: pluggy.PluginManager) -> None:
    started = time.perf_counter()
    try:
        candidate.module = candidate.load()
        _register(candidate, manager)
    except ModuleNotFoundError as exc:
        missing = exc.name or str(exc)
        if f"{candidate.module_name}.".startswith(f"{missing}."):  # its own module is not there
            candidate.refuse(PluginState.BROKEN, f"ModuleNotFoundError: {exc}")
        else:
            reason = f"needs the package {missing}, not installed here"
            candidate.refuse(PluginState.MISSING, reason)
    except (Exception, SystemExit) as exc:  # noqa: BLE001 - one bad plugin must not stop the process
        _log.debug("plugin %s failed to load", candidate.name, exc_info=True)
        detail = str(exc) if isinstance(exc, PluginError) else f"{type(exc).__name__}: {exc}"
        candidate.refuse(PluginState.BROKEN, detail)
    candidate.import_s = time.perf_counter() - started


def _register(candidate: _Candidate, manager: pluggy.PluginManager) -> None:
    try:
        manager.register(candidate.module, name=candidate.name)
        manager.check_pending()
        candidate.executors = tuple(_declared_by(candidate, manager))
    except BaseException:
        # A registration that is refused half-way leaves the hooks before the bad one behind.
        if manager.get_plugin(candidate.name) is not None:
            manager.unregister(name=candidate.name)
        raise


def _declared_by(candidate: _Candidate, manager: pluggy.PluginManager) -> Iterable[ExecutorInfo]:
    for impl in manager.hook.flowmesh_register_executors.get_hookimpls():
        if impl.plugin_name != candidate.name:
            continue
        declared: Any = impl.function()
        whole = isinstance(declared, Iterable) and not isinstance(declared, (str, Mapping))
        for info in declared if whole else [declared]:
            if not whole or not isinstance(info, ExecutorInfo):
                raise PluginLoadError(
                    "flowmesh_register_executors must return a list of ExecutorInfo, got "
                    f"{type(info).__name__}"
                )
            _check_api(info, candidate)
            yield info


def _check_api(info: ExecutorInfo, candidate: _Candidate) -> None:
    if info.api_version.split(".")[0] != API_VERSION.split(".")[0]:
        raise PluginLoadError(
            f"{candidate.distribution} {candidate.version} wrote executor {info.name!r} for "
            f"executor API {info.api_version}, this flowmesh-core has {API_VERSION}; "
            "install versions that match"
        )


def _refuse_claimed_names(candidates: Sequence[_Candidate], manager: pluggy.PluginManager) -> None:
    owners: dict[str, list[_Candidate]] = {}
    for candidate in candidates:
        for info in candidate.executors:
            owners.setdefault(info.name, []).append(candidate)
    for name, claimants in owners.items():
        if len(claimants) < 2:
            continue
        both = " and ".join(sorted(c.distribution for c in claimants))
        reason = f"executor name {name!r} is claimed by {both}; disable one of them"
        for claimant in claimants:
            if claimant.distribution != _CORE and claimant.state is PluginState.LOADED:
                manager.unregister(name=claimant.name)
                claimant.refuse(PluginState.CONFLICT, reason)


def _complain(candidate: _Candidate, *, raise_now: bool) -> None:
    if candidate.state in (PluginState.LOADED, PluginState.DISABLED):
        return
    text = (
        f"plugin {candidate.name} ({candidate.distribution} {candidate.version}, "
        f"{_CORE} {__version__}) is {candidate.state.value}: {candidate.reason}"
    )
    if raise_now:
        conflict = candidate.state is PluginState.CONFLICT
        raise (PluginConflictError if conflict else PluginLoadError)(text)
    _log.error("%s", text)


def is_importable(name: str) -> bool:
    """Return whether a package is installed, without importing it.

    A bare folder of that name on the path does not count.
    """
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


def import_target(target: str) -> Any:
    """Import ``package.module:Name``.

    Raises:
        PluginLoadError: The module or the name does not exist, or importing it raised.
    """
    module_name, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as exc:  # whatever it raises, the plugin is broken
        raise PluginLoadError(f"cannot import {target}: {type(exc).__name__}: {exc}") from exc


def load_driver(group: str, name: str) -> Any:
    """Return the one implementation that a name picks, such as a transport class.

    Args:
        group: ``flowmesh.transports``, ``flowmesh.stores``, ``flowmesh.places``.
        name: The driver's entry-point name.

    Raises:
        PluginError: No such driver, two of them, or it cannot be imported.
    """
    from stevedore.driver import DriverManager  # noqa: PLC0415 - only processes that run tasks
    from stevedore.exception import MultipleMatches  # noqa: PLC0415

    names = sorted({point.name for point in entry_points(group=group)})
    if name not in names:  # asked first, since stevedore would log a warning of its own
        known = ", ".join(names) or "none"
        raise PluginError(f"{group} has no driver {name!r}; known are {known}")
    try:
        return DriverManager(group, name, on_load_failure_callback=_raise_load_failure).driver
    except MultipleMatches as exc:
        raise PluginConflictError(f"{group} has several drivers {name!r}: {exc}") from exc


def _raise_load_failure(_manager: Any, point: EntryPoint, exc: BaseException) -> None:
    raise PluginLoadError(f"{point.group}: driver {point.name!r} cannot be loaded: {exc}") from exc


def extensions(group: str) -> tuple[dict[str, Any], list[PluginReport]]:
    """Load every entry point of a plugin's own group, such as ``flowmesh.agent.tools``.

    Returns:
        The objects that could be loaded by name, and a report for each entry point.
    """
    loaded: dict[str, Any] = {}
    candidates = [_from_entry_point(point) for point in _sorted_entry_points(group)]
    _refuse_duplicates(candidates)
    for candidate in candidates:
        if candidate.state is not PluginState.LOADED:
            continue
        try:
            loaded[candidate.name] = candidate.load()
        except (Exception, SystemExit) as exc:  # noqa: BLE001 - as in _load
            candidate.refuse(PluginState.BROKEN, f"{type(exc).__name__}: {exc}")
    return loaded, [candidate.report() for candidate in candidates]


class ExecutorRegistry:
    """Finds the executor for a task.

    Args:
        infos: Declarations, as ``Plugins.executors`` has them.
        preferences: Names per task type, best first (``FLOWMESH_PREFER``).
        gpu_count: GPUs that this worker may use.
        choose: ``flowmesh_choose_executor``, or None.
    """

    def __init__(
        self,
        infos: Iterable[ExecutorInfo] = (),
        *,
        preferences: Mapping[str, Sequence[str]] | None = None,
        gpu_count: int = 0,
        choose: Callable[..., str | None] | None = None,
    ) -> None:
        self._infos = {info.name: info for info in infos}
        self._classes: dict[str, type[Executor]] = {}
        self._preferences = preferences or {}
        self._gpu_count = gpu_count
        self._choose = choose

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
        """
        if info.name in self._infos:
            raise PluginConflictError(f"executor name {info.name!r} is already registered")
        self._infos[info.name] = info
        if cls is not None:
            self._classes[info.name] = cls

    def load_class(self, info: ExecutorInfo) -> type[Executor]:
        """Import the executor's class.

        Raises:
            PluginLoadError: It cannot be imported or is no ``Executor``.
        """
        cls = self._classes.get(info.name)
        if cls is None:
            cls = import_target(info.target)
            if not (isinstance(cls, type) and issubclass(cls, Executor)):
                raise PluginLoadError(f"{info.target} must be a subclass of flowmesh_core.Executor")
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
        ranked = sorted(usable, key=lambda info: self._rank(task_type, info))
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
        missing = [name for name in info.needs if not is_importable(name)]
        if missing:
            run = f"; run: {info.install}" if info.install else ""
            return f"needs the package {', '.join(missing)}, not installed here{run}"
        found = detect_model_format(_model_source(spec)) if info.model_formats else ""
        if found and found not in info.model_formats:
            loads = ", ".join(sorted(info.model_formats))
            return f"loads {loads} models, and spec.model.source is {found}"
        return ""

    def _rank(self, task_type: str, info: ExecutorInfo) -> tuple[int, bool, int, str]:
        preferred = list(self._preferences.get(task_type, ()))
        place = preferred.index(info.name) if info.name in preferred else len(preferred)
        uses_gpu = bool(self._gpu_count) and Capability.GPU in info.capabilities
        return (place, not uses_gpu, -info.priority, info.name)

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
    missing = [name for info in declared for name in info.needs if not is_importable(name)]
    install = next((info.install for info in declared if info.install and missing), "")
    return ExecutorUnavailableError(
        f"task type {task_type!r}: {told}", needs=missing, install=install
    )
