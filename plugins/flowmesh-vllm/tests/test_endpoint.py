"""The endpoint itself: one real server of vLLM, asked by the client that its users have."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from flowmesh_vllm.command import known_arguments
from flowmesh_vllm.serve import VllmServer
from flowmesh_vllm.spec import VllmServeSpec

from flowmesh_core import AdapterRef, Inputs, ModelRef, RunContext, ServeResult
from flowmesh_core.testing import build_lora

KEY = "sk-of-this-endpoint"
SMALL = {"max_model_len": 128, "max_num_seqs": 4, "kv_cache_memory_bytes": 2**27}
QUESTION = [{"role": "user", "content": "the quick brown fox"}]


def group_members(pid: int) -> list[str]:
    """Return the command lines of all processes that a server started and that still live."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found


class Recorded(VllmServer):
    """Remembers its server."""

    def start_server(self, *arguments: Any) -> Any:
        self.server = super().start_server(*arguments)
        return self.server


@pytest.fixture(scope="module")
def executor() -> Recorded:
    return Recorded()


@pytest.fixture(scope="module")
def endpoint(
    needs_vllm: None, executor: Recorded, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServeResult]:
    """An endpoint with a key and an adapter; ends as by a cancel, and leaves nothing."""
    folder = tmp_path_factory.mktemp("endpoint")
    adapter = build_lora(folder / "adapter", tiny_llama, strength=2.0)
    raw = {"model": {"vllm": SMALL}, "serve": {"api_key": KEY}}
    ready: queue.Queue[Any] = queue.Queue()
    cancelled = threading.Event()
    attempt = folder / "attempt"
    attempt.mkdir()
    ctx = RunContext(
        task_id="task-1",
        task_type="serve",
        spec=VllmServeSpec.model_validate(raw),
        raw_spec=raw,
        folder=attempt,
        clock=time.monotonic,
        deadline=time.monotonic() + 300,
        inputs=Inputs(
            model=ModelRef(identifier="acme/small", path=tiny_llama, format="hf"),
            adapters=(AdapterRef(name="tuned", path=adapter, scale=0.5),),
        ),
        is_cancelled=cancelled.is_set,
        on_ready=lambda result, _ttl_s: ready.put(result),
    )
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(executor.run, ctx)
        work.add_done_callback(lambda done: ready.put(done.exception()))
        try:
            found = ready.get()
            if isinstance(found, BaseException):
                raise found
            yield ServeResult.model_validate(found)
        finally:
            cancelled.set()
            result = work.result(30)
    assert result == found
    assert group_members(executor.server.pid) == []


@pytest.fixture(scope="module")
def client(endpoint: ServeResult) -> Iterator[Any]:
    openai: Any = pytest.importorskip("openai")
    with openai.OpenAI(base_url=endpoint.endpoint, api_key=KEY, max_retries=0) as client:
        yield client


def answer_of(client: Any, model: str, **fields: Any) -> str:
    answer = client.chat.completions.create(
        model=model, messages=QUESTION, max_tokens=12, temperature=0, **fields
    )
    text: str = answer.choices[0].message.content
    return text


def test_it_lists_the_model_and_its_adapter_which_is_what_to_ask_for(
    client: Any, endpoint: ServeResult
) -> None:
    listed = {model.id: model.parent for model in client.models.list()}
    assert listed == {"acme/small": None, "tuned": "acme/small"}
    assert endpoint.model == "tuned"


def test_a_chat_is_answered_and_an_adapter_changes_the_answer(client: Any) -> None:
    answers = [answer_of(client, model) for model in ("acme/small", "tuned") * 2]
    assert answers[:2] == answers[2:]
    assert answers[0] != answers[1]
    assert all(answers)


def test_a_completion_counts_its_tokens(client: Any) -> None:
    answer = client.completions.create(
        model="acme/small", prompt="the quick", max_tokens=5, temperature=0
    )
    assert answer.usage.completion_tokens == 5
    assert answer.choices[0].finish_reason == "length"


def test_a_stream_brings_the_same_answer_in_pieces(client: Any) -> None:
    stream = client.chat.completions.create(
        model="acme/small", messages=QUESTION, max_tokens=12, temperature=0, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(list(filter(None, pieces))) > 3
    assert "".join(pieces) == answer_of(client, "acme/small")


def test_a_wrong_key_is_refused_on_every_path(client: Any, endpoint: ServeResult) -> None:
    openai: Any = pytest.importorskip("openai")
    with pytest.raises(openai.AuthenticationError, match="401"):
        client.with_options(api_key="sk-wrong").models.list()
    root = endpoint.endpoint.removesuffix("/v1")
    body = {"model": "acme/small", "messages": QUESTION, "max_tokens": 1}
    with httpx.Client(base_url=root) as plain:
        for path in ("/v1/chat/completions", "/invocations", "/tokenize"):
            assert plain.post(path, json=body).status_code == 401, path
        for path in ("/metrics", "/version", "/openapi.json", "/no/such/path"):
            assert plain.get(path).status_code == 401, path
        assert plain.get("/health").status_code == 200
        plain.headers["Authorization"] = f"Bearer {KEY}"
        assert plain.post("/invocations", json=body).status_code == 200


def test_a_web_page_of_another_origin_is_not_let_in(endpoint: ServeResult) -> None:
    headers = {"Origin": "http://elsewhere.example", "Authorization": f"Bearer {KEY}"}
    answer = httpx.get(f"{endpoint.endpoint}/models", headers=headers)
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


def test_no_command_line_shows_the_key(endpoint: ServeResult, executor: Recorded) -> None:
    commands = group_members(executor.server.pid)
    assert len(commands) > 1, "the server has processes of its own"
    assert any("vllm.entrypoints" in command for command in commands)
    assert KEY not in "".join(commands)


def test_this_vllm_knows_what_is_said_to_it(endpoint: ServeResult) -> None:
    known = known_arguments()
    assert {*SMALL, "model", "enable_lora", "disable_log_stats", "enable_log_requests"} <= known
    assert not known & {"middleware", "host", "port", "api_key", "config"}
    assert len(known) > 100
