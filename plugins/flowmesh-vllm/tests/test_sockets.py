from __future__ import annotations

import os
from pathlib import Path

import pytest
from flowmesh_vllm.sockets import SOCKETS, own_sockets, use_sockets


def test_each_engine_meets_its_processes_in_a_folder_that_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SOCKETS, str(tmp_path))
    one, other = own_sockets(), own_sockets()
    assert one.name != other.name
    assert {Path(one.name).parent, Path(other.name).parent} == {tmp_path}
    Path(one.name, "socket").touch()
    for sockets in (one, other, one):
        sockets.cleanup()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("before", [None, "/run/vllm"])
def test_the_folder_is_named_only_while_vllm_starts(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if before is None:
        monkeypatch.delenv(SOCKETS, raising=False)
    else:
        monkeypatch.setenv(SOCKETS, before)

    def start() -> None:
        with use_sockets("/run/mine"):
            assert os.environ[SOCKETS] == "/run/mine"
            raise RuntimeError("it did not start")

    with pytest.raises(RuntimeError, match="it did not start"):
        start()
    assert os.environ.get(SOCKETS) == before
