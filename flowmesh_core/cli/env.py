"""``flowmesh env add``, ``list`` and ``remove``."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flowmesh_core.cli.plugins import print_table

if TYPE_CHECKING:  # loaded when the command runs
    from flowmesh_core.config import Settings
    from flowmesh_core.places.environments import Environment, Offer

__all__ = ["command"]


@click.group("env")
def command() -> None:
    """Build and list further virtual environments, for plugins that cannot share one."""


@command.command("add")
@click.argument("name")
@click.argument("requirements", nargs=-1, metavar="REQUIREMENT...")
@click.option("--python", default="", help="Interpreter or version; this one's by default.")
@click.option("--core", help="What to install as flowmesh-core, such as a wheel.")
@click.option(
    "--constraint",
    "constraints",
    multiple=True,
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Pin versions.",
)
@click.option("--path", type=click.Path(path_type=Path), help="Use one that is there already.")
def add(
    name: str,
    requirements: tuple[str, ...],
    python: str,
    core: str | None,
    constraints: tuple[Path, ...],
    path: Path | None,
) -> None:
    """Build the environment NAME and install each REQUIREMENT and flowmesh-core in it."""
    from flowmesh_core.config import load_settings
    from flowmesh_core.places.installer import build_environment, link_environment
    from flowmesh_core.plugins import core_requirement

    building = bool(requirements or python or core or constraints)
    if building == bool(path) or (building and not requirements):
        raise click.UsageError("give at least one REQUIREMENT, or --path alone")
    settings = load_settings()
    if path:
        offer = link_environment(settings, name, path)
    else:
        wanted = [*([core] if core else core_requirement()), *requirements]
        with _status(f"building {name}") as on_line, _interruptible():
            offer = build_environment(
                settings, name, wanted, python=python, constraints=constraints, on_line=on_line
            )
    plugins = ", ".join(_plugin_names(offer)) or "none, so that it serves nothing yet"
    core_told = f"Python {offer.python}, flowmesh-core {offer.core}"
    click.echo(f"environment {name}: {core_told}, plugins: {plugins}")


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_all(as_json: bool) -> None:
    """List every environment with its state and its plugins."""
    from flowmesh_core.config import load_settings
    from flowmesh_core.places.environments import list_environments

    settings = load_settings()
    rows = [_describe(each, settings) for each in list_environments(settings.envs_dir)]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    table = [("ENVIRONMENT", "STATE", "PYTHON", "CORE", "PLUGINS")]
    for row in rows:
        plugins = row["reason"] or ", ".join(row["plugins"])
        table.append((row["name"], row["state"], row["python"], row["core"], plugins))
    print_table(table)


@command.command("remove")
@click.argument("name")
def remove(name: str) -> None:
    """Delete the environment NAME; of one that was added with --path, the link alone."""
    from flowmesh_core.config import load_settings
    from flowmesh_core.places.installer import remove_environment

    remove_environment(load_settings(), name)
    click.echo(f"environment {name}: removed")


def _describe(environment: Environment, settings: Settings) -> dict[str, Any]:
    from flowmesh_core.errors import PluginError
    from flowmesh_core.places.environments import read_offer

    row = {"name": environment.name, "folder": str(environment.folder)}
    try:
        offer = read_offer(environment, settings)
    except PluginError as exc:
        told = {"state": "broken", "reason": str(exc), "python": "", "core": "", "plugins": []}
        return {**row, **told}
    told = {"state": "ready", "reason": "", "python": offer.python, "core": offer.core}
    return {**row, **told, "plugins": _plugin_names(offer)}


def _plugin_names(offer: Offer) -> list[str]:
    return [f"{row['name']}{_state_of(row)}" for row in offer.plugins]


def _state_of(row: Any) -> str:
    return "" if row["state"] == "loaded" else f" ({row['state']})"


@contextlib.contextmanager
def _status(title: str) -> Iterator[Callable[[str], None]]:
    """Show the latest line on a terminal, and nothing elsewhere."""
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(title) as status:
        yield lambda line: status.update(Text(f"{title}: {line}"))


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM end like Ctrl-C, so that nothing half made stays behind."""

    def interrupt(_number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):  # a shell's background job ignores SIGINT
        signal.signal(number, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        click.echo("interrupted; nothing was kept", err=True)
        raise SystemExit(130) from None
