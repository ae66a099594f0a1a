"""Pictures, sounds and films that messages point to: from where they may come."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flowmesh_core import FlowmeshError, InputError, NetworkPolicy

__all__ = ["clean_media"]

# What every reader of URLs understands alike; others make another host of a backslash.
_CREDENTIALS = re.compile(r"//.*@", re.DOTALL)
_PLAIN_URL = re.compile(r"https?://[\w.~:/?#\[\]@!$&'()*+,;=%-]+", re.ASCII | re.IGNORECASE)


def clean_media(
    messages: Sequence[Mapping[str, Any]], hosts: Sequence[str]
) -> list[dict[str, Any]]:
    """Return messages that vLLM may read; may ask the name service.

    Args:
        messages: As OpenAI has them. A part's ``uuid`` goes: vLLM would take it for the name of
            what it saw before, whoever sent that.
        hosts: Those of ``FLOWMESH_HTTP_ALLOW``; empty allows every public one.

    Raises:
        InputError: A message points to a local file or to a host that is not allowed.
    """
    policy = NetworkPolicy(allow=tuple(hosts))
    for url in _urls(messages):
        if url.startswith("data:"):
            continue
        if not _PLAIN_URL.fullmatch(url):
            shown = _CREDENTIALS.sub("//***@", url)[:80]
            raise InputError(f"a message points to {shown!r}, which is no plain http(s) URL")
        try:
            policy.check(url)
        except FlowmeshError as exc:
            raise InputError(f"a message points to {exc}") from exc
    return [_without_names(message) for message in messages]


def _without_names(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    parts = [
        {key: value for key, value in part.items() if key != "uuid"}
        if isinstance(part, Mapping)
        else part
        for part in content
    ]
    return {**message, "content": parts}


def _urls(value: Any, key: str = "") -> Iterator[str]:
    """Yield what stands under ``url`` or ``*_url`` in the parts of messages."""
    if isinstance(value, str):
        if key == "url" or key.endswith("_url"):
            yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _urls(item, str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _urls(item, key)
