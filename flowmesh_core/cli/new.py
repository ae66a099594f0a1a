"""``flowmesh new``."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["command"]


@click.group("new")
def command() -> None:
    """Write the files of a distribution to begin with."""


@command.command("executor")
@click.argument("name")
@click.option(
    "--dir",
    "parent",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help="Make the folder NAME in this one; the working folder by default.",
)
@click.option("--task-type", default="", help="acme.tts for acme-tts, when it is not given.")
@click.option(
    "--from",
    "file",
    metavar="FILE.py",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Take a single-file plugin; FILE.yaml beside it becomes the example.",
)
def executor(name: str, parent: Path, task_type: str, file: Path | None) -> None:
    """Write a distribution NAME (vendor-what, such as acme-tts) that passes its own tests."""
    from flowmesh_core.cli.documents import read_document
    from flowmesh_core.scaffold.build import build_from_file, build_new
    from flowmesh_core.scaffold.files import write_files
    from flowmesh_core.scaffold.names import parse_names

    if file and task_type:
        raise click.UsageError("--task-type is what FILE.py declares; give one of the two")
    names = parse_names(name, task_type)
    if file is None:
        project = build_new(names)
    else:
        beside = file.with_suffix(".yaml")
        workflow = read_document(beside) if beside.exists() else None
        text = beside.read_text(encoding="utf-8") if workflow else ""
        project = build_from_file(names, file, workflow, text)
    folder = parent / name
    write_files(folder, project.files)
    for line in (
        f"{folder}: {len(project.files)} files; what to do now:",
        f"  cd {folder} && python -m venv .venv && . .venv/bin/activate",
        "  pip install -e '.[dev]'",
        *(["  ruff check --fix . && ruff format ."] if file else []),
        "  pytest && mypy && ruff check . && ruff format --check .",
        "  flowmesh run examples/example.yaml",
        *(f"  {note}" for note in project.notes),
        "  choose a licence (LICENSE), then remove 'Private :: Do Not Upload' in pyproject.toml",
    ):
        click.echo(line)
