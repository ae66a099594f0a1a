"""Build, link and remove virtual environments; one process at a time works in their folder.

An environment is built where it will stay, since it cannot be moved, and is hidden by a mark until
it has answered. What fails or is interrupted is removed.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from flowmesh_core.config import Settings
from flowmesh_core.errors import ConfigError, PluginError
from flowmesh_core.places.environments import (
    Environment,
    Offer,
    end_group,
    is_plain_name,
    list_environments,
    mark_of,
    read_offer,
)

__all__ = ["build_environment", "link_environment", "remove_environment"]

_SHOWN_LINES = 15


def build_environment(
    settings: Settings,
    name: str,
    requirements: Sequence[str],
    *,
    python: str = "",
    constraints: Sequence[Path] = (),
    on_line: Callable[[str], None] = lambda _line: None,
) -> Offer:
    """Build an environment and return what it offers.

    Args:
        settings: ``envs_dir`` is where it will lie.
        name: Plain and free.
        requirements: As the installer takes them; flowmesh-core among them.
        python: Interpreter or version; this process's by default.
        constraints: Files that pin versions.
        on_line: Called with each line that the installer prints.

    Raises:
        ConfigError: The name is not plain or taken, or there is no folder for environments.
        PluginError: The installer failed, or what was built cannot be used; nothing is left of it.
    """
    with _work_in(settings, on_line) as (folder, lock):
        _refuse_taken(folder, name)
        environment = Environment(name=name, folder=folder / name)
        mark = mark_of(folder, name)
        _delete(environment.folder, mark)  # what a process left that was killed
        mark.touch()
        try:
            for command in _commands(environment, requirements, python, constraints):
                _run(name, command, lock, on_line)
            offer = read_offer(environment, settings)
        except BaseException:
            _delete(environment.folder, mark)
            raise
        mark.unlink()
        return offer


def link_environment(settings: Settings, name: str, path: Path) -> Offer:
    """Make an environment that lies elsewhere known by a name, and return what it offers.

    Raises:
        ConfigError: The name is not plain or taken, or there is no folder for environments.
        PluginError: It cannot be used; it is not linked then.
    """
    with _work_in(settings) as (folder, _lock):
        _refuse_taken(folder, name)
        offer = read_offer(Environment(name=name, folder=path.absolute()), settings)
        _delete(folder / name, mark_of(folder, name))
        (folder / name).symlink_to(path.absolute())
        return offer


def remove_environment(settings: Settings, name: str) -> None:
    """Delete an environment; of a linked one, the link alone.

    Raises:
        ConfigError: There is none of that name; names the known ones.
        PluginError: Something of it could not be deleted.
    """
    with _work_in(settings) as (folder, _lock):
        known = [environment.name for environment in list_environments(folder)]
        mark = mark_of(folder, name) if is_plain_name(name) else None
        if mark is None or (name not in known and not mark.exists()):
            raise ConfigError(f"no environment {name!r}; known are {', '.join(known) or 'none'}")
        mark.touch()
        _delete(folder / name, mark)
        if mark.exists():
            raise PluginError(f"{folder / name} could not be deleted; it is not used any more")


@contextlib.contextmanager
def _work_in(
    settings: Settings, on_line: Callable[[str], None] = lambda _line: None
) -> Iterator[tuple[Path, int]]:
    """Hold the lock of the folder; an installer gets it too, and holds it should we be killed."""
    if settings.envs_dir is None:
        raise ConfigError("FLOWMESH_ENVS must name a folder for environments; there is no HOME")
    folder = settings.envs_dir.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as exc:
        raise ConfigError(
            f"FLOWMESH_ENVS must be a folder that can be written, got {folder}: {exc.strerror}"
        ) from exc
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_line("waiting for another process that works on environments")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder, lock.fileno()


def _refuse_taken(folder: Path, name: str) -> None:
    if not is_plain_name(name):
        raise ConfigError(
            f"an environment's name must begin with a letter, digit or '_' and hold these, '-' "
            f"and '.' alone, got {name!r}"
        )
    if os.path.lexists(folder / name) and not mark_of(folder, name).exists():
        raise ConfigError(f"{folder / name} is there already; remove it or take another name")


def _delete(path: Path, mark: Path) -> None:
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)
    if not path.exists():  # else the mark goes on hiding what could not be deleted
        mark.unlink(missing_ok=True)


# The installers.


def _commands(
    environment: Environment, requirements: Sequence[str], python: str, constraints: Sequence[Path]
) -> Iterator[list[str]]:
    pins = [word for path in constraints for word in ("--constraint", str(path))]
    there, here = str(environment.python), str(environment.folder)
    uv = _find_uv()
    if uv:
        yield [uv, "venv", "--python", python or sys.executable, here]
        yield [uv, "pip", "install", "--python", there, *pins, *requirements]
    else:
        # -I: what PYTHONPATH points to would count as installed.
        yield [_find_python(python), "-I", "-m", "venv", here]
        yield [there, "-I", "-m", "pip", "install", *pins, *requirements]


def _find_uv() -> str | None:
    return shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))


def _find_python(wanted: str) -> str:
    if not wanted:
        return sys.executable
    found = shutil.which(wanted) or shutil.which(f"python{wanted}")
    if found is None:
        raise ConfigError(f"--python must be an interpreter or its version, got {wanted!r}")
    return found


def _run(name: str, command: Sequence[str], lock: int, on_line: Callable[[str], None]) -> None:
    last: collections.deque[str] = collections.deque(maxlen=_SHOWN_LINES)
    with subprocess.Popen(  # noqa: S603 - the operator asked for it
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        pass_fds=(lock,),
    ) as process:
        try:
            for line in process.stdout or ():
                last.append(line.rstrip())
                on_line(last[-1])
            code = process.wait()
        finally:
            end_group(process)
    if code:
        ended = f"{shlex.join(command)} ended with exit code {code}"
        raise PluginError("\n".join([f"environment {name} was not built: {ended}", *last]))
