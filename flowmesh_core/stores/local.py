"""The store of ``destination.type: local``: the task's folder is the delivery."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowmesh_core.contract import Destination
from flowmesh_core.stores.base import Store

__all__ = ["LocalStore"]


class LocalStore(Store):
    """Leaves everything where it lies."""

    async def upload(
        self, task_id: str, path: Path, final: Path, destination: Destination
    ) -> dict[str, Any]:
        """Return the file's own path as its address, which a later stage can read."""
        return {"url": str(final), "download_url": str(final)}

    async def deliver(
        self, task_id: str, result: Mapping[str, Any], destination: Destination
    ) -> None:
        """Do nothing: ``responses.json`` is in place."""
