"""``flowmesh run``."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click

from flowmesh_core.cli.documents import read_document
from flowmesh_core.cli.options import (
    assignments_option,
    file_argument,
    leave_out,
    plugin_options,
)
from flowmesh_core.cli.process import leave, run_main

if TYPE_CHECKING:  # loaded when the command runs
    from flowmesh_core.local_run import LocalRun, StageReport

__all__ = ["command"]

_SHOWN_ITEMS = 5
_SHOWN_CHARS = 600


@click.command("run")
@file_argument
@assignments_option
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("results"),
    show_default=True,
    help="Where results are written.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@plugin_options
def command(
    file: Path,
    assignments: tuple[str, ...],
    out: Path,
    as_json: bool,
    plugin_files: tuple[Path, ...],
    without: tuple[str, ...],
) -> None:
    """Run the workflow in FILE on this machine, with no service."""
    from flowmesh_core.checking import check_workflow
    from flowmesh_core.cli.progress import Progress
    from flowmesh_core.config import load_settings
    from flowmesh_core.errors import ContractError
    from flowmesh_core.local_run import LocalRun, plan
    from flowmesh_core.plugins import load_plugins
    from flowmesh_core.telemetry.probes import GpuReader

    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(message)s")
    settings = load_settings(results_dir=out, transport="local", worker_id="local")
    settings = leave_out(attrs.evolve(settings, drain_timeout_s=0.0), without)
    plugins = load_plugins(settings, files=plugin_files)
    workflow = plan(read_document(file, assignments))
    gpus = GpuReader(visible_devices=settings.visible_devices).list_gpus()
    registry = plugins.build_registry(settings, gpu_count=len(gpus))
    problems = check_workflow(workflow, registry)
    if problems:
        raise ContractError(problems, where=str(file))
    progress = Progress(workflow, quiet=as_json)
    run = LocalRun(
        workflow, settings, plugins, on_event=progress.note, on_serving=_announce_services
    )
    with progress:
        reports, interrupted = run_main(_run(run))
    if as_json:
        click.echo(json.dumps([_as_json(report) for report in reports], indent=2))
    else:
        _print(reports)
    failed = not all(report.ok for report in reports)
    leave(130 if interrupted else int(failed))


async def _run(run: LocalRun) -> tuple[Sequence[StageReport], bool]:
    loop = asyncio.get_running_loop()
    interrupts = 0

    def interrupt() -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1:  # the first was asked for politely
            sys.stderr.flush()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        click.echo("stopping; once more to stop at once", err=True)
        run.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    return await run.run(), interrupts > 0


def _announce_services(reports: Sequence[StageReport]) -> None:
    for report in reports:
        what = report.result.get("endpoint", "a service")
        click.echo(f"{report.name}: {what} is up until Ctrl-C, or the end of its time", err=True)


def _as_json(report: StageReport) -> dict[str, Any]:
    data = attrs.asdict(report, recurse=False)
    return {**data, "folder": str(report.folder) if report.folder else None}


def _print(reports: Sequence[StageReport]) -> None:
    for report in reports:
        if report.ok:
            _print_answers(report)
        else:
            click.echo(f"\n{report.name}: failed: {report.error}", err=True)
    for report in reports:
        if report.folder is not None:
            click.echo(f"{report.name}: {report.folder}")


def _print_answers(report: StageReport) -> None:
    items = report.result.get("items")
    click.echo(f"\n{report.name} ({report.runtime_s:.1f} s)")
    if not isinstance(items, list):
        click.echo(_short(json.dumps(report.result, ensure_ascii=False, indent=2)))
        return
    for item in items[:_SHOWN_ITEMS]:
        if isinstance(item, dict) and "output" in item:
            asked = (item.get("metadata") or {}).get("prompt", item.get("prompt", ""))
            click.echo(f"  > {_short(' '.join(str(asked).split()), 100)}")
            click.echo("    " + _short(str(item["output"]).strip()).replace("\n", "\n    "))
        else:
            click.echo(f"  {_short(json.dumps(item, ensure_ascii=False))}")
    if len(items) > _SHOWN_ITEMS:
        click.echo(f"  ... and {len(items) - _SHOWN_ITEMS} more in responses.json")


def _short(text: str, most: int = _SHOWN_CHARS) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
