"""The block ``data``: which columns of the rows mean what.

The core turns the block into rows; the names of columns are this plugin's. A key that neither of
them reads is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BeforeValidator, Field, model_validator

from flowmesh_trl.findings import OnceBlock

__all__ = ["ROLES", "DataBlock", "JsonlBlock", "RowsBlock"]

# The forms in which a document gives its rows when it does not say ``type``.
_FORMS = ("jsonl", "jsonl_path", "dataset_name", "prompts", "preferences", "examples")
_Type = Literal["list", "jsonl", "dataset", "records", "graph_template", "static"]
_ADDRESS = ("path", "url", "download_url", "worker_path", "headers", "timeout_s")
_DATASET = ("split", "revision", "trust_remote_code", "shuffle", "seed", "buffer_size")
# What each way of giving rows has further fields for, beside columns.
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "jsonl_path": ("headers", "timeout_s"),
    "dataset_name": ("config_name", "name", *_DATASET),
    "prompts": ("metadata",),
    "list": ("items", "metadata"),
    "jsonl": _ADDRESS,
    "dataset": ("url", "name", *_DATASET),
    "records": ("items",),
    "graph_template": ("template",),
    "static": ("task",),
}
_EVERYWHERE = (
    *("max_samples", "type", "eval", "eval_fraction"),
    *("prompt_format", "drop_too_long"),
)
# Rows in these are texts or have columns of fixed names.
_WITHOUT_COLUMNS = ("prompts", "preferences", "list", "graph_template", "static")

# What a column can be, and which roles the trainer of a task type knows.
_SFT = ("text", "prompt", "response", "messages")
_PAIRS = ("prompt", "chosen", "rejected")
ROLES: Mapping[str, tuple[str, ...]] = {
    "sft": _SFT,
    "lora_sft": _SFT,
    "dpo": _PAIRS,
    "reward": _PAIRS,
    "kto": ("prompt", "response", "label", "chosen", "rejected"),
    "grpo": ("prompt", "messages"),
    "ppo": ("prompt", "messages", "response"),
}


def _column(role: str, *others: str) -> Any:
    names = [f"{name}_{kind}" for name in (role, *others) for kind in ("field", "column")]
    return Field(default=None, min_length=1, validation_alias=AliasChoices(*names))


class ColumnsBlock(OnceBlock):
    """Names of columns; each may be written ``..._field`` or ``..._column``.

    A column that is not named here is found by its usual name, such as ``prompt`` or ``text``.

    Attributes:
        text_field: A whole text.
        prompt_field: What is asked, as ``query_field``.
        response_field: The answer, as ``completion_field``; ppo makes its own and leaves it out.
        messages_field: A chat, ``[{role, content}]``.
        chosen_field: The better answer.
        rejected_field: The worse answer.
        label_field: Whether the answer is a good one.
        separator: Stands between prompt and answer where they become one text.
    """

    text_field: str | None = _column("text")
    prompt_field: str | None = _column("prompt", "query")
    response_field: str | None = _column("response", "completion")
    messages_field: str | None = _column("messages")
    chosen_field: str | None = _column("chosen")
    rejected_field: str | None = _column("rejected")
    label_field: str | None = _column("label")
    separator: str = "\n\n"

    @property
    def columns(self) -> dict[str, str]:
        """Role to the column that is named for it."""
        roles = ("text", "prompt", "response", "messages", "chosen", "rejected", "label")
        named = {role: getattr(self, f"{role}_field") for role in roles}
        return {role: name for role, name in named.items() if name is not None}


class JsonlBlock(ColumnsBlock):
    """``data.jsonl``: a file of JSON objects, the first of four addresses that leads to one."""

    path: str | None = None
    url: str | None = None
    download_url: str | None = None
    worker_path: str | None = None
    headers: dict[str, str] = Field(
        default_factory=dict, validation_alias=AliasChoices("headers", "download_headers")
    )
    timeout_s: float | None = Field(
        default=None,
        gt=0,
        validation_alias=AliasChoices("timeoutSec", "download_timeoutSec", "timeout", "timeout_s"),
    )
    max_samples: int | None = Field(
        default=None, ge=1, validation_alias=AliasChoices("max_samples", "limit")
    )


def _as_block(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class RowsBlock(JsonlBlock):
    """``data`` or ``data.eval``: where rows come from, and their columns.

    Rows are given in exactly one way: ``jsonl`` (a file, or a block of its own), ``jsonl_path``,
    ``dataset_name`` (with ``config_name``, ``split``, ``revision``, ``trust_remote_code``,
    ``shuffle``, ``seed``, ``buffer_size``), ``prompts``, ``preferences``, ``examples``, or by a
    ``type`` and its fields.

    Attributes:
        max_samples: Take the first rows only.
    """

    type: _Type | None = None
    jsonl: Annotated[JsonlBlock | None, BeforeValidator(_as_block)] = None
    jsonl_path: str | None = None
    dataset_name: str | None = None
    config_name: str | None = None
    name: str | None = None
    split: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    shuffle: bool = False
    seed: int | None = None
    buffer_size: int | None = Field(default=None, ge=1)
    prompts: list[Any] | None = Field(default=None, min_length=1)
    preferences: list[dict[str, Any]] | None = Field(default=None, min_length=1)
    examples: list[dict[str, Any]] | None = Field(default=None, min_length=1)
    items: list[Any] | None = Field(default=None, min_length=1)
    metadata: list[dict[str, Any]] | None = Field(
        default=None, validation_alias=AliasChoices("metadata", "items_metadata")
    )
    template: dict[str, Any] | None = None
    task: str | None = None

    @property
    def form(self) -> str:
        """How the rows are given: a value of ``type``, or the field that holds or names them."""
        return self.type or next(name for name in _FORMS if getattr(self, name) is not None)

    @property
    def columns(self) -> dict[str, str]:
        """Role to the column that is named for it, here or in ``jsonl``."""
        inner = self.jsonl.columns if isinstance(self.jsonl, JsonlBlock) else {}
        return {**super().columns, **inner}

    @model_validator(mode="after")
    def _rows_once(self) -> RowsBlock:
        named = [name for name in _FORMS if getattr(self, name) is not None]
        if self.type is None and len(named) != 1:
            came = " and ".join(named) or "none"
            raise ValueError(f"must give its rows in one of {', '.join(_FORMS)}, got {came}")
        problems = [*self._strangers(), *self._columns_named_twice()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _strangers(self) -> Iterator[str]:
        """Yield fields that the rows, as they are given, have no use for."""
        known = {*_EVERYWHERE, *_FIELDS.get(self.form, ())}
        known |= {self.form} if self.type is None else set()
        known |= set() if self.form in _WITHOUT_COLUMNS else {*ColumnsBlock.model_fields}
        for name in sorted(self.model_fields_set - known):
            field = type(self).model_fields[name]
            if getattr(self, name) != field.get_default(
                call_default_factory=True, validated_data={}
            ):
                yield f"{name} says nothing about rows of {self.form}"

    def _columns_named_twice(self) -> Iterator[str]:
        outer = super().columns
        for role, name in self.columns.items():
            if outer.get(role, name) != name:
                yield f"{role}_field is {outer[role]!r} here and {name!r} in jsonl"


class DataBlock(RowsBlock):
    """``data``: the rows to train on.

    Attributes:
        eval: Rows to evaluate on; column names that it does not give are those of ``data``.
        eval_fraction: The share of the rows that is kept to evaluate on instead.
        prompt_format: ``chat`` gives prompts and answers the model's chat template, as inference
            does, ``plain`` leaves them as they are. ``auto`` is ``chat`` where the model has a
            template and the document no ``separator``. Whole texts are never changed.
        drop_too_long: For ``ppo``: leave prompts out that are too long, in place of an error.
    """

    eval: RowsBlock | None = None
    eval_fraction: float | None = Field(default=None, gt=0, lt=1)
    prompt_format: Literal["auto", "chat", "plain"] = "auto"
    drop_too_long: bool = False

    @model_validator(mode="after")
    def _evaluated_once(self) -> DataBlock:
        if self.eval is not None and self.eval_fraction is not None:
            raise ValueError("eval and eval_fraction exclude each other")
        return self

    @property
    def has_eval_rows(self) -> bool:
        """Whether there are rows to evaluate on."""
        return self.eval is not None or self.eval_fraction is not None
