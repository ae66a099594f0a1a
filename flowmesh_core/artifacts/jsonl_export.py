"""``postprocess.jsonl_export``: write a result's items as JSON lines for a later stage.

Source: the contract's selectors. Every value becomes text, and null becomes the empty text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flowmesh_core.artifacts.layout import MANIFEST_NAME, RESULT_NAME, Attempt, confine
from flowmesh_core.errors import ArtifactError
from flowmesh_core.specs import JsonlExport
from flowmesh_core.wire import encode_json

__all__ = ["write_jsonl_export"]

_SOURCES = ("literal", "prompt", "output", "metadata", "item")


def write_jsonl_export(
    export: JsonlExport, items: Sequence[Mapping[str, Any]], attempt: Attempt
) -> dict[str, Any]:
    """Write the file into the attempt's folder.

    Returns:
        The block ``result.jsonl_export``, with paths as they are after the commit.

    Raises:
        ArtifactError: The path leaves the task's folder or cannot be written, or a required field
            is empty.
    """
    path = confine(attempt.folder, export.path)
    relative = path.relative_to(attempt.folder).as_posix()
    if relative in (RESULT_NAME, MANIFEST_NAME):
        raise ArtifactError(
            f"postprocess.jsonl_export: {RESULT_NAME} and {MANIFEST_NAME} are the core's own files;"
            " choose another path"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for number, item in enumerate(items):
                file.write(encode_json(_build_record(export, item, number)) + b"\n")
    except OSError as exc:
        raise ArtifactError(f"postprocess.jsonl_export: cannot write {relative}: {exc}") from exc
    final = str(attempt.final / relative)
    return {
        "path": final,
        "worker_path": final,
        "relative_path": relative,
        "record_count": len(items),
        "fields": list(export.fields),
    }


def _build_record(export: JsonlExport, item: Mapping[str, Any], number: int) -> dict[str, str]:
    if not isinstance(item, Mapping):
        raise ArtifactError(
            f"postprocess.jsonl_export: item {number} must be an object, got {type(item).__name__}"
        )
    record = {name: _as_text(_select(selector, item)) for name, selector in export.fields.items()}
    empty = [name for name in export.required_fields if not record.get(name)]
    if empty:
        raise ArtifactError(
            f"postprocess.jsonl_export: item {number} has no {', '.join(empty)}, "
            "named in required_fields"
        )
    return record


def _select(selector: Any, item: Mapping[str, Any]) -> Any:
    if isinstance(selector, str):
        return _select_by_text(selector, item)
    return _select_by_object(selector, item) if isinstance(selector, Mapping) else selector


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    return encode_json(value).decode() if isinstance(value, (Mapping, list)) else str(value)


def _select_by_text(selector: str, item: Mapping[str, Any]) -> Any:
    if selector in ("prompt", "output"):
        return _field(item, selector, None)
    source, dot, key = selector.partition(".")
    if dot and source in ("metadata", "item"):
        return _field(item, source, key)
    return selector


def _select_by_object(selector: Mapping[str, Any], item: Mapping[str, Any]) -> Any:
    source = selector.get("from", selector.get("source", "literal"))
    if source not in _SOURCES:
        known = ", ".join(_SOURCES)
        raise ArtifactError(
            f"postprocess.jsonl_export: from must be one of {known}, got {source!r}"
        )
    if source == "literal":
        value = selector.get("value", selector.get("literal"))
    else:
        value = _field(item, source, selector.get("key"))
    if value in (None, "") and "fallback" in selector:
        value = _select(selector["fallback"], item)
    return selector.get("default") if value in (None, "") else value


def _field(item: Mapping[str, Any], source: str, key: str | None) -> Any:
    metadata = item.get("metadata")
    if not isinstance(metadata, Mapping):
        metadata = {}
    if source == "prompt":
        return metadata.get("prompt", item.get("prompt"))
    if source == "output":
        return item.get("output")
    holder = metadata if source == "metadata" else item
    return holder.get(key) if key else None
