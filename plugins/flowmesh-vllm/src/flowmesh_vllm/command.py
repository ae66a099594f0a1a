"""How vLLM's own OpenAI server is started: its command and environment. Imports no vLLM."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flowmesh_core import ExecutorUnavailableError, InputError

__all__ = ["build_command", "build_environment", "build_words", "known_arguments"]

# The one way in that old and new versions have, and the build for CPUs too.
_SERVER = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
# Arguments of the server, not of the engine, that a document may give.
_OF_THE_SERVER = (
    *("enable_auto_tool_choice", "tool_call_parser", "chat_template_content_format"),
    *("response_role", "default_chat_template_kwargs", "enable_prompt_tokens_details"),
    *("enable_force_include_usage", "return_tokens_as_token_ids"),
)
# vLLM has no --no-... for these; what is off by default is left out.
_PLAIN_FLAGS = ("disable_log_stats", "aggregate_engine_logging", "data_parallel_external_lb")


def build_command(
    arguments: Mapping[str, Any],
    *,
    address: str,
    port: int,
    model: str,
    adapters: Mapping[str, Path] | None = None,
    chat_template: Path | None = None,
    guarded: bool = False,
) -> list[str]:
    """Return the command that starts the server.

    Args:
        arguments: vLLM's engine arguments by name.
        address: IP address on which it listens.
        port: The same.
        model: The id under which it lists the model.
        adapters: Folders of adapters, by the id that a request names.
        chat_template: File with Jinja text.
        guarded: Whether it asks for the key of its environment, which no command line shows.

    Raises:
        InputError: A value cannot be said to vLLM in words.
    """
    modules = [
        json.dumps({"name": name, "path": str(path), "base_model_name": model})
        for name, path in (adapters or {}).items()
    ]
    own: dict[str, Any] = {
        "host": address,
        "port": port,
        "served_model_name": model,
        "lora_modules": modules,
        "chat_template": chat_template,
        "middleware": "flowmesh_vllm.guard.KeyGuard" if guarded else None,
    }
    # No web page may use it through its reader's browser; older versions let all of them.
    return [*_SERVER, *build_words({**arguments, **own}), "--allowed-origins=[]"]


def build_words(arguments: Mapping[str, Any]) -> list[str]:
    """Return arguments as vLLM's command line has them.

    Raises:
        InputError: A text in a list begins with a dash, which would make it an option.
    """
    return [word for name, value in arguments.items() for word in _say(name, value)]


def _say(name: str, value: Any) -> Iterator[str]:
    flag = f"--{name.replace('_', '-')}"
    if value is None or value == [] or (value is False and name in _PLAIN_FLAGS):
        return
    if isinstance(value, bool):
        yield flag if value else flag.replace("--", "--no-", 1)
    elif isinstance(value, Mapping):
        yield f"{flag}={json.dumps(value)}"
    elif isinstance(value, (list, tuple)):
        wrong = [item for item in value if isinstance(item, str) and item.startswith("-")]
        if wrong:
            raise InputError(f"model.vllm.{name}: {wrong[0]!r} must not begin with a dash")
        yield from (flag, *map(str, value))
    else:
        yield f"{flag}={value}"


def build_environment(inherited: Mapping[str, str], *, api_key: str | None) -> dict[str, str]:
    """Return the server's environment: the inherited one, with this task's key or none."""
    kept = {name: value for name, value in inherited.items() if name != "VLLM_API_KEY"}
    key = {"VLLM_API_KEY": api_key} if api_key else {}
    return {**kept, **key}


def known_arguments() -> set[str]:
    """Return what a document may say to this vLLM, read from its source.

    Importing it takes ten seconds and half a gigabyte, which the server does for itself.
    """
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        install = "pip install 'flowmesh-vllm[engine]'"
        raise ExecutorUnavailableError(
            f"serving needs the package vllm, not installed here; run: {install}",
            needs=("vllm",),
            install=install,
        )
    source = Path(found.origin).with_name("engine") / "arg_utils.py"
    classes = [
        node
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name in ("EngineArgs", "AsyncEngineArgs")
    ]
    fields = [item for node in classes for item in node.body if isinstance(item, ast.AnnAssign)]
    return {ast.unparse(field.target) for field in fields}.union(_OF_THE_SERVER)
