"""Which chunks a collection has, lacks and has too many; pure.

A point's id says all that its vector and payload were made of. So a chunk is written once however
often it comes, one that changed in any way is written anew, and what a killed run has left undone
is seen by the next. Points that only ``present`` has are stale, to be deleted once the new ones
are written.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from typing import Any

import attrs

__all__ = ["Difference", "compare", "digest_payload", "point_id"]

# Of this plugin; another one would write every collection anew.
_NAMESPACE = uuid.UUID("6c0a8a76-4b9e-5d0c-9f5e-3f3a5f1b7c21")


def digest_payload(payload: Mapping[str, Any], identity: str) -> str:
    """Return the digest of a chunk: its payload, and what turns its text into a vector."""
    plain = json.dumps([identity, payload], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(plain.encode()).hexdigest()


def point_id(source: str, ordinal: int, digest: str) -> str:
    """Return the id of a chunk's point, the same on every machine."""
    return str(uuid.uuid5(_NAMESPACE, f"{source}\0{ordinal}\0{digest}"))


@attrs.frozen(kw_only=True)
class Difference:
    """What is to be done about one source, each by point id."""

    new: frozenset[str]
    stale: frozenset[str]
    unchanged: frozenset[str]


def compare(wanted: Mapping[str, str], present: Mapping[str, str]) -> Difference:
    """Compare the digests of a source's points as they should be and as they are."""
    same = {point for point, digest in wanted.items() if present.get(point) == digest}
    return Difference(
        new=frozenset(wanted.keys() - same),
        stale=frozenset(present.keys() - wanted.keys()),
        unchanged=frozenset(same),
    )
