"""The executor's own logic, on an engine that answers at once or when it is told to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from flowmesh_transformers.batching import Budget
from flowmesh_transformers.executor import TransformersExecutor
from flowmesh_transformers.prompts import Answer, Request
from flowmesh_transformers.spec import TransformersSettings

from flowmesh_core import (
    CancelledError,
    DeadlineError,
    EmbeddingResult,
    ExecutionError,
    InferenceResult,
    InputError,
    Outcome,
    Row,
    RowSource,
    RunContext,
    derive_seed,
)


class FakeEngine:
    """Answers each prompt with itself, a character at a time; ``each_step`` watches."""

    def __init__(self) -> None:
        self.has_chat_template = False
        self.context_tokens: int | None = None
        self.rows = 4
        self.each_step: Callable[[], object] = lambda: None
        self.reply: Callable[[Request], str] = lambda request: "".join(map(chr, request.tokens))
        self.batches: list[Sequence[Request]] = []
        self.closed = 0

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        if messages[0]["role"] == "bad":
            raise InputError("no such role")
        return "|".join(f"{m['role']}:{m['content']}" for m in messages)

    def encode(self, text: str, *, rendered: bool) -> list[int]:
        return [ord(letter) for letter in text]

    def budget(self) -> Budget:
        return Budget(rows=self.rows)

    def generate(
        self, requests: Sequence[Request], stopped: Callable[[int], bool]
    ) -> Iterator[tuple[int, Answer | None]]:
        self.batches.append(requests)
        going = dict(enumerate(requests))
        step = 0
        while going:
            step += 1
            self.each_step()
            for number, request in [*going.items()]:
                text = self.reply(request)[: request.limit]
                if stopped(number):
                    del going[number]
                    yield number, None
                elif step >= len(text):
                    del going[number]
                    ended = len(text) < request.limit
                    reason = "stop" if ended else "length"
                    yield number, Answer(text=text, finish_reason=reason, tokens=len(text))

    def embed(self, requests: Sequence[Request]) -> list[list[float]]:
        self.batches.append(requests)
        return [[3.0 * len(request.tokens), 4.0 * len(request.tokens)] for request in requests]

    def close(self) -> None:
        self.closed += 1


class FakeExecutor(TransformersExecutor):
    def __init__(self) -> None:
        super().__init__()
        self.engine = FakeEngine()
        self.opened = 0

    def open_engine(self, ctx: RunContext) -> Any:
        self.opened += 1
        return self.engine


@pytest.fixture
def executor() -> FakeExecutor:
    return FakeExecutor()


@pytest.fixture
def run(executor: FakeExecutor, make_context: Any) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        ctx = make_context(*args, **kwargs)
        executor.load(ctx)
        return executor.run(ctx).result

    return run


@pytest.fixture
def run_group(executor: FakeExecutor, make_context: Any) -> Callable[..., Any]:
    """Run members that are given as keyword arguments of their contexts."""

    def run_group(**members: Mapping[str, Any]) -> list[tuple[str, Outcome]]:
        ctxs = [make_context(task_id=name, **member) for name, member in members.items()]
        executor.load(ctxs[0])
        return list(executor.run_group(ctxs))

    return run_group


def outputs(outcome: Outcome) -> list[str]:
    return [item["output"] for item in outcome.result["items"]]


def test_the_result_is_the_shared_one_with_the_rows_own_fields(run: Any) -> None:
    rows = RowSource.from_prompts(["long prompt", "p"], metadata=[{"k": 0}, {"k": 1}])
    result = InferenceResult.model_validate(run(inputs={"rows": rows}))
    assert [item.output for item in result.items] == ["long prompt", "p"]
    assert result.items[1].metadata == {"k": 1, "prompt": "p", "rendered_prompt": "p"}
    assert result.items[0].choices is None
    assert result.model == "acme/small"


def test_usage_counts_a_prompt_once_and_every_answer(run: Any) -> None:
    usage = run(["four", "sixsix"], n=3)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (10, 30)
    assert (usage["total_tokens"], usage["num_requests"]) == (40, 2)
    assert usage["latency_sec"] > 0


def test_choices_come_in_their_order_and_the_first_is_the_answer(
    run: Any, executor: FakeExecutor
) -> None:
    seeds = [derive_seed(4, 0, choice) for choice in range(3)]
    executor.engine.reply = lambda request: "x" * (4 - seeds.index(request.seed))
    (item,) = run(["p"], n=3, seed=4)["items"]  # the last ends first
    assert [choice["output"] for choice in item["choices"]] == ["xxxx", "xxx", "xx"]
    assert item["output"] == "xxxx"
    (batch,) = executor.engine.batches
    assert [request.seed for request in batch] == seeds


def test_batches_are_no_larger_than_the_budget_and_shrink_with_the_scale(
    run: Any, executor: FakeExecutor
) -> None:
    run([f"p{i}" for i in range(9)])
    assert [len(batch) for batch in executor.engine.batches] == [4, 4, 1]
    executor.engine.batches.clear()
    run([f"p{i}" for i in range(4)], context={"batch_scale": 0.5})
    assert [len(batch) for batch in executor.engine.batches] == [2, 2]


def test_rows_are_read_a_few_batches_ahead_only(run: Any, executor: FakeExecutor) -> None:
    read: list[int] = []
    ahead: list[int] = []

    class Rows:
        def count(self) -> int:
            return 100

        def __iter__(self) -> Iterator[Row]:
            for index in range(100):
                read.append(index)
                yield Row(index=index, prompt="p")

    executor.engine.each_step = lambda: ahead.append(len(read))
    assert len(run(inputs={"rows": Rows()})["items"]) == 100
    assert ahead[0] == 32


def test_the_smallest_scale_of_a_group_counts(run_group: Any, executor: FakeExecutor) -> None:
    run_group(a={"prompts": ["p"] * 4}, b={"prompts": ["p"] * 4, "context": {"batch_scale": 0.5}})
    assert {len(batch) for batch in executor.engine.batches} == {2}


def test_progress_never_falls_and_ends_at_one(run: Any) -> None:
    reports: list[Mapping[str, Any]] = []
    run([f"p{i}" for i in range(10)], n=2, context={"on_progress": reports.append})
    fractions = [report["fraction"] for report in reports]
    assert fractions == [pytest.approx((i + 1) / 20) for i in range(20)]
    assert reports[0]["message"] == "1 of 20 answers"


def test_prompt_format_decides_over_the_models_template(run: Any, executor: FakeExecutor) -> None:
    with pytest.raises(InputError, match="the model has no chat template"):
        run(["p"], prompt_format="chat")
    written = [run(["p"])["items"][0]["prompt"]]
    executor.engine.has_chat_template = True
    for kind in ("auto", "chat", "plain"):
        (item,) = run(["p"], prompt_format=kind, system_prompt="s")["items"]
        written.append(item["prompt"])
    assert written == ["p", "system:s|user:p", "system:s|user:p", "s\np"]


def test_a_row_that_cannot_be_written_names_itself(run: Any, executor: FakeExecutor) -> None:
    with pytest.raises(InputError, match="row 1: messages need a chat template"):
        run(["a", [{"role": "user", "content": "hi"}]])
    executor.engine.has_chat_template = True
    with pytest.raises(InputError, match="row 0: no such role"):
        run([[{"role": "bad", "content": "hi"}]])


def test_prompts_that_are_empty_or_too_long_are_errors(run: Any, executor: FakeExecutor) -> None:
    with pytest.raises(InputError, match="row 1: the prompt is empty"):
        run(["a", ""])
    executor.engine.context_tokens = 5
    with pytest.raises(InputError, match="row 0: the prompt has 6 tokens and the model takes 5"):
        run(["sixsix"])
    with pytest.raises(InputError, match="row 0: the prompt fills all 5 tokens"):
        run(["fives"])


def test_an_answer_is_no_longer_than_max_tokens_and_the_context(
    run: Any, executor: FakeExecutor
) -> None:
    executor.engine.context_tokens = 10
    (item,) = run(["sixsix"], max_tokens=9)["items"]
    assert (item["output"], item["finish_reason"]) == ("sixs", "length")
    (item,) = run(["sixsix"], max_new_tokens=2)["items"]
    assert item["output"] == "si"


def test_no_data_and_no_rows_are_two_clear_errors(run: Any) -> None:
    with pytest.raises(InputError, match="data is required"):
        run(inputs={"rows": None})
    with pytest.raises(InputError, match="data has no rows"):
        run([])


@pytest.mark.parametrize(
    ("problem", "retriable"), [(ValueError("odd bytes"), False), (OSError("disk gone"), True)]
)
def test_whatever_breaks_while_rows_are_read_is_the_datas_fault(
    run: Any, problem: Exception, retriable: bool
) -> None:
    with pytest.raises(InputError, match=f"data cannot be read: {problem}") as caught:
        run(inputs={"rows": Broken(problem)})
    assert caught.value.retriable is retriable


class Broken:
    """Rows of which the second cannot be read."""

    def __init__(self, problem: Exception) -> None:
        self.problem = problem

    def count(self) -> int:
        return 2

    def __iter__(self) -> Iterator[Row]:
        yield Row(index=0, prompt="fine")
        raise self.problem


def test_a_cancel_and_the_deadline_end_a_task_within_a_step(
    run: Any, executor: FakeExecutor
) -> None:
    steps: list[int] = []
    executor.engine.each_step = lambda: steps.append(1)
    with pytest.raises(CancelledError, match="task-1 was cancelled"):
        run(["endless" * 9] * 8, context={"is_cancelled": lambda: len(steps) >= 3})
    assert len(steps) == 3
    executor.engine.each_step = lambda: time.sleep(0.02)
    with pytest.raises(DeadlineError, match="task-1 reached its deadline"):
        run(["endless" * 9] * 8, context={"deadline": time.monotonic() + 0.1})
    assert len(executor.engine.batches) == 2


def test_members_share_batches_and_get_their_own_rows(
    run_group: Any, executor: FakeExecutor
) -> None:
    members = {
        "a": {"prompts": ["a0", "a1"], "system_prompt": "one"},
        "b": {"prompts": ["b0"], "system_prompt": "two"},
        "c": {"prompts": ["c0"]},
    }
    got = dict(run_group(**members))
    assert [len(batch) for batch in executor.engine.batches] == [4]
    assert outputs(got["a"]) == ["one\na0", "one\na1"]
    assert (outputs(got["b"]), outputs(got["c"])) == (["two\nb0"], ["c0"])
    assert got["a"].result["usage"]["prompt_tokens"] == 12
    assert got["c"].result["usage"]["num_requests"] == 1


def test_a_member_is_given_up_as_soon_as_it_has_all_of_its_answers(
    executor: FakeExecutor, make_context: Any
) -> None:
    steps: list[int] = []
    executor.engine.each_step = lambda: steps.append(1)
    long, short = (make_context([prompt], task_id=prompt[0]) for prompt in ("x" * 20, "short"))
    executor.load(long)
    arrived = [(task_id, len(steps)) for task_id, _ in executor.run_group([long, short])]
    assert arrived == [("s", 5), ("x", 20)]


def test_a_short_member_does_not_wait_for_the_rows_of_a_long_one(
    run_group: Any, executor: FakeExecutor
) -> None:
    got = run_group(long={"prompts": ["p"] * 100}, short={"prompts": ["p"] * 2})
    assert [task_id for task_id, _ in got] == ["short", "long"]


def test_a_bad_member_gets_its_own_error_and_spoils_no_other(run_group: Any) -> None:
    got = dict(
        run_group(
            unread={"inputs": {"rows": Broken(InputError("line 2 is no JSON"))}},
            good={"prompts": ["p1", "p2"]},
            empty={"prompts": []},
            messages={"prompts": ["x", [{"role": "user", "content": "hi"}]]},
        )
    )
    assert outputs(got["good"]) == ["p1", "p2"]
    assert "line 2 is no JSON" in str(got["unread"].error)
    assert "no rows" in str(got["empty"].error)
    assert "row 1: messages need" in str(got["messages"].error)
    assert all(not got[name].result for name in ("unread", "empty", "messages"))


def test_a_cancelled_member_is_dropped_and_the_others_go_on(
    run_group: Any, executor: FakeExecutor
) -> None:
    steps: list[int] = []
    executor.engine.each_step = lambda: steps.append(1)
    cancel = {"is_cancelled": lambda: len(steps) >= 3}
    got = run_group(gone={"prompts": ["x" * 9] * 2, "context": cancel}, kept={"prompts": ["y" * 9]})
    assert [task_id for task_id, _ in got] == ["gone", "kept"]
    assert isinstance(got[0][1].error, CancelledError)
    assert outputs(got[1][1]) == ["y" * 9]


def test_every_member_is_answered_once_even_when_all_are_cancelled(run_group: Any) -> None:
    gone = {"prompts": ["p"], "context": {"is_cancelled": lambda: True}}
    got = run_group(a=gone, b=gone)
    assert sorted(task_id for task_id, _ in got) == ["a", "b"]
    assert all(isinstance(outcome.error, CancelledError) for _, outcome in got)


def test_vectors_have_length_one_unless_told_otherwise(run: Any) -> None:
    result = run(["ab", "c"], task_type="embedding")
    shown = EmbeddingResult.model_validate(result)
    assert (shown.dimensions, shown.usage.prompt_tokens, shown.usage.num_requests) == (2, 3, 2)
    assert [item["embedding"] for item in shown.items] == [[0.6, 0.8], [0.6, 0.8]]
    raw = run(["ab", "c"], task_type="embedding", normalize=False)
    assert [item["embedding"] for item in raw["items"]] == [[6.0, 8.0], [3.0, 4.0]]


def test_a_chat_cannot_be_embedded(run: Any) -> None:
    with pytest.raises(InputError, match="row 0: an embedding needs a text"):
        run([[{"role": "user", "content": "hi"}]], task_type="embedding")


def test_loading_and_unloading_twice_happen_once(executor: FakeExecutor, make_context: Any) -> None:
    for _ in range(2):
        executor.load(make_context())
    for _ in range(2):
        executor.unload()
    assert executor.opened == executor.engine.closed == 1


def test_a_run_before_load_says_so(executor: FakeExecutor, make_context: Any) -> None:
    with pytest.raises(ExecutionError, match="run came before load"):
        executor.run(make_context())


def test_a_repositorys_own_code_runs_only_if_the_operator_allows_it(
    make_context: Any, tmp_path: Path
) -> None:
    wanted = {"options": {"trust_remote_code": True}, "model": tmp_path}
    (tmp_path / "config.json").write_text("{}")
    denied = TransformersSettings(FLOWMESH_TRUST_REMOTE_CODE=False)
    for settings in (None, denied):
        with pytest.raises(InputError, match="does not allow; leave it out, or set FLOWMESH_"):
            TransformersExecutor().load(make_context(**wanted, context={"settings": settings}))
