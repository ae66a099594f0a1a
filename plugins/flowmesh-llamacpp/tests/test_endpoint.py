"""Real weights behind the real HTTP server, asked as OpenAI's clients ask."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from flowmesh_core import AdapterRef, ExecutionError, InputError

QUESTION = [{"role": "user", "content": "What is 2+2?"}]
STORY = {
    "messages": [{"role": "user", "content": "Tell me a very long story."}],
    "max_tokens": 450,
    "repeat_penalty": 1.3,
    "seed": 1,
}
GREEDY = {"temperature": 0, "max_tokens": 16}


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=60, trust_env=False) as client:
        yield client


def ask(client: httpx.Client, base: str, **body: Any) -> Any:
    request = {"model": "acme/small", "messages": QUESTION, **GREEDY, **body}
    return client.post(f"{base}/chat/completions", json=request).raise_for_status().json()


def text_of(answer: Any) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as own:
        port: int = own.getsockname()[1]
        return port


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_chat_request_is_answered_in_openais_shape(service: Any, client: httpx.Client) -> None:
    with service.up() as result:
        answer = ask(client, result.endpoint)
    assert "4" in text_of(answer)
    assert (answer["object"], answer["model"]) == ("chat.completion", "acme/small")
    assert answer["choices"][0]["finish_reason"] == "stop"
    usage = answer["usage"]
    assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"] > 20


def test_a_stream_brings_the_same_answer_in_pieces(service: Any, client: httpx.Client) -> None:
    body = {"model": "acme/small", "messages": QUESTION, "stream": True, **GREEDY}
    with service.up() as result:
        whole = text_of(ask(client, result.endpoint))
        with client.stream("POST", f"{result.endpoint}/chat/completions", json=body) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            data = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    choices = [piece["choices"][0] for piece in map(json.loads, data) if piece["choices"]]
    texts = [choice["delta"].get("content") or "" for choice in choices]
    assert "".join(texts) == whole
    assert len(list(filter(None, texts))) > 3
    assert choices[-1]["finish_reason"] == "stop"


def test_completions_and_models_are_there_too(service: Any, client: httpx.Client) -> None:
    with service.up() as result:
        models = client.get(f"{result.endpoint}/models").json()["data"]
        plain = {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
        answer = client.post(f"{result.endpoint}/completions", json=plain).json()
    assert [model["id"] for model in models] == [result.model] == ["acme/small"]
    assert "Paris" in answer["choices"][0]["text"]


def test_it_has_answered_by_the_time_it_is_ready(service: Any, client: httpx.Client) -> None:
    port, statuses = free_port(), []
    service.on_ready = lambda: statuses.append(
        client.get(f"http://127.0.0.1:{port}/v1/models").status_code
    )
    with service.up(port=port) as result:
        assert statuses == [200]
        assert result.endpoint == f"http://127.0.0.1:{port}/v1"


def test_without_its_key_a_request_gets_401_and_learns_nothing(
    service: Any, client: httpx.Client
) -> None:
    with service.up(api_key="sk-secret") as result:
        for headers in ({}, {"Authorization": "Bearer sk-wrong"}, {"Authorization": "sk-secre"}):
            for method, path in (("GET", "models"), ("POST", "chat/completions")):
                url = f"{result.endpoint}/{path}"
                answer = client.request(method, url, headers=headers, json={"messages": QUESTION})
                assert answer.status_code == 401
                assert "acme" not in answer.text
        client.headers["Authorization"] = "Bearer sk-secret"
        assert "4" in text_of(ask(client, result.endpoint))
    assert "sk-secret" not in f"{service.result()} {service.lines}"


def test_a_web_page_of_another_origin_is_not_let_in(service: Any, client: httpx.Client) -> None:
    headers = {"Origin": "http://elsewhere.example", "Access-Control-Request-Method": "POST"}
    with service.up() as result:
        answer = client.options(f"{result.endpoint}/chat/completions", headers=headers)
    assert answer.headers.get("access-control-allow-origin", "") == ""


def test_stopping_frees_the_port_at_once_whatever_clients_do(service: Any) -> None:
    port = free_port()
    body = [json.dumps({**STORY, "stream": stream}).encode() for stream in (True, False)]
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    for _ in range(2):  # the second one gets the same port
        with service.up(port=port):
            talks = [b"", b"GET /v1/mo", head % 99 + b"{"]
            talks += [head % len(text) + text for text in body]
            clients = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in talks]
            for client, talk in zip(clients, talks, strict=True):
                client.sendall(talk)
            assert clients[3].recv(1)  # the stream has begun, and nobody reads on
            assert service.stop() < 3
            assert not is_listening(port)
            for client in clients:
                client.close()


def test_a_port_that_is_taken_is_an_error_and_its_owner_stays(
    service: Any, client: httpx.Client
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as owner:
        port = owner.getsockname()[1]
        message = f"cannot listen on 127.0.0.1 port {port}: Address already in use"
        with service.running(port=port), pytest.raises(ExecutionError, match=message):
            service.result()
        assert is_listening(port)


def test_weights_that_break_off_are_an_error_and_leave_no_listener(
    service: Any, weights: Path, tmp_path: Path
) -> None:
    port, cut = free_port(), tmp_path / "cut.gguf"
    cut.write_bytes(weights.read_bytes()[:50_000_000])
    service.weights = cut
    with service.running(port=port), pytest.raises(InputError, match=r"cannot load .*cut\.gguf"):
        service.result(20)
    assert not is_listening(port)


def test_two_services_at_once_have_models_and_ports_of_their_own(
    service: Any, client: httpx.Client, shallow_weights: Path, tmp_path: Path
) -> None:
    other = type(service)(shallow_weights, tmp_path)
    with service.up() as first, other.up() as second:
        assert urlsplit(first.endpoint).port != urlsplit(second.endpoint).port
        assert other.stop() < 3
        assert "4" in text_of(ask(client, first.endpoint))


def test_options_adapters_and_checkpoints_count_as_for_inference(
    service: Any, client: httpx.Client, lora: Path, weights: Path, tmp_path: Path
) -> None:
    answers = []
    for scale in (0.0, 1.0):
        service.inputs["adapters"] = (AdapterRef(name="a", path=lora, scale=scale),)
        with service.up() as result:
            answers.append(text_of(ask(client, result.endpoint)))
    assert answers[0] != answers[1]
    service.inputs = {"checkpoint": weights}
    service.weights = tmp_path / "nothing.gguf"
    service.spec = {"chat_template": "{{ messages[0].content }} Four means"}
    with service.up() as result:
        answer = ask(client, result.endpoint, max_tokens=2)
    assert answer["usage"]["prompt_tokens"] < 15  # the model's own template has more


def test_a_json_schema_binds_the_answer(service: Any, client: httpx.Client) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [7]}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with service.up() as result:
        answer = ask(client, result.endpoint, response_format=asked, max_tokens=40)
    assert json.loads(text_of(answer)) == {"a": 7}


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_an_address_of_ipv6_is_served_as_well(service: Any, client: httpx.Client) -> None:
    with service.up(host="::1") as result:
        assert client.get(f"{result.endpoint}/models").status_code == 200
