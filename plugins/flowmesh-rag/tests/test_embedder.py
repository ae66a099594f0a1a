from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from flowmesh_rag.embedder import Embedder, Role

from flowmesh_core import ExecutionError

np = pytest.importorskip("numpy", reason="needs the engine")


class FixedEmbedder(Embedder):
    """Gives the same array whatever it is asked."""

    model = "acme/small"
    dimensions = 2

    def __init__(self, vectors: Any) -> None:
        self.vectors = np.asarray(vectors, dtype=np.float32)

    def _embed(
        self, texts: Sequence[str], *, role: Role, stop: Callable[[], None], normalize: bool
    ) -> Any:
        stop()
        return self.vectors


def embed(vectors: Any, texts: Sequence[str] = ("a", "b")) -> Any:
    return FixedEmbedder(vectors).embed(texts, role="query", stop=lambda: None)


def test_vectors_pass_as_they_are() -> None:
    assert embed([[1, 2], [3, 4]]).tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_is_refused_with_its_text(number: float) -> None:
    with pytest.raises(ExecutionError, match="acme/small gave NaN or infinity for text 1"):
        embed([[1, 2], [3, number]])


@pytest.mark.parametrize("vectors", [[[1, 2]], [1, 2], [], [[[1], [2]], [[1], [2]]]])
def test_each_text_has_a_vector(vectors: Any) -> None:
    with pytest.raises(ExecutionError, match=r"acme/small gave an array of shape .* for 2 texts"):
        embed(vectors)
