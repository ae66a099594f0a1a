"""What turns texts into vectors and sorts hits anew, and how one is opened."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from flowmesh_core import ExecutionError, ModelRef
from flowmesh_rag.blocks import DEFAULT_MODEL, RagEmbedding, Rerank
from flowmesh_rag.settings import RagSettings

if TYPE_CHECKING:  # comes with the engine
    import numpy as np

__all__ = ["Embedder", "Reranker", "Role", "open_embedder", "open_reranker"]

Role = Literal["query", "document"]


class Embedder(abc.ABC):
    """A loaded model, or an endpoint; used by one thread, the main one of its process.

    Attributes:
        model: What results call it, and what an index remembers.
        dimensions: Size of its vectors; None until the first call of an endpoint.
        max_tokens: Where texts are cut; None when that cannot be told.
        batch_scale: Factor for batch sizes; set from ``ctx.batch_scale`` before ``embed``.
        remaining_s: Returns what is left of the task's time, if it has an end; set likewise.
    """

    model: str
    dimensions: int | None
    max_tokens: int | None = None
    batch_scale: float = 1.0
    remaining_s: Callable[[], float | None] = staticmethod(lambda: None)

    def embed(
        self,
        texts: Sequence[str],
        *,
        role: Role,
        stop: Callable[[], None],
        normalize: bool = True,
    ) -> np.ndarray:
        """Return float32 vectors of the texts, one row each, in their order.

        Args:
            texts: Any number but 0.
            role: Decides about the prompt that is put before each.
            stop: Called between batches; raises when the task must stop.
            normalize: Give each vector the length 1.

        Raises:
            ExecutionError: The model gave a number that is not finite, or too few vectors.
        """
        vectors = self._embed(texts, role=role, stop=stop, normalize=normalize)
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise ExecutionError(
                f"{self.model} gave an array of shape {vectors.shape} for {len(texts)} texts"
            )
        # The one place for this check: JSON has no such numbers, and stores would keep them.
        finite = (abs(vectors) < float("inf")).all(axis=1)
        if not finite.all():
            first = int(finite.argmin())
            raise ExecutionError(f"{self.model} gave NaN or infinity for text {first}")
        return vectors

    @abc.abstractmethod
    def _embed(
        self, texts: Sequence[str], *, role: Role, stop: Callable[[], None], normalize: bool
    ) -> np.ndarray:
        """Do what ``embed`` promises but for its checks."""

    def count_tokens(self, text: str) -> int | None:
        """Return the number of tokens of a text, uncut; None when that cannot be told."""
        return None

    def close(self) -> None:  # noqa: B027 - an endpoint may hold nothing
        """Free the model; may come twice."""


class Reranker(abc.ABC):
    """A loaded cross-encoder, or an endpoint; used like an ``Embedder``."""

    model: str
    batch_scale: float = 1.0
    remaining_s: Callable[[], float | None] = staticmethod(lambda: None)

    @abc.abstractmethod
    def score(self, pairs: Sequence[tuple[str, str]], *, stop: Callable[[], None]) -> list[float]:
        """Return how well the text of each pair (query, text) answers its query; more is better."""

    def close(self) -> None:  # noqa: B027 - as above
        """Free the model; may come twice."""


def open_embedder(
    block: RagEmbedding,
    model: ModelRef | None,
    *,
    settings: RagSettings,
    devices: Sequence[str] = (),
) -> Embedder:
    """Open what a block ``embedding`` names; not for one with ``server``.

    Args:
        block: The task's.
        model: ``ctx.inputs.models.get("embedding.model")``; None means the contract's default.
        settings: The operator's.
        devices: ``ctx.devices``.
    """
    if block.endpoint is not None:
        from flowmesh_rag.endpoint import EndpointEmbedder  # noqa: PLC0415 - few tasks need it

        return EndpointEmbedder(block, settings=settings)
    from flowmesh_rag.sentence import SentenceEmbedder  # noqa: PLC0415 - loads the engine

    if model is None:
        model = ModelRef(identifier=DEFAULT_MODEL, hub_id=DEFAULT_MODEL, format="hf")
    return SentenceEmbedder(model, block, settings=settings, devices=devices)


def open_reranker(
    block: Rerank, model: ModelRef | None, *, settings: RagSettings, devices: Sequence[str] = ()
) -> Reranker:
    """Open what a block ``rerank`` names; arguments are those of ``open_embedder``."""
    if block.endpoint is not None:
        from flowmesh_rag.endpoint import EndpointReranker  # noqa: PLC0415 - as above

        return EndpointReranker(block, settings=settings)
    from flowmesh_rag.sentence import SentenceReranker  # noqa: PLC0415 - as above

    if model is None:
        raise ExecutionError("spec.rerank.model was not gathered")
    return SentenceReranker(model, block, settings=settings, devices=devices)
