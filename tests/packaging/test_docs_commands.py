"""Commands on the pages are commands: they parse, and Redis and a worker take them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import pytest
import redis
from pages import DOCS, FENCE, PAGES, ROOT, blocks, text_of

import flowmesh_core.cli as command_line
from flowmesh_core.contract import parse_control
from flowmesh_core.testing import RedisServer, WorkerProcess, wait_for


def split_lines(code: str) -> list[str]:
    return re.split(r"(?<!\\)\n", code)


def command_lines(page: Path) -> Iterator[str]:
    """Yield every ``flowmesh ...`` of shell blocks and of inline code."""
    for _, code in blocks(page, "bash"):
        for line in split_lines(code):
            for part in line.replace("\\\n", " ").split("&&"):
                words = shlex.split(part, comments=True)
                while words and re.match(r"[A-Z_]+=", words[0]):
                    words.pop(0)
                if words and words[0].endswith("flowmesh"):
                    yield shlex.join(["flowmesh", *words[1:]])
    yield from re.findall(r"`(flowmesh [a-z-][^`]*)`", FENCE.sub("", text_of(page)))


COMMANDS = sorted({line for page in PAGES for line in command_lines(page)})


def touch_files(words: list[str], folder: Path) -> None:
    for word in words:
        if Path(word).suffix in (".yaml", ".py") or word in ("FILE", "FILE.py"):
            path = folder / word
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


def parse_command(words: list[str]) -> None:
    """Parse without running; whatever is wrong raises ``click.UsageError``."""
    command: Any = command_line._cli
    context = click.Context(command, info_name="flowmesh")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(context, words[0])
        if found is None:
            raise click.UsageError(f"no command {words[0]!r}")
        command, words = found, words[1:]
        context = click.Context(command, info_name=command.name, parent=context)
    # The name alone is prose; --help and --version print and end.
    if words and words[0] not in ("--help", "--version"):
        command.make_context(command.name, list(words), parent=context)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_line_on_the_pages_parses(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)[1:]
    touch_files(words, tmp_path)
    parse_command(words)


@pytest.mark.parametrize(
    "line", ["train", "run --fast FILE", "plugins remove x", "run --json", "check FILE extra"]
)
def test_a_command_line_that_is_wrong_does_not_parse(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    touch_files(line.split(), tmp_path)
    with pytest.raises(click.UsageError, match=r"."):
        parse_command(line.split())


def test_every_command_is_shown_somewhere() -> None:
    shown = {line.split()[1] for line in COMMANDS if len(line.split()) > 1}
    assert set(command_line._COMMANDS) <= shown


# What is said to Redis.


def redis_commands(*verb: str) -> list[list[str]]:
    """Return the words of each such command of operations.md, without ``redis-cli``."""
    code = "\n".join(code for _, code in blocks(DOCS / "operations.md", "bash"))
    lines = (shlex.split(line.replace("\\\n", " "), comments=True) for line in split_lines(code))
    commands = [words[1:] for words in lines if words[:1] == ["redis-cli"]]
    return [words for words in commands if tuple(words[: len(verb)]) == verb]


def test_the_orders_of_the_page_are_orders() -> None:
    orders = [parse_control(body) for _, _, body in redis_commands("PUBLISH")]
    assert [order.type for order in orders] == ["CANCEL", "DRAIN"]


def test_the_rights_of_the_page_are_enough_for_a_worker(
    flowmesh_redis_server: RedisServer, tmp_path: Path
) -> None:
    server = flowmesh_redis_server
    server.start()
    server.flush()
    (rights,) = redis_commands("ACL", "SETUSER")
    (drain,) = [words for words in redis_commands("PUBLISH") if "DRAIN" in words[2]]
    url = f"redis://gpu-1:secret@{urlsplit(server.url).netloc}/0"
    rough = ROOT / "tests" / "executors" / "rough.py"
    task = {"spec": {"taskType": "rough", "do": "print_lines", "count": 1}}
    message = {"task_id": "75de", "task": task, "assigned_worker": "gpu-1"}
    with (
        redis.Redis.from_url(server.url, decode_responses=True) as client,
        client.pubsub(ignore_subscribe_messages=True) as heard,
    ):
        client.execute_command(*rights)
        client.execute_command("ACL", "LOG", "RESET")
        heard.subscribe("tasks.events", "tasks.logs:75de")
        worker = WorkerProcess(
            url, tmp_path / "results", worker_id="gpu-1", arguments=("--plugin", str(rough))
        )
        try:
            with worker:
                wait_for(lambda: client.hget("worker:gpu-1", "status") == "IDLE")
                client.publish("tasks", json.dumps(message))
                said: list[str] = []

                def listen() -> bool:
                    if got := heard.get_message(timeout=0.1):
                        said.append(json.loads(got["data"])["type"])
                    return "TASK_SUCCEEDED" in said

                wait_for(listen)
                assert said == ["TASK_STARTED", "TASK_LOG", "TASK_SUCCEEDED"]
                client.flushdb()
                wait_for(lambda: client.sismember("workers:ids", "gpu-1"))
                client.execute_command(*drain)
                assert worker.wait() == 0
            assert client.execute_command("ACL", "LOG") == []
        finally:
            client.execute_command("ACL", "DELUSER", "gpu-1")
