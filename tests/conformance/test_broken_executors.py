"""The kit rejects executors that are right but for one fault, each by the one check for it."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from flowmesh_core.importing import import_plugin_file

BROKEN = Path(__file__).parent / "broken"
Reports = Mapping[str, Sequence[Mapping[str, str]]]


def expectations() -> dict[str, tuple[str, str]]:
    import_plugin_file(BROKEN / "sound.py")
    cases = import_plugin_file(BROKEN / "executors.py").CASES
    told = {case.info.name.rpartition(".")[2]: (case.clause, case.told) for case in cases}
    return {
        **told,
        "Heavy": ("light", "declaring it imports sqlite3, which it declares to need"),
        "Bulky": ("light", r"declaring it loads \d+ modules, the budget is 10 \(import_budget\)"),
        "Newer": ("installed", "for executor API 9.0, this flowmesh-core has 1.0; install"),
    }


EXPECTED = expectations()


def examine(request: pytest.FixtureRequest, folder: Path, *options: str) -> Reports:
    """Examine all that is asked for in one test run, each in a suite of its own."""
    wanted = {
        item.callspec.params["name"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
        if item.path == Path(__file__)
    }
    parallel = ["-n", "3", "--dist", "loadscope"] if importlib.util.find_spec("xdist") else []
    arguments = [str(BROKEN / "suites.py"), "-q", "-p", "no:cacheprovider", *parallel, *options]
    arguments += ["-p", "flowmesh_core.testing.report", f"--flowmesh-report={folder / 'checks'}"]
    if wanted < EXPECTED.keys():
        arguments += ["-k", " or ".join(f"TestBroken{name}" for name in wanted)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr
    found: dict[str, Any] = {}
    for check in json.loads((folder / "checks").read_text()):
        found.setdefault(check["suite"].removeprefix("TestBroken"), []).append(check)
    return found


@pytest.fixture(scope="module")
def expected_checks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Reports:
    """What the one check says that should reject each."""
    return examine(request, tmp_path_factory.mktemp("expected"), "--expected-alone")


@pytest.fixture(scope="module")
def all_checks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """What every check says of each."""
    return examine(request, tmp_path_factory.mktemp("all"))


@pytest.mark.parametrize("name", EXPECTED)
def test_the_check_for_it_rejects_it_and_names_the_fault(
    name: str, expected_checks: Reports
) -> None:
    clause, told = EXPECTED[name]
    (check,) = expected_checks[name]
    assert (check["clause"], check["outcome"]) == (clause, "failed")
    assert re.search(told, check["reason"]), check["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_no_other_check_rejects_it(name: str, all_checks: Reports) -> None:
    checks = all_checks[name]
    assert len(checks) > 30
    failed = {check["clause"]: check["reason"] for check in checks if check["outcome"] == "failed"}
    assert list(failed) == [EXPECTED[name][0]], failed


def test_most_clauses_have_an_executor_that_breaks_them() -> None:
    from flowmesh_core.testing import ExecutorSuite

    names = [name for name in dir(ExecutorSuite) if name.startswith("test_")]
    checks = [getattr(ExecutorSuite, name) for name in names]
    clauses = {mark.args[0] for check in checks for mark in check.pytestmark}
    # Only the core can break it: it computes equal members once.
    assert clauses - {clause for clause, _ in EXPECTED.values()} == {"identical"}
