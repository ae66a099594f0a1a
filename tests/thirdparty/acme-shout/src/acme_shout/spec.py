"""Documents, settings and results of ``acme.shout``."""

from __future__ import annotations

from typing import Any

from flowmesh_core import TaskSpec
from pydantic import BaseModel, Field


class ShoutSpec(TaskSpec):
    """What a document may say."""

    volume: int = Field(default=1, ge=1, le=11)


class ShoutSettings(BaseModel):
    """What the operator decides."""

    mark: str = Field(default="!", alias="ACME_SHOUT_MARK")


class Shouted(BaseModel):
    """The answer to one row."""

    index: int
    output: str


class ShoutResult(BaseModel):
    """What ``shouts.txt`` holds too, one line per row."""

    ok: bool
    items: list[Shouted]
    together: int = Field(description="How many tasks were shouted at once")


EXAMPLE: dict[str, Any] = {
    "data": {"type": "list", "items": ["hello", "world"]},
    "volume": 2,
}
