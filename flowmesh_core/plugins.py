"""Plugins: found through entry points, loaded under a guard, reported one by one.

Nothing here imports an engine. A plugin that cannot be used is reported and left out; the process
starts without it. Block lists and version checks act before import.
"""

from __future__ import annotations

import enum
import importlib
import importlib.util
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import EntryPoint, distribution, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

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
from flowmesh_core.places.environments import Environment, list_environments, read_offer

__all__ = [
    "ExecutorRegistry",
    "PluginReport",
    "PluginState",
    "Plugins",
    "core_requirement",
    "extensions",
    "import_plugin_file",
    "import_target",
    "is_importable",
    "load_driver",
    "load_plugins",
    "missing_packages",
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
    """One row of ``flowmesh plugins list``; ``import_s`` in seconds.

    ``environment`` is the one that the plugin lives in, empty for this process's own. One that
    cannot be used is a row of its own, without a distribution.
    """

    name: str
    distribution: str
    version: str
    state: PluginState
    reason: str = ""
    import_s: float = 0.0
    executors: tuple[ExecutorInfo, ...] = ()
    hooks: tuple[str, ...] = ()
    environment: str = ""

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
    environment: str = ""

    @property
    def owner(self) -> str:
        where = f" in environment {self.environment}" if self.environment else ""
        return self.distribution + where

    def belongs_to(self, other: _Candidate) -> bool:
        """Whether they are one plugin, installed beside the worker and in an environment."""
        places = bool(self.environment) + bool(other.environment)
        return self is other or (places == 1 and self.distribution == other.distribution)

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
            environment=self.environment,
        )


class Plugins:
    """All plugins of the process: the hook manager, the reports, the declared executors."""

    def __init__(
        self,
        manager: pluggy.PluginManager,
        reports: Sequence[PluginReport],
        *,
        files: Sequence[Path] = (),
        pythons: Mapping[str, Path] | None = None,
    ) -> None:
        self.manager = manager
        self.reports = tuple(reports)
        self.files = tuple(files)
        self.pythons = pythons or {}

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
            pythons=self.pythons,
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
    files = [Path(path) for path in files]
    asked_for = [_from_file(path) for path in files]
    candidates = installed + asked_for
    for candidate in candidates:
        _apply_lists(candidate, settings)
    environments = list_environments(settings.envs_dir)
    for environment in environments:
        candidates += _from_environment(environment, settings)
    _refuse_duplicates(candidates)
    for candidate in candidates:
        if candidate.state is PluginState.LOADED and not candidate.environment:
            _load(candidate, manager)
    _share_out_executors(candidates)
    _refuse_claimed_names(candidates, manager)
    for candidate in candidates:
        must = settings.strict_plugins or candidate in asked_for
        _complain(candidate, raise_now=must)
    return Plugins(
        manager,
        [candidate.report() for candidate in candidates],
        files=files,
        pythons={environment.name: environment.python for environment in environments},
    )


def _sorted_entry_points(group: str) -> list[EntryPoint]:
    return sorted(entry_points(group=group), key=lambda point: (point.name, _distribution(point)))


def _distribution(point: EntryPoint) -> str:
    return str(point.dist.name) if point.dist else "unknown"


def _from_entry_point(point: EntryPoint) -> _Candidate:
    version = point.dist.version if point.dist else "0"
    return _Candidate(point.name, _distribution(point), version, point.module, point.load)


def _from_file(path: Path) -> _Candidate:
    # The module gets a name of its own, so that `target=f"{__name__}:Class"` can be imported.
    name = _module_of(path)
    return _Candidate(path.stem, str(path), "0", name, lambda: import_plugin_file(path))


def _module_of(path: Path) -> str:
    return re.sub(r"\W", "_", f"flowmesh_plugin_{path.stem}")


def import_plugin_file(path: Path) -> ModuleType:
    """Import a single-file plugin under the name by which its targets are found.

    Raises:
        PluginLoadError: There is no such file.
    """
    name = _module_of(path)
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


def _from_environment(environment: Environment, settings: Settings) -> list[_Candidate]:
    """Return what an environment offers, or the one row that says why it is left out."""
    try:
        offer = read_offer(environment, settings)
        return [_from_row(row, environment.name) for row in offer.plugins]
    except PluginError as exc:
        candidate = _Candidate(environment.name, "", "", "", _never, environment=environment.name)
        remedy = f"repair it, or run: flowmesh env remove {environment.name}"
        candidate.refuse(PluginState.BROKEN, f"{exc}; {remedy}")
        return [candidate]


def _from_row(row: Mapping[str, Any], environment: str) -> _Candidate:
    """Build a candidate from ``PluginReport.to_dict``; hooks are not called across environments."""
    try:
        return _Candidate(
            name=row["name"],
            distribution=row["distribution"],
            version=row["version"],
            module_name="",
            load=_never,
            state=PluginState(row["state"]),
            reason=row["reason"],
            import_s=row["import_s"],
            executors=tuple(_settle(info, environment) for info in row["executors"]),
            environment=environment,
        )
    except (KeyError, TypeError, ValueError, PluginError) as exc:
        raise PluginError(f"environment {environment}: cannot read its plugins: {exc!r}") from exc


def _settle(data: Mapping[str, Any], environment: str) -> ExecutorInfo:
    info = ExecutorInfo.from_dict({**data, "environment": environment})
    # Another Python's packages cannot be imported here, whatever the author prefers.
    places = [place for place in info.places if place != "inline"] or ["process"]
    return attrs.evolve(info, places=places)


def core_requirement() -> list[str]:
    """Return what an installer must be given for a core that goes with this one.

    The folder or wheel that this one came from, as long as it is there; else a version of the
    same minor.
    """
    told = json.loads(distribution(_CORE).read_text("direct_url.json") or "{}")
    path = Path(unquote(urlsplit(told.get("url", "")).path))
    if urlsplit(told.get("url", "")).scheme == "file" and path.exists():
        editable = told.get("dir_info", {}).get("editable")
        return ["--editable", str(path)] if editable else [str(path)]
    return [f"{_CORE}~={__version__.partition('+')[0]}"]


def _never() -> Any:
    raise AssertionError("a plugin of another environment is not loaded here")


def _apply_lists(candidate: _Candidate, settings: Settings) -> None:
    if candidate.name in settings.disable_plugins:
        candidate.refuse(PluginState.DISABLED, "named in FLOWMESH_DISABLE_PLUGINS")
    elif settings.only_plugins and candidate.name not in settings.only_plugins:
        candidate.refuse(PluginState.DISABLED, "not named in FLOWMESH_ONLY_PLUGINS")


def _refuse_duplicates(candidates: Sequence[_Candidate]) -> None:
    allowed = [c for c in candidates if c.state is PluginState.LOADED]
    for one in allowed:
        others = [c for c in allowed if c.name == one.name and not one.belongs_to(c)]
        if others and one.distribution != _CORE:
            owners = ", ".join(sorted({one.owner, *(c.owner for c in others)}))
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


def _share_out_executors(candidates: Sequence[_Candidate]) -> None:
    """Of a plugin that is here and in an environment, take each executor where it can run.

    A plugin installs without its engine, and the environment brings that: what lacks packages
    here and none there is served from there.
    """
    here = {c.name: c for c in candidates if c.state is PluginState.LOADED and not c.environment}
    for there in candidates:
        local = here.get(there.name)
        if not there.environment or there.state is not PluginState.LOADED or local is None:
            continue
        lacking = {info.name for info in local.executors if missing_packages(info)}
        complete = {info.name for info in there.executors if not info.missing}
        moved = lacking & complete
        kept = {info.name for info in local.executors} - moved
        local.executors = tuple(info for info in local.executors if info.name in kept)
        there.executors = tuple(info for info in there.executors if info.name not in kept)
        if not there.executors:
            there.refuse(PluginState.DISABLED, "installed beside the worker as well")


def _refuse_claimed_names(candidates: Sequence[_Candidate], manager: pluggy.PluginManager) -> None:
    owners: dict[str, list[_Candidate]] = {}
    for candidate in candidates:
        for info in candidate.executors:
            owners.setdefault(info.name, []).append(candidate)
    for name, claimants in owners.items():
        if len(claimants) < 2:
            continue
        both = " and ".join(sorted(c.owner for c in claimants))
        reason = f"executor name {name!r} is claimed by {both}; disable one of them"
        for claimant in claimants:
            if claimant.distribution != _CORE and claimant.state is PluginState.LOADED:
                if not claimant.environment:
                    manager.unregister(name=claimant.name)
                claimant.refuse(PluginState.CONFLICT, reason)


def _complain(candidate: _Candidate, *, raise_now: bool) -> None:
    if candidate.state in (PluginState.LOADED, PluginState.DISABLED):
        return
    where = f", environment {candidate.environment}" if candidate.environment else ""
    text = (
        f"plugin {candidate.name} ({candidate.distribution} {candidate.version}, "
        f"{_CORE} {__version__}{where}) is {candidate.state.value}: {candidate.reason}"
    )
    if not candidate.distribution:  # a whole environment, which the reason names
        text = candidate.reason
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


def missing_packages(info: ExecutorInfo) -> tuple[str, ...]:
    """Return which of the packages that an executor needs are not installed where it runs."""
    if info.environment:
        return info.missing
    return tuple(name for name in info.needs if not is_importable(name))


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
        """
        if info.name in self._infos:
            raise PluginConflictError(f"executor name {info.name!r} is already registered")
        self._infos[info.name] = info
        if cls is not None:
            self._classes[info.name] = cls
            self._from_code.add(info.name)

    def places(self, info: ExecutorInfo) -> tuple[str, ...]:
        """Return where an executor can run; a class that came from code only exists here."""
        return ("inline",) if info.name in self._from_code else info.places

    def load_class(self, info: ExecutorInfo) -> type[Executor]:
        """Import the executor's class.

        Raises:
            PluginLoadError: It cannot be imported, is no ``Executor`` or lives in another
                environment.
        """
        cls = self._classes.get(info.name)
        if cls is None and info.environment:
            raise PluginLoadError(
                f"executor {info.name!r} lives in environment {info.environment} and cannot be "
                "imported here; run it in the place 'process'"
            )
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
    missing = [name for info in declared for name in missing_packages(info)]
    install = next((info.install for info in declared if info.install and missing), "")
    return ExecutorUnavailableError(
        f"task type {task_type!r}: {told}", needs=missing, install=install
    )
