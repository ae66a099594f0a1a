"""``flowmesh plugins list`` and ``show``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:  # loaded when the command runs
    from flowmesh_core.plugins import PluginReport

__all__ = ["command", "print_table"]


@click.group("plugins")
def command() -> None:
    """Show which plugins and executors are installed."""


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_plugins(as_json: bool) -> None:
    """List every plugin with its state and what it serves."""
    reports = _load()
    if as_json:
        click.echo(json.dumps([report.to_dict() for report in reports], indent=2))
        return
    rows = [("PLUGIN", "DISTRIBUTION", "VERSION", "ENVIRONMENT", "STATE", "SERVES")]
    print_table([*rows, *map(_row, reports)])


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of equal length, the first of which holds the headings, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())


@command.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(name: str, as_json: bool) -> None:
    """Show all that the plugin NAME declares."""
    from flowmesh_core.errors import PluginError

    reports = _load()
    found = [report for report in reports if report.name == name]
    if not found:
        known = ", ".join(sorted(report.name for report in reports))
        raise PluginError(f"plugin {name!r} is not installed; installed are {known}")
    for report in found:
        data = report.to_dict()
        click.echo(json.dumps(data, indent=2) if as_json else "\n".join(_lines(data)))


def _load() -> tuple[PluginReport, ...]:
    # Listing must show what is broken, so it never stops at it and logs nothing beside the list.
    import logging

    import attrs

    from flowmesh_core.config import load_settings
    from flowmesh_core.plugins import load_plugins

    logging.getLogger("flowmesh_core.plugins").setLevel(logging.CRITICAL)
    settings = attrs.evolve(load_settings(), strict_plugins=False)
    return load_plugins(settings).reports


def _row(report: PluginReport) -> Sequence[str]:
    serves = "; ".join(
        f"{info.name} ({', '.join(sorted(info.task_types))}){_lack(info)}"
        for info in report.executors
    )
    where, state = report.environment, report.state.value
    return (report.name, report.distribution, report.version, where, state, serves or report.reason)


def _lack(info: Any) -> str:
    from flowmesh_core.registry import missing_packages

    missing = missing_packages(info)
    return f" needs {', '.join(missing)}: {info.install}" if missing else ""


def _lines(data: dict[str, Any]) -> list[str]:
    executors = data.pop("executors")
    lines = [f"{key}: {_cell(value)}" for key, value in data.items() if value not in ("", [])]
    for info in executors:
        lines.append("executor:")
        lines += [
            f"  {key}: {_cell(value)}" for key, value in info.items() if value not in ("", [])
        ]
    return lines


def _cell(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
