"""``flowmesh kit``."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flowmesh_core.cli.options import assignments_option, plugin_files_option

if TYPE_CHECKING:  # loaded when the command runs; pytest is an extra
    from flowmesh_core.config import Settings
    from flowmesh_core.testing.report import Check, Report

__all__ = ["command"]


_document = click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)


@click.command("kit")
@click.argument("name")
@click.option(
    "--spec",
    "file",
    metavar="FILE",
    type=_document,
    help="Run this document, or spec, instead of the declared example; - is standard input.",
)
@assignments_option
@click.option(
    "--long", "long_file", metavar="FILE", type=_document, help="One for seconds, to be cancelled."
)
@click.option(
    "--refused",
    "refused_files",
    metavar="FILE",
    type=_document,
    multiple=True,
    help="One that it must refuse; may be given again.",
)
@plugin_files_option
@click.option("-k", "expression", default="", metavar="EXPR", help="Only checks that match.")
@click.option(
    "--limit",
    "limit_s",
    type=click.FloatRange(min=0, min_open=True),
    default=300.0,
    show_default=True,
    metavar="S",
    help="Longest that one task may take.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    name: str,
    file: Path | None,
    assignments: tuple[str, ...],
    long_file: Path | None,
    refused_files: tuple[Path, ...],
    plugin_files: tuple[Path, ...],
    expression: str,
    limit_s: float,
    as_json: bool,
) -> None:
    """Examine the installed executor NAME: does it keep what executors promise?"""
    from flowmesh_core.config import load_settings
    from flowmesh_core.importing import is_importable

    if not is_importable("pytest"):
        raise click.UsageError("the kit needs pytest; run: pip install 'flowmesh-core[testing]'")
    if assignments and file is None:
        raise click.UsageError("--set changes a document; name it with --spec")
    from flowmesh_core.testing.report import examine, find_executor

    settings, out = load_settings(), sys.stdout  # pytest puts another in its place
    report = find_executor(name, settings, plugin_files)
    _check_settings(name, settings, plugin_files)
    specs: dict[str, Any] = {
        "spec": _read_spec(file, assignments) if file else None,
        "long_spec": _read_spec(long_file) if long_file else None,
        "refused": [_read_spec(path) for path in refused_files],
    }
    if not as_json:
        click.echo(_describe(report))
    report = examine(
        report,
        settings,
        **specs,
        files=plugin_files,
        expression=expression,
        limit_s=limit_s,
        listen=None if as_json else lambda check: click.echo(_describe_check(check), file=out),
    )
    click.echo(json.dumps(report.to_dict(), indent=2) if as_json else _sum_up(report))
    raise SystemExit(0 if report.ok else 1)


def _check_settings(name: str, settings: Settings, plugin_files: tuple[Path, ...]) -> None:
    """Read an executor's settings once, since every check would stumble over the same variable.

    Raises:
        ConfigError: A variable cannot be read, or a path that nobody gave lies in the home, of
            which the kit makes another one.
    """
    from flowmesh_core.config import load_plugin_settings, plugin_variables
    from flowmesh_core.errors import ConfigError, PluginError
    from flowmesh_core.importing import import_target
    from flowmesh_core.plugins import load_plugins

    declared = load_plugins(settings, files=plugin_files).executors
    info = next(info for info in declared if info.name == name)
    if not info.settings or info.environment:
        return
    try:
        model = import_target(info.settings)
    except PluginError:  # a check says it
        return
    found = load_plugin_settings(model, plugin=name)
    variables = dict(zip(model.model_fields, plugin_variables(model, plugin=name), strict=True))
    for field in (field for field in variables if field not in found.model_fields_set):
        path = getattr(found, field)
        if isinstance(path, Path) and path.expanduser().is_relative_to(Path.home()):
            raise ConfigError(
                f"{variables[field]} must name a folder or file for the kit: it is not set, and "
                f"executor {name!r} would use {path}, where the kit lets no task write"
            )


def _read_spec(file: Path, assignments: tuple[str, ...] = ()) -> Any:
    """Return the ``spec`` of a document, or the document that is one."""
    from flowmesh_core.cli.documents import read_document
    from flowmesh_core.errors import ContractError

    document = read_document(Path("/dev/stdin") if str(file) == "-" else file, assignments)
    spec = document.get("spec", document) if isinstance(document, dict) else document
    if not isinstance(spec, dict):
        raise ContractError(f"spec must be an object, got {type(spec).__name__}", where=str(file))
    return spec


def _describe(report: Report) -> str:
    return (
        f"{report.executor} of {report.distribution} {report.version}: executor API "
        f"{report.api_version} x kit {report.kit_version}, flowmesh-core {report.core_version}"
    )


def _describe_check(check: Check) -> str:
    reason = (check.reason.splitlines() or [""])[0]
    told = f"\n           {reason}" if reason else ""
    return f"  {check.outcome:7}  {check.name} [{check.clause}]{told}"


def _sum_up(report: Report) -> str:
    counts = Counter(check.outcome for check in report.checks)
    told = ", ".join(f"{counts[outcome]} {outcome}" for outcome in sorted(counts))
    return told + (f"; not checked: {', '.join(report.unchecked)}" if report.unchecked else "")
