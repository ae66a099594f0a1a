"""A place that shares no path with the worker, as one on another machine; a driver for tests."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from flowmesh_core.places.base import PlaceContext
from flowmesh_core.places.process import ProcessPlace


class StagedPlace(ProcessPlace):
    """Runs executors under another root folder: what they need is copied in, and back out."""

    def __init__(self, context: PlaceContext) -> None:
        super().__init__(context)
        self.root = Path(tempfile.mkdtemp(prefix="flowmesh-elsewhere-", dir=context.folder))
        self._there: dict[Path, Path] = {}

    async def stage_in(self, paths: Sequence[Path]) -> Mapping[Path, Path]:
        return {path: await asyncio.to_thread(self._copy, path) for path in paths}

    def _copy(self, path: Path) -> Path:
        there = self.root / path.absolute().relative_to("/")
        there.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, there, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, there)
        self._there[path] = there
        return there

    async def collect(self, folder: Path) -> None:
        there = self._there.pop(folder)
        await asyncio.to_thread(shutil.copytree, there, folder, dirs_exist_ok=True)

    async def close(self) -> None:
        await super().close()
        shutil.rmtree(self.root, ignore_errors=True)
