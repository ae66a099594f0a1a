"""What an import loads and costs; libraries that must not be loaded are put in the way as decoys.

Times are compared with a reference that is measured beside them, never with a clock.
"""

from __future__ import annotations

import os
import pkgutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

import flowmesh_core

ENGINES = ("torch", "transformers", "vllm", "xllamacpp", "datasets", "numpy", "trl", "ray")
REFERENCE = ("-c", "import asyncio, json, logging")
LISTING = ("-m", "flowmesh_core", "plugins", "list")


@pytest.fixture
def decoys(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which every engine is importable and tells when it is."""
    folder = tmp_path / "decoys"
    for name in ENGINES:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"print('LOADED {name}')\n")
    return {**os.environ, "PYTHONPATH": str(folder)}


def run(*arguments: str, environ: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=sys.prefix,  # what is installed counts, not what lies in the working folder
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_decoys_tell_when_they_are_loaded(decoys: dict[str, str]) -> None:
    assert run("-c", "import torch, numpy", environ=decoys) == "LOADED torch\nLOADED numpy\n"


def test_importing_the_package_loads_nothing_heavy(decoys: dict[str, str]) -> None:
    heavy = ("pydantic", "redis", "httpx", "pluggy", "attrs", "asyncio", *ENGINES)
    code = (
        "import sys; before = set(sys.modules); import flowmesh_core; "
        "print(sorted({n.split('.')[0] for n in set(sys.modules) - before}))"
    )
    loaded = run("-c", code, environ=decoys)
    assert "flowmesh_core" in loaded
    assert not [name for name in heavy if f"'{name}'" in loaded], loaded


def test_declaring_an_executor_loads_no_client(decoys: dict[str, str]) -> None:
    code = (
        "import sys; from flowmesh_core import Capability, Executor, ExecutorInfo, hookimpl; "
        "print(sorted({n.split('.')[0] for n in sys.modules}))"
    )
    loaded = run("-c", code, environ=decoys)
    heavy = ("pydantic", "redis", "httpx", "asyncio", "stevedore", *ENGINES)
    assert not [name for name in heavy if f"'{name}'" in loaded], loaded


def test_listing_plugins_loads_no_engine(decoys: dict[str, str]) -> None:
    assert "echo" in run(*LISTING, environ=decoys)
    assert "LOADED" not in run(*LISTING, "--json", environ=decoys)


def test_every_name_and_module_of_the_core_loads_no_engine(decoys: dict[str, str]) -> None:
    names = [
        info.name
        for info in pkgutil.walk_packages(flowmesh_core.__path__, "flowmesh_core.")
        if not info.name.endswith("__main__")
    ]
    assert len(names) > 50
    assert "LOADED" not in run("-c", f"import {', '.join(names)}", environ=decoys)


def median_s(*arguments: str, tries: int = 7) -> float:
    times = []
    for _ in range(tries):
        started = time.perf_counter()
        run(*arguments)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


@pytest.mark.parametrize(
    ("arguments", "budget"),
    # 0.2 s and 0.5 s where the reference takes 0.05 s
    [(("-c", "import flowmesh_core"), 4), (LISTING, 10)],
    ids=["import", "plugins list"],
)
def test_start_keeps_to_its_budget(arguments: tuple[str, ...], budget: float) -> None:
    reference_s = median_s(*REFERENCE)
    assert median_s(*arguments) < budget * reference_s
