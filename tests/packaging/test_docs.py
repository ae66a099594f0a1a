"""The pages tell the truth: code runs, commands parse, links lead somewhere, tables match."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import attrs
import click
import pytest
import redis
import yaml

import flowmesh_core.cli as command_line
from flowmesh_core import Capability, ExecutorInfo, RunContext, config, errors, events, hookspecs
from flowmesh_core.config import child_environment, load_settings
from flowmesh_core.contract import parse_control
from flowmesh_core.local_run import plan
from flowmesh_core.places.crash import explain_exit
from flowmesh_core.plugins import load_plugins
from flowmesh_core.resources import parse_resources
from flowmesh_core.testing import RedisServer, WorkerProcess, wait_for

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md"), *ROOT.glob("plugins/*/*.md")])
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
# Parts that are planned; a row of faults.md may wait for one of them and for nothing else.
PLANNED = (
    *("durable queue", "server", "archives", "clean-up", "metrics"),
    *("training", "agent", "vllm", "transformers", "shell", "ws", "grpc"),
)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path, language: str) -> list[tuple[str, str]]:
    """Return title and content of each block of a language."""
    return [(title, code) for lang, title, code in FENCE.findall(text_of(path)) if lang == language]


def rows(path: Path, heading: str = "") -> list[list[str]]:
    """Return the cells of every table row below a heading; of the whole page without one."""
    text = text_of(path)
    if heading:
        text = re.split(rf"^#+ {re.escape(heading)}$", text, flags=re.MULTILINE)[1]
        text = re.split(r"^#+ ", text, flags=re.MULTILINE)[0]
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def first_names(table: list[list[str]]) -> list[str]:
    """Return what stands in backticks in the first cells, arguments and ``ctx.`` left out."""
    found = [re.findall(r"`(?:ctx\.)?(\w[\w.]*)(?:\([^`]*\))?`", row[0]) for row in table]
    return [name for names in found for name in names]


# Links.


def slug(heading: str) -> str:
    plain = re.sub(r"[`*]", "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    text = FENCE.sub("", text_of(path))
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(page))):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            assert anchor in anchors(path), f"{name_of(page)} links to {target}"


def test_the_index_names_every_page() -> None:
    for page in DOCS.glob("*.md"):
        if page.name not in ("index.md", "faults.md"):
            assert f"({page.name})" in text_of(DOCS / "index.md"), page.name


# Code.


def page_module(page: Path) -> str:
    """Join the python blocks that are not files of a packaged plugin."""
    return "\n\n".join(code for title, code in blocks(page, "python") if "/" not in title)


WITH_CODE = [page for page in PAGES if page_module(page)]


def run(*arguments: str, cwd: Path, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    (tmp_path / "page.py").write_text(page_module(page))
    run("-W", "error", "-c", "import page", cwd=tmp_path)


def test_pages_that_teach_have_code() -> None:
    taught = {page.name for page in WITH_CODE}
    assert {"quickstart.md", "writing-an-executor.md", "hooks.md"} <= taught


@pytest.mark.parametrize("page", ["quickstart.md", "writing-an-executor.md"])
def test_the_files_of_a_page_run_as_it_says(page: str, tmp_path: Path) -> None:
    files = [*blocks(DOCS / page, "python"), *blocks(DOCS / page, "yaml")]
    for title, code in files:
        if title and "/" not in title:
            (tmp_path / title).write_text(code)
    command = next(
        line for line in command_lines(DOCS / page) if line.endswith("shout.yaml --plugin shout.py")
    )
    (report,) = json.loads(
        run("-m", "flowmesh_core", *shlex.split(command)[1:], "--json", cwd=tmp_path)
    )
    assert report["ok"] is True
    assert "HELLO" in json.dumps(report["result"])


def test_the_two_stages_of_the_quickstart_pass_a_value_on(tmp_path: Path) -> None:
    code = dict(blocks(DOCS / "quickstart.md", "yaml"))["two.yaml"]
    (tmp_path / "two.yaml").write_text(code)
    reports = json.loads(run("-m", "flowmesh_core", "run", "two.yaml", "--json", cwd=tmp_path))
    assert [report["ok"] for report in reports] == [True, True]
    assert reports[1]["result"]["echo"]["message"] == "it said world"


def test_the_distribution_of_the_page_is_a_plugin_that_passes_its_own_tests(tmp_path: Path) -> None:
    page = DOCS / "writing-an-executor.md"
    files = {
        title: code for kind in ("python", "toml", "yaml") for title, code in blocks(page, kind)
    }
    packaged = [title for title in files if "/" in title]
    assert len(packaged) == 3
    for title in [*packaged, "pyproject.toml", "shout.yaml"]:
        path = tmp_path / "project" / title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files[title])
    project, site = tmp_path / "project", str(tmp_path / "site")
    run("-m", "hatchling", "build", "-t", "wheel", cwd=project)
    (wheel,) = (project / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    listed = json.loads(
        run("-m", "flowmesh_core", "plugins", "list", "--json", cwd=project, PYTHONPATH=site)
    )
    (row,) = [row for row in listed if row["name"] == "acme-shout"]
    assert (row["state"], row["distribution"]) == ("loaded", "acme-shout")
    (report,) = json.loads(
        run("-m", "flowmesh_core", "run", "shout.yaml", "--json", cwd=project, PYTHONPATH=site)
    )
    folder = project / report["folder"]
    assert (folder / "shouted.jsonl").read_text().splitlines()[1] == '{"said": "WORLD"}'
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", cwd=project, PYTHONPATH=site)


def test_the_test_of_the_page_passes(tmp_path: Path) -> None:
    code = dict(blocks(WRITING, "python"))
    for title in ("shout.py", "test_shout.py"):
        (tmp_path / title).write_text(code[title])
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_shout.py", cwd=tmp_path)
    assert "1 passed" in done


def test_the_hooks_page_is_itself_a_plugin_with_every_hook(tmp_path: Path) -> None:
    path = tmp_path / "all_hooks.py"
    path.write_text(page_module(DOCS / "hooks.md"))
    plugins = load_plugins(load_settings({}), files=[path])
    (report,) = [report for report in plugins.reports if report.name == "all_hooks"]
    assert set(report.hooks) == HOOKS
    plugins.observe("flowmesh_before_task", task_id="t", task_type="x", metadata={})
    assert plugins.heartbeat_fields() == {"acme_started": 1, "acme_failures": 0}
    with pytest.raises(errors.InputError, match="mount the share"):
        plugins.model_sources()["acme"]({"identifier": "../x"}, offline=True)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_data_on_a_page_is_well_formed(page: Path) -> None:
    for _, code in blocks(page, "json"):
        assert isinstance(json.loads(code), dict)
    for _, code in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(code), dict)
    for title, code in blocks(page, "yaml"):
        if title:
            assert plan(yaml.safe_load(code)).tasks


# Commands.


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


# Tables.

HOOKS = {name for name in vars(hookspecs) if name.startswith("flowmesh_")}
ERRORS: list[type[errors.FlowmeshError]] = [getattr(errors, name) for name in errors.__all__]
EVENTS = {value for name, value in vars(events).items() if isinstance(value, str) and name == value}
MEMBERS = {field.name for field in attrs.fields(RunContext)} | {
    name for name in vars(RunContext) if not name.startswith("_")
}
WRITING = DOCS / "writing-an-executor.md"
# Where the second table below that heading begins.
CAPABILITIES = 1 + len(attrs.fields(ExecutorInfo))


@pytest.mark.parametrize(
    ("described", "there"),
    [
        (
            first_names(rows(WRITING, "ExecutorInfo")[1:CAPABILITIES]),
            {f.name for f in attrs.fields(ExecutorInfo)},
        ),
        (
            first_names(rows(WRITING, "ExecutorInfo")[CAPABILITIES:]),
            {item.value for item in Capability},
        ),
        (first_names(rows(WRITING, "RunContext")), MEMBERS),
        (first_names(rows(DOCS / "errors.md")), {cls.code for cls in ERRORS}),
        (first_names(rows(DOCS / "contract.md", "Events")), EVENTS),
        (re.findall(r"^## (\w+)$", text_of(DOCS / "hooks.md"), re.MULTILINE), HOOKS),
    ],
    ids=["ExecutorInfo", "capabilities", "RunContext", "errors", "events", "hooks"],
)
def test_a_table_describes_exactly_what_there_is(described: list[str], there: set[str]) -> None:
    assert len(there) > 4
    assert sorted(described) == sorted(there)


@pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)
def test_an_error_has_its_class_and_says_whether_to_try_again(
    cls: type[errors.FlowmeshError],
) -> None:
    table = {row[0].strip("`"): row for row in rows(DOCS / "errors.md")}
    code, name, retriable, meaning, _ = table[cls.code]
    assert name == f"`{cls.__name__}`"
    assert retriable == ("yes" if cls.retriable else "no")
    assert meaning, code


def crash_rows() -> list[list[str]]:
    return rows(DOCS / "errors.md", "Crashes")[1:]


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


def test_the_variables_that_a_child_keeps_are_those_of_the_table() -> None:
    table = rows(DOCS / "configuration.md", "What an executor's process sees")[1:]
    told = [name for row in table[:-1] for name in re.findall(r"`([A-Z_]+\*?)`", row[1])]
    assert len(told) > 30
    environ = {name.replace("*", "X"): "kept" for name in told}
    withheld = {
        "HF_TOKEN": "",
        "CUDA_KEY": "",
        "REDIS_URL": "",
        "FLOWMESH_OTHER_X": "",
        "EDITOR": "",
    }
    kept = child_environment(plugin="x", environ=environ | withheld)
    assert kept.keys() - {"CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"} == environ.keys()
    page = text_of(DOCS / "configuration.md")
    assert all(f"`{name}*`" in page for name in config._CHILD_PREFIXES)
    assert all(f"`{name}`" in page for name in config._CHILD_NAMES if name.isupper())


def test_the_architecture_shows_the_layers_that_are_checked_and_every_file_of_a_place() -> None:
    page = text_of(DOCS / "architecture.md")
    checked = ast.parse(text_of(ROOT / "tests" / "packaging" / "test_layers.py")).body
    (layers,) = [
        ast.literal_eval(node.value)
        for node in checked
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS"
    ]
    (shown,) = re.findall(r"^```\n(errors\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    plain = [line.replace("/", "").split() for line in shown.splitlines()]
    assert list(map(set, plain)) == [set(line.split()) - {"__main__"} for line in layers]
    described = re.findall(
        r"`(\w+\.py)`", "".join(row[0] for row in rows(DOCS / "architecture.md", "Processes"))
    )
    files = {path.name for path in (ROOT / "flowmesh_core" / "places").glob("*.py")}
    assert set(described) == files - {"__init__.py"}


def test_every_field_of_a_declaration_has_its_default() -> None:
    told = {row[0].strip("`"): row[1] for row in rows(WRITING, "ExecutorInfo")[1:CAPABILITIES]}
    for field in attrs.fields(ExecutorInfo):
        assert (told[field.name] == "required") == (field.default is attrs.NOTHING), field.name


def test_every_hook_has_an_example_of_its_own() -> None:
    for section in re.split(r"^## ", text_of(DOCS / "hooks.md"), flags=re.MULTILINE)[1:]:
        name = section.split()[0]
        assert re.search(rf"^@hookimpl\ndef {name}\(", section, re.MULTILINE), name


def test_every_field_of_serve_is_in_the_contract() -> None:
    from flowmesh_core import ServeParams, ServeResult

    page = DOCS / "contract.md"
    told = [re.sub("`", "", row[0]) for row in rows(page, "Other task types")]
    assert told[-len(ServeParams.model_fields) :] == list(ServeParams.model_fields)
    shown = [json.loads(code) for _, code in blocks(page, "json")]
    assert list(ServeResult.model_fields) in [list(result) for result in shown]


def test_what_the_contract_says_of_resources_is_read_and_nothing_else() -> None:
    page = DOCS / "contract.md"
    (example,) = [
        block["resources"]
        for _, code in blocks(page, "yaml")
        if "resources" in (block := yaml.safe_load(code))
    ]
    request = parse_resources(example, where="the page")
    assert (request.cpu, request.memory_bytes, request.gpu_count) == (4, 16 << 30, 1)
    assert (request.gpu_type, request.gpu_memory_bytes) == ("a100", 40 << 30)
    told = first_names(rows(page, "Resources and priority"))
    gpu = [f"gpu.{name}" for name in example["hardware"]["gpu"]]
    assert told == [name for name in example["hardware"] if name != "gpu"] + gpu


def test_every_inference_field_is_in_the_contract_with_its_default() -> None:
    from flowmesh_core import InferenceParams

    told = {
        name: row[1]
        for row in rows(DOCS / "contract.md", "Inference")
        for name in re.findall(r"`(\w+)`", row[0])
    }
    del told["inference"]
    assert set(told) == set(InferenceParams.model_fields)
    for name, field in InferenceParams.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, bool):
            assert told[name].strip("`") == str(default).lower()
        elif isinstance(default, (int, float, str)):
            assert told[name].strip("`") == f"{default:g}" if name != "prompt_format" else default


# Faults.

NOTHING = "\N{EN DASH}"
FAULTS = [row for row in rows(DOCS / "faults.md") if row[0] != "#"]


@cache
def shown_by(path: Path) -> set[str]:
    """Return ``test_x`` and ``TestY::test_x`` of a file, without importing it."""
    found: set[str] = set()
    for node in ast.parse(text_of(path)).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            methods = (item for item in node.body if isinstance(item, ast.FunctionDef))
            found |= {f"{node.name}::{method.name}" for method in methods}
    return found


def test_every_fault_has_one_row() -> None:
    earlier = [str(number) for number in range(1, 63)]
    second, third = [f"T{n}" for n in range(1, 14)], [f"F{n}" for n in range(1, 20)]
    assert [row[0] for row in FAULTS] == [*earlier, *second, *third]


@pytest.mark.parametrize("row", FAULTS, ids=lambda row: row[0])
def test_a_fault_is_shown_absent_or_waits_for_a_planned_part(row: list[str]) -> None:
    _, fault, claim, shown = row
    tests = re.findall(r"`([^`]+)`", shown)
    waits = re.search(r"\bwith (.+)$", shown)
    assert fault
    assert (claim != NOTHING) == bool(tests), "what is claimed needs a test"
    assert tests or waits
    if waits:
        assert waits[1] in PLANNED
    for test in tests:
        file, _, name = test.partition("::")
        assert (ROOT / file).is_file(), test
        assert name in shown_by(ROOT / file), test
