from __future__ import annotations

import contextlib
import gzip
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import attrs
import pytest
from flowmesh_rag.blocks import RagEmbedding, RemoteBlock, Rerank
from flowmesh_rag.embedder import open_embedder, open_reranker
from flowmesh_rag.endpoint import Endpoint, EndpointEmbedder, EndpointReranker
from flowmesh_rag.settings import RagSettings

from flowmesh_core import CancelledError, ExecutionError, FlowmeshError, InputError

KEY = "sekrit-of-the-operator"
SETTINGS = RagSettings.model_validate({})


@attrs.define(kw_only=True)
class ModelServer:
    """An endpoint on this machine; ``answer`` gets path and body and gives status and text.

    ``drip_s`` is waited before each byte of it.
    """

    url: str = ""
    seen: list[tuple[str, Mapping[str, str], Any]] = attrs.field(factory=list)
    answer: Callable[[str, Any], tuple[int, str | bytes]] = lambda _path, _body: (200, "{}")
    headers: dict[str, str] = attrs.field(factory=dict)
    drip_s: float = 0.0
    closing: threading.Event = attrs.field(factory=threading.Event)

    def send(self, file: Any, data: bytes) -> None:
        if not self.drip_s:
            file.write(data)
        for position in range(len(data) if self.drip_s else 0):
            file.write(data[position : position + 1])
            file.flush()
            if self.closing.wait(self.drip_s):
                return


def length_vectors(path: str, body: Any) -> tuple[int, str]:
    """Answer with (length, 1) for each text, last one first."""
    assert path == "/v1/embeddings"
    data = [{"index": i, "embedding": [len(text), 1]} for i, text in enumerate(body["input"])]
    return 200, json.dumps({"data": data[::-1]})


@pytest.fixture
def server() -> Iterator[ModelServer]:
    state = ModelServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1

        def log_message(self, *_args: Any) -> None:
            """Write nothing."""

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            headers = {key.lower(): value for key, value in self.headers.items()}
            state.seen.append((self.path, headers, body))
            status, text = state.answer(self.path, body)
            if status == 0:
                self.close_connection = True
                return
            self.send_response(status)
            for name, value in state.headers.items():
                self.send_header(name, value)
            data = text.encode() if isinstance(text, str) else text
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(OSError):  # the client may have gone
                state.send(self.wfile, data)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        state.url = f"http://127.0.0.1:{listening.server_port}/v1"
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        state.closing.set()
        listening.shutdown()
        thread.join()


@contextlib.contextmanager
def connected(
    server: ModelServer, settings: RagSettings = SETTINGS, **fields: Any
) -> Iterator[Endpoint]:
    block = RemoteBlock.model_validate({"endpoint": server.url, **fields})
    endpoint = Endpoint(block, settings=settings)
    try:
        yield endpoint
    finally:
        endpoint.close()
        endpoint.close()


def posted(server: ModelServer, **fields: Any) -> Any:
    with connected(server, **fields) as endpoint:
        return endpoint.post("/chat", {"a": 1})


def failure(server: ModelServer, status: int, text: str, **fields: Any) -> FlowmeshError:
    server.answer = lambda _path, _body: (status, text)
    with pytest.raises(FlowmeshError, match="127") as caught:
        posted(server, **fields)
    return caught.value


def test_json_goes_there_and_back_with_the_key(server: ModelServer) -> None:
    server.answer = lambda _path, _body: (200, '{"said": [1]}')
    assert posted(server, api_key=KEY) == {"said": [1]}
    ((path, headers, body),) = server.seen
    assert (path, body) == ("/v1/chat", {"a": 1})
    assert headers["authorization"] == f"Bearer {KEY}"
    posted(server)
    assert "authorization" not in server.seen[1][1]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_what_the_server_refuses_is_final(server: ModelServer, status: int) -> None:
    error = failure(server, status, "no such model")
    assert isinstance(error, InputError)
    assert not error.retriable
    assert f"answered {status}: no such model" in str(error)


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 503])
def test_what_may_pass_is_tried_again(server: ModelServer, status: int) -> None:
    error = failure(server, status, "busy")
    assert isinstance(error, ExecutionError)
    assert error.retriable


def test_a_refused_key_is_named_by_its_field(server: ModelServer) -> None:
    assert str(failure(server, 401, "")).endswith("answered 401: nothing; api_key is required")
    assert str(failure(server, 403, "no", api_key=KEY)).endswith("answered 403: no; check api_key")


@pytest.mark.parametrize("status", [200, 400, 401, 500])
def test_a_key_that_a_server_quotes_is_not_shown(server: ModelServer, status: int) -> None:
    text = str(failure(server, status, f"key {KEY} is wrong\n" + "x" * 9999, api_key=KEY))
    assert KEY not in text
    assert "key *** is wrong" in text
    assert len(text) < 700


def test_a_redirect_is_not_followed(server: ModelServer) -> None:
    server.headers["location"] = server.url + "/elsewhere"
    error = failure(server, 307, "", api_key=KEY)
    assert isinstance(error, InputError)
    assert "answered 307, a redirect; give the final address" in str(error)
    assert len(server.seen) == 1


def test_an_answer_that_is_no_json_or_none_at_all_is_tried_again(server: ModelServer) -> None:
    error = failure(server, 200, "<html>")
    assert "must answer with JSON, got '<html>'" in str(error)
    assert error.retriable
    hung_up = failure(server, 0, "")
    assert "cannot be reached" in str(hung_up)
    assert hung_up.retriable


def test_a_server_that_is_slow_is_not_waited_for(server: ModelServer) -> None:
    done = threading.Event()
    server.answer = lambda _path, _body: (done.wait(20), (200, "{}"))[1]
    with (
        connected(server) as endpoint,
        pytest.raises(ExecutionError, match=r"did not answer within 0\.1 s"),
    ):
        endpoint.post("/chat", {}, timeout_s=0.1)
    done.set()


@pytest.mark.parametrize("asks", ["embedder", "reranker", "chat"])
def test_an_answer_that_drips_is_not_waited_for(server: ModelServer, asks: str) -> None:
    """Each byte comes in time, the last one would come after two hundred seconds."""
    server.answer = lambda _path, _body: (200, b" " * 4000)
    server.drip_s = 0.05
    started_s = time.monotonic()

    def ask() -> None:
        if asks == "chat":
            posted(server, timeout_s=0.3)
        elif asks == "reranker":
            with reranker(server) as ranks:
                ranks.remaining_s = lambda: 0.3
                ranks.score([("q", "a")], stop=stop)
        else:
            with embedder(server) as embeds:
                embeds.remaining_s = lambda: 0.3
                embeds.embed(["a"], role="query", stop=stop)

    with pytest.raises(ExecutionError, match=r"did not answer within 0\.3 s") as caught:
        ask()
    assert caught.value.retriable
    assert time.monotonic() - started_s < 5


def test_an_answer_may_come_packed_but_not_without_end(server: ModelServer) -> None:
    server.headers["content-encoding"] = "gzip"
    server.answer = lambda _path, _body: (200, gzip.compress(b'{"said": 1}'))
    assert posted(server) == {"said": 1}
    assert server.seen[0][1]["accept-encoding"] == "gzip"
    bomb = gzip.compress(b" " * (129 << 20), compresslevel=1)
    server.answer = lambda _path, _body: (200, bomb)
    with pytest.raises(InputError, match=r"answers with more than 128 MiB; lower batch_size"):
        posted(server)
    server.headers["content-encoding"] = "gzip, gzip"
    with pytest.raises(InputError, match=r"answers in encoding 'gzip, gzip', asked for gzip"):
        posted(server)


def test_an_answer_that_is_nested_without_end_is_no_json(server: ModelServer) -> None:
    error = failure(server, 200, "[" * 200_000)
    assert "must answer with JSON" in str(error)


def test_the_operator_decides_which_hosts_are_called(server: ModelServer) -> None:
    settings = RagSettings.model_validate({"FLOWMESH_HTTP_ALLOW": "api.example.org"})
    with (
        connected(server, settings) as endpoint,
        pytest.raises(InputError, match=r"host 127\.0\.0\.1 is not among those"),
    ):
        endpoint.post("/chat", {})
    assert server.seen == []


def test_the_metadata_service_is_never_called() -> None:
    block = RemoteBlock(endpoint="http://169.254.169.254/latest")
    endpoint = Endpoint(block, settings=SETTINGS)
    with pytest.raises(InputError, match="a link-local or metadata address"):
        endpoint.post("/x", {})
    endpoint.close()


@contextlib.contextmanager
def embedder(server: ModelServer, **fields: Any) -> Iterator[EndpointEmbedder]:
    pytest.importorskip("numpy", reason="vectors are arrays")
    known = {"endpoint": server.url, "remote_model": "m-1", **fields}
    opened = open_embedder(RagEmbedding.model_validate(known), None, settings=SETTINGS)
    assert isinstance(opened, EndpointEmbedder)
    yield opened
    opened.close()


def stop() -> None:
    """Go on."""


def test_texts_are_embedded_in_batches_and_keep_their_order(server: ModelServer) -> None:
    server.answer = length_vectors
    texts = ["a", "bbb", "cc", "dddd", "e"]
    with embedder(server, batch_size=2, api_key=KEY) as opened:
        assert opened.dimensions is None
        got = opened.embed(texts, role="query", stop=stop, normalize=False)
        assert opened.dimensions == 2
    assert got.tolist() == [[1, 1], [3, 1], [2, 1], [4, 1], [1, 1]]
    assert [len(body["input"]) for _, _, body in server.seen] == [2, 2, 1]
    assert server.seen[0][2] == {
        "model": "m-1",
        "input": ["a", "bbb"],
        "encoding_format": "float",
    }


def test_prompts_dimensions_and_a_smaller_batch_reach_the_server(server: ModelServer) -> None:
    server.answer = length_vectors
    prompts = {"query_prompt": "query: ", "document_prompt": "passage: "}
    with embedder(server, batch_size=2, dimensions=2, **prompts) as opened:
        opened.batch_scale = 0.5
        opened.embed(["a", "b"], role="document", stop=stop)
        opened.embed(["a"], role="query", stop=stop)
    assert [body["input"] for _, _, body in server.seen] == [
        ["passage: a"],
        ["passage: b"],
        ["query: a"],
    ]
    assert server.seen[0][2]["dimensions"] == 2


def test_vectors_have_length_one_unless_the_document_says_otherwise(server: ModelServer) -> None:
    data = [{"index": 0, "embedding": [3, 4]}, {"index": 1, "embedding": [0, 0]}]
    server.answer = lambda _path, _body: (200, json.dumps({"data": data}))
    with embedder(server) as opened:
        got = opened.embed(["a", "b"], role="query", stop=stop)
    assert got[0].tolist() == pytest.approx([0.6, 0.8])
    assert got[1].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({}, "must answer with a list 'data' as its API says"),
        ([], "must answer with a list 'data' as its API says"),
        ({"data": [{"index": 0, "embedding": "AAAA"}]}, "must answer with a list 'data'"),
        ({"data": [{"index": 0, "embedding": [1]}]}, "gave 1 answers for 2 texts"),
        ({"data": [{"index": i, "embedding": [1]} for i in (0, 5)]}, "gave 2 answers for 2"),
        (
            {"data": [{"index": 0, "embedding": [1]}, {"index": 1, "embedding": [1, 2]}]},
            "gave vectors of several sizes",
        ),
    ],
)
def test_an_answer_of_another_shape_is_an_error(
    server: ModelServer, answer: Any, message: str
) -> None:
    server.answer = lambda _path, _body: (200, json.dumps(answer))
    with embedder(server) as opened, pytest.raises(ExecutionError, match=message):
        opened.embed(["a", "b"], role="query", stop=stop)


def test_a_cancel_ends_it_between_two_requests(server: ModelServer) -> None:
    server.answer = length_vectors

    def cancelled() -> None:
        if server.seen:
            raise CancelledError("enough")

    with (
        embedder(server, batch_size=1) as opened,
        pytest.raises(CancelledError, match="enough"),
    ):
        opened.embed(["a", "b", "c"], role="query", stop=cancelled)
    assert len(server.seen) == 1


@contextlib.contextmanager
def reranker(server: ModelServer, **fields: Any) -> Iterator[EndpointReranker]:
    block = Rerank.model_validate({"endpoint": server.url, **fields})
    opened = open_reranker(block, None, settings=SETTINGS)
    assert isinstance(opened, EndpointReranker)
    yield opened
    opened.close()


def test_each_query_is_sent_once_with_its_texts(server: ModelServer) -> None:
    def answer(_path: str, body: Any) -> tuple[int, str]:
        found = [
            {"index": i, "relevance_score": len(text)} for i, text in enumerate(body["documents"])
        ]
        return 200, json.dumps({"results": found[::-1]})

    server.answer = answer
    pairs = [("q", "a"), ("q", "bbb"), ("r", "cc")]
    with reranker(server, remote_model="r-1") as opened:
        assert opened.score(pairs, stop=stop) == [1, 3, 2]
    assert [(path, body) for path, _, body in server.seen] == [
        (
            "/v1/rerank",
            {"query": "q", "documents": ["a", "bbb"], "top_n": 2, "model": "r-1"},
        ),
        ("/v1/rerank", {"query": "r", "documents": ["cc"], "top_n": 1, "model": "r-1"}),
    ]


def test_a_score_that_is_no_number_is_refused(server: ModelServer) -> None:
    answer = {"results": [{"index": 0, "relevance_score": math.nan}]}
    server.answer = lambda _path, _body: (200, json.dumps(answer))
    with (
        reranker(server) as opened,
        pytest.raises(ExecutionError, match="gave NaN or infinity as a score"),
    ):
        opened.score([("q", "a")], stop=stop)
