"""What docs/errors.md says of each error is so: class, whether to try again, and the very words."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from generated import ERRORS, OUT_OF_MEMORY
from pages import DOCS, rows_by_name, sections, table

from flowmesh_core import (
    Executor,
    ExecutorInfo,
    ExecutorRegistry,
    NetworkPolicy,
    Outcome,
    RunContext,
    errors,
    load_driver,
    load_plugins,
    load_settings,
)
from flowmesh_core.artifacts.manifest import build_manifest
from flowmesh_core.artifacts.unpack import UnpackLimits, unpack
from flowmesh_core.contract import parse_envelope
from flowmesh_core.merge import share_out
from flowmesh_core.places.crash import explain_exit
from flowmesh_core.testing import RedisServer, run_task

PAGE = DOCS / "errors.md"
TABLE = rows_by_name(sections(PAGE, 1)["Errors"])
SAYS = {code: cells[0] for code, cells in rows_by_name(sections(PAGE)["What they say"]).items()}
LIST = {"type": "list", "items": ["a"]}


class Does(Executor):
    """Does what ``spec.do`` says."""

    def run(self, ctx: RunContext) -> Outcome:
        match ctx.raw_spec.get("do"):
            case "fail":
                raise ValueError("no voice 'bass' in this model")
            case "cancel":
                ctx.is_cancelled = lambda: True
                ctx.check()
            case "wait":
                while True:
                    ctx.check()
                    time.sleep(0.01)
        return Outcome(result={"ok": True})


INFO = ExecutorInfo(
    name="acme.speak", task_types={"acme.speak"}, target=f"{__name__}:Does", inputs={"rows"}
)
NEEDY = ExecutorInfo(
    name="acme.sing",
    task_types={"acme.sing"},
    target="acme_sing:Sings",
    needs=["acme_engine"],
    install="pip install 'acme-sing[engine]'",
)


def run(**spec: Any) -> None:
    error = run_task(Does, spec, info=INFO, task_id="75de").error
    assert error is not None
    raise error


def share_nothing() -> None:
    body = {
        "task_id": "a",
        "task": {"spec": {"taskType": "echo"}},
        "merged_children": [{"task_id": "b", "spec": {}}],
    }
    share_out(parse_envelope(body), {})


def registry() -> ExecutorRegistry:
    return ExecutorRegistry([INFO, NEEDY])


def end(**how: Any) -> None:
    raise explain_exit(what="executor 'acme.speak'", **how)


def unpack_damaged(folder: Path) -> None:
    (folder / "model.tar.gz").write_bytes(b"<html>")
    unpack(folder / "model.tar.gz", folder / "out", limits=UnpackLimits())


def load_broken(folder: Path) -> None:
    (folder / "acme.py").write_text("import acme_engine\n")
    load_plugins(load_settings({}, strict_plugins=True), files=[folder / "acme.py"])


def deliver_to_nobody(folder: Path) -> None:
    document = {"spec": {"taskType": "echo", "output": {"destination": NOBODY}}}
    (folder / "echo.yaml").write_text(json.dumps(document))
    done = command("run", "echo.yaml", "--json", cwd=folder, FLOWMESH_DELIVERY_RETRIES="0")
    (report,) = json.loads(done.stdout)
    assert report["code"] == "artifact.upload"
    raise errors.UploadError(report["error"])


def command(*arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flowmesh_core", *arguments],
        cwd=cwd,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


NOBODY = {"type": "http", "url": "http://127.0.0.1:9/results"}
RAISE: Mapping[str, Callable[[Path], object]] = {
    "config": lambda _: load_settings({"LOG_LEVEL": "loud"}),
    "contract": lambda _: parse_envelope({"task_id": "75de", "task": {"spec": {"timeoutSec": -1}}}),
    "merge": lambda _: share_nothing(),
    "plugin": lambda _: load_driver("flowmesh.transports", "pigeon"),
    "plugin.load": load_broken,
    "plugin.conflict": lambda _: registry().register(INFO),
    "executor.unknown_task_type": lambda _: registry().resolve("acme.speek", {}),
    "executor.unavailable": lambda _: registry().resolve("acme.sing", {}),
    "executor.failed": lambda _: run(do="fail"),
    "deadline": lambda _: run(do="wait", timeoutSec=0.1),
    "cancelled": lambda _: run(do="cancel"),
    "crash": lambda _: end(signal="SIGSEGV"),
    "crash.out_of_memory": lambda _: end(code=1, output_tail="CUDA out of memory."),
    "resource": lambda _: run(resources={"hardware": {"cpu": 4096}}),
    "input": lambda _: run(data={"type": "list"}),
    "artifact": lambda _: NetworkPolicy().check("http://169.254.169.254/latest"),
    "artifact.manifest": lambda folder: build_manifest("75de", folder / "gone"),
    "artifact.archive": unpack_damaged,
    "artifact.upload": deliver_to_nobody,
}

# Groups of others; the core raises what is below them.
GROUPS = {"flowmesh", "executor"}


def says(code: str, text: str) -> bool:
    """Return whether a text is that of the page, where dots stand for anything."""
    parts = map(re.escape, SAYS[code].strip("`").split("..."))
    return bool(re.fullmatch(".*".join(parts), text))


def test_every_code_has_its_row_and_its_words() -> None:
    assert set(TABLE) == {*ERRORS, OUT_OF_MEMORY}
    assert set(SAYS) == {*RAISE, "transport"} == set(TABLE) - GROUPS


@pytest.mark.parametrize("code", TABLE)
def test_an_error_has_its_class_and_says_whether_to_try_again(code: str) -> None:
    cls = ERRORS.get(code, errors.CrashError)
    name, retriable, meaning, _ = TABLE[code]
    assert name == f"`{cls.__name__}`"
    assert retriable == ("yes" if cls.retriable else "no")
    assert meaning


@pytest.mark.parametrize("code", RAISE)
def test_an_error_says_what_the_page_says(code: str, tmp_path: Path) -> None:
    with pytest.raises(errors.FlowmeshError, match=r".") as caught:
        RAISE[code](tmp_path)
    assert caught.value.code == code
    assert says(code, str(caught.value)), caught.value


def test_a_queue_that_refuses_says_what_the_page_says(
    flowmesh_redis_server: RedisServer, tmp_path: Path
) -> None:
    flowmesh_redis_server.start()
    url = flowmesh_redis_server.url.replace("redis://", "redis://nobody:wrong@")
    done = command("worker", cwd=tmp_path, REDIS_URL=url)
    assert done.returncode == 2
    assert says("transport", done.stderr.splitlines()[-1].removeprefix("error: "))


def crash_rows() -> list[list[str]]:
    return table(sections(PAGE)["Crashes"])[1:]


def test_a_crash_is_tried_again_as_the_table_says() -> None:
    told = {name: row[2] for row in crash_rows() for name in re.findall(r"SIG[A-Z]+", row[0])}
    assert len(told) > 9
    for name, retriable in told.items():
        crash = explain_exit(what="it", signal=name)
        assert (crash.code, crash.retriable) == ("crash", retriable == "yes"), name
    for beginning, code in (("exited with 0", 0), ("exited with a code", 3)):
        (row,) = [row for row in crash_rows() if row[0].startswith(beginning)]
        assert explain_exit(what="it", code=code).retriable == (row[2] == "yes")
    (row,) = [row for row in crash_rows() if row[0].startswith("said at its end")]
    crash = explain_exit(what="it", code=1, output_tail="CUDA out of memory.")
    assert (f"`{crash.code}`", crash.retriable) == (row[1], row[2] == "yes")
