"""Examines what is installed: each plugin is loaded and each engine imported in a child process.

The process that examines imports no plugin, so that none can hang or end it. A finding is *failed*
when the installation has to be repaired, and a *warning* when it is the machine or advice.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from flowmesh_core.config import Settings, child_environment, load_settings
from flowmesh_core.distributions import installed_version, unmet_requirements
from flowmesh_core.doctor_child import TARGETS, rows_of
from flowmesh_core.errors import PluginError
from flowmesh_core.executor import API_VERSION, Capability, ExecutorInfo
from flowmesh_core.places.environments import Environment, list_environments
from flowmesh_core.places.trial import Trial, try_call
from flowmesh_core.plugins import plugin_names
from flowmesh_core.registry import missing_packages
from flowmesh_core.telemetry.probes import GpuReader

__all__ = ["Diagnosis", "Finding", "Verdict", "examine"]

_MODELS_S = 60.0
_ENVIRONMENT_S = 900.0


class Verdict(str, enum.Enum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@attrs.frozen(kw_only=True)
class Finding:
    """What one check found.

    Attributes:
        check: What was looked at: ``load``, ``api version``, ``requirements``, ``declaration``,
            ``name`` (who else claims it), ``needs``, ``engine``, ``gpu``.
        verdict: How it ended.
        told: One line.
        executor: Whose; empty when it is about the whole plugin.
        traceback: Where it broke or hangs, if it did.
    """

    check: str
    verdict: Verdict
    told: str
    executor: str = ""
    traceback: str = ""


@attrs.frozen(kw_only=True)
class Diagnosis:
    """A plugin and what was found; ``row`` is that of ``flowmesh plugins list --json``."""

    row: Mapping[str, Any]
    findings: Sequence[Finding]

    @property
    def ok(self) -> bool:
        """Whether nothing has to be repaired."""
        return all(finding.verdict is not Verdict.FAILED for finding in self.findings)

    def answers_to(self, names: Sequence[str]) -> bool:
        """Whether it, or an executor of it, is among names; no names mean all."""
        own = {self.row["name"], *(info["name"] for info in self.row["executors"])}
        return not names or bool(own & set(names))

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON data."""
        findings = [{**attrs.asdict(each), "verdict": each.verdict.value} for each in self.findings]
        return {**self.row, "ok": self.ok, "findings": findings}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, environment: str) -> Diagnosis:
        """Build one from ``to_dict`` of another environment's core."""
        found = [
            Finding(**{**each, "verdict": Verdict(each["verdict"])}) for each in data["findings"]
        ]
        row = {key: data[key] for key in data.keys() - {"ok", "findings"}}
        return cls(row={**row, "environment": environment}, findings=found)


def examine(
    settings: Settings,
    names: Sequence[str] = (),
    *,
    limit_s: float = 3.0,
    engine_limit_s: float = 120.0,
) -> list[Diagnosis]:
    """Examine plugins beside this process; those of other environments examine themselves.

    Args:
        settings: Block lists hold; ``visible_devices`` are the GPUs that count.
        names: Which plugins; all by default. Conflicts are looked for among all.
        limit_s: How long a plugin may take to load.
        engine_limit_s: How long an engine may take to be imported.
    """
    limits = {"limit_s": limit_s, "engine_limit_s": engine_limit_s}
    there = [
        one
        for environment in list_environments(settings.envs_dir)
        for one in _examine_there(environment, settings, names, limits)
    ]
    served = {info["name"] for each in there if each.ok for info in each.row["executors"]}
    rows = [row for name in plugin_names() for row in _load_beside(name, settings, limit_s)]
    gpus = len(GpuReader(visible_devices=settings.visible_devices).list_gpus())
    examiner = _Examiner(_claims(rows), served, gpus, settings.visible_devices, engine_limit_s)
    wanted = [row for row in rows if Diagnosis(row=row, findings=()).answers_to(names)]
    return [*(Diagnosis(row=row, findings=[*examiner.examine(row)]) for row in wanted), *there]


def _examine_there(
    environment: Environment, settings: Settings, names: Sequence[str], limits: Mapping[str, float]
) -> list[Diagnosis]:
    asked = {"names": names, **_lists(settings), "limits": limits}
    target, python = "flowmesh_core.doctor:examine_here", environment.python
    trial = try_call(target, asked, limit_s=_ENVIRONMENT_S, python=python)
    if trial.problem:
        finding = Finding(
            check="load", verdict=Verdict.FAILED, told=trial.problem, traceback=trial.output
        )
        unknown = dict.fromkeys(("distribution", "version", "entry_point"), "")
        row = {"name": environment.name, "environment": environment.name, "state": "broken"}
        return [Diagnosis(row={**row, **unknown, "executors": []}, findings=[finding])]
    found = [Diagnosis.from_dict(data, environment=environment.name) for data in trial.answer]
    return [each for each in found if each.row["distribution"] != "flowmesh-core"]


def _lists(settings: Settings) -> dict[str, Any]:
    return {"only": settings.only_plugins, "disabled": settings.disable_plugins}


def examine_here(
    names: Sequence[str], only: Sequence[str], disabled: Sequence[str], limits: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Examine what is installed beside this core; called in another environment's Python."""
    settings = load_settings(
        only_plugins=tuple(only), disable_plugins=tuple(disabled), envs_dir=None
    )
    return [each.to_dict() for each in examine(settings, names, **limits)]


def _load_beside(name: str, settings: Settings, limit_s: float) -> list[dict[str, Any]]:
    asked = {"name": name, **_lists(settings)}
    if name in settings.disable_plugins or name not in (settings.only_plugins or [name]):
        return rows_of(**asked)  # nothing is imported
    trial = try_call("flowmesh_core.doctor_child:load_rows", asked, limit_s=limit_s)
    if not trial.problem:
        return list(trial.answer)
    # It ended the process or never came back: what it declares stays unknown.
    state = "slow" if trial.hung else "broken"
    told = {"reason": trial.problem, "traceback": trial.output, "state": state}
    return [{**row, **told} for row in rows_of(name, (), (name,))]


def _claims(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return who declares each executor name."""
    claims: dict[str, list[str]] = {}
    for row in rows:
        for info in row["executors"]:
            claims.setdefault(info["name"], []).append(row["distribution"])
    return claims


@attrs.frozen
class _Examiner:
    """Examines one plugin after the other, against what holds for all.

    Attributes:
        claims: Who declares each executor name.
        served: Executors that another environment runs.
        gpus: How many the worker sees.
        visible_devices: ``CUDA_VISIBLE_DEVICES`` of the worker.
        engine_limit_s: How long an engine may take to be imported.
    """

    claims: Mapping[str, Sequence[str]]
    served: Collection[str]
    gpus: int
    visible_devices: str | None
    engine_limit_s: float

    def examine(self, row: Mapping[str, Any]) -> Iterator[Finding]:
        yield _examine_load(row)
        if row["state"] == "disabled":
            return
        yield _examine_requirements(row["distribution"])
        trials: dict[Any, Trial] = {}  # what several executors share is imported once
        for info in [ExecutorInfo.from_dict(data) for data in row["executors"]]:
            yield from self._examine_name(info)
            yield _finding(
                "api version", Verdict.OK, f"{info.api_version}, here {API_VERSION}", info
            )
            yield _examine_declaration(info)
            missing = missing_packages(info)
            yield self._examine_needs(info, missing)
            if not missing:
                yield from self._examine_engine(info, trials)

    def _examine_name(self, info: ExecutorInfo) -> Iterator[Finding]:
        owners = self.claims[info.name]
        if len(owners) > 1:
            told = f"executor name {info.name!r} is claimed by {' and '.join(sorted(owners))}"
            remedy = "disable one of them (FLOWMESH_DISABLE_PLUGINS)"
            yield _finding("name", Verdict.FAILED, f"{told}; {remedy}", info)

    def _examine_needs(self, info: ExecutorInfo, missing: Sequence[str]) -> Finding:
        if not missing:
            versions = (f"{need} {installed_version(need)}".strip() for need in info.needs)
            return _finding("needs", Verdict.OK, ", ".join(versions) or "nothing", info)
        told = f"lacks {', '.join(missing)}"
        if info.name in self.served:
            return _finding("needs", Verdict.SKIPPED, f"{told}; an environment serves it", info)
        install = f"; run: {info.install}" if info.install else ""
        return _finding("needs", Verdict.FAILED, told + install, info)

    def _examine_engine(self, info: ExecutorInfo, trials: dict[Any, Trial]) -> Iterator[Finding]:
        key = (info.target, info.needs, info.variables)
        if key not in trials:
            trials[key] = self._try_engine(info)
        trial = trials[key]
        if trial.problem:
            yield _failed("engine", trial, info)
            return
        told = f"{info.target} imported in {trial.answer['import_s']:.1f} s"
        yield _finding("engine", Verdict.OK, told, info)
        if Capability.GPU in info.capabilities:
            yield self._examine_gpus(info, trial.answer)

    def _try_engine(self, info: ExecutorInfo) -> Trial:
        environ = child_environment(plugin=info.name, variables=info.variables)
        del environ["CUDA_VISIBLE_DEVICES"]  # it may see what the worker sees, not what a task gets
        if self.visible_devices is not None:
            environ["CUDA_VISIBLE_DEVICES"] = self.visible_devices
        target, asked = "flowmesh_core.doctor_child:import_engine", {"data": info.to_dict()}
        return try_call(target, asked, limit_s=self.engine_limit_s, environ=environ)

    def _examine_gpus(self, info: ExecutorInfo, answer: Mapping[str, Any]) -> Finding:
        if not self.gpus:
            cpu = Capability.CPU in info.capabilities
            told = "none here; it runs on the CPU" if cpu else "none here, and it needs one"
            return _finding("gpu", Verdict.OK if cpu else Verdict.WARNING, told, info)
        seen = answer.get("torch_gpus", self.gpus)
        if not seen:
            told = f"torch {answer['torch']} sees none of {self.gpus}; install a build for them"
            return _finding("gpu", Verdict.FAILED, told, info)
        return _finding("gpu", Verdict.OK, f"sees {seen} of {self.gpus}", info)


def _finding(check: str, verdict: Verdict, told: str, info: ExecutorInfo) -> Finding:
    return Finding(check=check, verdict=verdict, told=told, executor=info.name)


def _examine_load(row: Mapping[str, Any]) -> Finding:
    if row["state"] == "disabled":
        return Finding(check="load", verdict=Verdict.SKIPPED, told=row["reason"])
    if row["state"] != "loaded":
        told, trace = row["reason"], row["traceback"]
        return Finding(check="load", verdict=Verdict.FAILED, told=told, traceback=trace)
    names = ", ".join(info["name"] for info in row["executors"]) or "no executor"
    told = f"{row['import_s'] * 1000:.0f} ms, declares {names}"
    if row["loaded"]:
        engines = ", ".join(row["loaded"])
        told += f"; it imports {engines}, which belongs into the executor's module"
        return Finding(check="load", verdict=Verdict.WARNING, told=told)
    return Finding(check="load", verdict=Verdict.OK, told=told)


def _examine_requirements(distribution: str) -> Finding:
    try:
        unmet = unmet_requirements(distribution)
    except PluginError as exc:
        return Finding(check="requirements", verdict=Verdict.SKIPPED, told=str(exc))
    if unmet:
        told = f"{'; '.join(unmet)}; run: pip install {distribution}"
        return Finding(check="requirements", verdict=Verdict.FAILED, told=told)
    return Finding(check="requirements", verdict=Verdict.OK, told="what is required is installed")


def _failed(check: str, trial: Trial, info: ExecutorInfo) -> Finding:
    finding = _finding(check, Verdict.FAILED, trial.problem, info)
    return attrs.evolve(finding, traceback=trial.output)


def _examine_declaration(info: ExecutorInfo) -> Finding:
    asked = {"data": info.to_dict()}
    trial = try_call("flowmesh_core.doctor_child:check_declaration", asked, limit_s=_MODELS_S)
    if trial.problem:
        return _failed("declaration", trial, info)
    if trial.answer:
        return _finding("declaration", Verdict.FAILED, "; ".join(trial.answer), info)
    named = ", ".join(field for field in TARGETS if getattr(info, field))
    return _finding(
        "declaration", Verdict.OK, f"{named} can be used" if named else "names no model", info
    )
