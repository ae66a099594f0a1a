from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from flowmesh_vllm.command import build_command, build_environment, build_words, known_arguments

from flowmesh_core import ExecutorUnavailableError, InputError

SOURCE = """
class Other:
    other: int = 1
class EngineArgs:
    model: str = "m"
    max_model_len: int | None = get(ModelConfig)
    plain = 1
    def __post_init__(self):
        local: int = 2
class AsyncEngineArgs(EngineArgs):
    enable_log_requests: bool = False
"""


def command(**changes: Any) -> list[str]:
    given: dict[str, Any] = {"address": "127.0.0.1", "port": 8080, "model": "acme/small"}
    return build_command({"model": "/models/a"}, **{**given, **changes})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max_model_len", -1, ["--max-model-len=-1"]),
        ("gpu_memory_utilization", 0.9, ["--gpu-memory-utilization=0.9"]),
        ("model", "-x y=1.5", ["--model=-x y=1.5"]),
        ("enforce_eager", True, ["--enforce-eager"]),
        ("enable_prefix_caching", False, ["--no-enable-prefix-caching"]),
        ("enable_no_thing", False, ["--no-enable-no-thing"]),
        ("disable_log_stats", True, ["--disable-log-stats"]),
        ("disable_log_stats", False, []),
        ("quantization", None, []),
        ("cudagraph_capture_sizes", [1, 2], ["--cudagraph-capture-sizes", "1", "2"]),
        ("ignore_patterns", ("a", "b"), ["--ignore-patterns", "a", "b"]),
        ("ignore_patterns", [], []),
        ("limit_mm_per_prompt", {"image": 2}, ['--limit-mm-per-prompt={"image": 2}']),
        ("hf_overrides", {}, ["--hf-overrides={}"]),
    ],
)
def test_a_value_becomes_the_words_that_vllm_reads(name: str, value: Any, words: list[str]) -> None:
    assert build_words({name: value}) == words


def test_a_text_in_a_list_cannot_become_an_option() -> None:
    message = r"model\.vllm\.ignore_patterns: '--host=0\.0\.0\.0' must not begin with a dash"
    with pytest.raises(InputError, match=message):
        build_words({"ignore_patterns": ["a", "--host=0.0.0.0"]})


def test_the_command_says_where_and_under_which_name() -> None:
    words = command()
    assert words[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert {"--model=/models/a", "--host=127.0.0.1", "--port=8080"} < set(words)
    assert "--served-model-name=acme/small" in words
    assert not [word for word in words if word.startswith(("--middleware", "--chat", "--lora"))]


def test_nothing_in_the_engines_arguments_changes_where_it_listens() -> None:
    words = build_command({"host": "0.0.0.0", "port": 1}, address="::1", port=2, model="m")
    assert [word for word in words if word.startswith(("--host", "--port"))] == [
        "--host=::1",
        "--port=2",
    ]


def test_web_pages_of_other_origins_are_kept_out_of_every_version() -> None:
    assert "--allowed-origins=[]" in command()


def test_a_guarded_server_asks_for_its_key_everywhere() -> None:
    assert "--middleware=flowmesh_vllm.guard.KeyGuard" in command(guarded=True)


def test_adapters_are_named_whatever_their_path_holds(tmp_path: Path) -> None:
    path = tmp_path / "a=1,b"
    words = command(adapters={"tuned": path})
    (said,) = words[words.index("--lora-modules") + 1 : words.index("--lora-modules") + 2]
    assert json.loads(said) == {
        "name": "tuned",
        "path": str(path),
        "base_model_name": "acme/small",
    }


def test_a_template_is_a_file(tmp_path: Path) -> None:
    assert f"--chat-template={tmp_path}/t" in command(chat_template=tmp_path / "t")


def test_the_environment_has_this_tasks_key_and_no_other() -> None:
    inherited = {"PATH": "/bin", "VLLM_API_KEY": "old"}
    expected = {"PATH": "/bin"}
    assert build_environment(inherited, api_key=None) == expected
    assert build_environment(inherited, api_key="new") == {**expected, "VLLM_API_KEY": "new"}


def test_what_vllm_knows_is_read_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm" / "engine").mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / "vllm" / "engine" / "arg_utils.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    known = known_arguments()
    assert {"model", "max_model_len", "enable_log_requests", "tool_call_parser"} <= known
    assert not known & {"other", "plain", "local", "middleware", "host", "api_key"}


def test_without_vllm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ExecutorUnavailableError, match=r"run: pip install 'flowmesh-vllm\[engi"):
        known_arguments()
