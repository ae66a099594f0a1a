"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:  # loaded when a command runs
    from flowmesh_core.config import Settings

__all__ = [
    "assignments_option",
    "file_argument",
    "leave_out",
    "plugin_files_option",
    "plugin_options",
]

_CommandT = TypeVar("_CommandT", bound=Callable[..., Any])

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
_no_plugin_option = click.option(
    "--no-plugin", "without", multiple=True, metavar="NAME", help="Leave a plugin out."
)


def plugin_options(command: _CommandT) -> _CommandT:
    """Add ``--plugin``, the files for ``load_plugins``, and ``--no-plugin``, for ``leave_out``."""
    return plugin_files_option(_no_plugin_option(command))


def leave_out(settings: Settings, names: Iterable[str]) -> Settings:
    """Return settings by which these plugins are not imported, beside those that they name."""
    import attrs

    return attrs.evolve(settings, disable_plugins=(*settings.disable_plugins, *names))
