"""The executor's own logic, on an engine that answers at once or when it is told to."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
from flowmesh_llamacpp.executor import LlamacppExecutor

from flowmesh_core import (
    AdapterRef,
    CancelledError,
    DeadlineError,
    ExecutionError,
    InferenceResult,
    InputError,
    Row,
    RunContext,
    derive_seed,
)


@attrs.frozen(kw_only=True)
class FakeAnswer:
    text: str
    finish_reason: str = "stop"
    prompt: str
    prompt_tokens: int = 3
    completion_tokens: int = 2


class FakeEngine:
    """Answers ``re: <prompt>``; ``hold`` may keep a prompt until the test lets it go."""

    def __init__(self) -> None:
        self.has_chat_template = False
        self.hold: Callable[[str], object] = lambda _prompt: None
        self.reply: Callable[[str], str] = "re: {}".format
        self.requests: list[Mapping[str, Any]] = []
        self.running = self.most_running = self.closed = 0
        self._lock = threading.Lock()

    def complete(self, request: Mapping[str, Any], *, stopped: Callable[[], bool]) -> Any:
        prompt = request.get("prompt", "chat")
        with self._lock:
            self.requests.append(request)
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            self.hold(prompt)
            while prompt.startswith("endless"):
                if stopped():
                    return None
                time.sleep(0.005)
        finally:
            with self._lock:
                self.running -= 1
        if prompt == "broken":
            raise InputError("cannot be read")
        tokens = len(prompt)
        return FakeAnswer(text=self.reply(prompt), prompt=prompt, prompt_tokens=tokens)

    def build_grammar(self, schema: Mapping[str, Any]) -> str:
        return f"grammar of {sorted(schema)}"

    def close(self) -> None:
        self.closed += 1


class FakeExecutor(LlamacppExecutor):
    def __init__(self) -> None:
        super().__init__()
        self.engine = FakeEngine()
        self.opened: list[Any] = []

    def open_engine(self, *args: Any) -> Any:
        self.opened.append(args)
        return self.engine


@pytest.fixture
def executor() -> FakeExecutor:
    return FakeExecutor()


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.touch()
    return path


@pytest.fixture
def run(executor: FakeExecutor, make_context: Any, gguf: Path) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        ctx: RunContext = make_context(*args, weights=gguf, **kwargs)
        executor.load(ctx)
        return asyncio.run(executor.run(ctx))

    return run


class LazyRows:
    """Rows that are counted as they are read."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.read = 0

    def count(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[Row]:
        for index in range(self.total):
            self.read += 1
            yield Row(index=index, prompt=f"p{index}", metadata={"k": index})


def test_the_result_is_the_shared_one_with_the_rows_own_fields(run: Any) -> None:
    result = InferenceResult.model_validate(run(inputs={"rows": LazyRows(2)}))
    assert [item.output for item in result.items] == ["re: p0", "re: p1"]
    assert result.items[1].metadata == {"k": 1, "prompt": "p1", "rendered_prompt": "p1"}
    assert result.items[0].choices is None
    assert result.model == "model"


def test_usage_counts_a_prompt_once_and_every_answer(run: Any) -> None:
    usage = run(["four", "sixsix"], n=3)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (10, 12)
    assert (usage["total_tokens"], usage["num_requests"]) == (22, 2)
    assert usage["latency_sec"] > 0


def test_items_keep_the_order_of_rows_when_later_ones_finish_first(
    run: Any, executor: FakeExecutor
) -> None:
    later = threading.Event()
    executor.engine.hold = lambda p: later.set() if p == "b" else assert_set(later, p)
    assert [item["output"] for item in run(["a", "b"])["items"]] == ["re: a", "re: b"]


def assert_set(event: threading.Event, prompt: str) -> None:
    assert event.wait(5), f"{prompt} waits for another slot that never came"


def test_all_slots_are_busy_and_never_more(run: Any, executor: FakeExecutor) -> None:
    together = threading.Barrier(3)
    executor.engine.hold = lambda _p: together.wait(5)
    run([f"p{i}" for i in range(9)], options={"n_parallel": 3})
    assert executor.engine.most_running == 3


def test_rows_are_read_no_faster_than_they_are_answered(run: Any, executor: FakeExecutor) -> None:
    rows, ahead = LazyRows(30), []
    executor.engine.hold = lambda _p: ahead.append(rows.read - len(executor.engine.requests))
    run(inputs={"rows": rows}, options={"n_parallel": 2})
    assert max(ahead) <= 3


def test_one_bad_row_names_itself_and_ends_the_others(run: Any, executor: FakeExecutor) -> None:
    with pytest.raises(InputError, match="row 1: cannot be read"):
        run(["endless", "broken", "endless too", "d", "e", "f"])
    assert len(executor.engine.requests) < 6


def test_an_answer_without_prompt_tokens_is_an_error(run: Any) -> None:
    with pytest.raises(InputError, match="row 1: the prompt is empty"):
        run(["a", ""])


def test_a_cancel_ends_the_answers_under_way(run: Any, executor: FakeExecutor) -> None:
    cancelled = threading.Event()
    executor.engine.hold = lambda _p: cancelled.set()
    with pytest.raises(CancelledError, match="task-1 was cancelled"):
        run(["endless"] * 8, context={"is_cancelled": cancelled.is_set})
    assert executor.engine.running == 0


def test_the_deadline_ends_the_answers_under_way(run: Any, executor: FakeExecutor) -> None:
    with pytest.raises(DeadlineError, match="task-1 reached its deadline"):
        run(["endless"] * 8, context={"deadline": time.monotonic() + 0.1})
    assert executor.engine.running == 0


def test_progress_never_falls_and_ends_at_one(run: Any) -> None:
    reports: list[Mapping[str, Any]] = []
    run([f"p{i}" for i in range(20)], n=2, context={"on_progress": reports.append})
    fractions = [report["fraction"] for report in reports]
    assert fractions == [pytest.approx((i + 1) / 40) for i in range(40)]
    assert reports[0]["message"] == "1 of 40 answers"


def test_no_data_and_no_rows_are_two_clear_errors(run: Any) -> None:
    with pytest.raises(InputError, match="data is required"):
        run(inputs={"rows": None})
    with pytest.raises(InputError, match="data has no rows"):
        run([])


def test_every_choice_has_its_own_seed_and_none_without_one(
    run: Any, executor: FakeExecutor
) -> None:
    run(["same", "same"], n=3, seed=5)
    wanted = [derive_seed(5, row, choice) for row in range(2) for choice in range(3)]
    assert sorted(request["seed"] for request in executor.engine.requests) == sorted(wanted)
    executor.engine.requests.clear()
    run(["same"], n=2)
    assert all("seed" not in request for request in executor.engine.requests)


def test_prompt_format_decides_over_the_models_template(run: Any, executor: FakeExecutor) -> None:
    asked = executor.engine.requests
    run(["p"])
    with pytest.raises(InputError, match="the model has no chat template"):
        run(["p"], prompt_format="chat")
    executor.engine.has_chat_template = True
    for kind in ("auto", "chat", "plain"):
        run(["p"], prompt_format=kind)
    assert ["messages" in request for request in asked] == [False, True, True, False]
    assert ["prompt" in request for request in asked] == [True, False, False, True]


def test_the_system_prompt_reaches_both_formats(run: Any, executor: FakeExecutor) -> None:
    run(["p"], system_prompt="s")
    executor.engine.has_chat_template = True
    run(["p"], system_prompt="s")
    plain, chat = executor.engine.requests
    assert plain["prompt"] == "s\np"
    assert [message["content"] for message in chat["messages"]] == ["s", "p"]


def test_messages_for_a_model_without_a_template_name_the_row(run: Any) -> None:
    with pytest.raises(InputError, match="row 0: messages need a chat template"):
        run([[{"role": "user", "content": "hi"}]])


def test_an_answer_that_breaks_its_schema_is_an_error(run: Any, executor: FakeExecutor) -> None:
    with pytest.raises(ExecutionError, match="row 0: the answer is not the JSON asked for"):
        run(["p"], response_format={"type": "json_object"})
    executor.engine.reply = lambda _p: "{}"
    assert run(["p"], response_format={"type": "json_object"})["items"][0]["output"] == "{}"
    assert executor.engine.requests[-1]["grammar"] == "grammar of ['type']"


def test_loading_and_unloading_twice_happen_once(
    executor: FakeExecutor, make_context: Any, gguf: Path
) -> None:
    for _ in range(2):
        executor.load(make_context(weights=gguf))
    for _ in range(2):
        executor.unload()
    assert len(executor.opened) == executor.engine.closed == 1


def test_a_run_before_load_says_so(executor: FakeExecutor, make_context: Any) -> None:
    with pytest.raises(ExecutionError, match="run came before load"):
        asyncio.run(executor.run(make_context()))


def test_a_checkpoint_replaces_the_models_weights(
    run: Any, executor: FakeExecutor, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "tuned.gguf").touch()
    run(inputs={"checkpoint": folder})
    assert executor.opened[0][0] == folder / "tuned.gguf"


def test_a_model_that_is_not_here_is_an_error(executor: FakeExecutor, make_context: Any) -> None:
    with pytest.raises(InputError, match=r"model\.source must name a GGUF file"):
        executor.load(make_context(weights=None))


def test_adapters_that_are_no_gguf_loras_are_refused_by_name(
    executor: FakeExecutor, make_context: Any, gguf: Path, weights: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "adapter_model.safetensors").touch()
    for path, message in ((folder, "hold exactly one, got none"), (weights, "type 'model'")):
        adapters = (AdapterRef(name="mine", path=path),)
        with pytest.raises(InputError, match=f"adapter mine: .*{message}"):
            executor.load(make_context(weights=gguf, inputs={"adapters": adapters}))
    assert executor.opened == []
