"""A loaded model behind vLLM's asynchronous engine; with ``loading``, the one door to vLLM.

What arrives while other requests run joins the running batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import attrs
from vllm import PoolingParams, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.renderers.params import ChatParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from flowmesh_core import (
    Answer,
    CrashError,
    ExecutionError,
    InputError,
    available_memory_bytes,
)
from flowmesh_vllm.loading import build_config, can_sleep, size_of_weights
from flowmesh_vllm.sockets import own_sockets, use_sockets

__all__ = ["Prompt", "VllmEngine"]

_LOOK_S = 0.1
# "repetition" ends an answer by a rule of the operator's; what else vLLM tells are failures.
_REASONS: Mapping[str, Literal["stop", "length"]] = {
    "stop": "stop",
    "repetition": "stop",
    "length": "length",
}
OnText = Callable[[str], None]


@attrs.frozen(kw_only=True)
class Prompt:
    """A prompt as the model is given it.

    Attributes:
        request: What vLLM made of it.
        text: The same as text.
        tokens: Their number.
    """

    request: Mapping[str, Any]
    text: str
    tokens: int


class VllmEngine:
    """A model in memory. Made outside of the event loop, used on it.

    Args:
        arguments: vLLM's engine arguments.
        chat_template: Text that replaces the tokenizer's own.

    Attributes:
        has_chat_template: Whether messages can be rendered.
        takes_adapters: Whether requests may bring an adapter.
        at_once: Requests that the engine works on together at most.

    Raises:
        InputError: vLLM refuses the arguments.
        ExecutionError: It cannot load the model with them, for want of memory perhaps; retriable.
    """

    def __init__(self, arguments: Mapping[str, Any], *, chat_template: str | None = None) -> None:
        given = {
            "disable_log_stats": True,
            "enable_sleep_mode": can_sleep(),
            **arguments,
        }
        what = f"vLLM cannot load {given['model']} with these model.vllm options"
        self._sockets = own_sockets()
        try:
            config = build_config(given)
            with use_sockets(self._sockets.name):
                self._llm = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
        except RuntimeError as exc:  # its processes tell their reason in the log alone
            raise ExecutionError(
                f"{what}: {_one_line(exc)}; the task's log has the reason", retriable=True
            ) from exc
        except (ValueError, TypeError, OSError, NotImplementedError) as exc:
            raise InputError(f"{what}: {_one_line(exc)}; the task's log has more") from exc
        self._can_sleep = bool(config.model_config.enable_sleep_mode)
        self._weights_bytes = size_of_weights(given["model"])
        self.takes_adapters = config.lora_config is not None
        self._renderer = self._llm.renderer
        self._template = chat_template
        tokenizer = self._renderer.get_tokenizer()
        self.has_chat_template = bool(chat_template or getattr(tokenizer, "chat_template", None))
        self.at_once: int = self._llm.scheduler_config.max_num_seqs
        self._count = 0

    async def render_messages(self, messages: Sequence[Mapping[str, Any]], *, salt: str) -> Prompt:
        """Return chat messages as the model's template writes them, ready for its answer.

        Args:
            messages: As OpenAI has them, pictures and sounds included if the model takes them.
            salt: Prompts share what was computed for them only with those of the same salt.

        Raises:
            InputError: The template or the model refuses them.
        """
        params = ChatParams(
            chat_template=self._template,
            chat_template_kwargs={"add_generation_prompt": True},
        )
        with _in_our_words():
            _, (request,) = await self._renderer.render_chat_async(
                [list(messages)], params, prompt_extras=_extras(salt)
            )
        text = self._renderer.get_tokenizer().decode(request["prompt_token_ids"])
        return _as_prompt(request, text)

    async def render_text(self, text: str, *, salt: str) -> Prompt:
        """Return a plain text as a prompt, with the tokenizer's special tokens.

        Raises:
            InputError: It is too long, or empty.
        """
        with _in_our_words():
            (request,) = await self._renderer.render_cmpl_async(
                [{"prompt": text}], prompt_extras=_extras(salt)
            )
        return _as_prompt(request, text)

    async def generate(
        self,
        prompt: Prompt,
        sampling: Mapping[str, Any],
        adapter: LoRARequest | None = None,
        on_text: OnText | None = None,
    ) -> Answer:
        """Answer a prompt; cancelling the caller ends the work within a token.

        Args:
            prompt: From ``render_messages`` or ``render_text``.
            sampling: From ``sampling.build_sampling``.
            adapter: From ``open_adapter``.
            on_text: Gets what is written so far, again and again.

        Raises:
            InputError: vLLM refuses the request.
            ExecutionError: vLLM broke off.
            CrashError: The engine has died.
        """
        form = sampling["structured_outputs"]
        with _in_our_words():
            params = SamplingParams(
                **{
                    **sampling,
                    "structured_outputs": form and StructuredOutputsParams(**form),
                    "output_kind": RequestOutputKind.CUMULATIVE
                    if on_text
                    else RequestOutputKind.FINAL_ONLY,
                }
            )
            stream = self._llm.generate(
                prompt.request, params, self._new_id(), lora_request=adapter
            )
            output = await _last(stream, on_text)
        choice = output and output.outputs[0]
        if choice is None or choice.finish_reason not in _REASONS:
            told = choice and choice.finish_reason
            raise ExecutionError(
                f"vLLM broke off ({told}); the task's log may say why", retriable=told != "error"
            )
        return Answer(
            text=choice.text,
            finish_reason=_REASONS[choice.finish_reason],
            tokens=len(choice.token_ids),
            logprobs=None if choice.logprobs is None else _logprobs(choice, params.logprobs),
        )

    async def embed(self, prompt: Prompt, adapter: LoRARequest | None = None) -> list[float]:
        """Return the vector of a text, not normalized.

        Raises:
            InputError: vLLM refuses the request.
            CrashError: The engine has died.
        """
        params = PoolingParams(task="embed", use_activation=False)
        with _in_our_words():
            stream = self._llm.encode(prompt.request, params, self._new_id(), lora_request=adapter)
            output = await _last(stream, None)
        vector: list[float] = output.outputs.data.float().tolist()
        return vector

    async def open_adapter(self, name: str, number: int, path: str) -> LoRARequest:
        """Load an adapter, so that a bad one fails its task alone.

        Raises:
            InputError: vLLM cannot use it.
            CrashError: The engine has died.
        """
        request = LoRARequest(lora_name=name, lora_int_id=number, lora_path=path)
        try:
            await self._while_it_lives(self._llm.add_lora(request))
        except (EngineDeadError, CrashError) as exc:
            raise _dead() from exc
        except Exception as exc:  # what its process said comes as this
            raise InputError(f"vLLM cannot use it: {_one_line(exc)}") from exc
        return request

    async def sleep(self) -> bool:
        """Move the weights to the machine's memory; False where they cannot go there."""
        if not self._can_sleep:  # vLLM would stop its scheduler all the same, for ever
            return False
        free = available_memory_bytes()
        if free is not None and free < self._weights_bytes:
            return False
        await self._llm.sleep(level=1)
        return True

    async def wake(self) -> None:
        """Bring the weights back."""
        await self._while_it_lives(self._llm.wake_up())

    def close(self) -> None:
        """End the engine and its processes; may come twice."""
        self._llm.shutdown()
        self._sockets.cleanup()

    async def _while_it_lives(self, call: Coroutine[Any, Any, Any]) -> None:
        """Wait for a call that vLLM would not answer if its engine died meanwhile."""
        task = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait([task], timeout=_LOOK_S))[0]:
                if self._llm.errored:
                    raise _dead()
            task.result()
        finally:
            task.cancel()

    def _new_id(self) -> str:
        self._count += 1
        return str(self._count)


async def _last(stream: AsyncIterator[Any], on_text: OnText | None) -> Any:
    output: Any = None
    async for output in stream:
        if on_text is not None:
            on_text(output.outputs[0].text)
    return output


def _extras(salt: str) -> dict[str, Any] | None:
    return {"cache_salt": salt} if salt else None


def _as_prompt(request: Mapping[str, Any], text: str) -> Prompt:
    tokens = len(request["prompt_token_ids"])
    if not tokens:
        raise InputError("the prompt is empty and this model has no token to begin with")
    return Prompt(request=request, text=text, tokens=tokens)


def _logprobs(choice: Any, likeliest: int) -> list[dict[str, Any]]:
    """Return OpenAI's form of vLLM's tables, which hold the chosen token and the likeliest."""
    found = []
    for token, table in zip(choice.token_ids, choice.logprobs, strict=True):
        chosen = table[token]
        top = [
            {"token": one.decoded_token, "logprob": one.logprob}
            for one in sorted(table.values(), key=lambda one: one.rank)
            if one.rank <= likeliest
        ]
        found.append(
            {"token": chosen.decoded_token, "logprob": chosen.logprob, "top_logprobs": top}
        )
    return found


@contextmanager
def _in_our_words() -> Iterator[None]:
    """Turn what vLLM raises into errors of ours."""
    try:
        yield
    except EngineDeadError as exc:
        raise _dead() from exc
    except (OSError, asyncio.TimeoutError) as exc:
        raise ExecutionError(f"vLLM cannot fetch it: {_one_line(exc)}", retriable=True) from exc
    except EngineGenerateError as exc:
        raise ExecutionError(f"vLLM failed: {_one_line(exc.__cause__ or exc)}") from exc
    except (InputError, ExecutionError):
        raise
    except Exception as exc:
        # Its own kind for bad requests, and what templates and media loaders raise.
        raise InputError(f"vLLM refuses it: {_one_line(exc)}") from exc


def _dead() -> CrashError:
    return CrashError("vLLM's engine has died; the task's log may say why")


def _one_line(exc: BaseException) -> str:
    return " ".join(str(exc).split())[:500] or type(exc).__name__
