"""``flowmesh kit``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flowmesh_core.cli.options import assignments_option, plugin_files_option

if TYPE_CHECKING:  # pytest is an extra
    from flowmesh_core.testing.report import Report

__all__ = ["command"]


@click.command("kit")
@click.argument("name")
@click.option(
    "--spec",
    "file",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
    help="Run this document, or spec, instead of the declared example; - is standard input.",
)
@assignments_option
@plugin_files_option
@click.option("-k", "expression", default="", metavar="EXPR", help="Only checks that match.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    name: str,
    file: Path | None,
    assignments: tuple[str, ...],
    plugin_files: tuple[Path, ...],
    expression: str,
    as_json: bool,
) -> None:
    """Examine the installed executor NAME: does it keep what executors promise?"""
    from flowmesh_core.config import load_settings
    from flowmesh_core.importing import is_importable

    if not is_importable("pytest"):
        raise click.UsageError("the kit needs pytest; run: pip install 'flowmesh-core[testing]'")
    if assignments and file is None:
        raise click.UsageError("--set changes a document; name it with --spec")
    from flowmesh_core.testing.report import examine

    spec = _read_spec(file, assignments) if file else None
    report = examine(name, load_settings(), spec=spec, files=plugin_files, expression=expression)
    click.echo(json.dumps(report.to_dict(), indent=2) if as_json else _describe(report))
    raise SystemExit(0 if report.ok else 1)


def _read_spec(file: Path, assignments: tuple[str, ...]) -> Any:
    """Return the ``spec`` of a document, or the document that is one."""
    from flowmesh_core.cli.documents import read_document
    from flowmesh_core.errors import ContractError

    document = read_document(Path("/dev/stdin") if str(file) == "-" else file, assignments)
    spec = document.get("spec", document) if isinstance(document, dict) else document
    if not isinstance(spec, dict):
        raise ContractError(f"spec must be an object, got {type(spec).__name__}", where=str(file))
    return spec


def _describe(report: Report) -> str:
    lines = [
        f"{report.executor} of {report.distribution} {report.version}: executor API "
        f"{report.api_version} x kit {report.kit_version}, flowmesh-core {report.core_version}"
    ]
    for check in report.checks:
        reason = (check.reason.splitlines() or [""])[0]
        told = f"\n           {reason}" if reason else ""
        lines.append(f"  {check.outcome:7}  {check.name} [{check.clause}]{told}")
    counts = Counter(check.outcome for check in report.checks)
    lines.append(", ".join(f"{counts[outcome]} {outcome}" for outcome in sorted(counts)))
    return "\n".join(lines)
