"""``flowmesh worker``."""

from __future__ import annotations

import asyncio
import logging
import logging.handlers
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flowmesh_core.cli.options import leave_out, plugin_options
from flowmesh_core.cli.process import leave, run_main

if TYPE_CHECKING:  # loaded when the command runs
    from flowmesh_core.config import Settings
    from flowmesh_core.worker import Worker

__all__ = ["command"]

_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


@click.command("worker")
@plugin_options
def command(plugin_files: tuple[Path, ...], without: tuple[str, ...]) -> None:
    """Take tasks from the queue until stopped; variables configure it (REDIS_URL, RESULTS_DIR...).

    SIGTERM and SIGINT let running tasks end and unregister the worker; a second one cancels them.
    """
    from flowmesh_core.config import load_settings
    from flowmesh_core.plugins import load_plugins
    from flowmesh_core.worker import Worker

    settings = leave_out(load_settings(), without)
    logging.basicConfig(level=settings.log_level, format=_FORMAT)
    plugins = load_plugins(settings, files=plugin_files)
    worker = Worker(settings, plugins=plugins)
    _log_to_file(settings, worker.folders.worker_log(settings.worker_id))
    run_main(_work(worker))
    leave(0)


def _log_to_file(settings: Settings, path: Path) -> None:
    handler = logging.handlers.RotatingFileHandler(
        path,
        maxBytes=settings.log_max_bytes,
        backupCount=settings.log_backups,
        encoding="utf-8",
        errors="backslashreplace",  # a name or a text may hold what UTF-8 cannot
    )
    handler.setFormatter(logging.Formatter(_FORMAT))
    logging.getLogger().addHandler(handler)


async def _work(worker: Worker) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, worker.stop)
    types = ", ".join(worker.registry.task_types)
    click.echo(f"worker {worker.settings.worker_id} serves {types}", err=True)
    await worker.run()
