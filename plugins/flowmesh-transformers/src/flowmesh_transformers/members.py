"""The tasks of a group: each one's rows on their way to the model, and its own result or error."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import attrs

from flowmesh_core import (
    Answer,
    FlowmeshError,
    InputError,
    Outcome,
    Row,
    RunContext,
    build_item,
    build_messages,
    build_result,
    build_text,
    build_vector_item,
    derive_seed,
    normalize,
)
from flowmesh_transformers.prompts import Request

__all__ = ["EmbeddingMember", "InferenceMember", "Job", "Member", "Reading"]


class Reading(Protocol):
    """What a member needs of an engine; ``engine.TransformersEngine`` documents it."""

    context_tokens: int | None

    @property
    def has_chat_template(self) -> bool: ...  # noqa: D102 - as above
    def render(self, messages: Sequence[Mapping[str, Any]]) -> str: ...  # noqa: D102
    def encode(self, text: str, *, rendered: bool) -> list[int]: ...  # noqa: D102


@attrs.frozen(kw_only=True, eq=False)
class Job:
    """One text of a member for the model.

    Attributes:
        prompt: The text as the model gets it.
        choice: Which of the row's ``n`` answers.
    """

    member: Member
    row: Row
    prompt: str
    request: Request
    choice: int = 0


class Member(abc.ABC):
    """One task of a group."""

    def __init__(self, ctx: RunContext, engine: Reading) -> None:
        self.ctx = ctx
        self.error: FlowmeshError | None = None
        self._engine = engine
        self._started_s = ctx.clock()
        self._items: dict[int, dict[str, Any]] = {}
        self._expected = self._done = 0
        self._prompt_tokens = self._answer_tokens = 0

    @property
    def ended(self) -> bool:
        """Whether its outcome is known."""
        return self.error is not None or 0 < self._expected == self._done

    def jobs(self) -> Iterator[Job]:
        """Read the rows; what is wrong with them becomes the member's error."""
        try:
            rows = self.ctx.inputs.rows
            if rows is None:
                raise InputError("data is required: give data.type and the prompts")
            self._check_format()
            self._expected = rows.count() * self._choices
            if not self._expected:
                raise InputError("data has no rows: there is nothing to answer")
            for row in rows:
                yield from self._jobs_of(row)
                if self.is_stopped():
                    return
        except FlowmeshError as exc:
            self.error = exc
        except (OSError, ValueError) as exc:
            self.error = InputError(
                f"data cannot be read: {exc}", retriable=isinstance(exc, OSError)
            )

    def is_stopped(self) -> bool:
        """Look for a cancel and the deadline; either becomes the member's error."""
        if self.error is None:
            try:
                self.ctx.check()
            except FlowmeshError as exc:
                self.error = exc
        return self.error is not None

    def outcome(self) -> Outcome:
        """Return what became of the task."""
        if self.error is not None:
            return Outcome(error=self.error)
        items = [self._items[index] for index in sorted(self._items)]
        result = build_result(
            self.ctx.inputs.model,
            items,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._answer_tokens,
            latency_s=self.ctx.clock() - self._started_s,
            **self._summary(items),
        )
        return Outcome(result=result)

    @abc.abstractmethod
    def take(self, job: Job, answer: Any) -> None:
        """Keep what the engine gave for a job."""

    _choices = 1

    @abc.abstractmethod
    def _jobs_of(self, row: Row) -> Iterator[Job]: ...

    def _check_format(self) -> None:  # noqa: B027 - a text has one format only
        """Raise if no row can be written as the document wants it."""

    def _summary(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {}

    def _encode(self, row: Row, text: str, *, rendered: bool) -> list[int]:
        tokens = self._engine.encode(text, rendered=rendered)
        if not tokens:
            raise InputError(
                f"row {row.index}: the prompt is empty and this model has no token to begin with"
            )
        limit = self._engine.context_tokens
        if limit is not None and len(tokens) > limit:
            raise InputError(
                f"row {row.index}: the prompt has {len(tokens)} tokens and the model takes "
                f"{limit}; shorten it"
            )
        self._prompt_tokens += len(tokens)
        return tokens

    def _count(self, what: str) -> None:
        self._done += 1
        self.ctx.progress(
            min(self._done / self._expected, 1.0), f"{self._done} of {self._expected} {what}"
        )


class InferenceMember(Member):
    """A task of type ``inference``; its result is an ``InferenceResult``."""

    def __init__(self, ctx: RunContext, engine: Reading) -> None:
        super().__init__(ctx, engine)
        self._params = ctx.spec.inference
        self._choices = self._params.n
        self._answers: dict[int, dict[int, Answer]] = {}

    def take(self, job: Job, answer: Answer) -> None:
        """Keep an answer; a row with all of its answers becomes an item."""
        answers = self._answers.setdefault(job.row.index, {})
        answers[job.choice] = answer
        self._answer_tokens += answer.tokens
        if len(answers) == self._choices:
            del self._answers[job.row.index]
            ordered = [answers[choice] for choice in range(self._choices)]
            self._items[job.row.index] = build_item(job.row, job.prompt, ordered)
        self._count("answers")

    def _check_format(self) -> None:
        if self._params.prompt_format == "chat" and not self._engine.has_chat_template:
            raise InputError(
                "inference.prompt_format is 'chat', but the model has no chat template; set "
                "model.transformers.chat_template, or use plain"
            )

    def _jobs_of(self, row: Row) -> Iterator[Job]:
        chat = self._params.prompt_format != "plain" and self._engine.has_chat_template
        try:
            prompt = self._write(row, chat=chat)
        except (FlowmeshError, ValueError) as exc:
            raise InputError(f"row {row.index}: {exc}") from exc
        tokens = self._encode(row, prompt, rendered=chat)
        room = self._room(row, len(tokens))
        for choice in range(self._choices):
            request = Request(
                tokens=tokens,
                limit=room,
                params=self._params,
                seed=derive_seed(self._params.seed, row.index, choice),
            )
            yield Job(member=self, row=row, prompt=prompt, request=request, choice=choice)

    def _write(self, row: Row, *, chat: bool) -> str:
        system = self._params.system_prompt
        if not chat:
            return build_text(row, system)
        return self._engine.render(build_messages(row, system))

    def _room(self, row: Row, tokens: int) -> int:
        context = self._engine.context_tokens
        if context is None:
            return int(self._params.max_tokens)
        if tokens == context:
            raise InputError(
                f"row {row.index}: the prompt fills all {context} tokens that the model takes; "
                "shorten it"
            )
        return int(min(self._params.max_tokens, context - tokens))


class EmbeddingMember(Member):
    """A task of type ``embedding``; its result is an ``EmbeddingResult``."""

    def take(self, job: Job, answer: Sequence[float]) -> None:
        """Keep a vector."""
        vector = normalize(answer) if self.ctx.spec.normalize else answer
        self._items[job.row.index] = build_vector_item(job.row, vector)
        self._count("vectors")

    def _jobs_of(self, row: Row) -> Iterator[Job]:
        if not isinstance(row.prompt, str):
            raise InputError(f"row {row.index}: an embedding needs a text, got chat messages")
        tokens = self._encode(row, row.prompt, rendered=False)
        yield Job(member=self, row=row, prompt=row.prompt, request=Request(tokens=tokens))

    def _summary(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"dimensions": len(items[0]["embedding"])}
