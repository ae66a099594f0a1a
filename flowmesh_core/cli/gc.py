"""``flowmesh gc``."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:  # loaded when the command runs
    from flowmesh_core.housekeeping.cleaning import Plan, Removed
    from flowmesh_core.housekeeping.leftovers import Leftover

__all__ = ["command"]

ValueT = TypeVar("ValueT")


@click.command("gc")
@click.option(
    "--results-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where tasks have their folders; RESULTS_DIR by default.",
)
@click.option("--older-than", metavar="AGE", help="Remove what was reported longer ago, as 7d.")
@click.option("--max-size", metavar="SIZE", help="Remove the oldest until the rest has 50GiB, say.")
@click.option(
    "--unreported",
    is_flag=True,
    help="With --older-than: also what was never reported and has not changed for so long.",
)
@click.option("--dry-run", is_flag=True, help="Show what would go, and remove nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    results_dir: Path | None,
    older_than: str | None,
    max_size: str | None,
    unreported: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove old task folders; what was not reported yet, or a worker holds, stays."""
    from flowmesh_core.config import load_settings
    from flowmesh_core.errors import ConfigError
    from flowmesh_core.housekeeping.cleaning import Housekeeping, Limits, Removed
    from flowmesh_core.quantities import parse_duration_s, parse_size_bytes

    limits = Limits(
        older_than_s=_read("--older-than", older_than, parse_duration_s),
        max_bytes=_read("--max-size", max_size, parse_size_bytes),
        unreported=unreported,
    )
    if older_than is None and (max_size is None or unreported):
        wanted = "--older-than" if unreported else "--older-than, --max-size or both"
        raise click.UsageError(f"give {wanted}")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    settings = load_settings()
    folder = results_dir or settings.results_dir
    if not folder.is_dir():
        raise ConfigError(f"RESULTS_DIR must be a folder that is there, got {str(folder)!r}")
    housekeeping = Housekeeping(folder, settings.allowed_dirs, limits=limits)
    try:
        plan = housekeeping.plan()
        removed = Removed(gone=plan.going) if dry_run else housekeeping.remove(plan)
    except OSError as exc:
        raise click.ClickException(f"{folder} cannot be cleaned up: {exc}") from exc
    if as_json:
        click.echo(json.dumps(_as_json(plan, removed, dry_run), indent=2))
    else:
        _print(plan, removed, dry_run)
    if removed.failed:
        click.echo(f"{len(removed.failed)} folders could not be deleted", err=True)
        raise SystemExit(1)


def _read(option: str, text: str | None, parse: Callable[[str], ValueT]) -> ValueT | None:
    try:
        return None if text is None else parse(text)
    except ValueError as exc:
        raise click.BadParameter(f"must be {exc}, got {text!r}", param_hint=option) from None


def _as_json(plan: Plan, removed: Removed, dry_run: bool) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "removed": [_describe(leftover) for leftover in removed.gone],
        "removed_bytes": _sum(removed.gone),
        "failed": [str(path) for path in removed.failed],
        "staying": _count_staying(plan),
    }


def _describe(leftover: Leftover) -> dict[str, Any]:
    return {
        "folder": str(leftover.folder),
        "state": leftover.state.value,
        "since": _show_time(leftover.at),
        "size_bytes": leftover.size_bytes,
        "paths": [str(path) for path in leftover.parts],
    }


def _count_staying(plan: Plan) -> dict[str, int]:
    from flowmesh_core.housekeeping.leftovers import State

    states = (State.REPORTED, State.UNREPORTED, State.HELD)
    return {state.value: plan.count_staying(state) for state in states}


def _print(plan: Plan, removed: Removed, dry_run: bool) -> None:
    for leftover in removed.gone if dry_run else ():
        size = _show_size(leftover.size_bytes)
        since = _show_time(leftover.at)
        click.echo(f"{leftover.folder}: {leftover.state.value} since {since}, {size}")
    verb = "would remove" if dry_run else "removed"
    staying = ", ".join(f"{count} {state}" for state, count in _count_staying(plan).items())
    freed = _show_size(_sum(removed.gone))
    click.echo(f"{verb} {len(removed.gone)} folders, {freed}; staying: {staying}")


def _sum(leftovers: tuple[Leftover, ...]) -> int:
    return sum(leftover.size_bytes for leftover in leftovers)


def _show_time(at: float) -> str:
    return datetime.fromtimestamp(at, timezone.utc).isoformat(timespec="seconds")


def _show_size(size_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.4g} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.4g} GiB"
