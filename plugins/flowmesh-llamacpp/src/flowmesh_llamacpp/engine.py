"""The one door to llama.cpp: a loaded model that answers requests, given here or over HTTP.

What llama.cpp would do silently is an error here: a JSON schema that it cannot compile, an
answer that breaks off, a GPU that is not there.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import attrs
import xllamacpp

from flowmesh_core import (
    AdapterRef,
    ExecutionError,
    ExecutorUnavailableError,
    InputError,
    ask_status,
    find_address,
)
from flowmesh_llamacpp.gguf import read_metadata
from flowmesh_llamacpp.listener import sever
from flowmesh_llamacpp.spec import LlamacppOptions

__all__ = ["Completion", "LlamaEndpoint", "LlamaEngine"]

_MARK = "~ok"
_SCHEMA_ENGINE = "%llguidance"


@attrs.frozen(kw_only=True)
class Completion:
    """One answer.

    Attributes:
        text: Without the stop text.
        finish_reason: ``length`` when ``max_tokens`` or the context ended it.
        prompt: What the model was given: chat messages as the template rendered them.
        prompt_tokens: Tokens of the prompt.
        completion_tokens: Tokens of the answer, its end mark included.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    prompt: str
    prompt_tokens: int
    completion_tokens: int


class LlamaEngine:
    """A GGUF model in memory; every method but ``close`` may be called from several threads.

    Args:
        path: The weights.
        options: How to load them.
        adapters: GGUF LoRA files, all of them applied with their scales.

    Raises:
        InputError: A file is not what it should be, or llama.cpp cannot load it.
        ExecutorUnavailableError: Layers are wanted on a GPU that llama.cpp does not see.
    """

    def __init__(
        self, path: Path, options: LlamacppOptions, adapters: Iterable[AdapterRef] = ()
    ) -> None:
        head = read_metadata(path, "model")
        self.has_chat_template = bool(options.chat_template or head.get("tokenizer.chat_template"))
        self._cache_prompt = options.cache_prompt
        self._context_tokens = _context_tokens(head, options)
        params = _build_params(path, options, self._context_tokens, adapters)
        params.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
        params.force_pure_content_parser = True  # the answer as it is, nothing parsed out of it
        self._server: Any = _start_hidden(params, path)

    def complete(
        self, request: Mapping[str, Any], *, stopped: Callable[[], bool]
    ) -> Completion | None:
        """Answer ``messages`` or a plain ``prompt``; blocks until the answer is whole.

        Args:
            request: Prompt and sampling in llama.cpp's names.
            stopped: Asked after every token and every step of the prompt; must not raise.

        Returns:
            The answer, or None when ``stopped`` said so.

        Raises:
            InputError: llama.cpp refuses the prompt or a field of the request.
            ExecutionError: The answer broke off.
        """
        stream = _Stream(stopped, request.get("prompt", ""))
        chat = "messages" in request
        answer = self._server.handle_chat_completions if chat else self._server.handle_completions
        full = {
            **request,
            "cache_prompt": self._cache_prompt,
            "repeat_last_n": self._context_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_progress": True,  # so that a long prompt can be stopped too
            "verbose": chat,  # the last piece then holds the rendered prompt
        }
        try:
            answer(full, stream.take)
        except (RuntimeError, ValueError) as exc:
            raise InputError(f"llama.cpp refuses it: {exc}") from exc
        return stream.finish()

    def build_grammar(self, schema: Mapping[str, Any]) -> str:
        """Return the grammar of a JSON schema.

        llama.cpp answers without any constraint when its schema compiler gives up, so the
        compiler is asked for a marker before the schema is trusted.

        Raises:
            InputError: The schema cannot be compiled.
        """
        grammar: str = xllamacpp.json_schema_to_grammar(dict(schema))
        if not grammar.startswith(_SCHEMA_ENGINE):  # the other compiler reports its errors
            return grammar
        probe = f'{_SCHEMA_ENGINE} {{}}\nstart: "{_MARK}" body\nbody: %json {json.dumps(schema)}'
        request = {"prompt": "x", "max_tokens": 2 * len(_MARK), "grammar": probe}
        answer = self.complete(request, stopped=lambda: False)
        if answer is None or not answer.text.startswith(_MARK):
            raise InputError(
                "inference.response_format: llama.cpp cannot compile this JSON schema; the task's "
                "log has its reason"
            )
        return grammar

    def close(self) -> None:
        """Free the model; may come twice."""
        self._server = None


class LlamaEndpoint:
    """A GGUF model in memory that answers OpenAI's requests over HTTP.

    Args:
        path: The weights.
        options: How to load them.
        adapters: GGUF LoRA files, all of them applied with their scales.
        model: The id under which ``/v1/models`` lists it.
        host: IP address or name to listen on.
        port: 0 takes a free one.
        api_key: What requests must bring, or None.

    Attributes:
        port: The one on which it listens.

    Raises:
        InputError: A file is not what it should be, or llama.cpp cannot load it.
        ExecutionError: It cannot listen there.
        ExecutorUnavailableError: Layers are wanted on a GPU that llama.cpp does not see.
    """

    def __init__(
        self,
        path: Path,
        options: LlamacppOptions,
        adapters: Iterable[AdapterRef],
        *,
        model: str,
        host: str,
        port: int,
        api_key: str | None,
    ) -> None:
        self._address, self._api_key = find_address(host, port), api_key
        context_tokens = _context_tokens(read_metadata(path, "model"), options)
        params = _build_params(path, options, context_tokens, adapters)
        params.hostnames, params.port = [self._address], port
        params.api_keys = [api_key] if api_key else []
        params.model_alias = {model}
        params.cors_origins = ""  # a web page must not use it through its reader's browser
        params.timeout_read = params.timeout_write = 60  # each stuck client holds a thread
        self._server: Any = _start_server(params, path)
        self.port = urlsplit(self._server.listening_address).port or port

    def ask(self) -> int:
        """Ask over HTTP for the models; return the status, 0 without an answer."""
        return ask_status(self._address, self.port, "/v1/models", api_key=self._api_key)

    def close(self) -> None:
        """Hang up on every client, free the port and the model; may come twice."""
        if self._server is not None:
            sever(self.port)
            self._server = None


class _Stream:
    """Collects the pieces of one answer as llama.cpp hands them over."""

    def __init__(self, stopped: Callable[[], bool], prompt: str) -> None:
        self._stopped = stopped
        self._prompt = prompt
        self._was_stopped = False
        self._text: list[str] = []
        self._reason: Literal["stop", "length"] | None = None
        self._usage: Mapping[str, int] = {}
        self._error: Mapping[str, Any] | None = None

    def take(self, piece: Mapping[str, Any]) -> bool:
        """Read one piece; return True to stop."""
        self._error = self._error or piece.get("error")
        for choice in piece.get("choices", ()):
            text = choice["text"] if "text" in choice else choice["delta"].get("content")
            if text:
                self._text.append(text)
            self._reason = choice["finish_reason"] or self._reason
        self._usage = piece.get("usage") or self._usage
        self._prompt = piece.get("__verbose", {}).get("prompt", self._prompt)
        self._was_stopped = self._reason is None and self._stopped()
        return self._was_stopped

    def finish(self) -> Completion | None:
        """Return the whole answer, or None when it was stopped."""
        if self._error:
            raise _explain(self._error)
        if self._was_stopped:
            return None
        if self._reason is None or not self._usage:
            raise ExecutionError("llama.cpp broke off without a reason")
        return Completion(
            text="".join(self._text),
            finish_reason=self._reason,
            prompt=self._prompt,
            prompt_tokens=self._usage["prompt_tokens"],
            completion_tokens=self._usage["completion_tokens"],
        )


def _explain(error: Mapping[str, Any]) -> InputError | ExecutionError:
    if "n_prompt_tokens" in error:
        return InputError(
            f"the prompt has {error['n_prompt_tokens']} tokens and the context n_ctx "
            f"{error['n_ctx']}; shorten it or raise model.llamacpp.n_ctx"
        )
    if error.get("code") == 400:
        return InputError(f"llama.cpp refuses it: {error.get('message')}")
    return ExecutionError(f"llama.cpp failed: {error.get('message')}")


def _context_tokens(head: Mapping[str, Any], options: LlamacppOptions) -> int:
    """Return the tokens of one slot: what is asked for, within what the model can do."""
    trained = int(head.get(f"{head.get('general.architecture')}.context_length", 0))
    return min(options.n_ctx or trained, trained or options.n_ctx)


def _build_params(
    path: Path, options: LlamacppOptions, context_tokens: int, adapters: Iterable[AdapterRef]
) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel = options.n_parallel
    params.n_ctx = context_tokens * options.n_parallel
    params.n_batch, params.n_ubatch = options.n_batch, options.n_ubatch
    # its threads wait by spinning: one too many for the machine slows it down twentyfold
    threads = options.n_threads or max(1, len(os.sched_getaffinity(0)) - 1)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_gpu_layers = _usable_gpu_layers(options.n_gpu_layers)
    params.flash_attn_type = xllamacpp.llama_flash_attn_type(int(options.flash_attn))
    params.cache_type_k = _cache_type(options.cache_type_k)
    params.cache_type_v = _cache_type(options.cache_type_v)
    params.load_mode = xllamacpp.llama_load_mode(options.mmap + 2 * options.mlock)
    params.warmup = options.warmup
    params.cache_prompt = options.cache_prompt
    if options.chat_template:
        params.chat_template = options.chat_template
    params.fit_params = False  # would change n_ctx behind the document's back
    params.cache_ram_mib = 0
    params.verbosity = 1  # errors only; they go to the task's log
    params.ui = params.endpoint_slots = False
    params.lora_adapters = [
        xllamacpp.CommonAdapterLoraInfo(str(adapter.path), adapter.scale) for adapter in adapters
    ]
    return params


def _start_server(params: Any, path: Path) -> Any:
    try:
        return xllamacpp.Server(params)
    except RuntimeError as exc:
        raise InputError(
            f"model: llama.cpp cannot load {path} with these model.llamacpp options and "
            "adapters; the task's log has its reason"
        ) from exc


def _start_hidden(params: Any, path: Path) -> Any:
    # llama.cpp insists on a listener: it gets a private path that is gone before anyone can use
    # it, written through the folder's descriptor because socket paths must be short.
    with tempfile.TemporaryDirectory(prefix="llamacpp-") as folder:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            params.hostnames = [f"/proc/self/fd/{descriptor}/unused.sock"]
            return _start_server(params, path)
        finally:
            os.close(descriptor)


def _cache_type(name: str) -> Any:
    return xllamacpp.ggml_type[f"GGML_TYPE_{name.upper()}"]


def _usable_gpu_layers(wanted: int) -> int:
    cpu = xllamacpp.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_CPU
    if wanted and all(device["type"] == cpu for device in xllamacpp.get_device_info()):
        raise ExecutorUnavailableError(
            f"model.llamacpp.n_gpu_layers is {wanted}, but this xllamacpp sees no GPU; leave it "
            "out, or install a build for your GPU as xllamacpp's documentation says"
        )
    return wanted
