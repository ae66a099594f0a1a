"""Rows of any known form into the dataset that TRL's trainer of a task type takes.

The first row decides the form; a later row that has another one is an error that says where it
stands. Rows go to disk as they are read, so memory stays bounded.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Json, List, Value
from datasets.exceptions import DatasetGenerationError

from flowmesh_core import FlowmeshError, InputError, RowSource
from flowmesh_trl.forms import Converted, Form, Options, choose_form
from flowmesh_trl.records import Columns, Record, numbered_records

__all__ = ["build_dataset", "build_datasets"]

_FEATURES: Mapping[str, Any] = {
    "chat": List(Json()),
    "flag": Value("bool"),
    "ids": List(Value("int32")),
    "json": Json(),
    "number": Value("float64"),
    "text": Value("string"),
}


def build_datasets(
    task_type: str,
    rows: RowSource | None,
    eval_rows: RowSource | None,
    data: Mapping[str, Any],
    *,
    folder: Path,
    seed: int = 42,
    **options: Any,
) -> tuple[Dataset, Dataset | None]:
    """Build what is trained on and what is evaluated on.

    The latter comes from ``eval_rows``, whose columns ``data.eval`` may name anew, or is the share
    ``data.eval_fraction`` of the rows, drawn with ``seed``; without either it is None. Further
    arguments are those of ``build_dataset``.

    Raises:
        InputError: See ``build_dataset``; or there are too few rows to share out.
    """
    if rows is None:
        raise InputError(f"spec.data is required to train ({task_type}), got none")
    train = build_dataset(task_type, rows, data, folder=folder, **options)
    if eval_rows is not None:
        named = {**_flat(data), **_flat(data.get("eval") or {})}
        return train, build_dataset(task_type, eval_rows, named, folder=folder, **options)
    fraction = data.get("eval_fraction")
    return _share_out(train, fraction, seed) if fraction else (train, None)


def build_dataset(
    task_type: str,
    rows: RowSource,
    data: Mapping[str, Any],
    *,
    folder: Path,
    tokenizer: Any = None,
    completion_only: bool = False,
    max_query_length: int | None = None,
) -> Dataset:
    """Write the rows below ``folder``, in the columns that the trainer of the type takes.

    - ``sft``, ``lora_sft``: ``text`` or ``messages``; with ``completion_only`` ``prompt`` and
      ``completion``.
    - ``dpo``, ``reward``: ``chosen``, ``rejected``, and ``prompt`` unless the rows have none.
    - ``kto``: ``prompt``, ``completion``, ``label``; or as dpo, of which TRL makes two rows.
    - ``grpo``: ``prompt``, and every other column of the rows for reward functions.
    - ``ppo``: as grpo, and the tokens of the prompt as ``input_ids``.

    Ranks may call this at the same time: one writes, the others wait and then read.

    Args:
        task_type: Decides the columns.
        rows: Opened twice, for the first row and for all of them.
        data: The document's block, validated, for ``*_field``, ``separator``, ``prompt_format``
            and ``drop_too_long``.
        folder: Must outlive the dataset, which reads from ``.cache`` in it.
        tokenizer: Of the model to be trained; ppo needs it, chats are checked against it.
        completion_only: Whether the loss is to be on the answers alone.
        max_query_length: Most tokens of a prompt of ppo.

    Raises:
        InputError: There are no rows, or one cannot be used; the message says where it stands.
    """
    chat = _wants_chat(_flat(data), tokenizer)
    options = Options(
        columns=Columns.read(_flat(data)),
        chat=chat,
        completion_only=completion_only,
        tokenizer=tokenizer,
        max_query_length=max_query_length,
        drop_too_long=bool(data.get("drop_too_long")),
    )
    first = next(numbered_records(rows), None)
    if first is None:
        raise InputError("spec.data holds no rows, at least one is needed to train")
    form = choose_form(task_type, first, options)
    if "chat" in form.kinds.values() and tokenizer is not None:
        _check_template(tokenizer, first)
    fingerprint = json.dumps([task_type, rows.to_dict(), data, completion_only, chat], default=str)
    return _write(rows, form, folder / ".cache" / "datasets", fingerprint)


def _flat(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Names of columns may stand in ``data.jsonl`` as well as in ``data``."""
    inner = data.get("jsonl")
    rest = {key: value for key, value in data.items() if key != "jsonl"}
    return {**rest, **(inner if isinstance(inner, Mapping) else {})}


def _wants_chat(data: Mapping[str, Any], tokenizer: Any) -> bool:
    """Whether texts become messages: a model is to be trained on what it will be asked."""
    wanted = data.get("prompt_format") or "auto"
    if wanted != "auto":
        return bool(wanted == "chat")
    return bool(tokenizer is not None and tokenizer.chat_template) and "separator" not in data


def _check_template(tokenizer: Any, first: Record) -> None:
    if not tokenizer.chat_template:
        raise first.complaint(
            "becomes a chat, and the model's tokenizer has no chat template; take an instruction"
            " model, or columns of text with data.prompt_format: plain"
        )


def _write(rows: RowSource, form: Form, cache: Path, fingerprint: str) -> Dataset:
    try:
        return Dataset.from_generator(
            partial(_converted, rows, form),
            features=Features({name: _FEATURES[kind] for name, kind in form.kinds.items()}),
            cache_dir=str(cache),
            fingerprint=hashlib.sha256(fingerprint.encode()).hexdigest()[:16],
        )
    except DatasetGenerationError as exc:  # how the library wraps what its generator raises
        if isinstance(exc.__cause__, FlowmeshError):
            raise exc.__cause__ from None
        raise


def _converted(rows: RowSource, form: Form) -> Iterator[Converted]:
    kept = 0
    for record in numbered_records(rows):
        row = form.convert(record)
        if row is not None:
            kept += 1
            yield row
    if not kept:
        raise InputError("spec.data: every row is too long, and data.drop_too_long left them out")


def _share_out(rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    if len(rows) < 2:
        raise InputError(
            f"data.eval_fraction {fraction} needs two rows at least, one to train on and one to"
            f" evaluate on, got {len(rows)}"
        )
    held = min(max(round(len(rows) * fraction), 1), len(rows) - 1)
    chosen = set(random.Random(seed).sample(range(len(rows)), held))  # noqa: S311 - no secret
    rest = [index for index in range(len(rows)) if index not in chosen]
    return (
        rows.select(rest, keep_in_memory=True),
        rows.select(sorted(chosen), keep_in_memory=True),
    )
