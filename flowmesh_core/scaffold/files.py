"""Fills in templates, and writes what they give."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template

from flowmesh_core.errors import ConfigError

__all__ = ["render", "write_files"]

_TEMPLATES = Path(__file__).parent / "templates"


def render(kind: str, values: Mapping[str, str]) -> dict[Path, str]:
    """Return every file of a project, by its path in there.

    Args:
        kind: ``new`` or ``from_file``.
        values: What the templates name; ``package`` becomes a folder's name as well.
    """
    files = {}
    for tree in (_TEMPLATES / "common", _TEMPLATES / kind):
        for source in sorted(tree.rglob("*.tmpl")):
            path = source.relative_to(tree).with_suffix("").as_posix()
            for word, meant in (("PACKAGE", values["package"]), ("TESTS", "tests"), ("DOT_", ".")):
                path = path.replace(word, meant)
            files[Path(path)] = Template(source.read_text(encoding="utf-8")).substitute(values)
    return files


def write_files(folder: Path, files: Mapping[Path, str]) -> None:
    """Write files into a folder that is made for them.

    Raises:
        ConfigError: It exists, or cannot be written.
    """
    try:
        folder.mkdir(parents=True)
        for path, text in files.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    except FileExistsError:
        raise ConfigError(
            f"{folder} exists; nothing is overwritten, choose another --dir"
        ) from None
    except OSError as exc:
        raise ConfigError(f"cannot write {folder}: {exc.strerror}") from exc
