"""The rows of a task over an engine that answers when the test says so."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
from flowmesh_vllm.answering import Answering, Embedding
from flowmesh_vllm.lora import AdapterIds
from flowmesh_vllm.spec import VllmSettings, VllmSpec

from flowmesh_core import (
    AdapterRef,
    Answer,
    CancelledError,
    CrashError,
    DeadlineError,
    EmbeddingResult,
    ExecutionError,
    InferenceResult,
    InputError,
    Inputs,
    ModelRef,
    Row,
    RowSource,
    RunContext,
    derive_seed,
)

Work = Callable[["FakeEngine", str], Coroutine[Any, Any, None]]


class FakeEngine:
    """Says every prompt back in capitals, once ``work`` lets it.

    ``seen`` holds each request; ``most`` is how many were in hand at once.
    """

    has_chat_template = takes_adapters = True
    at_once = 4

    def __init__(self, work: Work | None = None, *, tokens: int = 3) -> None:
        self.work = work
        self.tokens = tokens
        self.seen: list[SimpleNamespace] = []
        self.salts: list[str] = []
        self.opened: list[tuple[str, int, str]] = []
        self.cancelled: list[str] = []
        self.running = self.most = 0

    async def render_messages(self, messages: Sequence[Mapping[str, Any]], *, salt: str) -> Any:
        self.salts.append(salt)
        text = "|".join(f"{one['role']}:{one['content']}" for one in messages)
        return SimpleNamespace(text=text, tokens=len(text))

    async def render_text(self, text: str, *, salt: str) -> Any:
        self.salts.append(salt)
        if not text:
            raise InputError("the prompt is empty")
        return SimpleNamespace(text=text, tokens=len(text))

    async def generate(
        self,
        prompt: Any,
        sampling: Mapping[str, Any],
        adapter: Any = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        self.seen.append(SimpleNamespace(text=prompt.text, sampling=sampling, adapter=adapter))
        said = prompt.text.upper()
        if on_text is not None:
            on_text(said[:2])
        await self._labour(prompt.text)
        return Answer(text=said, finish_reason="stop", tokens=self.tokens)

    async def embed(self, prompt: Any, adapter: Any = None) -> list[float]:
        self.seen.append(SimpleNamespace(text=prompt.text, adapter=adapter))
        await self._labour(prompt.text)
        return [3.0, 4.0]

    async def open_adapter(self, name: str, number: int, path: str) -> Any:
        self.opened.append((name, number, path))
        return f"adapter {number}"

    async def sleep(self) -> bool:
        return True

    async def wake(self) -> None: ...

    def close(self) -> None: ...

    async def _labour(self, text: str) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await (self.work(self, text) if self.work else asyncio.sleep(0))
        except asyncio.CancelledError:
            self.cancelled.append(text)
            raise
        finally:
            self.running -= 1


@attrs.define
class Source:
    """Rows that remember how many of them were read, and by which threads."""

    number: int
    read: int = 0
    threads: set[int] = attrs.field(factory=set)

    def count(self) -> int:
        self.threads.add(threading.get_ident())
        return self.number

    def __iter__(self) -> Iterator[Row]:
        for index in range(self.number):
            self.read += 1
            self.threads.add(threading.get_ident())
            yield Row(index=index, prompt=f"row {index}")


def make_context(folder: Path, rows: Any = ("hello",), **changes: Any) -> RunContext:
    """Return a task over prompts; fields of the spec, of its inputs and of the context."""
    inputs = changes.pop("inputs", {})
    raw = {"inference": changes.pop("inference", {"prompt_format": "plain"})}
    raw |= changes.pop("spec", {})
    source = RowSource.from_prompts(rows) if isinstance(rows, (list, tuple)) else rows
    model = ModelRef(identifier="acme/big", hub_id="acme/big")
    return RunContext(
        task_id="task-1",
        task_type="inference",
        spec=VllmSpec.model_validate(raw),
        raw_spec=raw,
        folder=folder,
        inputs=Inputs(**{"rows": source, "model": model, **inputs}),
        **{"clock": time.monotonic, **changes},
    )


def answer(
    ctx: RunContext,
    engine: FakeEngine,
    *,
    kind: type[Answering | Embedding] = Answering,
    ids: AdapterIds | None = None,
) -> Any:
    task = kind(ctx, engine, ids or AdapterIds(), VllmSettings())
    return asyncio.run(asyncio.wait_for(task.run(), 20))


# Items.


def test_each_row_has_its_item_with_the_usage_of_all(tmp_path: Path) -> None:
    ctx = make_context(tmp_path, ["a", "bcd"])
    result = answer(ctx, FakeEngine())
    InferenceResult.model_validate(result)
    assert [(item["index"], item["output"]) for item in result["items"]] == [(0, "A"), (1, "BCD")]
    assert result["model"] == "acme/big"
    usage = result["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (4, 6)
    assert usage["num_requests"] == 2


def test_items_keep_the_order_of_the_rows_whoever_is_done_first(tmp_path: Path) -> None:
    async def last_first(_engine: FakeEngine, text: str) -> None:
        await asyncio.sleep(0.02 * (5 - int(text.split()[1])))

    result = answer(make_context(tmp_path, Source(5)), FakeEngine(last_first))
    assert [item["index"] for item in result["items"]] == [0, 1, 2, 3, 4]
    assert [item["output"] for item in result["items"]] == [f"ROW {n}" for n in range(5)]


def test_rows_keep_their_place_in_the_whole_source(tmp_path: Path) -> None:
    rows = RowSource(
        kind="list", params={"items": list("abcdef"), "metadata": []}, shard_index=1, shard_total=2
    )
    inference = {"temperature": 1.0, "seed": 5, "prompt_format": "plain"}
    engine = FakeEngine()
    result = answer(make_context(tmp_path, rows, inference=inference), engine)
    assert [item["index"] for item in result["items"]] == [3, 4, 5]
    seeds = {one.text: one.sampling["seed"] for one in engine.seen}
    assert seeds == {text: derive_seed(5, 3 + at, 0) for at, text in enumerate("def")}


def test_all_choices_of_a_row_stand_in_its_item_each_with_its_seed(tmp_path: Path) -> None:
    engine = FakeEngine()
    inference = {"n": 3, "temperature": 1.0, "seed": 5, "prompt_format": "plain"}
    result = answer(make_context(tmp_path, ["a", "bb"], inference=inference), engine)
    assert [len(item["choices"]) for item in result["items"]] == [3, 3]
    assert result["usage"]["completion_tokens"] == 18
    assert result["usage"]["prompt_tokens"] == 3  # a prompt counts once
    seeds = [one.sampling["seed"] for one in engine.seen if one.text == "bb"]
    assert sorted(seeds) == sorted(derive_seed(5, 1, choice) or 0 for choice in range(3))


def test_choices_keep_their_order_whichever_is_done_first(tmp_path: Path) -> None:
    class Counts(FakeEngine):
        async def generate(self, *arguments: Any, **more: Any) -> Answer:
            number = len(self.seen)
            found = await super().generate(*arguments, **more)
            await asyncio.sleep(0.02 * (3 - number))
            return attrs.evolve(found, text=str(number))

    inference = {"n": 3, "prompt_format": "plain"}
    (item,) = answer(make_context(tmp_path, inference=inference), Counts())["items"]
    assert [one["output"] for one in item["choices"]] == ["0", "1", "2"]


@pytest.mark.parametrize(("normalized", "vector"), [(True, [0.6, 0.8]), (False, [3.0, 4.0])])
def test_vectors_have_length_one_unless_asked_otherwise(
    normalized: bool, vector: list[float], tmp_path: Path
) -> None:
    ctx = make_context(tmp_path, ["a", "b"], spec={"normalize": normalized})
    result = answer(ctx, FakeEngine(), kind=Embedding)
    EmbeddingResult.model_validate(result)
    assert [item["embedding"] for item in result["items"]] == [pytest.approx(vector)] * 2
    assert result["dimensions"] == 2
    assert result["usage"]["completion_tokens"] == 0


# Prompts.


def test_messages_go_through_the_template_and_plain_texts_do_not(tmp_path: Path) -> None:
    told = {"system_prompt": "be brief"}
    for form, expected in (
        ("auto", "system:be brief|user:hello"),
        ("chat", "system:be brief|user:hello"),
        ("plain", "be brief\nhello"),
    ):
        ctx = make_context(tmp_path, inference={**told, "prompt_format": form})
        assert answer(ctx, FakeEngine())["items"][0]["prompt"] == expected


def test_without_a_template_a_chat_is_refused_and_auto_is_plain(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.has_chat_template = False
    assert answer(make_context(tmp_path, inference={}), engine)["items"][0]["prompt"] == "hello"
    with pytest.raises(InputError, match=r"no chat template; set model\.vllm\.chat_template"):
        answer(make_context(tmp_path, inference={"prompt_format": "chat"}), engine)
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(InputError, match="row 0: messages need a chat template"):
        answer(make_context(tmp_path, [messages], inference={}), engine)


def test_what_a_message_points_to_is_checked_before_the_engine_sees_it(tmp_path: Path) -> None:
    parts = [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]
    engine = FakeEngine()
    ctx = make_context(tmp_path, [[{"role": "user", "content": parts}]], inference={})
    with pytest.raises(InputError, match="row 0: a message points to 'file:///etc/passwd'"):
        answer(ctx, engine)
    assert engine.salts == []


def test_an_embedding_needs_a_text(tmp_path: Path) -> None:
    ctx = make_context(tmp_path, [[{"role": "user", "content": "x"}]])
    with pytest.raises(InputError, match="row 0: an embedding needs a text, got chat messages"):
        answer(ctx, FakeEngine(), kind=Embedding)


@pytest.mark.parametrize(("rows", "says"), [(None, "data is required"), ((), "has no rows")])
def test_a_task_without_rows_says_so(rows: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        answer(make_context(tmp_path, rows), FakeEngine())


@pytest.mark.parametrize("kind", [Answering, Embedding])
def test_owners_share_no_cached_prompts(kind: type[Answering | Embedding], tmp_path: Path) -> None:
    owners: list[dict[str, Any]] = [
        {"owner": "a"},
        {"owner": "b"},
        {"namespace": "a"},
        {"tenant": "a"},
        {"owner": "a", "tenant": "a"},
    ]
    salts = []
    for metadata in owners:
        engine = FakeEngine()
        answer(make_context(tmp_path, ["x", "y"], metadata=metadata), engine, kind=kind)
        (salt,) = set(engine.salts)
        salts.append(salt)
        again = FakeEngine()
        answer(make_context(tmp_path, metadata={**metadata, "name": "n"}), again, kind=kind)
        assert again.salts == [salt]
    assert len(set(salts)) == len(owners)
    assert all(len(salt) > 20 for salt in salts)  # nobody else can write it into a document
    nobody = FakeEngine()
    answer(make_context(tmp_path, metadata={"owner": ""}), nobody, kind=kind)
    assert nobody.salts == [""]


# How many at once.


@pytest.mark.parametrize(("choices", "rows_at_once"), [(1, 8), (2, 4), (3, 2), (20, 1)])
def test_no_more_rows_are_in_hand_than_keep_the_engine_busy(
    choices: int, rows_at_once: int, tmp_path: Path
) -> None:
    async def pause(_engine: FakeEngine, _text: str) -> None:
        await asyncio.sleep(0.002)

    engine = FakeEngine(pause)
    inference = {"n": choices, "prompt_format": "plain"}
    result = answer(make_context(tmp_path, Source(30), inference=inference), engine)
    assert len(result["items"]) == 30
    assert engine.most == rows_at_once * choices


def test_rows_are_read_as_they_are_needed_and_not_on_the_loop(tmp_path: Path) -> None:
    source = Source(1000)
    read: list[tuple[int, int]] = []

    async def note(engine: FakeEngine, text: str) -> None:
        read.append((int(text.split()[1]), source.read))
        await asyncio.sleep(0)

    answer(make_context(tmp_path, source), FakeEngine(note))
    assert len(read) == 1000
    assert max(so_far - index for index, so_far in read) <= 64 + 8
    assert threading.get_ident() not in source.threads


def test_a_slow_row_holds_up_no_other(tmp_path: Path) -> None:
    async def first_last(engine: FakeEngine, text: str) -> None:
        while text == "row 0" and len(engine.seen) < 100:
            await asyncio.sleep(0.001)

    result = answer(make_context(tmp_path, Source(100)), FakeEngine(first_last))
    assert len(result["items"]) == 100


# How it ends.


@pytest.mark.parametrize(
    ("error", "retriable"),
    [
        (InputError("too long"), False),
        (ExecutionError("it failed", retriable=True), True),
        (ExecutionError("it failed"), False),
    ],
)
def test_the_first_row_that_fails_ends_the_task_and_the_others_work(
    error: Any, retriable: bool, tmp_path: Path
) -> None:
    async def third_fails(_engine: FakeEngine, text: str) -> None:
        if text == "row 2":
            raise error
        await asyncio.sleep(30)

    engine, source = FakeEngine(third_fails), Source(1000)
    with pytest.raises(type(error), match=f"^row 2: {error}$") as caught:
        answer(make_context(tmp_path, source), engine)
    assert caught.value.retriable is retriable
    assert engine.running == 0
    others = {f"row {index}" for index in range(8)} - {"row 2"}
    assert set(engine.cancelled) == others  # nothing goes on for a task that has ended
    assert source.read <= 64 + 1


def test_a_dead_engine_is_told_as_it_is(tmp_path: Path) -> None:
    dead = CrashError("vLLM's engine has died", exit_code=9)

    async def die(_engine: FakeEngine, text: str) -> None:
        if text == "row 1":
            raise dead
        await asyncio.sleep(30)

    engine = FakeEngine(die)
    with pytest.raises(CrashError, match=r"^vLLM's engine has died$") as caught:
        answer(make_context(tmp_path, Source(5)), engine)
    assert caught.value is dead
    assert engine.running == 0


def test_a_source_that_breaks_ends_the_task(tmp_path: Path) -> None:
    class Breaks(Source):
        def __iter__(self) -> Iterator[Row]:
            yield Row(index=0, prompt="fine")
            raise InputError("line 2 is no JSON")

    with pytest.raises(InputError, match=r"^line 2 is no JSON$"):
        answer(make_context(tmp_path, Breaks(2)), FakeEngine())


async def for_ever(_engine: FakeEngine, _text: str) -> None:
    await asyncio.sleep(30)


@pytest.mark.parametrize("kind", [Answering, Embedding])
def test_a_cancel_ends_the_work_at_once(kind: type[Answering | Embedding], tmp_path: Path) -> None:
    asked_s: list[float] = []

    def is_cancelled() -> bool:
        if engine.running == 8 and not asked_s:
            asked_s.append(time.monotonic())
        return bool(asked_s)

    engine = FakeEngine(for_ever)
    ctx = make_context(tmp_path, Source(100), is_cancelled=is_cancelled)
    with pytest.raises(CancelledError, match="task task-1 was cancelled"):
        answer(ctx, engine, kind=kind)
    assert time.monotonic() - asked_s[0] < 0.2
    assert len(engine.cancelled) == 8
    assert engine.running == 0


def test_the_deadline_ends_the_work_at_once(tmp_path: Path) -> None:
    engine = FakeEngine(for_ever)
    deadline = time.monotonic() + 0.3
    ctx = make_context(tmp_path, Source(100), deadline=deadline)
    with pytest.raises(DeadlineError, match="task task-1 reached its deadline"):
        answer(ctx, engine)
    assert 0 <= time.monotonic() - deadline < 0.2
    assert len(engine.cancelled) == 8


def test_whoever_gives_the_task_up_leaves_nothing_behind(tmp_path: Path) -> None:
    engine = FakeEngine(for_ever)

    async def give_up() -> None:
        task = Answering(make_context(tmp_path, Source(100)), engine, AdapterIds(), VllmSettings())
        before = asyncio.all_tasks()
        running = asyncio.ensure_future(task.run())
        while engine.running < 8:
            await asyncio.sleep(0.005)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert engine.running == 0
        await asyncio.sleep(0.01)  # the reader of the rows is closed by the loop
        assert asyncio.all_tasks() == before

    asyncio.run(asyncio.wait_for(give_up(), 20))


# Adapters.


def write_adapter(folder: Path, *, weights: bytes = b"w", **config: Any) -> Path:
    folder.mkdir()
    whole = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(whole))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def test_every_request_of_a_task_brings_its_adapter(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a")
    inputs = {"adapters": (AdapterRef(name="mine", path=path),)}
    for kind in (Answering, Embedding):
        engine = FakeEngine()
        answer(make_context(tmp_path, ["x", "y"], inputs=inputs), engine, kind=kind)
        assert [one.adapter for one in engine.seen] == ["adapter 1"] * 2
        ((name, number, opened),) = engine.opened
        assert name.startswith("lora-")
        assert (number, opened) == (1, str(path))


def test_equal_adapters_of_several_tasks_have_one_number_and_others_another(
    tmp_path: Path,
) -> None:
    engine, ids = FakeEngine(), AdapterIds()
    first = write_adapter(tmp_path / "first")
    copied = write_adapter(tmp_path / "copied")
    other = write_adapter(tmp_path / "other", weights=b"v")
    for path, scale in ((first, 1.0), (copied, 1.0), (other, 1.0), (first, 0.5)):
        adapters = (AdapterRef(name="mine", path=path, scale=scale),)
        folder = tmp_path / f"attempt-{len(engine.opened)}"
        answer(make_context(folder, inputs={"adapters": adapters}), engine, ids=ids)
    assert [number for _, number, _ in engine.opened] == [1, 1, 2, 3]
    assert engine.opened[0][0] == engine.opened[1][0]
    assert engine.opened[3][2] == str(tmp_path / "attempt-3" / ".adapters" / "mine")


def test_adapters_that_were_merged_are_no_longer_asked_for(tmp_path: Path) -> None:
    adapters = (AdapterRef(name="mine", path=tmp_path / "gone", apply="merge"),)
    engine = FakeEngine()
    answer(make_context(tmp_path, inputs={"adapters": adapters}), engine)
    assert (engine.opened, engine.seen[0].adapter) == ([], None)


def test_an_adapter_that_the_engine_cannot_take_is_named(tmp_path: Path) -> None:
    class Refuses(FakeEngine):
        async def open_adapter(self, *_arguments: Any) -> Any:
            raise InputError("vLLM cannot use it: no such module")

    large = write_adapter(tmp_path / "large", r=128)
    fine = write_adapter(tmp_path / "fine")
    for path, says in ((large, "raise .* to 128"), (fine, "vLLM cannot use it: no such module")):
        engine = Refuses()
        adapters = (AdapterRef(name="mine", path=path),)
        with pytest.raises(InputError, match=f"^adapter mine: .*{says}"):
            answer(make_context(tmp_path, inputs={"adapters": adapters}), engine)
        assert engine.seen == []


def test_an_architecture_that_takes_no_adapters_is_told_with_what_to_do(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.takes_adapters = False
    assert answer(make_context(tmp_path), engine)["ok"], "nobody else is held up by it"
    adapters = (AdapterRef(name="mine", path=write_adapter(tmp_path / "a")),)
    with pytest.raises(InputError, match=r"^adapter mine: .*; give it apply: merge$"):
        answer(make_context(tmp_path, inputs={"adapters": adapters}), engine)
    assert engine.opened == []


# Progress.


@pytest.mark.parametrize(
    ("kind", "choices", "what", "number"),
    [(Answering, 1, "answers", 4), (Answering, 3, "answers", 12), (Embedding, 1, "vectors", 4)],
)
def test_progress_counts_what_was_asked_for(
    kind: type[Answering | Embedding], choices: int, what: str, number: int, tmp_path: Path
) -> None:
    told: list[Mapping[str, Any]] = []
    inference = {"n": choices, "prompt_format": "plain"}
    ctx = make_context(tmp_path, Source(4), inference=inference, on_progress=told.append)
    answer(ctx, FakeEngine(), kind=kind)
    assert [one["message"] for one in told] == [
        f"{done} of {number} {what}" for done in range(1, number + 1)
    ]
    assert [one["fraction"] for one in told] == [
        pytest.approx(done / number) for done in range(1, number + 1)
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_being_written_is_told_when_the_document_asks(stream: bool, tmp_path: Path) -> None:
    told: list[Mapping[str, Any]] = []
    inference = {"stream": stream, "prompt_format": "plain"}
    ctx = make_context(tmp_path, ["hello"], inference=inference, on_progress=told.append)
    answer(ctx, FakeEngine())
    partial = [one["partial"] for one in told if "partial" in one]
    assert partial == ([[{"index": 0, "choice": 0, "output": "HE"}]] if stream else [])
