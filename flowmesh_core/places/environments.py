"""Virtual environments beside the worker's own: which there are, and what each offers.

Every subfolder of ``FLOWMESH_ENVS`` with ``bin/python`` is one, named by the subfolder. Nothing of
it is ever imported here: its own Python is asked, in a process group of its own and for a limited
time. The answer is kept in the environment until something there changes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import attrs

from flowmesh_core.config import Settings
from flowmesh_core.errors import PluginError
from flowmesh_core.executor import API_VERSION

if TYPE_CHECKING:  # most starts find every answer kept and start no process
    import subprocess

__all__ = [
    "Environment",
    "Offer",
    "check_there",
    "end_group",
    "is_plain_name",
    "list_environments",
    "mark_of",
    "read_offer",
]

_log = logging.getLogger(__name__)
_NAME = re.compile(r"\w[\w.-]{0,127}\Z", re.ASCII)
_ANSWER_S = 30.0
_KEPT = ".flowmesh.json"
_SETTLED_NS = 100_000_000

# What is run there. The answer goes to a copy of standard output, so that nothing that a plugin
# prints stands in it; threads that a plugin has started are not waited for.
_HEAD = """
import json, os, sys
sink = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)
asked = json.load(sys.stdin)

def answer(value):
    json.dump(value, sink)
    sink.flush()
    os._exit(0)
"""
_OFFER = """
import logging, platform
from flowmesh_core import API_VERSION, Settings, __version__, load_plugins
from flowmesh_core.importing import is_importable

logging.disable()  # what is wrong stands in the reports
rows = [report.to_dict() for report in load_plugins(Settings(**asked)).reports]
for row in rows:
    for info in row["executors"]:
        info["missing"] = [name for name in info["needs"] if not is_importable(name)]
files = [getattr(module, "__dict__", {}).get("__file__") for module in [*sys.modules.values()]]
installed = (os.path.dirname(os.__file__), *(path for path in sys.path if "-packages" in path))
answer({
    "core": __version__,
    "api": API_VERSION,
    "python": platform.python_version(),
    "plugins": rows,
    "paths": sys.path + [file for file in files if file and not file.startswith(installed)],
})
"""
_CHECK = """
from flowmesh_core.checking import check_spec
answer(check_spec(asked["target"], asked["spec"]))
"""


@attrs.frozen(kw_only=True)
class Environment:
    """One virtual environment; ``folder`` is absolute, and may be a link to where it really is."""

    name: str
    folder: Path

    @property
    def python(self) -> Path:
        """Its interpreter; the link itself, since where it lies makes it this environment's."""
        return self.folder / "bin" / "python"


@attrs.frozen(kw_only=True)
class Offer:
    """What an environment says about itself.

    Attributes:
        core: Version of its flowmesh-core.
        api: Version of that one's executor API.
        python: Version of its Python.
        plugins: Its plugins but the core's own, as ``PluginReport.to_dict`` has them; each
            executor with the packages that are ``missing`` there.
    """

    core: str
    api: str
    python: str
    plugins: tuple[Mapping[str, Any], ...]


def is_plain_name(name: str) -> bool:
    """Whether an environment may be called so: letters, digits, ``_``, later also ``.``, ``-``."""
    return bool(_NAME.match(name))


def mark_of(folder: Path, name: str) -> Path:
    """Return the file that exists while an environment is half made, which hides it."""
    return folder / f".{name}.unfinished"


def list_environments(folder: Path | None) -> tuple[Environment, ...]:
    """Return the environments of a folder by name, usable or not; none without the folder."""
    if folder is None:
        return ()
    try:
        paths = sorted(folder.absolute().iterdir())
    except FileNotFoundError:
        return ()
    except OSError as exc:
        _log.warning("environments are left out: FLOWMESH_ENVS %s: %s", folder, exc.strerror)
        return ()
    return tuple(Environment(name=path.name, folder=path) for path in paths if _is_one(path))


def _is_one(path: Path) -> bool:
    # A link that leads nowhere was an environment once, and is told as a broken one.
    there = path.is_symlink() or os.path.lexists(path / "bin" / "python")
    return is_plain_name(path.name) and there and not mark_of(path.parent, path.name).exists()


def read_offer(environment: Environment, settings: Settings) -> Offer:
    """Return what an environment offers, asking its Python unless the answer is known.

    Args:
        environment: Which.
        settings: ``only_plugins`` and ``disable_plugins`` hold there too, before import.

    Raises:
        PluginError: It cannot be used; says why.
    """
    question = {
        "only_plugins": list(settings.only_plugins),
        "disable_plugins": list(settings.disable_plugins),
    }
    kept = _read_kept(environment, question)
    if kept is not None:
        return _parse(environment, kept)
    started_ns = time.time_ns()
    answer = _ask(environment.name, environment.python, _OFFER, question)
    offer = _parse(environment, answer)
    _keep(environment, question, answer, started_ns)
    return offer


def check_there(name: str, python: Path, target: str, spec: Mapping[str, Any]) -> list[str]:
    """Let an environment's own model explain what is wrong with a spec.

    Args:
        name: The environment.
        python: Its interpreter.
        target: ``package.module:Model``, importable there.
        spec: The whole ``spec``.

    Raises:
        PluginError: The environment gave no answer.
    """
    problems = _ask(name, python, _CHECK, {"target": target, "spec": spec})
    return [str(problem) for problem in problems]


def _parse(environment: Environment, answer: Any) -> Offer:
    try:
        offer = Offer(
            core=str(answer["core"]),
            api=str(answer["api"]),
            python=str(answer["python"]),
            plugins=tuple(
                row for row in answer["plugins"] if row["distribution"] != "flowmesh-core"
            ),
        )
    except (KeyError, TypeError) as exc:
        raise _unusable(environment.name, f"its answer cannot be read: {exc!r}") from exc
    if offer.api.split(".")[0] != API_VERSION.split(".")[0]:
        raise _unusable(
            environment.name,
            f"its flowmesh-core {offer.core} has executor API {offer.api}, this one "
            f"{API_VERSION}; install versions that match",
        )
    return offer


def _unusable(name: str, reason: str) -> PluginError:
    return PluginError(f"environment {name}: {reason}")


# Asking.


def _ask(name: str, python: Path, code: str, question: Any) -> Any:
    """Run code in another Python, neither the working folder nor ``PYTHON*`` variables with it."""
    import subprocess  # noqa: PLC0415 - see the import block
    from tempfile import TemporaryFile  # noqa: PLC0415 - as above

    # Files, not pipes: what a plugin leaves running may hold a pipe open for ever.
    with TemporaryFile() as asked, TemporaryFile() as answer, TemporaryFile() as noise:
        asked.write(json.dumps(question, default=str).encode())
        asked.seek(0)
        command = [str(python), "-I", "-c", _HEAD + code]
        try:
            process = subprocess.Popen(  # noqa: S603 - the operator named this interpreter
                command, stdin=asked, stdout=answer, stderr=noise, start_new_session=True
            )
        except OSError as exc:
            raise _unusable(name, f"{python} cannot be started: {exc.strerror}") from exc
        try:
            status = process.wait(_ANSWER_S)
        except subprocess.TimeoutExpired:
            reason = f"gave no answer within {_ANSWER_S:g} s; {_last_line(noise)}"
            raise _unusable(name, reason) from None
        finally:
            end_group(process)
        return _answer_of(name, status, answer, noise)


def _answer_of(name: str, status: int, answer: IO[bytes], noise: IO[bytes]) -> Any:
    answer.seek(0)
    if status == 0:
        with contextlib.suppress(ValueError):
            return json.load(answer)
        raise _unusable(name, "its answer is no JSON")
    how = f"exit code {status}" if status > 0 else signal.Signals(-status).name
    raise _unusable(name, f"its Python ended with {how}: {_last_line(noise)}")


def _last_line(noise: IO[bytes]) -> str:
    size = noise.seek(0, os.SEEK_END)
    noise.seek(max(0, size - 4096))
    lines = noise.read().decode(errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it said nothing")


def end_group(process: subprocess.Popen[Any]) -> None:
    """End a process that leads a group of its own, and all that it left behind in the group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# Keeping answers.


def _state(environment: Environment, question: Any, paths: Iterable[str]) -> dict[str, Any]:
    """Return all that an answer depends on, as JSON data."""
    interpreter = environment.python.resolve()
    paths = [str(interpreter), str(environment.folder / "pyvenv.cfg"), *paths]
    return {"code": zlib.crc32(_OFFER.encode()), "question": question, "times": _times(paths)}


def _times(paths: Iterable[str]) -> dict[str, int]:
    """Return the modification times of files and folders, and of what is installed in these."""
    times: dict[str, int] = {}
    for path in paths:
        with contextlib.suppress(OSError):
            times[path] = Path(path).stat().st_mtime_ns
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.endswith((".dist-info", ".pth")):
                        times[entry.path] = entry.stat().st_mtime_ns
    return times


def _read_kept(environment: Environment, question: Any) -> Any:
    try:
        kept = json.loads((environment.folder / _KEPT).read_bytes())
        current = kept["state"] == _state(environment, question, kept["answer"]["paths"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kept["answer"] if current else None


def _keep(environment: Environment, question: Any, answer: Any, asked_ns: int) -> None:
    """Write the answer down, if that is allowed and nothing has changed meanwhile."""
    state = _state(environment, question, answer["paths"])
    if max(state["times"].values(), default=0) > asked_ns - _SETTLED_NS:
        return
    path = environment.folder / f"{_KEPT}.{os.getpid()}"
    with contextlib.suppress(OSError):
        path.write_text(json.dumps({"state": state, "answer": answer}), encoding="utf-8")
        path.replace(environment.folder / _KEPT)
