"""What became of a plugin at start: for the listing, the log and the registration."""

from __future__ import annotations

import enum
from typing import Any

import attrs

from flowmesh_core import __version__
from flowmesh_core.executor import ExecutorInfo

__all__ = ["PluginReport", "PluginState"]


class PluginState(str, enum.Enum):
    """What became of a plugin at start."""

    LOADED = "loaded"
    DISABLED = "disabled"
    MISSING = "missing"
    """A package that the plugin's module itself imports is not installed."""
    BROKEN = "broken"
    SLOW = "slow"
    """It did not come to an end within ``FLOWMESH_PLUGIN_TIMEOUT_S``."""
    CONFLICT = "conflict"


@attrs.frozen(kw_only=True)
class PluginReport:
    """One row of ``flowmesh plugins list``.

    Attributes:
        name: Of its entry point; of a single-file plugin, the file's.
        distribution: Who brings it; the file of a single-file plugin. Empty for an environment
            that cannot be used, which is a row of its own.
        version: Of the distribution.
        state: What became of it.
        reason: Why it is not loaded, in one line.
        import_s: Seconds that loading it took.
        executors: What it declares.
        hooks: What it implements.
        environment: The one that it lives in; empty for this process's own.
        entry_point: The module that its distribution names.
        traceback: Where it broke, or stood when its time was over; empty when that says nothing.
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
    entry_point: str = ""
    traceback: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing has to be repaired: it is loaded, or was left out on purpose."""
        return self.state in (PluginState.LOADED, PluginState.DISABLED)

    @property
    def hint(self) -> str:
        """What to do next; empty when nothing is wrong or the reason says it."""
        told = self.ok or self.state is PluginState.CONFLICT or not self.distribution
        return "" if told else f"run: flowmesh plugins doctor {self.name}"

    def describe(self) -> str:
        """Return what is wrong in one line, with all that tells this plugin from others."""
        if not self.distribution:  # a whole environment, which the reason names
            return self.reason
        where = f", environment {self.environment}" if self.environment else ""
        hint = f"; {self.hint}" if self.hint else ""
        return (
            f"plugin {self.name} ({self.distribution} {self.version}, entry point "
            f"{self.entry_point}, flowmesh-core {__version__}{where}) is {self.state.value}: "
            f"{self.reason}{hint}"
        )

    def to_wire(self) -> dict[str, str]:
        """Return what the registration says of it; its executors stand there on their own."""
        fields = ("name", "distribution", "version", "entry_point", "environment", "reason", "hint")
        return {"state": self.state.value, **{field: getattr(self, field) for field in fields}}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        row = attrs.asdict(self, recurse=False)
        row.update(state=self.state.value, hooks=list(self.hooks), hint=self.hint)
        row["executors"] = [info.to_dict() for info in self.executors]
        return row
