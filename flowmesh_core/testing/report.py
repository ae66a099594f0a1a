"""Runs the suite against an installed executor and tells what became of each check.

Also a pytest plugin: ``-p flowmesh_core.testing.report --flowmesh-report FILE`` writes the checks
of a test run as JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest

from flowmesh_core import __version__
from flowmesh_core.config import Settings
from flowmesh_core.errors import PluginError
from flowmesh_core.executor import API_VERSION
from flowmesh_core.plugins import load_plugins
from flowmesh_core.testing.findings import NOT_PROMISED

__all__ = ["KIT_VERSION", "Check", "Report", "examine", "find_executor"]

KIT_VERSION = "1.0"
_SUITE = '''"""What `flowmesh kit` runs; an author's own test file looks the same."""

import json
from pathlib import Path

from flowmesh_core.testing import ExecutorSuite


class TestExecutor(ExecutorSuite):
    executor = {name!r}
    plugin_files = [Path(path) for path in {files!r}]
    spec = json.loads({spec!r})
    long_spec = json.loads({long_spec!r})
    refused = json.loads({refused!r})
    limit_s = {limit_s!r}
    settings = {{"envs_dir": {envs!r} and Path({envs!r})}}
'''
_OPTIONS = ("--import-mode=importlib", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-q")


@attrs.frozen(kw_only=True)
class Check:
    """What became of one check.

    Attributes:
        suite: Name of the test class.
        name: The check as a sentence.
        clause: Its row of ``docs/conformance.md``.
        outcome: ``passed``, ``failed`` or ``skipped``.
        reason: The fault, or why it was skipped.
    """

    suite: str
    name: str
    clause: str
    outcome: str
    reason: str = ""


@attrs.frozen(kw_only=True)
class Report:
    """What the kit found about one executor."""

    executor: str
    distribution: str
    version: str
    core_version: str
    api_version: str
    kit_version: str
    checks: Sequence[Check]

    @property
    def unchecked(self) -> list[str]:
        """The clauses that were skipped, but for those of capabilities that it does not declare."""
        return [
            check.clause
            for check in self.checks
            if check.outcome == "skipped" and not check.reason.startswith(NOT_PROMISED)
        ]

    @property
    def ok(self) -> bool:
        """Whether no check failed, and some check passed."""
        outcomes = {check.outcome for check in self.checks}
        return "failed" not in outcomes and "passed" in outcomes

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        return attrs.asdict(self)


class Collector:
    """A pytest plugin that keeps what became of the checks of suites.

    Args:
        listen: Gets each check when it has ended.
    """

    def __init__(self, listen: Callable[[Check], None] | None = None) -> None:
        self.checks: dict[str, Check] = {}
        self._listen = listen

    def pytest_collection_modifyitems(self, items: Sequence[pytest.Item]) -> None:
        """Let reports say their clause, and their class."""
        for item in items:
            if marker := item.get_closest_marker("flowmesh_clause"):
                suite = item.getparent(pytest.Class)
                item.user_properties += [("suite", suite.name if suite else "")]
                item.user_properties += [("clause", marker.args[0])]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the worst of what is said about one check."""
        self._keep(report)
        check = self.checks.get(report.nodeid)
        if self._listen and check and report.when == "teardown":
            self._listen(check)

    def _keep(self, report: pytest.TestReport) -> None:
        about = dict(report.user_properties)
        known = self.checks.get(report.nodeid)
        setup = report.when != "call" and report.passed
        if "clause" not in about or setup or (known and known.outcome == "failed"):
            return
        name = report.location[2].rpartition(".")[2].removeprefix("test_").replace("_", " ")
        self.checks[report.nodeid] = Check(
            suite=str(about["suite"]),
            name=name,
            clause=str(about["clause"]),
            outcome=report.outcome,
            reason=_reason(report),
        )


def _reason(report: pytest.TestReport) -> str:
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, text
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    told = str(crash.message) if crash else report.longreprtext.strip()
    return told.removeprefix("Failed: ")  # of pytest.fail


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a test run say where its checks are to be written."""
    parser.addoption("--flowmesh-report", metavar="FILE", help="Write the kit's checks as JSON.")


def pytest_configure(config: pytest.Config) -> None:
    """Keep the checks of this run."""
    if config.getoption("--flowmesh-report"):
        config.pluginmanager.register(Collector(), "flowmesh-collector")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write them."""
    collector = session.config.pluginmanager.get_plugin("flowmesh-collector")
    if collector is not None and not hasattr(session.config, "workerinput"):  # of pytest-xdist
        checks = [attrs.asdict(check) for check in collector.checks.values()]
        Path(session.config.getoption("--flowmesh-report")).write_text(json.dumps(checks))


def find_executor(name: str, settings: Settings, files: Sequence[Path] = ()) -> Report:
    """Return the report about an installed executor before any check.

    Raises:
        PluginError: It is not installed.
    """
    found = {
        info.name: report
        for report in load_plugins(settings, files=files).reports
        for info in report.executors
    }
    if name not in found:
        known = ", ".join(sorted(found)) or "none"
        raise PluginError(f"executor {name!r} is not installed; installed are {known}")
    return Report(
        executor=name,
        distribution=found[name].distribution,
        version=found[name].version,
        core_version=__version__,
        api_version=API_VERSION,
        kit_version=KIT_VERSION,
        checks=(),
    )


def examine(
    report: Report,
    settings: Settings,
    *,
    spec: Mapping[str, Any] | None = None,
    long_spec: Mapping[str, Any] | None = None,
    refused: Sequence[Mapping[str, Any]] = (),
    files: Sequence[Path] = (),
    expression: str = "",
    limit_s: float = 300.0,
    listen: Callable[[Check], None] | None = None,
) -> Report:
    """Run every check against one installed executor, in this process.

    Args:
        report: Of ``find_executor``.
        settings: Say which plugins and environments count.
        spec: A document's ``spec``; the declared example without it.
        long_spec: One that runs for seconds.
        refused: Those that it must refuse.
        files: Single-file plugins.
        expression: Of pytest's ``-k``: only checks whose names match.
        limit_s: Longest that one task may take.
        listen: Gets each check when it has ended.

    Raises:
        PluginError: No check could be begun.
    """
    suite = _SUITE.format(
        name=report.executor,
        files=[str(path.absolute()) for path in files],
        spec=json.dumps(spec),
        long_spec=json.dumps(long_spec),
        refused=json.dumps([*refused]),
        limit_s=limit_s,
        envs=settings.envs_dir and str(settings.envs_dir),
    )
    return attrs.evolve(report, checks=_run(suite, expression, listen))


def _run(suite: str, expression: str, listen: Callable[[Check], None] | None) -> Sequence[Check]:
    collector, said = Collector(listen), io.StringIO()
    with tempfile.TemporaryDirectory(prefix="flowmesh-kit-") as folder:
        path = Path(folder, "test_kit.py")
        path.write_text(suite, encoding="utf-8")
        Path(folder, "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
        arguments = [str(path), f"--rootdir={folder}", "-c", str(Path(folder, "pytest.ini"))]
        arguments += [f"--basetemp={Path(folder, 'runs')}", *_OPTIONS, "-k", expression]
        with contextlib.redirect_stdout(said):
            code = pytest.main(arguments, plugins=[collector])
    if not collector.checks:
        told = said.getvalue().strip()[-500:]
        raise PluginError(f"no check was run (pytest ended with {int(code)}): {told}")
    return tuple(collector.checks.values())
