"""Plugins: found through entry points, loaded under a guard, reported one by one.

Nothing here imports an engine. A plugin that cannot be used, or does not come to an end, is
reported and left out; the process starts without it. Block lists act before import.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pluggy

from flowmesh_core import hookspecs
from flowmesh_core.config import Settings
from flowmesh_core.distributions import code_version, core_requirement, installed_version
from flowmesh_core.errors import (
    PluginConflictError,
    PluginError,
    PluginLoadError,
)
from flowmesh_core.executor import API_VERSION, ExecutorInfo
from flowmesh_core.hook_trace import trace_hooks
from flowmesh_core.importing import import_target
from flowmesh_core.places.environments import list_environments
from flowmesh_core.plugin_candidates import (
    Candidate,
    find_entry_points,
    from_entry_point,
    from_environment,
    from_file,
)
from flowmesh_core.plugin_reports import PluginReport, PluginState
from flowmesh_core.registry import ExecutorRegistry, missing_packages
from flowmesh_core.time_limit import (
    EscapeError,
    StillRunningError,
    call_within,
    describe_exception,
)

__all__ = [
    "PluginReport",
    "PluginState",
    "Plugins",
    "code_version",
    "core_requirement",
    "extensions",
    "installed_version",
    "load_driver",
    "load_plugins",
]

_log = logging.getLogger(__name__)
_CORE = "flowmesh-core"
_SLOW_S = 1.0


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
        settings: ``only_plugins``, ``disable_plugins``, ``strict_plugins``, ``trace_hooks`` and
            ``plugin_timeout_s`` are read.
        files: Single-file plugins, loaded after the installed ones.

    Raises:
        PluginError: With ``strict_plugins``, or for one of ``files``: the first that is refused.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    installed = [from_entry_point(point) for point in find_entry_points("flowmesh")]
    files = [Path(path) for path in files]
    asked_for = [from_file(path) for path in files]
    candidates = installed + asked_for
    for candidate in candidates:
        _apply_lists(candidate, settings)
    environments = list_environments(settings.envs_dir)
    for environment in environments:
        candidates += from_environment(environment, settings)
    _refuse_duplicates(candidates)
    for candidate in candidates:
        if candidate.state is PluginState.LOADED and not candidate.environment:
            _load(candidate, manager, settings)
    _share_out_executors(candidates)
    _refuse_claimed_names(candidates, manager)
    reports = [candidate.report() for candidate in candidates]
    for candidate, report in zip(candidates, reports, strict=True):
        must = settings.strict_plugins or candidate in asked_for
        _complain(report, raise_now=must)
    return Plugins(
        manager,
        reports,
        files=files,
        pythons={environment.name: environment.python for environment in environments},
    )


def _apply_lists(candidate: Candidate, settings: Settings) -> None:
    if candidate.name in settings.disable_plugins:
        candidate.refuse(PluginState.DISABLED, "named in FLOWMESH_DISABLE_PLUGINS")
    elif settings.only_plugins and candidate.name not in settings.only_plugins:
        candidate.refuse(PluginState.DISABLED, "not named in FLOWMESH_ONLY_PLUGINS")


def _refuse_duplicates(candidates: Sequence[Candidate]) -> None:
    allowed = [c for c in candidates if c.state is PluginState.LOADED]
    for one in allowed:
        others = [c for c in allowed if c.name == one.name and not one.belongs_to(c)]
        if others and one.distribution != _CORE:
            owners = ", ".join(sorted({one.owner, *(c.owner for c in others)}))
            reason = f"plugin name {one.name!r} is claimed by {owners}; uninstall all but one"
            one.refuse(PluginState.CONFLICT, reason)


def _load(candidate: Candidate, manager: pluggy.PluginManager, settings: Settings) -> None:
    started = time.perf_counter()
    try:
        candidate.module = call_within(candidate.load, settings.plugin_timeout_s)
        _register(candidate, manager, settings)
    except StillRunningError as exc:
        limit = f"did not load within {settings.plugin_timeout_s:g} s (FLOWMESH_PLUGIN_TIMEOUT_S)"
        candidate.refuse(PluginState.SLOW, f"{limit}, {exc}")
        candidate.traceback = exc.stack
    except ModuleNotFoundError as exc:
        _refuse_missing(candidate, exc)
    except (Exception, SystemExit) as exc:  # noqa: BLE001 - one bad plugin must not stop the process
        _log.debug("plugin %s failed to load", candidate.name, exc_info=True)
        cause = exc.cause if isinstance(exc, EscapeError) else exc
        ours = isinstance(cause, PluginError)
        told = str(cause) if ours else f"{type(cause).__name__}: {cause}"
        candidate.refuse(PluginState.BROKEN, told)
        candidate.traceback = "" if ours else describe_exception(cause)
    candidate.import_s = time.perf_counter() - started


def _refuse_missing(candidate: Candidate, exc: ModuleNotFoundError) -> None:
    missing = exc.name or str(exc)
    if f"{candidate.module_name}.".startswith(f"{missing}."):  # its own module is not there
        candidate.refuse(PluginState.BROKEN, f"ModuleNotFoundError: {exc}")
    else:
        reason = f"needs the package {missing}, not installed here"
        candidate.refuse(PluginState.MISSING, reason)
    candidate.traceback = describe_exception(exc)


def _register(candidate: Candidate, manager: pluggy.PluginManager, settings: Settings) -> None:
    try:
        manager.register(candidate.module, name=candidate.name)
        manager.check_pending()
        if settings.trace_hooks:
            trace_hooks(manager, candidate.module)
        declare = functools.partial(_declared_by, candidate, manager)
        candidate.executors = call_within(declare, settings.plugin_timeout_s)
    except BaseException:
        # A registration that is refused half-way leaves the hooks before the bad one behind.
        if manager.get_plugin(candidate.name) is not None:
            manager.unregister(name=candidate.name)
        raise


def _declared_by(candidate: Candidate, manager: pluggy.PluginManager) -> tuple[ExecutorInfo, ...]:
    found: list[ExecutorInfo] = []
    for impl in manager.hook.flowmesh_register_executors.get_hookimpls():
        if impl.plugin_name == candidate.name:
            found += _check_declared(impl.function(), candidate)
    return tuple(found)


def _check_declared(declared: Any, candidate: Candidate) -> Iterable[ExecutorInfo]:
    whole = isinstance(declared, Iterable) and not isinstance(declared, (str, Mapping))
    for info in declared if whole else [declared]:
        if not whole or not isinstance(info, ExecutorInfo):
            raise PluginLoadError(
                "flowmesh_register_executors must return a list of ExecutorInfo, got "
                f"{type(info).__name__}"
            )
        _check_api(info, candidate)
        yield info


def _check_api(info: ExecutorInfo, candidate: Candidate) -> None:
    if info.api_version.split(".")[0] != API_VERSION.split(".")[0]:
        raise PluginLoadError(
            f"{candidate.distribution} {candidate.version} wrote executor {info.name!r} for "
            f"executor API {info.api_version}, this flowmesh-core has {API_VERSION}; "
            "install versions that match"
        )


def _share_out_executors(candidates: Sequence[Candidate]) -> None:
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


def _refuse_claimed_names(candidates: Sequence[Candidate], manager: pluggy.PluginManager) -> None:
    owners: dict[str, list[Candidate]] = {}
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


def _complain(report: PluginReport, *, raise_now: bool) -> None:
    if report.state is PluginState.LOADED and report.import_s > _SLOW_S and not report.environment:
        _log.warning(
            "plugin %s (%s %s) took %.1f s to load; its module should import no engine; run: "
            "flowmesh plugins doctor %s",
            *(report.name, report.distribution, report.version, report.import_s, report.name),
        )
    if report.ok:
        return
    if raise_now:
        conflict = report.state is PluginState.CONFLICT
        raise (PluginConflictError if conflict else PluginLoadError)(report.describe())
    _log.error("%s", report.describe())


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

    names = sorted({point.name for point in find_entry_points(group)})
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

    This runs the code of all who registered there, each time: call it where they are listed, and
    ``load_driver`` where a name picks one.

    Returns:
        What could be loaded, by name, and a report for each entry point: one that is broken, or
        whose name two distributions claim, is left out and never raises.
    """
    loaded: dict[str, Any] = {}
    candidates = [from_entry_point(point) for point in find_entry_points(group)]
    _refuse_duplicates(candidates)
    for candidate in candidates:
        if candidate.state is not PluginState.LOADED:
            continue
        try:
            loaded[candidate.name] = candidate.load()
        except (Exception, SystemExit) as exc:  # noqa: BLE001 - as in _load
            candidate.refuse(PluginState.BROKEN, f"{type(exc).__name__}: {exc}")
    return loaded, [candidate.report() for candidate in candidates]


def plugin_names() -> tuple[str, ...]:
    """Return the name of every installed plugin, sorted, without importing any."""
    return tuple(sorted({point.name for point in find_entry_points("flowmesh")}))
