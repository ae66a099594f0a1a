"""Models behind OpenAI-compatible endpoints, called under the operator's rules for the network."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import httpx
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from flowmesh_core import (
    ArtifactError,
    ExecutionError,
    FlowmeshError,
    InputError,
    SecretMask,
    client_hooks,
)
from flowmesh_rag.blocks import RagEmbedding, RemoteBlock, Rerank
from flowmesh_rag.embedder import Embedder, Reranker, Role
from flowmesh_rag.settings import RagSettings

if TYPE_CHECKING:  # comes with the engine
    import numpy as np

__all__ = ["Endpoint", "EndpointEmbedder", "EndpointReranker", "refuse_answer"]

_AGAIN = frozenset({408, 409, 425, 429})
_SHOWN_CHARS = 500
_MOST_BYTES = 128 * 2**20  # 2048 vectors of 3072 numbers
# What 64 KiB of others become is not bounded.
_ENCODINGS = frozenset({"", "identity", "gzip"})
_LEAST_S = 0.01


def refuse_answer(url: str, status: int, text: str, *, has_key: bool) -> FlowmeshError:
    """Return the error for an answer without success, retriable where it may pass.

    Args:
        url: Who answered.
        status: Of HTTP.
        text: What was said, without a key.
        has_key: Whether one was sent.
    """
    if 300 <= status < 400:
        return InputError(f"{url} answered {status}, a redirect; give the final address")
    said = f"{url} answered {status}: {text or 'nothing'}"
    if status in _AGAIN or status >= 500:
        return ExecutionError(said, retriable=True)
    if status in (401, 403):
        said += "; check api_key" if has_key else "; api_key is required"
    return InputError(said)


class Endpoint:
    """A base address that takes JSON; several threads may post at once.

    Redirects are not followed, so that the key and the texts reach nobody but whom the document
    names. What the server says is shown without the key.

    Attributes:
        mask: For what of an answer reaches a result.
    """

    def __init__(self, block: RemoteBlock, *, settings: RagSettings) -> None:
        """Make a client; it connects with the first request.

        Args:
            block: With ``endpoint``.
            settings: The operator's.
        """
        self.url = (block.endpoint or "").rstrip("/")
        self._key = block.api_key.get_secret_value() if block.api_key else ""
        self.mask = SecretMask({"api_key": self._key})
        self._timeout_s = block.timeout_s
        key = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx.Client(
            headers={"Accept-Encoding": "gzip", **key}, **client_hooks(settings.policy)
        )

    def post(self, path: str, body: Mapping[str, Any], *, timeout_s: float | None = None) -> Any:
        """Return the JSON of an answer.

        Args:
            path: Below the base address, such as ``/embeddings``.
            body: JSON data.
            timeout_s: What is left of the task's time, if it has an end.

        Raises:
            InputError: The server refuses the request, the operator the address, or the answer is
                too large.
            ExecutionError: It may do better another time; retriable.
        """
        url = self.url + path
        limit_s = self._timeout_s if timeout_s is None else min(self._timeout_s, timeout_s)
        try:
            status, content = self._exchange(url, body, max(_LEAST_S, limit_s))
        except ArtifactError as exc:  # the operator's rules
            raise InputError(str(exc)) from None
        except httpx.TimeoutException:
            text = f"{url} did not answer within {limit_s:g} s"
            raise ExecutionError(text, retriable=True) from None
        except httpx.HTTPError as exc:
            text = f"{url} cannot be reached: {self._masked(str(exc))}"
            raise ExecutionError(text, retriable=True) from None
        said = content.decode(errors="replace")
        if not 200 <= status < 300:
            raise refuse_answer(url, status, self._masked(said), has_key=bool(self._key))
        try:
            return json.loads(said)
        except (ValueError, RecursionError):
            text = f"{url} must answer with JSON, got {self._masked(said)!r}"
            raise ExecutionError(text, retriable=True) from None

    def close(self) -> None:
        """Give the connections back; may come twice."""
        self._client.close()

    def _exchange(self, url: str, body: Mapping[str, Any], limit_s: float) -> tuple[int, bytes]:
        """Return status and content, within bounds of time and size."""
        until, content = time.monotonic() + limit_s, bytearray()
        with self._client.stream("POST", url, json=body, timeout=limit_s) as answer:
            encoding = answer.headers.get("content-encoding", "").strip().lower()
            if encoding not in _ENCODINGS:
                raise InputError(f"{url} answers in encoding {encoding[:50]!r}, asked for gzip")
            for part in answer.iter_bytes():
                content += part
                if len(content) > _MOST_BYTES:
                    most = f"{_MOST_BYTES >> 20} MiB"
                    raise InputError(f"{url} answers with more than {most}; lower batch_size")
                if time.monotonic() > until:
                    raise httpx.ReadTimeout("")
        return answer.status_code, bytes(content)

    def _masked(self, text: str) -> str:
        """Shorten what comes from outside, without the key that a server may quote."""
        clean = text.replace(self._key, "***") if self._key else text
        return " ".join(clean.split())[:_SHOWN_CHARS]


class _Vector(BaseModel):
    index: int = Field(ge=0)
    embedding: list[float]


class _Place(BaseModel):
    index: int = Field(ge=0)
    relevance_score: float


_VECTORS = TypeAdapter(list[_Vector])
_PLACES = TypeAdapter(list[_Place])


class EndpointEmbedder(Embedder):
    """``/embeddings``, a batch of texts per request."""

    def __init__(self, block: RagEmbedding, *, settings: RagSettings) -> None:
        self.model = block.remote_model or ""
        self.dimensions = block.dimensions
        self._block = block
        self._endpoint = Endpoint(block, settings=settings)

    def close(self) -> None:
        """Give the connections back."""
        self._endpoint.close()

    def _embed(
        self, texts: Sequence[str], *, role: Role, stop: Callable[[], None], normalize: bool
    ) -> np.ndarray:
        import numpy as np  # noqa: PLC0415 - comes with the engine

        block = self._block
        prompt = (block.query_prompt if role == "query" else block.document_prompt) or ""
        size = max(1, int(block.batch_size * self.batch_scale))
        rows: list[list[float]] = []
        for batch in _batches([prompt + text for text in texts], size):
            stop()
            rows += self._ask(batch)
        if {len(row) for row in rows} != {len(rows[0])}:
            raise ExecutionError(f"{self._endpoint.url} gave vectors of several sizes")
        vectors = np.asarray(rows, dtype=np.float32)
        self.dimensions = vectors.shape[1]
        if normalize:
            lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
            vectors = vectors / np.where(lengths == 0, 1, lengths)
        return vectors

    def _ask(self, texts: Sequence[str]) -> list[list[float]]:
        body: dict[str, Any] = {
            "model": self.model,
            "input": list(texts),
            "encoding_format": "float",
        }
        if self._block.dimensions is not None:
            body["dimensions"] = self._block.dimensions
        answer = self._endpoint.post("/embeddings", body, timeout_s=self.remaining_s())
        read = _read(_VECTORS, answer, "data", self._endpoint.url)
        return _in_order({one.index: one.embedding for one in read}, len(texts), self._endpoint.url)


class EndpointReranker(Reranker):
    """``/rerank`` as Cohere, Jina, vLLM and llama.cpp serve it: a query and its texts at once."""

    def __init__(self, block: Rerank, *, settings: RagSettings) -> None:
        self.model = block.remote_model or ""
        self._endpoint = Endpoint(block, settings=settings)

    def score(self, pairs: Sequence[tuple[str, str]], *, stop: Callable[[], None]) -> list[float]:
        """Send one request per run of pairs with the same query."""
        scores: list[float] = []
        for query, run in groupby(pairs, key=lambda pair: pair[0]):
            stop()
            scores += self._ask(query, [text for _, text in run])
        return scores

    def close(self) -> None:
        """Give the connections back."""
        self._endpoint.close()

    def _ask(self, query: str, texts: Sequence[str]) -> list[float]:
        body: dict[str, Any] = {"query": query, "documents": list(texts), "top_n": len(texts)}
        if self.model:
            body["model"] = self.model
        url = self._endpoint.url
        answer = self._endpoint.post("/rerank", body, timeout_s=self.remaining_s())
        read = _read(_PLACES, answer, "results", url)
        scores = _in_order({one.index: one.relevance_score for one in read}, len(texts), url)
        if not all(map(math.isfinite, scores)):
            raise ExecutionError(f"{url} gave NaN or infinity as a score")
        return scores


def _read(adapter: TypeAdapter[Any], answer: Any, key: str, url: str) -> Any:
    try:
        return adapter.validate_python(answer[key])
    except (KeyError, TypeError, ValidationError):
        raise ExecutionError(f"{url} must answer with a list {key!r} as its API says") from None


def _in_order(found: Mapping[int, Any], count: int, url: str) -> list[Any]:
    """Return what came for each text; a list may come in any order."""
    if found.keys() != set(range(count)):
        raise ExecutionError(f"{url} gave {len(found)} answers for {count} texts")
    return [found[index] for index in range(count)]


def _batches(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (texts[start : start + size] for start in range(0, len(texts), size))
