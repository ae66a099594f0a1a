"""Where plugins come from: entry points, single files, environments; nothing is imported yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import attrs

from flowmesh_core import hookspecs
from flowmesh_core.config import Settings
from flowmesh_core.errors import PluginError
from flowmesh_core.executor import ExecutorInfo
from flowmesh_core.importing import import_plugin_file, plugin_module_name
from flowmesh_core.places.environments import Environment, read_offer
from flowmesh_core.plugin_reports import PluginReport, PluginState

__all__ = [
    "Candidate",
    "find_entry_points",
    "from_entry_point",
    "from_environment",
    "from_file",
]

_HOOKS = frozenset(name for name in vars(hookspecs) if name.startswith("flowmesh_"))


@attrs.define
class Candidate:
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
    traceback: str = ""

    @property
    def owner(self) -> str:
        """Who brings it, as messages say it."""
        where = f" in environment {self.environment}" if self.environment else ""
        return self.distribution + where

    def belongs_to(self, other: Candidate) -> bool:
        """Whether they are one plugin, installed beside the worker and in an environment."""
        places = bool(self.environment) + bool(other.environment)
        return self is other or (places == 1 and self.distribution == other.distribution)

    def refuse(self, state: PluginState, reason: str) -> None:
        """Leave it out, with all that it declares."""
        self.state, self.reason, self.executors = state, reason, ()

    def report(self) -> PluginReport:
        """Return what became of it."""
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
            entry_point=self.module_name,
            traceback=self.traceback,
        )


def find_entry_points(group: str) -> list[EntryPoint]:
    """Return the entry points of a group, by name and distribution; imports none."""
    return sorted(entry_points(group=group), key=lambda point: (point.name, _distribution(point)))


def _distribution(point: EntryPoint) -> str:
    return str(point.dist.name) if point.dist else "unknown"


def from_entry_point(point: EntryPoint) -> Candidate:
    """Return what an installed distribution names."""
    version = point.dist.version if point.dist else "0"
    return Candidate(point.name, _distribution(point), version, point.module, point.load)


def from_file(path: Path) -> Candidate:
    """Return a single-file plugin."""
    # The module gets a name of its own, so that `target=f"{__name__}:Class"` can be imported.
    name = plugin_module_name(path)
    return Candidate(path.stem, str(path), "0", name, lambda: import_plugin_file(path))


def from_environment(environment: Environment, settings: Settings) -> list[Candidate]:
    """Return what an environment offers, or the one row that says why it is left out."""
    try:
        offer = read_offer(environment, settings)
        return [_from_row(row, environment.name) for row in offer.plugins]
    except PluginError as exc:
        candidate = Candidate(environment.name, "", "", "", _never, environment=environment.name)
        remedy = f"repair it, or run: flowmesh env remove {environment.name}"
        candidate.refuse(PluginState.BROKEN, f"{exc}; {remedy}")
        return [candidate]


def _from_row(row: Mapping[str, Any], environment: str) -> Candidate:
    """Build a candidate from ``PluginReport.to_dict``; hooks are not called across environments."""
    try:
        return Candidate(
            name=row["name"],
            distribution=row["distribution"],
            version=row["version"],
            module_name=row.get("entry_point", ""),
            load=_never,
            state=PluginState(row["state"]),
            reason=row["reason"],
            import_s=row["import_s"],
            executors=tuple(_settle(info, environment) for info in row["executors"]),
            environment=environment,
            traceback=row.get("traceback", ""),
        )
    except (KeyError, TypeError, ValueError, PluginError) as exc:
        raise PluginError(f"environment {environment}: cannot read its plugins: {exc!r}") from exc


def _settle(data: Mapping[str, Any], environment: str) -> ExecutorInfo:
    info = ExecutorInfo.from_dict({**data, "environment": environment})
    # Another Python's packages cannot be imported here, whatever the author prefers.
    places = [place for place in info.places if place != "inline"] or ["process"]
    return attrs.evolve(info, places=places)


def _never() -> Any:
    raise AssertionError("a plugin of another environment is not loaded here")
