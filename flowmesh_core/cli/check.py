"""``flowmesh check``."""

from __future__ import annotations

from pathlib import Path

import click

from flowmesh_core.cli.documents import read_document
from flowmesh_core.cli.options import (
    assignments_option,
    file_argument,
    leave_out,
    plugin_options,
)

__all__ = ["command"]


@click.command("check")
@file_argument
@assignments_option
@plugin_options
def command(
    file: Path,
    assignments: tuple[str, ...],
    plugin_files: tuple[Path, ...],
    without: tuple[str, ...],
) -> None:
    """Explain what is wrong with the workflow in FILE, without running it."""
    from flowmesh_core.checking import check_workflow
    from flowmesh_core.config import load_settings
    from flowmesh_core.local_run import plan
    from flowmesh_core.plugins import load_plugins
    from flowmesh_core.telemetry.probes import GpuReader

    settings = leave_out(load_settings(), without)
    plugins = load_plugins(settings, files=plugin_files)
    workflow = plan(read_document(file, assignments))
    gpus = GpuReader(visible_devices=settings.visible_devices).list_gpus()
    registry = plugins.build_registry(settings, gpu_count=len(gpus))
    problems = check_workflow(workflow, registry)
    for problem in problems:
        click.echo(f"{file}: {problem}", err=True)
    if problems:
        raise SystemExit(2)
    for task in workflow.tasks:
        names = {other.task_id: other.name for other in workflow.tasks}
        after = ", ".join(names[task_id] for task_id in task.depends_on)
        click.echo(f"{task.name or workflow.name}: ok" + (f", after {after}" if after else ""))
