"""The forms that training data comes in, and the columns that TRL's trainers take.

Source: the dataset preparation of the trainers of TRL 1.12.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

import attrs

from flowmesh_trl.records import Chat, Columns, Record

__all__ = ["Converted", "Form", "Options", "choose_form"]

Converted = dict[str, Any]

# What TRL hands on to the chat template, and what it takes for none.
_TEMPLATE_EXTRAS = {"tools": "null", "chat_template_kwargs": "{}"}
# What TRL calls reward functions with beside the columns.
_TAKEN = {"prompts", "completions", "trainer_state", "log_extra", "log_metric", "environments"}


@attrs.frozen(kw_only=True)
class Form:
    """What rows of one form become.

    Attributes:
        kinds: Column of the dataset to ``text``, ``chat``, ``json``, ``flag``, ``number``, ``ids``.
        convert: Turns a record into values of these columns, or None to leave it out.
    """

    kinds: Mapping[str, str]
    convert: Callable[[Record], Converted | None]


@attrs.frozen(kw_only=True)
class Options:
    """What shapes the dataset beside the rows; see ``build_dataset``.

    Attributes:
        chat: Whether prompts and answers of text become messages.
    """

    columns: Columns
    chat: bool = False
    completion_only: bool = False
    tokenizer: Any = None
    max_query_length: int | None = None
    drop_too_long: bool = False


def choose_form(task_type: str, first: Record, options: Options) -> Form:
    """Learn from the first row what form the rows of a task have.

    Raises:
        InputError: None that the task type can be trained on.
    """
    return _FORMS[task_type](first, options)


def _supervised(first: Record, options: Options) -> Form:
    """Decide by the names that the document gives, and only without any by the usual ones."""
    columns = options.columns
    roles = ("messages", "text", "prompt", "completion")
    found = {role: columns.named[role] for role in roles if role in columns.named}
    if not found:
        usual = {role: columns.usual(role, first) for role in roles}
        found = {role: name for role, name in usual.items() if name}
    if "messages" in found:
        return _conversations(found["messages"], first, options)
    if "text" in found:
        return _texts(found["text"], first, options)
    if "prompt" in found and "completion" in found:
        return _pairs(found["prompt"], found["completion"], first, options)
    if "prompt" not in found and "completion" not in columns.named:
        raise first.complaint(
            "needs messages, a text, or a prompt with a response; got the columns"
            f" {first.names}; name them in data.text_field, data.prompt_field and so on"
        )
    (column,) = found.values()
    return (_conversations if first.is_chat(column) else _texts)(column, first, options)


def _texts(column: str, first: Record, options: Options) -> Form:
    if options.completion_only:
        raise first.complaint(
            f"training.completion_only_loss needs a prompt and a response, got the text {column!r}"
        )
    return Form(kinds={"text": "text"}, convert=lambda record: {"text": record.text(column)})


def _conversations(column: str, first: Record, options: Options) -> Form:
    extras = {name: "json" for name in _TEMPLATE_EXTRAS if first.has(name)}

    def whole(record: Record) -> Converted:
        return {**_chats(record, messages=record.chat(column)), **_rest(record, extras)}

    def split(record: Record) -> Converted:
        *prompt, answer = record.chat(column)
        if not prompt or answer["role"] != "assistant":
            raise record.complaint(
                f"{column} must end with the assistant's answer to something, got"
                f" {answer['role']!r} (training.completion_only_loss)"
            )
        return {**_chats(record, prompt=prompt, completion=[answer]), **_rest(record, extras)}

    if options.completion_only:
        return Form(kinds={"prompt": "chat", "completion": "chat", **extras}, convert=split)
    return Form(kinds={"messages": "chat", **extras}, convert=whole)


def _pairs(prompt: str, completion: str, first: Record, options: Options) -> Form:
    if options.chat or first.is_chat(prompt) or first.is_chat(completion):
        return _chat_pairs(prompt, completion, first, options)

    def convert(record: Record) -> Converted:
        asked = record.text(prompt) + options.columns.separator
        answer = record.text(completion)
        if options.completion_only:
            return {"prompt": asked, "completion": answer}
        return {"text": asked + answer}

    names = ("prompt", "completion") if options.completion_only else ("text",)
    return Form(kinds=dict.fromkeys(names, "text"), convert=convert)


def _chat_pairs(prompt: str, completion: str, first: Record, options: Options) -> Form:
    extras = {name: "json" for name in _TEMPLATE_EXTRAS if first.has(name)}

    def convert(record: Record) -> Converted:
        asked = record.chat(prompt, role="user")
        answer = record.chat(completion, role="assistant")
        if options.completion_only:
            return {**_chats(record, prompt=asked, completion=answer), **_rest(record, extras)}
        return {**_chats(record, messages=asked + answer), **_rest(record, extras)}

    names = ("prompt", "completion") if options.completion_only else ("messages",)
    return Form(kinds={**dict.fromkeys(names, "chat"), **extras}, convert=convert)


def _preferences(first: Record, options: Options) -> Form:
    columns = options.columns
    chosen, rejected = columns.require(first, "chosen"), columns.require(first, "rejected")
    prompt = columns.find(first, "prompt")
    found = any(name and first.is_chat(name) for name in (prompt, chosen, rejected))
    if found or (options.chat and prompt):
        return _chat_preferences(prompt, chosen, rejected, first)
    names = {"chosen": chosen, "rejected": rejected, **({"prompt": prompt} if prompt else {})}
    return Form(
        kinds=dict.fromkeys(names, "text"),
        convert=lambda record: {name: record.text(column) for name, column in names.items()},
    )


def _chat_preferences(prompt: str | None, chosen: str, rejected: str, first: Record) -> Form:
    """Both answers may be whole conversations; the prompt is then what they share."""
    extras = {name: "json" for name in _TEMPLATE_EXTRAS if first.has(name)}

    def convert(record: Record) -> Converted:
        good = record.chat(chosen, role="assistant")
        bad = record.chat(rejected, role="assistant")
        if good[0]["role"] in ("system", "user"):
            asked, good, bad = _shared_start(good, bad)
        elif prompt is not None:
            asked = record.chat(prompt, role="user")
        else:
            asked = []
        if not (asked and good and bad):
            raise record.complaint(
                f"{chosen} and {rejected} must be two answers to one prompt, or conversations"
                " that begin alike and end differently"
            )
        chats = _chats(record, prompt=asked, chosen=good, rejected=bad)
        return {**chats, **_rest(record, extras)}

    return Form(
        kinds={**dict.fromkeys(("prompt", "chosen", "rejected"), "chat"), **extras},
        convert=convert,
    )


def _shared_start(good: Chat, bad: Chat) -> tuple[Chat, Chat, Chat]:
    same = 0
    while same < min(len(good), len(bad)) and good[same] == bad[same]:
        same += 1
    return good[:same], good[same:], bad[same:]


def _reward(first: Record, options: Options) -> Form:
    form = _preferences(first, options)
    if not first.has("margin"):
        return form

    def convert(record: Record) -> Converted:
        return {**(form.convert(record) or {}), "margin": record.number("margin")}

    return Form(kinds={**form.kinds, "margin": "number"}, convert=convert)


def _unpaired(first: Record, options: Options) -> Form:
    columns = options.columns
    label = columns.find(first, "label")
    if label is None and columns.find(first, "chosen") and columns.find(first, "rejected"):
        return _preferences(first, options)  # TRL makes two rows of each
    label = columns.require(first, "label")
    prompt, completion = columns.require(first, "prompt"), columns.require(first, "completion")
    pairs = attrs.evolve(
        options,
        completion_only=True,
        columns=attrs.evolve(columns, separator=""),
    )
    form = _pairs(prompt, completion, first, pairs)

    def convert(record: Record) -> Converted:
        return {**(form.convert(record) or {}), "label": record.flag(label)}

    return Form(kinds={**form.kinds, "label": "flag"}, convert=convert)


def _queries(first: Record, options: Options) -> Form:
    """Prompts to be answered; every other column is kept for reward functions."""
    columns = options.columns
    prompt = columns.require(first, "messages", "prompt")
    others = [name for name in first.values if name != prompt]
    chat = options.chat or first.is_chat(prompt)

    def convert(record: Record) -> Converted:
        _check_others(record, prompt, others)
        rest = {name: record.dump(record.values.get(name)) for name in others}
        if chat:
            return {**rest, **_chats(record, prompt=_question(record, prompt))}
        return {**rest, "prompt": record.text(prompt)}

    kinds = {**dict.fromkeys(others, "json"), "prompt": "chat" if chat else "text"}
    return Form(kinds=kinds, convert=convert)


def _check_others(record: Record, prompt: str, others: list[str]) -> None:
    for name in record.values:
        if name in _TAKEN or (name == "prompt" and name != prompt):
            raise record.complaint(f"no column may be called {name!r}, TRL calls something else so")
        if name != prompt and name not in others:
            raise record.complaint(
                f"the column {name!r} is not in the first row; give every row the same columns"
            )


def _question(record: Record, column: str) -> Chat:
    chat = record.chat(column, role="user")
    if chat[-1]["role"] not in ("user", "tool"):
        raise record.complaint(
            f"{column} must end with a message of user or tool, which is to be answered, got"
            f" {chat[-1]['role']!r}"
        )
    return chat


def _tokenized(first: Record, options: Options) -> Form:
    form = _queries(first, options)
    if "input_ids" in form.kinds:
        raise first.complaint("no column may be called 'input_ids', it gets the prompt's tokens")

    def convert(record: Record) -> Converted | None:
        row = form.convert(record) or {}
        ids = _tokens(row["prompt"], options.tokenizer)
        limit = options.max_query_length
        if limit is None or len(ids) <= limit:
            return {**row, "input_ids": ids}
        if options.drop_too_long:
            return None
        raise record.complaint(
            f"the prompt has {len(ids)} tokens, at most {limit} are allowed; raise"
            " training.max_seq_length, or set data.drop_too_long: true to leave such rows out"
        )

    return Form(kinds={**form.kinds, "input_ids": "ids"}, convert=convert)


def _tokens(prompt: str | list[str], tokenizer: Any) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    chat = [json.loads(message) for message in prompt]
    encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def _rest(record: Record, names: Collection[str]) -> Converted:
    late = [name for name in _TEMPLATE_EXTRAS if name not in names and record.has(name)]
    if late:
        raise record.complaint(f"has {late[0]}, which the first row has not; give it to every row")
    return {
        name: record.dump(record.values[name]) if record.has(name) else _TEMPLATE_EXTRAS[name]
        for name in names
    }


def _chats(record: Record, **chats: Chat) -> Converted:
    """Write each message as JSON: a table would give every message every other one's keys."""
    return {name: [record.dump(message) for message in chat] for name, chat in chats.items()}


_FORMS: Mapping[str, Callable[[Record, Options], Form]] = {
    "dpo": _preferences,
    "grpo": _queries,
    "kto": _unpaired,
    "lora_sft": _supervised,
    "ppo": _tokenized,
    "reward": _reward,
    "sft": _supervised,
}
