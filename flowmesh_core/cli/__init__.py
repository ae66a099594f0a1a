"""The ``flowmesh`` command: one file per sub-command, each loaded only when it is called.

Exit codes: 0 done; 1 a task failed; 2 the document, an option or a variable is wrong; 130
interrupted.
"""

from __future__ import annotations

import importlib
from typing import Any

import click

__all__ = ["main"]

_COMMANDS = {
    "run": "Run a workflow on this machine, with no service.",
    "check": "Explain what is wrong with a workflow, without running it.",
    "worker": "Take tasks from the queue until stopped.",
    "plugins": "Show which plugins and executors are installed.",
    "kit": "Examine an installed executor: does it keep what executors promise?",
    "new": "Write the files of a plugin to begin with.",
    "env": "Build and list further virtual environments for plugins.",
    "gc": "Remove old task folders.",
}


class _LazyGroup(click.Group):
    """Knows its commands by name, so that help needs no import."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: Any = importlib.import_module(f"flowmesh_core.cli.{cmd_name}").command
        return command if isinstance(command, click.Command) else None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        from flowmesh_core import __version__

        click.echo(f"flowmesh-core {__version__}")
        ctx.exit()


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, callback=_version, expose_value=False, is_eager=True)
def _cli() -> None:
    """A plugin framework for ML workers."""


def main() -> None:
    """Run the command line; our errors become one line and exit code 2."""
    from flowmesh_core.errors import FlowmeshError

    try:
        _cli(prog_name="flowmesh")
    except FlowmeshError as exc:
        click.echo(f"error: {exc}", err=True)
        raise SystemExit(2) from None
