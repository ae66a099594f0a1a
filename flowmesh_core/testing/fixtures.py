"""Pytest fixtures, registered as the ``flowmesh`` plugin; heavy imports wait for their use."""

# ruff: noqa: PLC0415 - every pytest run imports this file, so redis has to cost it nothing

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

import pytest

if TYPE_CHECKING:  # for the reason above, not to hide a cycle
    from flowmesh_core.testing.clock import ManualClock
    from flowmesh_core.testing.orchestrator import StandInOrchestrator
    from flowmesh_core.testing.redis_server import RedisServer
    from flowmesh_core.testing.subject import Subject

__all__ = [
    "flowmesh_clock",
    "flowmesh_orchestrator",
    "flowmesh_redis_server",
    "flowmesh_redis_url",
    "flowmesh_subject",
]

DATABASES = range(1, 16)  # never 0, which is where an operator's own data usually are


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker by which checks of a suite name their clause."""
    config.addinivalue_line(
        "markers", "flowmesh_clause(name): the row of docs/conformance.md that a check is for"
    )


@pytest.fixture(scope="class")
def flowmesh_subject(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Subject]:
    """The executor that a suite examines; its runs are shared by the suite's checks."""
    from flowmesh_core.testing.subject import Subject

    with Subject(request.cls, tmp_path_factory.mktemp("kit")) as subject:
        yield subject


@pytest.fixture
def flowmesh_clock() -> ManualClock:
    """A clock at 0 seconds that only the test moves, such as for ``RunContext.clock``."""
    from flowmesh_core.testing.clock import ManualClock

    return ManualClock()


@pytest.fixture(scope="session")
def flowmesh_redis_server() -> Iterator[RedisServer]:
    """A running server of this test session; a test may stop it and start it again."""
    from flowmesh_core.errors import ResourceError
    from flowmesh_core.testing.redis_server import RedisServer

    try:
        server = RedisServer()
    except ResourceError as exc:
        if _variable("CI"):
            pytest.fail(str(exc))
        pytest.skip(str(exc))
    with server:
        yield server


@pytest.fixture
def flowmesh_redis_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of an empty database, emptied again afterwards.

    It is one of ``FLOWMESH_TEST_REDIS_URL``, when that is set, else of ``flowmesh_redis_server``.
    Pub/sub channels know no databases: run one test session at a time against a shared server.
    """
    import redis

    shared = _variable("FLOWMESH_TEST_REDIS_URL")
    if shared:
        url = _empty_database(shared)
        yield url
        with redis.Redis.from_url(url) as client:
            client.flushdb()
        return
    server: RedisServer = request.getfixturevalue("flowmesh_redis_server")
    server.start()
    server.flush()
    yield server.url


@pytest.fixture
def flowmesh_orchestrator(flowmesh_redis_url: str, tmp_path: Path) -> Iterator[StandInOrchestrator]:
    """A started stand-in for the earlier orchestrator, with its own results folder."""
    from flowmesh_core.testing.orchestrator import StandInOrchestrator

    with StandInOrchestrator(flowmesh_redis_url, tmp_path / "orchestrator-results") as host:
        yield host


def _variable(name: str) -> str:
    return os.environ.get(name, "")  # noqa: TID251 - set for a test run, not for a worker


def _empty_database(server_url: str) -> str:
    """Address of the first database that holds nothing, so that emptying it removes only ours."""
    import redis

    for number in DATABASES:
        url = urlunsplit(urlsplit(server_url)._replace(path=f"/{number}"))
        with redis.Redis.from_url(url) as client:
            if client.dbsize() == 0:
                return url
    pytest.fail(
        f"FLOWMESH_TEST_REDIS_URL: databases {DATABASES[0]} to {DATABASES[-1]} all hold keys; "
        "empty one of them or unset the variable"
    )
