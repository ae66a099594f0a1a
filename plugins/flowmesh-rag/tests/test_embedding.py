from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from flowmesh_rag.embedder import Embedder, Role
from flowmesh_rag.embedding import EmbeddingExecutor
from tiny_models import build_tiny_embedder

from flowmesh_core import (
    CancelledError,
    EmbeddingResult,
    ExecutionError,
    InputError,
    ModelRef,
    RowSource,
)

np = pytest.importorskip("numpy", reason="vectors are arrays")

SPEC = {"taskType": "embedding", "data": {"type": "list"}}


class LengthEmbedder(Embedder):
    """Gives (length, 1); "poison" has no vector."""

    model = "lengths@1"
    dimensions = 2
    max_tokens = 3

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.on_call: Callable[[], None] = lambda: None

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def _embed(
        self, texts: Sequence[str], *, role: Role, stop: Callable[[], None], normalize: bool
    ) -> Any:
        assert (role, normalize) == ("document", False)
        self.calls.append(list(texts))
        self.on_call()
        stop()
        if "poison" in texts:
            raise InputError("poison has no vector")
        return np.asarray([[len(text), 1] for text in texts], dtype=np.float32)


class LengthExecutor(EmbeddingExecutor):
    """The executor with that model."""

    def open_embedder(self, ctx: Any) -> Embedder:
        return self.lengths

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self.lengths = LengthEmbedder()


@pytest.fixture
def make_task(make_context: Any) -> Any:
    def make(
        texts: Sequence[Any], task_id: str = "task-1", context: Any = None, **spec: Any
    ) -> Any:
        return make_context(
            {**SPEC, **spec},
            task_id=task_id,
            rows=RowSource.from_prompts(texts),
            model=ModelRef(identifier="acme/small", format="hf"),
            context=context,
        )

    return make


@pytest.fixture
def executor(make_task: Any) -> LengthExecutor:
    executor = LengthExecutor()
    executor.load(make_task(["x"]))
    return executor


def vectors(result: Any) -> list[list[float]]:
    return [item["embedding"] for item in result["items"]]


def test_the_result_is_the_shared_one(executor: LengthExecutor, make_task: Any) -> None:
    raw = executor.run(make_task(["abc", "a b c d e"])).result
    result = EmbeddingResult.model_validate(raw)
    assert (result.model, result.dimensions) == ("acme/small", 2)
    assert [item["index"] for item in result.items] == [0, 1]
    assert result.items[0]["metadata"] == {"prompt": "abc"}
    length = 10**0.5
    assert vectors(raw)[0] == pytest.approx([3 / length, 1 / length], abs=1e-12)
    assert result.usage.prompt_tokens == result.usage.total_tokens == 1 + 3
    assert result.usage.num_requests == 2


def test_vectors_keep_their_length_where_the_document_says_so(
    executor: LengthExecutor, make_task: Any
) -> None:
    assert vectors(executor.run(make_task(["abc"], normalize=False)).result) == [[3.0, 1.0]]


def test_tasks_share_batches_and_end_one_after_the_other(
    executor: LengthExecutor, make_task: Any
) -> None:
    options = {"sentence_transformers": {"batch_size": 1}}
    progress: list[Any] = []
    ctxs = [
        make_task(["x" * (n + 1)] * count, f"t{n}", model=options, context=context)
        for n, (count, context) in enumerate(
            [(3, None), (20, {"on_progress": progress.append}), (5, None)]
        )
    ]
    ended: list[tuple[str, int]] = []
    for task_id, outcome in executor.run_group(ctxs):
        ended.append((task_id, len(executor.lengths.calls)))
        assert {item["embedding"][0] > 0 for item in outcome.result["items"]} == {True}
        assert len(outcome.result["items"]) == {"t0": 3, "t1": 20, "t2": 5}[task_id]
    assert ended == [("t0", 1), ("t1", 2), ("t2", 2)]
    assert [len(call) for call in executor.lengths.calls] == [16, 12]
    assert [one["fraction"] for one in progress] == [13 / 20, 1.0]


def test_a_bad_member_fails_alone_and_a_cancelled_one_is_not_embedded(
    executor: LengthExecutor, make_task: Any
) -> None:
    chat = [[{"role": "user", "content": "hi"}]]
    ctxs = [
        make_task(["good"], "good"),
        make_task(chat, "chat"),
        make_task(["poison"], "poison"),
        make_task(["gone"], "gone", context={"is_cancelled": lambda: True}),
        make_task(["last one"], "last"),
    ]
    got = dict(executor.run_group(ctxs))
    assert "row 0: must be a text, got chat messages" in str(got["chat"].error)
    assert str(got["poison"].error) == "poison has no vector"
    assert isinstance(got["gone"].error, CancelledError)
    assert vectors(got["good"].result)[0][0] == pytest.approx(4 / 17**0.5)
    assert got["last"].ok
    assert all("gone" not in call for call in executor.lengths.calls)


def test_a_cancel_that_comes_midway_ends_the_task(executor: LengthExecutor, make_task: Any) -> None:
    flag: list[bool] = []
    executor.lengths.on_call = lambda: flag.append(True)
    with pytest.raises(CancelledError, match="was cancelled"):
        executor.run(make_task(["a"], context={"is_cancelled": lambda: bool(flag)}))


def test_a_run_without_a_loaded_model_is_an_error(make_task: Any) -> None:
    with pytest.raises(ExecutionError, match="run came before load"):
        EmbeddingExecutor().run(make_task(["a"]))


def test_a_task_without_a_model_is_refused(make_context: Any) -> None:
    with pytest.raises(InputError, match=r"model\.source must name a model"):
        EmbeddingExecutor().load(make_context(SPEC))


def test_a_real_model_gives_what_the_library_gives(make_context: Any, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers", reason="needs the engine")
    folder = build_tiny_embedder(tmp_path)
    texts = ["the lamp", "the keeper of the sea"]
    options = {"sentence_transformers": {"document_prompt": "a "}}
    ctx = make_context(
        {**SPEC, "model": options, "normalize": False},
        rows=RowSource.from_prompts(texts),
        model=ModelRef(identifier="acme/tiny", path=folder, format="hf"),
    )
    executor = EmbeddingExecutor()
    executor.load(ctx)
    result = executor.run(ctx).result
    executor.unload()
    executor.unload()
    plain = library.SentenceTransformer(str(folder), device="cpu")
    expected = plain.encode([f"a {text}" for text in texts])
    np.testing.assert_allclose(vectors(result), expected, atol=1e-5)
    assert result["usage"]["prompt_tokens"] == 4 + 7
