"""``flowmesh plugins list``, ``show``, ``schema`` and ``doctor``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:  # loaded when the command runs
    from flowmesh_core.doctor import Diagnosis
    from flowmesh_core.executor import ExecutorInfo
    from flowmesh_core.plugins import PluginReport, Plugins

__all__ = ["command", "print_table"]

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group("plugins")
def command() -> None:
    """Show which plugins and executors are installed."""


@command.command("list")
@_json_option
def list_plugins(as_json: bool) -> None:
    """List every plugin with its state and what it serves."""
    reports = _load().reports
    if as_json:
        click.echo(json.dumps([report.to_dict() for report in reports], indent=2))
        return
    head = ("PLUGIN", "DISTRIBUTION", "VERSION", "ENVIRONMENT", "STATE", "IMPORT", "SERVES")
    print_table([head, *map(_row, reports)])
    for report in reports:
        if not report.ok:
            click.echo(f"\n{report.describe()}")
        if report.traceback:
            click.echo(_indented(report.traceback))


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of equal length, the first of which holds the headings, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())


@command.command("show")
@click.argument("name")
@_json_option
def show(name: str, as_json: bool) -> None:
    """Show all that the plugin, or executor, NAME declares: fields, settings, example."""
    plugins = _load()
    for report in _find(plugins, name):
        executors = [
            {**info.to_dict(), **_described(info, plugins)}
            for info in report.executors
            if name in (report.name, info.name)
        ]
        data = {**report.to_dict(), "executors": executors}
        click.echo(json.dumps(data, indent=2) if as_json else "\n".join(_lines(data)))


@command.command("schema")
@click.argument("name")
@click.option("--result", "field", flag_value="result", help="Of what it answers.")
@click.option("--settings", "field", flag_value="settings", help="Of its variables.")
@click.option("--json", is_flag=True, expose_value=False, help="Print JSON, as always.")
def schema(name: str, field: str | None) -> None:
    """Print the JSON schema of the spec that the executor NAME takes."""
    from flowmesh_core.errors import PluginError

    plugins = _load()
    infos = [info for report in _find(plugins, name) for info in report.executors]
    chosen = [info for info in infos if info.name == name] or infos
    if len(chosen) != 1:
        names = ", ".join(info.name for info in chosen) or "none"
        raise PluginError(f"plugin {name!r} has several executors or none; name one of: {names}")
    click.echo(json.dumps(_schema(chosen[0], field or "spec", plugins), indent=2))


@command.command("doctor")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "--limit",
    "limit_s",
    type=click.FloatRange(min=0, min_open=True),
    default=3.0,
    show_default=True,
    metavar="SECONDS",
    help="How long a plugin may take to load.",
)
@click.option(
    "--engine-limit",
    "engine_limit_s",
    type=click.FloatRange(min=0, min_open=True),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="How long an engine may take to be imported.",
)
@_json_option
def doctor(names: tuple[str, ...], limit_s: float, engine_limit_s: float, as_json: bool) -> None:
    """Try to load every plugin, or those named, and to import their engines; each in a process.

    Exit code 1 says that something has to be repaired.
    """
    from flowmesh_core.config import load_settings
    from flowmesh_core.doctor import examine
    from flowmesh_core.errors import PluginError

    settings = load_settings()
    diagnoses = examine(settings, names, limit_s=limit_s, engine_limit_s=engine_limit_s)
    unknown = [name for name in names if not any(each.answers_to([name]) for each in diagnoses)]
    if unknown:
        raise PluginError(
            f"plugin {unknown[0]!r} is not installed; flowmesh plugins list shows what is"
        )
    if as_json:
        click.echo(json.dumps([each.to_dict() for each in diagnoses], indent=2))
    else:
        click.echo("\n".join(line for each in diagnoses for line in _diagnosis_lines(each)))
    raise SystemExit(0 if all(each.ok for each in diagnoses) else 1)


def _load() -> Plugins:
    # Listing must show what is broken, so it never stops at it and logs nothing beside the list.
    import logging

    import attrs

    from flowmesh_core.config import load_settings
    from flowmesh_core.plugins import load_plugins

    logging.getLogger("flowmesh_core.plugins").setLevel(logging.CRITICAL)
    settings = attrs.evolve(load_settings(), strict_plugins=False)
    if settings.trace_hooks:
        logging.basicConfig(format="%(message)s")
    return load_plugins(settings)


def _find(plugins: Plugins, name: str) -> list[PluginReport]:
    from flowmesh_core.errors import PluginError

    reports = plugins.reports
    found = [report for report in reports if report.name == name]
    found = found or [r for r in reports if name in [info.name for info in r.executors]]
    if not found:
        known = ", ".join(sorted({report.name for report in reports}))
        raise PluginError(f"plugin {name!r} is not installed; installed are {known}")
    return found


# Lines.


def _row(report: PluginReport) -> Sequence[str]:
    serves = "; ".join(
        f"{info.name} ({', '.join(sorted(info.task_types))}){_lack(info)}"
        for info in report.executors
    )
    where, state, took = report.environment, report.state.value, f"{report.import_s * 1000:.0f} ms"
    cells = (report.name, report.distribution, report.version, where, state, took)
    return (*cells, serves or report.reason)


def _lack(info: ExecutorInfo) -> str:
    from flowmesh_core.registry import missing_packages

    missing = missing_packages(info)
    return f" needs {', '.join(missing)}: {info.install}" if missing else ""


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines())


def _lines(data: Mapping[str, Any]) -> Iterator[str]:
    for key, value in data.items():
        if key not in ("executors", "traceback") and value not in ("", []):
            yield f"{key}: {_cell(value)}"
    if data["traceback"]:
        yield f"traceback:\n{_indented(data['traceback'])}"
    for info in data["executors"]:
        yield "executor:"
        yield from _executor_lines(info)


def _executor_lines(info: Mapping[str, Any]) -> Iterator[str]:
    for key, value in info.items():
        if key not in ("schemas", "example_spec") and value not in ("", [], None):
            yield f"  {key}: {_cell(value)}"
    for field, found in info["schemas"].items():
        yield f"  fields of {field}:"
        required = found.get("required", [])
        for name, shape in found.get("properties", {}).items():
            yield f"    {_field(name, shape, required=name in required)}"
    if info["example_spec"]:
        yield f"  example of a spec: {json.dumps(info['example_spec'], ensure_ascii=False)}"


def _field(name: str, shape: Mapping[str, Any], *, required: bool) -> str:
    default = shape.get("default")
    told = " (required)" if required else f" = {json.dumps(default)}" if default is not None else ""
    variable = f" from {shape['variable']}" if "variable" in shape else ""
    return f"{name}: {_type(shape)}{told}{variable}"


def _type(shape: Mapping[str, Any]) -> str:
    """Return a JSON schema's type as one would write it in Python."""
    if "$ref" in shape:
        return str(shape["$ref"]).rpartition("/")[2]
    if "anyOf" in shape:
        return " | ".join(map(_type, shape["anyOf"]))
    if "enum" in shape or "const" in shape:
        return " | ".join(map(json.dumps, shape.get("enum", [shape.get("const")])))
    kind = str(shape.get("type", "any"))
    return f"array of {_type(shape['items'])}" if shape.get("items") else kind


def _cell(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _diagnosis_lines(diagnosis: Diagnosis) -> Iterator[str]:
    row = diagnosis.row
    where = f", environment {row['environment']}" if row["environment"] else ""
    yield f"{row['name']} ({row['distribution']} {row['version']}{where}): {row['state']}"
    for finding in diagnosis.findings:
        who = f"{finding.executor}: " if finding.executor else ""
        yield f"  {finding.verdict.value:7}  {who}{finding.check}: {finding.told}"
        if finding.traceback:
            yield _indented(finding.traceback)


# What a declaration names.


def _described(info: ExecutorInfo, plugins: Plugins) -> dict[str, Any]:
    """Return the schemas of an executor and its example, without those that cannot be had."""
    from flowmesh_core.errors import FlowmeshError

    schemas, problems = {}, []
    for field in ("spec", "settings", "result"):
        if getattr(info, field):
            try:
                schemas[field] = _schema(info, field, plugins)
            except FlowmeshError as exc:
                problems.append(f"{field}: {exc}")
    return {"schemas": schemas, "example_spec": _example(info), "problems": problems}


def _schema(info: ExecutorInfo, field: str, plugins: Plugins) -> Any:
    from flowmesh_core.doctor_child import build_schema
    from flowmesh_core.errors import PluginError
    from flowmesh_core.places.trial import try_call

    if not info.environment or not getattr(info, field):
        return build_schema(info, field)
    trial = try_call(
        "flowmesh_core.doctor_child:build_schema_of",
        {"data": info.to_dict(), "field": field},
        limit_s=30.0,
        python=plugins.pythons[info.environment],
    )
    if trial.problem:
        raise PluginError(f"environment {info.environment}: {trial.problem}")
    return trial.answer


def _example(info: ExecutorInfo) -> Any:
    """Return the example of a spec; None for one that needs a folder, or lives elsewhere."""
    from flowmesh_core.errors import FlowmeshError
    from flowmesh_core.importing import import_target

    if not info.example or info.environment:
        return None
    try:
        found = import_target(info.example)
    except FlowmeshError:
        return None
    return found if isinstance(found, dict) else None
