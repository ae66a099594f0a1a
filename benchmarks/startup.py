"""What plugins cost a start: ``flowmesh plugins list`` and a worker until it has registered.

Four folders are put on the path: nothing, a plugin that is well, several that are broken, and those
beside one that sleeps for five seconds when it is imported. Run it where torch and vllm are
installed to see that they cost nothing. Medians over ``--rounds``.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flowmesh_core.testing import RedisServer, StandInOrchestrator, WorkerProcess

HEAD = "from flowmesh_core import ExecutorInfo, hookimpl\n"
HOOK = """
@hookimpl
def flowmesh_register_executors():
    return [ExecutorInfo(name={0!r}, task_types=[{0!r}], target="m:C", api_version={1!r})]
"""
WELL = {"acme-well": ("acme-well", HOOK.format("acme.well", "1.0"))}
BROKEN = {
    "acme-raises": ("acme-raises", "raise RuntimeError('no licence')"),
    "acme-next": ("acme-next", HOOK.format("acme.next", "2.0")),
    "acme-one": ("acme-twice", HOOK.format("acme.one", "1.0")),
    "acme-two": ("acme-twice", HOOK.format("acme.two", "1.0")),
}
HANGS = {"acme-hangs": ("acme-hangs", "import time\ntime.sleep(5)\n")}
SITES: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "what is installed": {},
    "and one that is well": WELL,
    "and four broken": {**WELL, **BROKEN},
    "and one that sleeps 5 s": {**WELL, **BROKEN, **HANGS},
}


def install(folder: Path, plugins: Mapping[str, tuple[str, str]]) -> None:
    """Write distributions, each with one plugin, as an installer would."""
    for distribution, (point, source) in plugins.items():
        module = distribution.replace("-", "_")
        (folder / f"{module}.py").write_text(HEAD + source)
        info = folder / f"{module}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n"
        )
        (info / "entry_points.txt").write_text(f"[flowmesh]\n{point} = {module}\n")


def median_s(rounds: int, call: Callable[[], float]) -> float:
    """Return the median of what a call measures, after one that warms the caches."""
    call()
    return statistics.median(call() for _ in range(rounds))


def time_listing(environ: Mapping[str, str]) -> float:
    """Return the seconds that ``flowmesh plugins list`` takes."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "flowmesh_core", "plugins", "list"],
        env={**os.environ, **environ},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - started


def time_worker(redis_url: str, environ: Mapping[str, str], folder: Path) -> float:
    """Return the seconds from the start of a worker until its registration is seen."""
    with StandInOrchestrator(redis_url, folder / "host") as host:
        worker = WorkerProcess(redis_url, folder / "results", environ=environ)
        started = time.perf_counter()
        with worker:
            host.wait_workers(1, timeout_s=60)
            return time.perf_counter() - started


def measure(rounds: int, limits: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield one row for each folder and time limit."""
    with RedisServer() as server:
        for title, plugins in SITES.items():
            for limit, limit_s in limits.items() if plugins.keys() & HANGS else [("", "10")]:
                with tempfile.TemporaryDirectory() as name:
                    site = Path(name, "site")
                    site.mkdir()
                    install(site, plugins)
                    environ = {
                        "PYTHONPATH": str(site),
                        "FLOWMESH_ENVS": str(site / "envs"),
                        "FLOWMESH_PLUGIN_TIMEOUT_S": limit_s,
                    }
                    listing = functools.partial(time_listing, environ)
                    worker = functools.partial(time_worker, server.url, environ, Path(name))
                    yield {
                        "plugins": f"{title}{limit}",
                        "list_s": median_s(rounds, listing),
                        "worker_s": median_s(rounds, worker),
                    }


def main() -> None:
    """Print the medians, as a table or as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    limits = {"": "10", ", 2 s allowed": "2"}
    rows = []
    for row in measure(options.rounds, limits):
        rows.append(row)
        if not options.json:
            print(
                f"{row['plugins']:40}  list {row['list_s']:5.2f} s  worker {row['worker_s']:5.2f} s"
            )
    if options.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
