"""From nothing to an author's own wheel that runs a task in a worker: commands, seconds, lines.

What an author types, and then an operator, runs in two clean virtual environments. A wheel of this
checkout stands for the core on an index; all else comes from where pip, or uv, is told to look.
``cd`` and ``activate`` are not counted. Ends with 1 as soon as a command fails.

    python benchmarks/author_walk.py [--uv] [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowmesh_core.testing import RedisServer, StandInOrchestrator

CHECKOUT = Path(__file__).parents[1]
NAME = "acme-mirror"
SPEC: Mapping[str, Any] = {
    "taskType": "acme.mirror",
    "data": {"type": "list", "items": ["hello", "world"]},
    "options": {"style": "loud"},
}
# What the author writes: in which file, in place of what.
OWN = (
    (
        "src/acme_mirror/engine.py",
        '        return text.upper() if self._style == "loud" else text\n',
        "        said = text[::-1]\n"
        '        return said.upper() if self._style == "loud" else said\n',
    ),
    (
        "tests/test_executor.py",
        '    [("plain", ["hello", "world"]), ("loud", ["HELLO", "WORLD"])],\n',
        '    [("plain", ["olleh", "dlrow"]), ("loud", ["OLLEH", "DLROW"])],\n',
    ),
)


class Venv:
    """Somebody's folder and virtual environment, and what they typed there.

    Args:
        folder: Made here.
        wheels: Where the core's wheel lies.
        uv: Path of uv; pip and venv are used without it.
    """

    def __init__(self, folder: Path, wheels: Path, uv: str) -> None:
        folder.mkdir()
        self.folder, self._uv = folder, uv
        self.typed: list[tuple[str, float]] = []
        own = (
            "FLOWMESH_",
            "PYTHON",
            "REDIS_",
            "VIRTUAL_ENV",
            "UV_PROJECT_ENVIRONMENT",
            "UV_PYTHON",
        )
        self.environ = {key: text for key, text in os.environ.items() if not key.startswith(own)}
        tools = [str(folder / ".venv" / "bin"), *([str(Path(uv).parent)] if uv else [])]
        self.environ["PATH"] = os.pathsep.join([*tools, self.environ["PATH"]])
        self.environ["VIRTUAL_ENV"] = str(folder / ".venv")
        for variable, separator in (("PIP_FIND_LINKS", " "), ("UV_FIND_LINKS", ",")):
            more = self.environ.get(variable)
            self.environ[variable] = f"{wheels}{separator}{more}" if more else str(wheels)

    def create(self) -> None:
        """Make the environment."""
        python = ["--python", sys.executable]
        tool = ["uv", "venv", "-q", *python] if self._uv else [sys.executable, "-m", "venv"]
        self.run(*tool, ".venv")

    def install(self, *wanted: str, cwd: str = "") -> None:
        """Install into the environment."""
        self.run(*(["uv"] if self._uv else []), "pip", "install", "-q", *wanted, cwd=cwd)

    def build_wheel(self, source: Path | str, into: Path | str, *, cwd: str = "") -> None:
        """Build the wheel of a project."""
        plain = ("pip", "wheel", "-q", "--no-deps", "-w", str(into))
        tool = ("uv", "build", "-q", "--wheel", "-o", str(into)) if self._uv else plain
        self.run(*tool, str(source), cwd=cwd)

    def run(self, *command: str, cwd: str = "") -> str:
        """Run a command that must succeed, and return what it printed."""
        with self.timed(command):
            done = subprocess.run(
                command,
                check=False,
                cwd=self.folder / cwd,
                env=self.environ,
                capture_output=True,
                text=True,
                timeout=900,
            )
            if done.returncode:
                said = f"{done.stdout}{done.stderr}".strip()
                raise SystemExit(f"\n{said}\n{command[0]} ended with {done.returncode}")
        return done.stdout

    @contextlib.contextmanager
    def timed(self, command: Sequence[str]) -> Iterator[None]:
        """Count a command, and print it with the seconds that it takes."""
        begun = time.perf_counter()
        line = " ".join(["python" if word == sys.executable else word for word in command])
        print(f"{self.folder.name:>8}$ {line}", end="", flush=True, file=sys.stderr)
        yield
        seconds = time.perf_counter() - begun
        self.typed.append((line, seconds))
        print(f"   {seconds:.1f} s", file=sys.stderr)


def write_own_lines(project: Path) -> int:
    """Put the author's work into the new project; return how many lines it is."""
    for file, before, after in OWN:
        text = (project / file).read_text(encoding="utf-8")
        if before not in text:
            raise SystemExit(f"{file} of a new project has no line {before.strip()!r}")
        (project / file).write_text(text.replace(before, after), encoding="utf-8")
    return sum(after.count("\n") for _, _, after in OWN)


def walk_as_author(author: Venv) -> tuple[Path, int]:
    """Go from an empty environment to a wheel; return it, and the lines written for it."""
    author.install("flowmesh-core")
    author.run("flowmesh", "new", "executor", NAME)
    lines = write_own_lines(author.folder / NAME)
    author.install("-e", ".[dev]", cwd=NAME)
    for check in ("pytest -q", "mypy", "ruff check .", "ruff format --check ."):
        author.run(*check.split(), cwd=NAME)
    author.build_wheel(".", "dist", cwd=NAME)
    (wheel,) = (author.folder / NAME / "dist").glob("*.whl")
    return wheel, lines


def walk_as_operator(operator: Venv, wheel: Path) -> None:
    """Install the wheel beside the core alone, serve a task with it, examine it."""
    operator.create()
    operator.install(str(wheel), "flowmesh-core[testing]")
    rows = json.loads(operator.run("flowmesh", "plugins", "list", "--json"))
    states = {row["name"]: row["state"] for row in rows}
    if states.get(NAME) != "loaded":
        raise SystemExit(f"{NAME} is not loaded but {states.get(NAME)}")
    serve(operator)
    operator.run("flowmesh", "kit", "acme.mirror")


def serve(operator: Venv) -> None:
    """Run one task in a worker; its seconds are those from its start to the task's end."""
    with (
        RedisServer() as server,
        StandInOrchestrator(server.url, operator.folder / "host") as host,
        (operator.folder / "worker.log").open("wb") as log,
        contextlib.ExitStack() as stack,
    ):
        results = operator.folder / "results"
        variables = {"REDIS_URL": server.url, "RESULTS_DIR": str(results)}
        with operator.timed(("flowmesh", "worker")):
            worker = subprocess.Popen(
                [operator.folder / ".venv" / "bin" / "flowmesh", "worker"],
                env={**operator.environ, **variables},
                stdout=log,
                stderr=log,
            )
            stack.callback(worker.wait)
            stack.callback(worker.terminate)
            host.wait_workers(1, 60)
            task_id = host.submit({"metadata": {"name": NAME}, "spec": SPEC})
            record = host.wait_task(task_id, 60)
        answer = json.loads((results / task_id / "responses.json").read_text(encoding="utf-8"))
        said = [item["output"] for item in answer.get("items", ())]
        if record.status != "DONE" or said != ["OLLEH", "DLROW"]:
            raise SystemExit(f"the task ended as {record.status} with {said}")


def measure(root: Path, uv: str) -> dict[str, Any]:
    """Walk, and return the totals."""
    wheels = root / "index"
    wheels.mkdir()
    author, operator = (Venv(root / who, wheels, uv) for who in ("author", "operator"))
    author.create()
    author.build_wheel(CHECKOUT, wheels)
    author.typed.pop()  # nobody builds what an index has
    wheel, lines = walk_as_author(author)
    walk_as_operator(operator, wheel)
    typed = author.typed + operator.typed
    return {
        "commands": len(typed),
        "seconds": sum(seconds for _, seconds in typed),
        "commands_of_author": len(author.typed),
        "seconds_of_author": sum(seconds for _, seconds in author.typed),
        "lines_of_author": lines,
    }


def main() -> None:
    """Print each command with its seconds, and the totals."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uv", action="store_true", help="type uv in place of pip and venv")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    uv = shutil.which("uv", path=places) if options.uv else ""
    if uv is None:
        parser.error("uv is not installed")
    with tempfile.TemporaryDirectory(prefix="flowmesh-walk-") as folder:
        totals = measure(Path(folder), uv)
    if options.json:
        print(json.dumps(totals, indent=2))
        return
    for name, value in totals.items():
        print(f"{name:20} {value:8.1f}" if isinstance(value, float) else f"{name:20} {value:6}")


if __name__ == "__main__":
    main()
