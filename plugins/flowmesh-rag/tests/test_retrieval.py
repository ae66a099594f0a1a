from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import attrs
import pytest
from flowmesh_rag.blocks import StoreBlock
from flowmesh_rag.plugin import flowmesh_register_executors
from flowmesh_rag.settings import RagSettings
from flowmesh_rag.stores.base import BOOKKEEPING, CollectionFacts, open_store
from word_models import TEXTS, WORDS, WordEmbedder, WordExecutor, count_words, make_point

from flowmesh_core import (
    CancelledError,
    DeadlineError,
    ExecutionError,
    InputError,
    Outcome,
    RowSource,
)
from flowmesh_core.testing import run_task

pytest.importorskip("numpy", reason="vectors are arrays")

RAG = flowmesh_register_executors()[0]
EMBEDDED = {"type": "sqlite", "collection": "docs"}
SPEC: dict[str, Any] = {"taskType": "rag", "store": EMBEDDED, "data": {"type": "list"}}
GENERATE = {"task": {"model": {"source": {"identifier": "acme/small"}}}}


def fill(settings: RagSettings, *, owner: str = "") -> None:
    """Write the texts into the embedded collection."""
    facts = CollectionFacts(vectors={"dense": 4}, sparse=("bm25",), model="words@1")
    with open_store(StoreBlock(**EMBEDDED), owner=owner, settings=settings) as store:
        store.create(facts)
        store.upsert([make_point(number, text) for number, text in enumerate(TEXTS)])


@pytest.fixture
def executor() -> WordExecutor:
    return WordExecutor()


@pytest.fixture
def make_task(make_context: Any, settings: RagSettings) -> Any:
    """Contexts by ``make_task(texts, task_id, **spec)``, for a filled collection."""
    fill(settings)

    def make(
        texts: Sequence[Any] = ("lamp",), task_id: str = "task-1", context: Any = None, **spec: Any
    ) -> Any:
        rows = RowSource.from_prompts(texts)
        return make_context({**SPEC, **spec}, task_id=task_id, rows=rows, context=context)

    return make


def found(result: Any) -> list[list[str]]:
    return [[item["payload"]["text"] for item in one["items"]] for one in result["queries"]]


def by_hand(query: str, limit: int) -> list[tuple[str, float]]:
    """Rank the texts as brute force does."""
    asked = count_words(query)

    def cosine(text: str) -> float:
        other = count_words(text)
        product = sum(a * b for a, b in zip(asked, other, strict=True))
        return product / (math.hypot(*asked) * math.hypot(*other))

    ranked = sorted(((text, cosine(text)) for text in TEXTS), key=lambda item: -item[1])
    return ranked[:limit]


def test_each_query_gets_what_brute_force_finds(executor: WordExecutor, make_task: Any) -> None:
    queries = ["lamp lamp", "sea ship ship", "tower lamp"]
    result = executor.run(make_task(queries, search={"top_k": 2})).result
    assert [one["query"] for one in result["queries"]] == queries
    for query, one in zip(queries, result["queries"], strict=True):
        expected = by_hand(query, 2)
        assert [item["payload"]["text"] for item in one["items"]] == [text for text, _ in expected]
        scores = [item["score"] for item in one["items"]]
        assert scores == pytest.approx([score for _, score in expected], abs=1e-5)
        assert all(BOOKKEEPING not in item["payload"] for item in one["items"])
    usage = result["usage"]
    assert (usage["num_queries"], usage["total_results"]) == (3, 6)
    assert 0 < usage["embed_sec"] + usage["search_sec"] <= usage["latency_sec"]


def test_a_thousand_queries_are_one_batch_of_the_model_and_four_of_the_store(
    executor: WordExecutor, make_task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flowmesh_rag.stores.sqlite import SqliteStore

    sizes: list[int] = []
    search = SqliteStore.search

    def counting(self: Any, searches: Any, options: Any) -> Any:
        sizes.append(len(searches))
        return search(self, searches, options)

    monkeypatch.setattr(SqliteStore, "search", counting)
    queries = [f"{WORDS[number % 4]} number {number}" for number in range(1000)]
    progress: list[Any] = []
    ctx = make_task(queries, search={"top_k": 1}, context={"on_progress": progress.append})
    result = executor.run(ctx).result
    assert executor.words.calls == [queries]
    assert sizes == [256, 256, 256, 232]
    assert [one["index"] for one in result["queries"]] == list(range(1000))
    best = {word: by_hand(word, 1)[0][0] for word in WORDS}
    assert found(result) == [[best[WORDS[number % 4]]] for number in range(1000)]
    fractions = [one["fraction"] for one in progress]
    assert fractions == sorted(fractions)
    assert len(set(fractions)) >= 5
    assert fractions[-1] == 1.0


def test_members_of_a_group_get_their_own_answers_out_of_one_batch(
    executor: WordExecutor, make_task: Any
) -> None:
    cancelled = {"is_cancelled": lambda: True}
    asked: dict[str, list[Any]] = {
        "one": ["lamp"],
        "two": ["sea", "ship"],
        "bad": [[{"role": "user", "content": "hi"}]],
        "gone": ["tower tower"],
        "same": ["sea", "ship"],
        "three": ["tower"],
        "four": ["lamp", "lamp"],
        "five": ["sea tower"],
    }
    ctxs = [
        make_task(texts, task_id, context=cancelled if task_id == "gone" else None)
        for task_id, texts in asked.items()
    ]
    got = dict(executor.run_group(ctxs))
    assert list(got) == list(asked)
    assert "row 0: must be a text, got chat messages" in str(got["bad"].error)
    assert isinstance(got["gone"].error, CancelledError)
    assert executor.words.calls == [["lamp", "sea", "ship", "tower", "sea tower"]]
    for task_id in set(asked) - {"bad", "gone"}:
        alone = WordExecutor().run(make_task(asked[task_id], task_id)).result
        assert got[task_id].result["queries"] == alone["queries"]
    assert got["two"].result["queries"] != got["one"].result["queries"]


def test_a_text_that_the_model_refuses_fails_its_own_task(
    executor: WordExecutor, make_task: Any
) -> None:
    ctxs = [make_task(["lamp"], "a"), make_task(["poison", "sea"], "b"), make_task(["sea"], "c")]
    got = dict(executor.run_group(ctxs))
    assert str(got["b"].error) == "poison has no vector"
    assert found(got["a"].result)[0][0] == "lamp lamp tower"
    assert len(found(got["c"].result)) == 1


def test_a_cancel_that_comes_midway_ends_one_task_and_not_its_neighbour(
    executor: WordExecutor, make_task: Any
) -> None:
    flag: list[bool] = []
    executor.words.on_call = lambda: flag.append(True)
    first = make_task(["lamp"], "a", context={"is_cancelled": lambda: bool(flag)})
    second = make_task(["sea"], "b")
    got = dict(executor.run_group([first, second]))
    assert isinstance(got["a"].error, CancelledError)
    assert got["b"].ok


def test_the_deadline_ends_a_task_while_it_embeds(executor: WordExecutor, make_task: Any) -> None:
    now = [0.0]
    executor.words.on_call = lambda: now.__setitem__(0, 10.0)
    ctx = make_task(["lamp"], context={"clock": lambda: now[0], "deadline": 9.0})
    with pytest.raises(DeadlineError, match="reached its deadline"):
        executor.run(ctx)
    assert executor.words.finished == 0


def test_a_collection_that_is_not_there_is_named_and_nothing_is_embedded(
    executor: WordExecutor, make_task: Any
) -> None:
    missing = {"type": "sqlite", "collection": "other"}
    with pytest.raises(InputError, match="store 'sqlite' has no collection 'other'"):
        executor.run(make_task(store=missing))
    assert executor.words.calls == []


def test_owners_see_nothing_of_each_other(
    executor: WordExecutor, make_task: Any, settings: RagSettings
) -> None:
    fill(settings, owner=json.dumps(["ann", None, None]))
    ann, bob = ({"metadata": {"owner": name}} for name in ("ann", "bob"))
    assert executor.run(make_task(context=ann)).ok
    with pytest.raises(InputError, match="has no collection 'docs'"):
        executor.run(make_task(context=bob))


@pytest.mark.parametrize("tells_size", [True, False])
def test_vectors_of_another_size_are_refused_as_early_as_can_be(
    executor: WordExecutor, make_task: Any, tells_size: bool
) -> None:
    executor.words = WordEmbedder(5, tells_size=tells_size)
    with pytest.raises(
        InputError, match=r"model words@1 gives vectors of 5 numbers, the collection holds 4"
    ):
        executor.run(make_task())
    assert len(executor.words.calls) == (0 if tells_size else 1)


def test_a_collection_of_another_model_is_told_in_the_log(
    executor: WordExecutor, make_task: Any
) -> None:
    executor.words.model = "words@2"
    lines: list[str] = []
    ctx = make_task(context={"on_log": lambda _level, text: lines.append(text)})
    assert executor.run(ctx).ok
    (line,) = lines
    assert "is words@2, and the collection was made with words@1" in line


def test_a_search_by_words_needs_no_model(executor: WordExecutor, make_task: Any) -> None:
    ctx = make_task(["ship"], search={"mode": "sparse", "top_k": 2})
    executor.load(ctx)
    result = executor.run(ctx).result
    assert executor.opened == 0
    assert found(result)[0][0] == "ship ship ship lamp"
    assert result["embedding"] == {"model": ""}
    # The same engine then serves a task that does need it.
    dense = executor.run(make_task(["ship"])).result
    assert executor.opened == 1
    assert dense["embedding"] == {"model": "words@1"}


def test_a_hybrid_search_joins_both(executor: WordExecutor, make_task: Any) -> None:
    result = executor.run(make_task(["ship"], search={"mode": "hybrid", "top_k": 2})).result
    (items,) = [one["items"] for one in result["queries"]]
    assert items[0]["payload"]["text"] == "ship ship ship lamp"
    assert items[0]["score"] == pytest.approx(2 / 60)


def test_a_cross_encoder_sorts_more_hits_than_are_shown(
    executor: WordExecutor, make_task: Any
) -> None:
    ctx = make_task(
        ["lamp", "sea"],
        search={"top_k": 2, "with_payload": ["source"]},
        rerank={"model": "m", "candidates": 3},
    )
    result = executor.run(ctx).result
    (pairs,) = executor.short.calls
    assert [query for query, _ in pairs] == ["lamp"] * 3 + ["sea"] * 3
    assert pairs[0] == ("lamp", "lamp lamp tower")
    for one in result["queries"]:
        lengths = sorted(len(text) for query, text in pairs if query == one["query"])
        assert [item["rerank_score"] for item in one["items"]] == [-n for n in lengths[:2]]
        assert all(item["payload"].keys() == {"source"} for item in one["items"])
    assert result["usage"]["rerank_sec"] >= 0


def test_a_hit_without_text_comes_last_and_is_told(
    executor: WordExecutor, make_task: Any, settings: RagSettings
) -> None:
    blank = make_point(9, "lamp")
    blank = attrs.evolve(blank, payload={**blank.payload, "text": " "})
    with open_store(StoreBlock(**EMBEDDED), owner="", settings=settings) as store:
        store.upsert([blank])
    lines: list[str] = []
    told = {"on_log": lambda _, text: lines.append(text)}
    ctx = make_task(search={"top_k": 9}, rerank={"model": "m"}, context=told)
    (one,) = executor.run(ctx).result["queries"]
    *others, last = one["items"]
    assert last["payload"]["source"] == "9.md"
    assert "rerank_score" not in last
    scores = [item["rerank_score"] for item in others]
    assert scores == sorted(scores, reverse=True)
    assert lines == ["spec.rerank.text_field: 1 of 7 hits have no text in 'text' and come last"]


def test_hits_without_any_text_fail_their_own_task(executor: WordExecutor, make_task: Any) -> None:
    rerank = {"model": "m", "text_field": "body"}
    with pytest.raises(InputError, match=r"rerank\.text_field: 6 of 6 hits have no text in 'body'"):
        executor.run(make_task(rerank=rerank))
    assert executor.short.calls == []


def test_no_hits_are_no_error(executor: WordExecutor, make_task: Any) -> None:
    nothing = {"must": [{"key": "source", "match": {"value": "no.md"}}]}
    result = executor.run(make_task(search={"filter": nothing}, rerank={"model": "m"})).result
    assert result["queries"][0]["items"] == []
    assert result["usage"]["total_results"] == 0
    assert executor.short.calls == []


def answering(seen: list[Any]) -> Callable[[Any], Future[Outcome]]:
    """Return what answers child tasks, as an inference engine would."""

    def start(spec: Any) -> Future[Outcome]:
        seen.append(spec)
        prompts = spec["data"]["items"]
        future: Future[Outcome] = Future()
        items = [{"output": f"Said {i} [1]", "finish_reason": "stop"} for i in range(len(prompts))]
        usage = {"prompt_tokens": 7, "completion_tokens": 2}
        future.set_result(Outcome(result={"model": "acme/small", "items": items, "usage": usage}))
        return future

    return start


def test_answers_are_written_out_of_the_hits(executor: WordExecutor, make_task: Any) -> None:
    seen: list[Any] = []
    ctx = make_task(
        ["lamp", "sea"],
        search={"top_k": 1, "with_payload": False},
        generate=GENERATE,
        context={"start_child": answering(seen)},
    )
    result = executor.run(ctx).result
    (spec,) = seen
    assert "lamp lamp tower" in spec["data"]["items"][0]
    answers = [one["answer"] for one in result["queries"]]
    assert [answer["text"] for answer in answers] == ["Said 0 [1]", "Said 1 [1]"]
    assert [one["source"] for one in answers[0]["citations"]] == ["0.md"]
    assert result["queries"][0]["items"][0]["payload"] is None
    usage = result["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (7, 2)
    assert usage["total_tokens"] == 9
    assert usage["generate_sec"] >= 0


def test_an_answer_that_fails_leaves_the_groups_other_tasks_alone(
    executor: WordExecutor, make_task: Any
) -> None:
    def failing(_spec: Any) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        future.set_result(Outcome(error=ExecutionError("the model is gone")))
        return future

    ctxs = [
        make_task(["lamp"], name, generate=GENERATE, context={"start_child": start})
        for name, start in {"a": failing, "b": answering([])}.items()
    ]
    got = dict(executor.run_group(ctxs))
    assert str(got["a"].error) == "the model is gone"
    assert got["b"].result["queries"][0]["answer"]["text"] == "Said 0 [1]"


class Patient:
    """An inference engine that answers only when it has the child tasks of a whole group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.waiting: list[tuple[Future[Outcome], Any]] = []

    def __call__(self, spec: Any) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        self.waiting.append((future, spec))
        if len(self.waiting) == self.size:
            for one, asked in self.waiting:
                one.set_result(answering([])(asked).result())
        return future


def test_the_answers_of_a_group_are_written_at_the_same_time(
    executor: WordExecutor, make_task: Any
) -> None:
    engine = Patient(3)
    late = {"start_child": engine, "deadline": time.monotonic() + 60}
    ctxs = [make_task(["lamp"], name, generate=GENERATE, context=late) for name in "abc"]
    got = dict(executor.run_group(ctxs))
    assert [outcome.error for outcome in got.values()] == [None] * 3


def test_a_cancel_ends_one_answer_and_not_its_neighbours(
    executor: WordExecutor, make_task: Any
) -> None:
    silent: Future[Outcome] = Future()
    begun: list[Any] = []
    stuck = {
        "start_child": lambda spec: (begun.append(spec), silent)[1],
        "is_cancelled": lambda: bool(begun),
    }
    contexts = {"a": stuck, "b": {"start_child": answering([])}}
    ctxs = [make_task(["lamp"], n, generate=GENERATE, context=c) for n, c in contexts.items()]
    got = dict(executor.run_group(ctxs))
    assert isinstance(got["a"].error, CancelledError)
    assert got["b"].ok
    assert silent.cancelled()


def test_the_time_of_a_failed_answer_is_not_its_neighbours(
    executor: WordExecutor, make_task: Any
) -> None:
    def slow(_spec: Any) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        timer = threading.Timer(1, lambda: future.set_result(Outcome(error=InputError("no"))))
        timer.start()
        return future

    contexts = {"a": {"start_child": slow}, "b": {"start_child": answering([])}}
    ctxs = [make_task(["lamp"], n, generate=GENERATE, context=c) for n, c in contexts.items()]
    order = list(executor.run_group(ctxs))
    assert [name for name, _ in order] == ["b", "a"], "whoever has its answers goes first"
    assert order[0][1].result["usage"]["generate_sec"] < 0.9
    assert str(order[1][1].error) == "no"


def test_models_and_stores_know_the_time_that_is_left_and_hear_a_cancel(
    executor: WordExecutor, make_task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flowmesh_rag.stores.sqlite import SqliteStore

    flag: list[bool] = []

    def searching(self: Any, searches: Any, options: Any) -> Any:
        flag.append(True)
        self.context.stop()
        raise AssertionError("the cancel was not heard")

    monkeypatch.setattr(SqliteStore, "search", searching)
    end = {"clock": lambda: 10.0, "is_cancelled": lambda: bool(flag)}
    left: list[Any] = []
    executor.words.on_call = lambda: left.append(executor.words.remaining_s())
    ctxs = [
        make_task(["lamp"], name, context={**end, "deadline": deadline})
        for name, deadline in {"a": 12.0, "b": 17.0}.items()
    ]
    got = dict(executor.run_group(ctxs))
    assert left == [7.0], "of the task that has the most"
    assert [type(outcome.error) for outcome in got.values()] == [CancelledError] * 2


def test_models_are_freed_once_and_loaded_anew(executor: WordExecutor, make_task: Any) -> None:
    ctx = make_task()
    executor.load(ctx)
    executor.unload()
    executor.unload()
    assert executor.words.closed == 1
    executor.load(ctx)
    assert executor.opened == 2


def test_the_smallest_batch_of_a_group_counts(executor: WordExecutor, make_task: Any) -> None:
    scales = {"a": 1.0, "b": 0.5}
    ctxs = [make_task(["lamp"], name, context={"batch_scale": s}) for name, s in scales.items()]
    assert all(outcome.ok for _, outcome in executor.run_group(ctxs))
    assert executor.words.batch_scale == 0.5


ROWS = [{"question": "lamp", "lang": "en"}, {"question": "sea", "lang": "fr"}]
TEMPLATE = {"text": "{col1_value}", "columns": [{"label": "A", "expr": "first.said"}]}
DATA: dict[str, dict[str, Any]] = {
    "list": {"type": "list", "items": ["lamp", "sea"]},
    "static": {"type": "static", "task": "sea"},
    "records": {"type": "records", "items": ROWS},
    "jsonl": {"type": "jsonl", "path": "asked.jsonl"},
    "dataset": {"type": "dataset", "url": "asked.jsonl", "column": "question"},
    "graph_template": {"type": "graph_template", "template": TEMPLATE},
}


@pytest.mark.parametrize("kind", DATA)
def test_queries_come_from_every_kind_of_data(
    settings: RagSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "dataset":
        pytest.importorskip("datasets", reason="it reads this kind")
    fill(settings)
    monkeypatch.setenv("FLOWMESH_RAG_DIR", str(settings.folder))
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps(row) for row in ROWS]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines))
    upstream = {"_upstreamResults": {"first": {"said": "sea"}}}
    spec = {"store": EMBEDDED, "search": {"top_k": 1}, "data": DATA[kind], **upstream}
    info = attrs.evolve(RAG, name="test.rag", places=("inline",), needs=(), models=())
    run = run_task(WordExecutor, spec, info=info, folder=tmp_path / "run")
    assert run.error is None
    queries = run.result["queries"]
    asked = ["sea"] if kind in ("static", "graph_template") else ["lamp", "sea"]
    assert [one["query"] for one in queries] == asked
    assert found(run.result)[-1] == ["sea sea tower"]
    if kind in ("records", "jsonl", "dataset"):
        assert [one["metadata"] for one in queries] == [{"lang": "en"}, {"lang": "fr"}]
