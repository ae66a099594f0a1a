from __future__ import annotations

from pathlib import Path

import psutil
from flowmesh_transformers.memory import free_memory_bytes


def write_group(folder: Path, *, limit: str, used: int, cached: int) -> Path:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")
    return folder


def test_a_containers_limit_counts_with_its_cache_as_free(tmp_path: Path) -> None:
    folder = write_group(tmp_path, limit="1000000", used=600000, cached=100000)
    assert free_memory_bytes(folder) == 500000


def test_a_container_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    assert free_memory_bytes(write_group(tmp_path, limit="1000", used=2000, cached=0)) == 0


def test_without_a_limit_the_machines_free_memory_counts(tmp_path: Path) -> None:
    total = psutil.virtual_memory().total
    assert 0 < free_memory_bytes(tmp_path / "none") <= total
    assert 0 < free_memory_bytes(write_group(tmp_path, limit="max", used=1, cached=0)) <= total
