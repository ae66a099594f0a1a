"""The executor with real processes: a stand-in that is started as vLLM's server would be."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest
from flowmesh_vllm import serve, server
from flowmesh_vllm.serve import VllmServer
from flowmesh_vllm.spec import VllmServeSettings, VllmServeSpec

from flowmesh_core import (
    AdapterRef,
    CancelledError,
    DeadlineError,
    ExecutionError,
    InputError,
    Inputs,
    ModelRef,
    RunContext,
    ServeResult,
)

# Started in place of vLLM: does what its variable says, beside a child that no SIGTERM ends.
STAND_IN = """
import argparse, json, os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

print("loading", flush=True)
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", stubborn])
notes = {"pids": [os.getpid(), child.pid], "words": sys.argv[1:], "group": os.getpgid(0)}
notes["environment"] = {k: v for k, v in os.environ.items() if k.startswith("VLLM")}
with open(os.environ["NOTES"] + ".part", "w") as file:
    json.dump(notes, file)
os.rename(os.environ["NOTES"] + ".part", os.environ["NOTES"])
does = os.environ["DOES"]
if does == "fails":
    sys.exit(3)
if does == "is killed":
    os.kill(os.getpid(), signal.SIGKILL)
if does == "is stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if does == "hangs":
    time.sleep(600)

parser = argparse.ArgumentParser()
parser.add_argument("--host")
parser.add_argument("--port", type=int)
given = parser.parse_known_args()[0]
answers = iter([503, 200])

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        key = os.environ.get("VLLM_API_KEY")
        allowed = not key or self.headers["Authorization"] == "Bearer " + key
        known = self.path == "/v1/models"
        self.send_response(next(answers, 200) if allowed and known else 401)
        self.end_headers()
    def log_message(self, *args):
        pass

HTTPServer((given.host, given.port), Handler).serve_forever()
"""
ENGINE_ARGUMENTS = """
class EngineArgs:
    model: str
    lora_target_modules: list[str]
    seed: int
"""


@attrs.define
class Service:
    """A run of ``serve`` in a thread of its own, and what it says of itself."""

    folder: Path
    inputs: Inputs
    notes_path: Path
    does: Callable[[str], None]
    options: dict[str, Any] = attrs.field(factory=dict)
    settings: VllmServeSettings | None = None
    time_s: float = 20  # that the task has
    passed_s: float = 0  # beside what really passes
    lines: list[str] = attrs.field(factory=list)
    on_ready: Callable[[ServeResult], object] = lambda _result: None
    ttl_s: float | None = None
    cancelled: threading.Event = attrs.field(factory=threading.Event)
    ready: queue.Queue[ServeResult] = attrs.field(factory=queue.Queue)
    work: Future[Mapping[str, Any]] = attrs.field(factory=Future)

    @contextmanager
    def running(self, **params: Any) -> Iterator[Service]:
        """Serve in the background, whether it gets ready or not; stopped at the end."""
        self.cancelled.clear()
        with ThreadPoolExecutor(1) as pool:
            self.work = pool.submit(VllmServer().run, self.context(params))
            try:
                yield self
            finally:
                self.cancelled.set()

    @contextmanager
    def up(self, **params: Any) -> Iterator[ServeResult]:
        """Serve, and give the result as soon as the service says that it is ready."""
        with self.running(**params):
            yield self.wait_until_ready()

    def wait_until_ready(self) -> ServeResult:
        while True:
            try:
                return self.ready.get(timeout=0.02)
            except queue.Empty:
                if self.work.done():
                    self.work.result()
                    pytest.fail("it ended without being ready")

    def stop(self) -> Mapping[str, Any]:
        self.cancelled.set()
        return self.result()

    def result(self) -> Mapping[str, Any]:
        return self.work.result(20)

    def notes(self) -> Any:
        """Return what the server wrote of itself, as soon as it has."""
        assert until(self.notes_path.exists), "the server was never started"
        return json.loads(self.notes_path.read_bytes())

    def note(self, result: Any, ttl_s: float | None) -> None:
        self.ttl_s = ttl_s
        self.on_ready(ServeResult.model_validate(result))
        self.ready.put(ServeResult.model_validate(result))

    def context(self, params: Any) -> RunContext:
        raw = {"taskType": "serve", "model": {"vllm": self.options}, "serve": params}
        return RunContext(
            task_id="task-1",
            task_type="serve",
            spec=VllmServeSpec.model_validate(raw),
            raw_spec=raw,
            folder=self.folder,
            clock=lambda: time.monotonic() + self.passed_s,
            settings=self.settings,
            deadline=time.monotonic() + self.time_s,
            inputs=self.inputs,
            is_cancelled=self.cancelled.is_set,
            on_log=lambda level, message: self.lines.append(f"{level} {message}"),
            on_ready=self.note,
        )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"num_attention_heads": 2}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def service(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    package = tmp_path / "path" / "vllm"
    for name in ("entrypoints/openai/api_server.py", "engine/arg_utils.py"):
        file = package / name
        file.parent.mkdir(parents=True)
        file.write_text(STAND_IN if "api" in name else ENGINE_ARGUMENTS)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(package.parent)  # where its arguments are looked up
    monkeypatch.setenv("PYTHONPATH", str(package.parent))  # where it is started
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.setenv("DOES", "serves")
    monkeypatch.setenv("VLLM_API_KEY", "sk-of-another-task")
    folder = tmp_path / "attempt"
    folder.mkdir()
    inputs = Inputs(model=ModelRef(identifier="acme/small", path=model, format="hf"))
    return Service(
        folder, inputs, tmp_path / "notes", lambda what: monkeypatch.setenv("DOES", what)
    )


def until(true: Callable[[], bool], within_s: float = 10) -> bool:
    give_up_s = time.monotonic() + within_s
    while not (found := true()) and time.monotonic() < give_up_s:
        time.sleep(0.02)
    return found


def is_gone(pid: int) -> bool:
    """Whether a process has ended; it may wait for its parent to take note of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def all_gone(service: Service) -> bool:
    return all(map(is_gone, service.notes()["pids"]))


def words_of(service: Service, *options: str) -> list[str]:
    return [word for word in service.notes()["words"] if word.startswith(options)]


def test_it_is_ready_when_the_server_has_answered_and_says_where_it_is(service: Service) -> None:
    statuses: list[int] = []
    service.on_ready = lambda result: statuses.append(
        httpx.get(f"{result.endpoint}/models").status_code
    )
    with service.up(ttl_s=90) as result:
        assert statuses == [200]
        assert (result.model, service.ttl_s) == ("acme/small", 90)
        port = int(result.endpoint.rpartition(":")[2].partition("/")[0])
        assert result.endpoint == f"http://127.0.0.1:{port}/v1"
        assert words_of(service, "--host", "--port", "--served") == [
            *("--host=127.0.0.1", f"--port={port}", "--served-model-name=acme/small"),
        ]
        assert result.expires_at is not None
    assert service.lines == [f"info serving acme/small at {result.endpoint}"]
    assert service.result()["endpoint"] == result.endpoint


def test_what_it_prints_is_printed_here(
    service: Service, capfd: pytest.CaptureFixture[str]
) -> None:
    with service.up():
        assert "loading" in capfd.readouterr().out


def test_a_cancel_ends_the_server_and_all_that_it_started(service: Service) -> None:
    with service.up():
        assert not any(map(is_gone, service.notes()["pids"]))
        assert service.notes()["group"] == service.notes()["pids"][0]
        started_s = time.monotonic()
        service.stop()
        assert time.monotonic() - started_s < 2, "a server that obeys is not waited for"
        assert all_gone(service)


def test_a_server_that_does_not_obey_is_killed_after_a_grace(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_GRACE_S", 0.5)
    service.does("is stubborn")
    with service.up():
        started_s = time.monotonic()
        service.stop()
        assert 0.4 < time.monotonic() - started_s < 3
        assert all_gone(service)


def test_a_cancel_while_it_loads_ends_it(service: Service) -> None:
    service.does("hangs")
    with service.running():
        service.notes()
        with pytest.raises(CancelledError, match="task-1 was cancelled"):
            service.stop()
    assert all_gone(service)
    assert service.ready.empty()


def test_it_may_load_as_long_as_the_task_has_time_and_no_longer(service: Service) -> None:
    service.does("hangs")
    service.time_s = 9999
    with service.running():
        service.notes()
        service.passed_s = 9000
        time.sleep(0.5)
        assert not service.work.done()
        service.passed_s = 9999
        with pytest.raises(DeadlineError, match="task-1 reached its deadline"):
            service.result()
    assert all_gone(service)


def test_the_deadline_is_for_getting_ready_alone(service: Service) -> None:
    with service.up():
        service.passed_s = 9999
        time.sleep(0.3)
        assert not service.work.done()


@pytest.mark.parametrize(
    ("does", "told", "retriable"),
    [("fails", "code 3", False), ("is killed", "SIGKILL", True)],
)
def test_a_server_that_ends_while_it_loads_is_an_error_at_once(
    service: Service, does: str, told: str, retriable: bool
) -> None:
    service.does(does)
    message = f"vLLM's server ended with {told}; the task's log has its reason"
    with service.running(), pytest.raises(ExecutionError, match=message) as caught:
        service.result()
    assert caught.value.retriable is retriable
    assert all_gone(service)


def test_a_server_that_dies_while_it_serves_is_an_error(service: Service) -> None:
    with service.up() as result:
        pid, child = service.notes()["pids"]
        os.kill(pid, signal.SIGABRT)
        with pytest.raises(ExecutionError, match="vLLM's server ended with SIGABRT"):
            service.result()
        assert result.model == "acme/small"
    assert is_gone(child)


def test_nothing_stays_when_nobody_takes_its_readiness(service: Service) -> None:
    def refuse(_result: ServeResult) -> None:
        raise ConnectionError("the worker is gone")

    service.on_ready = refuse
    with service.running(), pytest.raises(ConnectionError, match="the worker is gone"):
        service.result()
    assert all_gone(service)


def test_a_host_that_others_can_reach_needs_the_operators_leave(service: Service) -> None:
    message = r"serve.host '0\.0\.0\.0' can be reached .* FLOWMESH_SERVE_HOSTS"
    with service.running(host="0.0.0.0"), pytest.raises(InputError, match=message):
        service.result()
    assert not service.notes_path.exists()
    service.settings = VllmServeSettings(hosts=("0.0.0.0",))
    with service.up(host="0.0.0.0", api_key="sk-1") as result:
        assert f"//{socket.gethostname()}:" in result.endpoint


def test_a_port_that_is_taken_is_an_error_before_anything_is_started(service: Service) -> None:
    with socket.create_server(("127.0.0.1", 0)) as own:
        port = own.getsockname()[1]
        message = f"cannot listen on 127.0.0.1 port {port}: Address already in use"
        with service.running(port=port), pytest.raises(ExecutionError, match=message) as caught:
            service.result()
    assert caught.value.retriable
    assert not service.notes_path.exists()


def test_two_that_load_for_one_port_are_told_apart(service: Service) -> None:
    service.does("hangs")
    with socket.create_server(("127.0.0.1", 0)) as own:
        port = own.getsockname()[1]
    second = attrs.evolve(service, ready=queue.Queue(), cancelled=threading.Event())
    with contextlib.suppress(CancelledError), service.running(port=port):
        service.notes()
        message = f"cannot listen on 127.0.0.1 port {port}"
        with second.running(port=port), pytest.raises(ExecutionError, match=message):
            second.result()


def test_the_key_is_in_the_environment_and_in_no_command_line_or_log(service: Service) -> None:
    with service.up(api_key="sk-secret"):
        notes = service.notes()
        assert notes["environment"]["VLLM_API_KEY"] == "sk-secret"
        assert "sk-secret" not in f"{notes['words']}"
        assert words_of(service, "--middleware") == ["--middleware=flowmesh_vllm.guard.KeyGuard"]
    assert "sk-secret" not in f"{service.result()} {service.lines}"


def test_without_a_key_it_asks_for_none_not_even_another_tasks(service: Service) -> None:
    with service.up():
        assert "VLLM_API_KEY" not in service.notes()["environment"]
        assert words_of(service, "--middleware") == []


def test_options_and_the_operators_defaults_become_words(service: Service, model: Path) -> None:
    service.options = {"seed": 5, "lora_target_modules": ["q", "v"], "enable_prefix_caching": False}
    service.settings = VllmServeSettings(engine_args={"max_num_seqs": 3})
    with service.up():
        words = service.notes()["words"]
    assert {f"--model={model}", "--seed=5", "--max-num-seqs=3"} <= set(words)
    assert "--no-enable-prefix-caching" in words
    at = words.index("--lora-target-modules")
    assert words[at + 1 : at + 3] == ["q", "v"]


@pytest.mark.parametrize(
    ("allowed", "domains"),
    [((), ["none.invalid"]), (("*.a.org",), ["none.invalid"]), (("a.org", "*.b.org"), ["a.org"])],
)
def test_clients_may_point_to_hosts_that_the_operator_names_and_no_others(
    service: Service, allowed: tuple[str, ...], domains: list[str]
) -> None:
    service.settings = VllmServeSettings(http_allow=allowed)
    with service.up():
        words = service.notes()["words"]
    at = words.index("--allowed-media-domains")
    assert words[at + 1 : at + 1 + len(domains)] == domains


def test_an_argument_that_this_vllm_does_not_have_is_refused_before_anything_is_started(
    service: Service,
) -> None:
    service.options = {"swap_space": 4}  # of earlier versions
    message = "model.vllm.swap_space is no engine argument of this vLLM"
    with service.running(), pytest.raises(InputError, match=message):
        service.result()
    assert not service.notes_path.exists()


def test_code_of_the_model_needs_the_operators_leave(service: Service) -> None:
    service.options = {"trust_remote_code": True}
    with service.running(), pytest.raises(InputError, match="FLOWMESH_TRUST_REMOTE_CODE=1"):
        service.result()
    service.settings = VllmServeSettings(trust_remote_code=True)
    with service.up():
        assert words_of(service, "--trust") == ["--trust-remote-code"]


def test_a_template_reaches_the_server_as_a_file_that_no_result_keeps(service: Service) -> None:
    service.options = {"chat_template": "{{ messages[0].content }}\nsaid"}
    with service.up():
        (word,) = words_of(service, "--chat-template=")
        path = Path(word.partition("=")[2])
        assert path.read_text() == "{{ messages[0].content }}\nsaid"
        assert path.parent == service.folder
        assert path.name.startswith(".")


@pytest.fixture
def adapter(tmp_path: Path) -> AdapterRef:
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").touch()
    return AdapterRef(name="tuned", path=folder)


def test_what_clients_ask_for_is_the_adapter_when_there_is_one(
    service: Service, adapter: AdapterRef
) -> None:
    service.inputs = attrs.evolve(service.inputs, adapters=(attrs.evolve(adapter, scale=2.0),))
    with service.up() as result:
        words = service.notes()["words"]
        said = json.loads(words[words.index("--lora-modules") + 1])
        assert (result.model, said["name"]) == ("tuned", "tuned")
        assert (
            json.loads((Path(said["path"]) / "adapter_config.json").read_text())["lora_alpha"] == 16
        )


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"name": "acme/small"}, {}, "adapter acme/small must not have the model's own name"),
        ({}, {"max_lora_rank": 1}, "raise model.vllm.max_lora_rank to 8"),
    ],
)
def test_an_adapter_that_cannot_be_served_is_refused_before_anything_is_started(
    service: Service, adapter: AdapterRef, changes: Any, options: Any, message: str
) -> None:
    service.inputs = attrs.evolve(service.inputs, adapters=(attrs.evolve(adapter, **changes),))
    service.options = options
    with service.running(), pytest.raises(InputError, match=message):
        service.result()
    assert not service.notes_path.exists()


def test_merged_weights_stay_until_the_server_has_read_them(
    service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"

    @contextmanager
    def merge(weights: Any, _folder: Path, *, trust_remote_code: bool) -> Iterator[Any]:
        merged.mkdir()
        yield attrs.evolve(weights, model=str(merged))
        assert service.notes_path.exists(), "the server has been started"
        merged.rmdir()

    monkeypatch.setattr(serve, "merged", merge)
    with service.up():
        assert words_of(service, "--model") == [f"--model={merged}"]
        assert not merged.exists()


def test_a_task_without_a_model_says_so(service: Service) -> None:
    service.inputs = Inputs()
    with service.running(), pytest.raises(InputError, match=r"model\.source must name a model"):
        service.result()
