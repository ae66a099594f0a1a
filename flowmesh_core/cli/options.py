"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["assignments_option", "file_argument", "plugin_files_option"]

file_argument = click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
assignments_option = click.option(
    "--set", "assignments", multiple=True, metavar="PATH=VALUE", help="Change a value."
)
plugin_files_option = click.option(
    "--plugin",
    "plugin_files",
    multiple=True,
    metavar="FILE.py",
    type=click.Path(path_type=Path),
    help="Load a single-file plugin.",
)
