"""The ``data`` block: prompts, records, a JSONL file, a dataset or a template, into rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import attrs
from pydantic import AliasChoices, Field

from flowmesh_core.checkpoints import Fetcher, existing
from flowmesh_core.contract import Task
from flowmesh_core.errors import ArtifactError, FlowmeshError, InputError
from flowmesh_core.rows import RowSource, check_prompt
from flowmesh_core.templates import render_graph_template
from flowmesh_core.validation import OpenBlock, validate_model

__all__ = ["resolve_eval_rows", "resolve_rows"]


class _Data(OpenBlock):
    limit: Annotated[int, Field(ge=0)] | None = Field(
        default=None, validation_alias=AliasChoices("limit", "max_samples")
    )


class _ListData(_Data):
    items: list[Any] = Field(min_length=1)
    metadata: list[dict[str, Any]] | None = Field(
        default=None, validation_alias=AliasChoices("metadata", "items_metadata")
    )


class _TableData(_Data):
    column: str | None = None
    metadata_columns: list[str] | dict[str, str] | None = None


class _RecordsData(_TableData):
    items: list[dict[str, Any]] = Field(min_length=1)


class _JsonlData(_TableData):
    path: str | None = None
    url: str | None = None
    download_url: str | None = None
    worker_path: str | None = None
    headers: dict[str, str] = Field(
        default_factory=dict, validation_alias=AliasChoices("headers", "download_headers")
    )
    timeout_s: float = Field(
        default=60.0,
        gt=0,
        validation_alias=AliasChoices("timeoutSec", "download_timeoutSec", "timeout", "timeout_s"),
    )


class _DatasetData(_TableData):
    url: str = Field(min_length=1)
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    trust_remote_code: bool = False
    shuffle: bool = False
    seed: int = 42
    buffer_size: Annotated[int, Field(ge=1)] | None = None
    metadata_include_all: bool = False


class _TemplateData(_Data):
    template: dict[str, Any]


class _StaticData(_Data):
    task: str


_KINDS: Mapping[str, type[_Data]] = {
    "dataset": _DatasetData,
    "graph_template": _TemplateData,
    "jsonl": _JsonlData,
    "list": _ListData,
    "records": _RecordsData,
    "static": _StaticData,
}


def resolve_rows(
    task: Task, fetcher: Fetcher, *, folder: Path, trust_remote_code: bool = False
) -> RowSource | None:
    """Describe the rows of a task's shard; a file that lies elsewhere is brought below ``folder``.

    Returns:
        None when the task has no ``data``, or ``data.type`` is ``none``.

    Raises:
        ContractError: A field is missing or of the wrong kind.
        InputError: The rows cannot be had.
    """
    block = task.spec.get("data")
    source = _resolve(block, task, fetcher, folder / "data", trust_remote_code, "spec.data")
    return source and attrs.evolve(
        source,
        shard_index=task.common.shard.index,
        shard_total=task.common.shard.total,
        contiguous=task.common.shard.contiguous,
    )


def resolve_eval_rows(
    task: Task, fetcher: Fetcher, *, folder: Path, trust_remote_code: bool = False
) -> RowSource | None:
    """Describe the rows of ``data.eval``, a block like ``data``; see ``resolve_rows``.

    Every shard of a task is evaluated on all of them.
    """
    data = task.spec.get("data")
    block = data.get("eval") if isinstance(data, Mapping) else None
    where = "spec.data.eval"
    return _resolve(block, task, fetcher, folder / "eval", trust_remote_code, where)


def _resolve(
    block: Any, task: Task, fetcher: Fetcher, folder: Path, trust_remote_code: bool, where: str
) -> RowSource | None:
    if not block or (isinstance(block, Mapping) and block.get("type") == "none"):
        return None
    if not isinstance(block, Mapping):
        raise InputError(f"{where} must be a mapping, got {type(block).__name__}")
    kind, fields, where = _kind_of(block, where)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise InputError(
            f"{where}.type must be one of {', '.join(_KINDS)}, none, got {kind!r}; or give the"
            f" rows as one of {', '.join(_FORMS)}"
        )
    data = validate_model(_KINDS[kind], fields, where="", prefix=where)
    source = _describe(data, task, fetcher, folder, trust_remote_code)
    return attrs.evolve(source, limit=data.limit)


def _nested_jsonl(block: Mapping[str, Any]) -> Mapping[str, Any]:
    jsonl = block["jsonl"]
    fields = jsonl if isinstance(jsonl, Mapping) else {"path": jsonl}
    limits = {key: block[key] for key in ("limit", "max_samples") if key in block}
    return {**limits, **fields}


def _named_dataset(block: Mapping[str, Any]) -> Mapping[str, Any]:
    renamed = {**block, "url": block["dataset_name"]}
    return {**renamed, "name": block["config_name"]} if block.get("config_name") else renamed


def _items(key: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    return lambda block: {**block, "items": block[key]}


# How training documents name their rows, without a type: kind, its fields, where they stand.
_FORMS: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], Mapping[str, Any]], str]] = {
    "jsonl": ("jsonl", _nested_jsonl, ".jsonl"),
    "jsonl_path": ("jsonl", lambda block: {**block, "path": block["jsonl_path"]}, ""),
    "dataset_name": ("dataset", _named_dataset, ""),
    "prompts": ("list", _items("prompts"), ""),
    "preferences": ("records", _items("preferences"), ""),
    "examples": ("records", _items("examples"), ""),
}


def _kind_of(block: Mapping[str, Any], where: str) -> tuple[Any, Mapping[str, Any], str]:
    """Return the kind of a block's rows, its fields and where those stand.

    Raises:
        InputError: Several forms are there, and any could be meant.
    """
    if block.get("type") is not None:
        return block["type"], block, where
    named = [key for key in _FORMS if block.get(key) is not None]
    if len(named) > 1:
        raise InputError(f"{where} must name its rows once, got {' and '.join(named)}")
    if not named:
        return None, block, where
    kind, fields, below = _FORMS[named[0]]
    return kind, fields(block), where + below


def _describe(
    data: _Data, task: Task, fetcher: Fetcher, folder: Path, trust_remote_code: bool
) -> RowSource:
    if isinstance(data, _ListData):
        return _from_list(data)
    if isinstance(data, _RecordsData):
        return RowSource.from_records(data.items, **_columns(data))
    if isinstance(data, _JsonlData):
        path = _jsonl_file(data, fetcher, folder)
        return RowSource(kind="jsonl", params={"path": str(path), **_columns(data)})
    if isinstance(data, _DatasetData):
        return _from_dataset(data, trust_remote_code)
    if isinstance(data, _TemplateData):
        prompt = render_graph_template(data.template, task.common.upstream)
        raw = data.template.get("append_system_prompt") is True
        return RowSource.from_prompts([prompt], add_system_prompt=raw)
    assert isinstance(data, _StaticData)  # noqa: S101 - the last of _KINDS
    return RowSource.from_prompts([data.task])


def _from_list(data: _ListData) -> RowSource:
    prompts = [check_prompt(item, where=f"items[{i}]") for i, item in enumerate(data.items)]
    metadata = data.metadata or []
    if metadata and len(metadata) != len(prompts):
        raise InputError(
            f"metadata must have one entry per item, got {len(metadata)} for {len(prompts)} items"
        )
    return RowSource.from_prompts(prompts, metadata=metadata)


def _columns(data: _TableData) -> dict[str, Any]:
    return {"column": data.column, "metadata_columns": data.metadata_columns}


def _from_dataset(data: _DatasetData, trust_remote_code: bool) -> RowSource:
    if data.trust_remote_code and not trust_remote_code:
        raise InputError(
            "trust_remote_code runs code of the dataset's repository, which the operator of this"
            " worker does not allow; leave it out, or set FLOWMESH_TRUST_REMOTE_CODE=1 there"
        )
    fields = set(_DatasetData.model_fields) - {"limit"}
    local = existing(data.url)
    url = {"url": str(local)} if local else {}
    return RowSource(kind="dataset", params={**data.model_dump(include=fields), **url})


def _jsonl_file(data: _JsonlData, fetcher: Fetcher, folder: Path) -> Path:
    """Return the first of the contract's four addresses that leads to a file."""
    addresses = (data.download_url, data.url, data.path, data.worker_path)
    problems: list[FlowmeshError] = []
    for address in dict.fromkeys(filter(None, addresses)):
        if not address.startswith(("http://", "https://")):
            path = existing(address)
            if path is not None and path.is_file():
                return path
            problems.append(InputError(f"{address!r} is no file on this worker"))
            continue
        try:
            return fetcher.download(address, folder, headers=data.headers, timeout_s=data.timeout_s)
        except (ArtifactError, InputError) as exc:
            problems.append(exc)
    raise InputError(
        "; ".join(map(str, problems)) or "one of download_url, url, path, worker_path is required",
        retriable=any(problem.retriable for problem in problems),
    )
