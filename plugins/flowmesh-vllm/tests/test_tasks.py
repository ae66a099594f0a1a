"""Tasks on a real worker that keeps one model hot: groups, adapters, forms, cancels and crashes."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowmesh_core import InferenceResult

Spec = Callable[..., dict[str, Any]]
LONG = {"max_tokens": 220, "n": 2, "temperature": 1.5, "prompt_format": "plain"}


@pytest.fixture(scope="module")
def spec(smollm2: Path, options: dict[str, Any]) -> Spec:
    """The spec of a task for the model that stays loaded."""

    def make(
        *prompts: str, adapters: tuple[dict[str, Any], ...] = (), **inference: Any
    ) -> dict[str, Any]:
        return {
            "taskType": "inference",
            "executor": "vllm",
            "model": {
                "source": {"identifier": str(smollm2)},
                "vllm": options,
                "adapters": list(adapters),
            },
            "data": {"type": "list", "items": list(prompts)},
            "inference": {"temperature": 0, "max_tokens": 16, **inference},
        }

    return make


def child(task_id: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"task_id": task_id, "spec": spec}


def outputs(result: dict[str, Any]) -> list[str]:
    return [item["output"] for item in result["items"]]


def test_a_group_of_eight_keeps_each_members_own_system_prompt(fleet: Any, spec: Spec) -> None:
    question = "What is the capital of France?"
    specs = [spec(question, system_prompt=f"You are clerk number {n}.") for n in range(7)]
    specs.append(specs[3])  # the same work as another member's
    children = [child(f"c{n}", each) for n, each in enumerate(specs[1:], 1)]
    fleet.send("group", specs[0], *children)
    leader = fleet.result("group")
    results = [leader, *(fleet.read(f"c{n}") for n in range(1, 8))]
    for number, result in enumerate(results):
        (item,) = InferenceResult.model_validate(result).items
        assert f"clerk number {3 if number == 7 else number}." in item.prompt
        assert "Paris" in item.output
    assert leader["group"]["members"] == 8
    assert leader["group"]["computed"] == 7
    assert outputs(results[7]) == outputs(results[3])


def test_the_engine_stays_loaded_and_what_comes_later_joins_the_running_batch(
    fleet: Any, spec: Spec
) -> None:
    before = fleet.engines()
    fleet.send("long", spec("Once upon a time", **LONG))
    time.sleep(0.3)
    fleet.send("short", spec("What is the capital of France?"))
    assert "Paris" in outputs(fleet.result("short"))[0]
    assert not [e for e in fleet.events if e["task_id"] == "long" and e["type"] == "TASK_SUCCEEDED"]
    assert len(fleet.result("long")["items"][0]["choices"]) == 2
    assert fleet.engines() == before
    assert len(before) == 1


def test_tasks_with_different_adapters_and_none_run_at_once(
    fleet: Any, spec: Spec, adapters: list[Path]
) -> None:
    question = "What is the capital of France?"
    chosen: dict[str, tuple[dict[str, Any], ...]] = {
        "base": (),
        "first": ({"path": str(adapters[0])},),
        "second": ({"path": str(adapters[1])},),
        "faint": ({"path": str(adapters[0]), "scale": 0.0},),
    }
    alone = {}
    for name, used in chosen.items():
        fleet.send(f"alone-{name}", spec(question, adapters=used))
        alone[name] = outputs(fleet.result(f"alone-{name}"))
    before = fleet.engines()
    for name, used in chosen.items():
        fleet.send(f"beside-{name}", spec(question, "Name a colour.", adapters=used))
    beside = {name: outputs(fleet.result(f"beside-{name}"))[:1] for name in chosen}
    assert beside == alone
    assert len({*alone["base"], *alone["first"], *alone["second"]}) == 3
    assert alone["faint"] == alone["base"]
    assert fleet.engines() == before


def test_a_bad_adapter_fails_its_own_task_alone(
    fleet: Any, spec: Spec, adapters: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    config = json.loads((adapters[0] / "adapter_config.json").read_bytes())
    (broken / "adapter_config.json").write_text(json.dumps({**config, "r": 16}))
    weights = (adapters[0] / "adapter_model.safetensors").read_bytes()
    (broken / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    large = tmp_path / "large"
    large.mkdir()
    (large / "adapter_config.json").write_text(json.dumps({**config, "r": 128}))
    (large / "adapter_model.safetensors").write_bytes(weights)
    before = fleet.engines()
    fleet.send("neighbour", spec("Once upon a time", **LONG))
    fleet.send("broken", spec("hello", adapters=({"path": str(broken), "name": "mine"},)))
    fleet.send("large", spec("hello", adapters=({"path": str(large), "name": "big"},)))
    assert "adapter mine" in fleet.error("broken")
    assert "raise model.vllm.max_lora_rank to 128" in fleet.error("large")
    assert fleet.result("neighbour")["ok"]
    assert fleet.engines() == before


def test_answers_keep_to_a_schema_an_expression_or_a_choice(fleet: Any, spec: Spec) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string"}, "people": {"type": "integer"}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    forms: dict[str, dict[str, Any]] = {
        "schema": {"type": "json_schema", "json_schema": {"schema": schema}},
        "regex": {"type": "regex", "regex": "[A-Z]{3}-[0-9]{4}"},
        "choice": {"type": "choice", "choice": ["Lyon", "Berlin"]},
        "wrong": {"type": "json_schema", "schema": {"type": "nonsense"}},
    }
    for name, form in forms.items():
        fleet.send(name, spec("Tell me about Paris.", max_tokens=60, response_format=form))
    found = json.loads(outputs(fleet.result("schema"))[0])
    assert isinstance(found["city"], str)
    assert isinstance(found["people"], int)
    assert re.fullmatch("[A-Z]{3}-[0-9]{4}", outputs(fleet.result("regex"))[0])
    assert outputs(fleet.result("choice"))[0] in ("Lyon", "Berlin")
    assert "row 0: vLLM refuses it" in fleet.error("wrong")


def test_chance_is_repeatable_by_its_seed_and_every_choice_its_own(fleet: Any, spec: Spec) -> None:
    told = {"temperature": 1.0, "n": 3, "max_tokens": 12}
    for name, seed in (("one", 7), ("again", 7), ("next", 8), ("any", None)):
        fleet.send(name, spec("Name an animal.", "Name an animal.", seed=seed, **told))
    said = {
        name: [[one["output"] for one in item["choices"]] for item in fleet.result(name)["items"]]
        for name in ("one", "again", "next", "any")
    }
    assert said["one"] == said["again"]
    assert said["one"] != said["any"]
    assert said["one"][0] != said["one"][1]  # equal rows draw for themselves
    assert said["one"][0][1:] == said["next"][0][:2]  # choice i is the first of seed + i


def test_every_token_comes_with_its_likelihood_when_asked(fleet: Any, spec: Spec) -> None:
    fleet.send("likely", spec("What is the capital of France?", logprobs=2))
    result = fleet.result("likely")
    (item,) = result["items"]
    InferenceResult.model_validate(result)
    tokens = item["logprobs"]
    assert len(tokens) == result["usage"]["completion_tokens"]
    assert "".join(token["token"] for token in tokens).startswith(item["output"])
    for token in tokens:
        first, second = token["top_logprobs"]
        assert token == {**first, "top_logprobs": [first, second]}  # greedy takes the likeliest
        assert 0 >= first["logprob"] >= second["logprob"]


def test_what_is_being_written_is_told_on_request(fleet: Any, spec: Spec) -> None:
    fleet.send("told", spec("Tell me a story.", max_tokens=200, stream=True))
    (item,) = fleet.result("told")["items"]
    texts = [one["output"] for one in fleet.partial("told")]
    assert len(texts) > 2
    assert all(item["output"].startswith(text.rstrip("\ufffd")) for text in texts)
    assert [len(text) for text in texts] == sorted(len(text) for text in texts)


def test_a_cancel_ends_a_task_while_it_writes_and_frees_its_place(fleet: Any, spec: Spec) -> None:
    before = fleet.engines()
    fleet.send("endless", spec("Once upon a time", stream=True, **LONG))
    fleet.wait_for(lambda: fleet.partial("endless"))
    fleet.order(type="CANCEL", task_id="endless")
    assert "cancelled" in fleet.error("endless", timeout_s=5)
    fleet.send("after", spec("What is the capital of France?"))
    assert "Paris" in outputs(fleet.result("after"))[0]
    assert fleet.engines() == before


def test_a_deadline_ends_a_task_while_it_writes(fleet: Any, spec: Spec) -> None:
    fleet.send("late", {**spec("Once upon a time", **LONG), "timeoutSec": 0.5})
    assert "deadline" in fleet.error("late", timeout_s=10)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"max_tokens": 600, "prompt": "word " * 600}, "row 0: .*maximum context length"),
        ({"prompt": "", "prompt_format": "plain"}, "row 0: the prompt is empty"),
        ({"prompt": [{"role": "user", "content": [{"type": "smell"}]}]}, "row 0: vLLM refuses"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(
    fleet: Any, spec: Spec, changed: dict[str, Any], says: str
) -> None:
    prompt = changed.pop("prompt")
    task_id = f"bad-{len(fleet.events)}"
    fleet.send(task_id, spec(prompt, **changed))
    assert re.search(says, fleet.error(task_id))


def test_an_unknown_engine_argument_is_refused_with_the_nearest_name(
    fleet: Any, spec: Spec
) -> None:
    wrong = spec("hello")
    wrong["model"]["vllm"] = {**wrong["model"]["vllm"], "max_num_seq": 4}
    fleet.send("typo", wrong)
    assert "did you mean max_num_seqs?" in fleet.error("typo")


def test_a_killed_engine_is_replaced_and_its_task_told(fleet: Any, spec: Spec) -> None:
    (pid,) = fleet.engines()
    fleet.send("unlucky", spec("Once upon a time", stream=True, **LONG))
    fleet.wait_for(lambda: fleet.partial("unlucky"))
    os.kill(pid, signal.SIGKILL)
    assert "engine has died" in fleet.error("unlucky", timeout_s=20)
    fleet.send("lucky", spec("What is the capital of France?"))
    assert "Paris" in outputs(fleet.result("lucky"))[0]
    assert fleet.engines() != [pid]
