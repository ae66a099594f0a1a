from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from flowmesh_core.artifacts.parcel import Parcel

T = TypeVar("T")
CONTENT = bytes(range(256)) * 20_000


def run(work: Callable[[], Awaitable[T]]) -> T:
    async def main() -> T:
        return await asyncio.wait_for(work(), 20)

    return asyncio.run(main())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.bin"


async def read(parcel: Parcel, most_bytes: int = 1 << 18) -> list[bytes]:
    return [block async for block in parcel.blocks(most_bytes)]


def test_a_file_is_read_in_blocks_and_hashed_on_the_way(path: Path) -> None:
    path.write_bytes(CONTENT)

    async def work() -> None:
        parcel = Parcel("t1", path, path)
        assert parcel.size_bytes == len(CONTENT)
        assert parcel.sha256 == ""
        blocks = await read(parcel, 100_000)
        assert b"".join(blocks) == CONTENT
        assert max(map(len, blocks)) == 100_000
        assert parcel.sha256 == hashlib.sha256(CONTENT).hexdigest()
        assert b"".join(await read(parcel)) == CONTENT, "it can be read again"

    run(work)


def test_an_empty_file_has_the_digest_of_nothing(path: Path) -> None:
    path.touch()

    async def work() -> str:
        parcel = Parcel("t1", path, path)
        assert await read(parcel) == []
        return parcel.sha256

    assert run(work) == hashlib.sha256(b"").hexdigest()


def test_a_reader_follows_a_file_that_another_thread_writes(path: Path) -> None:
    async def work() -> None:
        parcel = Parcel("t1", path, path, growing=True)
        assert (parcel.size_bytes, parcel.sha256) == (None, "")

        def write() -> None:
            with path.open("wb", buffering=0) as file:
                for end in range(100_000, len(CONTENT) + 100_000, 100_000):
                    file.write(CONTENT[end - 100_000 : end])
                    parcel.grow(min(end, len(CONTENT)))

        reading = asyncio.ensure_future(read(parcel))
        await asyncio.to_thread(write)
        await asyncio.sleep(0.01)
        assert not reading.done(), "nobody has said that this is all"
        parcel.seal(len(CONTENT), "digest")
        assert b"".join(await reading) == CONTENT
        assert (parcel.size_bytes, parcel.sha256) == (len(CONTENT), "digest")
        await parcel.whole()

    run(work)


def test_bytes_that_were_not_announced_are_not_read(path: Path) -> None:
    path.write_bytes(CONTENT)

    async def work() -> bytes:
        parcel = Parcel("t1", path, path, growing=True)
        parcel.grow(1000)
        blocks = parcel.blocks()
        first = await blocks.__anext__()
        await blocks.aclose()  # type: ignore[attr-defined]  # a generator has it
        return first

    assert run(work) == CONTENT[:1000]


@pytest.mark.parametrize("wait", [read, Parcel.whole])
def test_whoever_waits_for_a_file_that_was_given_up_is_told(
    path: Path, wait: Callable[[Parcel], Awaitable[object]]
) -> None:
    async def work() -> None:
        parcel = Parcel("t1", path, path, growing=True)
        waiting = asyncio.ensure_future(wait(parcel))
        await asyncio.sleep(0)
        parcel.give_up(KeyError("no more"))
        with pytest.raises(KeyError, match="no more"):
            await waiting

    run(work)


def test_whoever_writes_a_file_that_was_given_up_is_stopped(path: Path) -> None:
    async def work() -> None:
        parcel = Parcel("t1", path, path, growing=True)
        parcel.give_up(KeyError("no more"))
        with pytest.raises(RuntimeError, match=r"model\.bin was given up"):
            await asyncio.to_thread(parcel.grow, 10)

    run(work)


def test_a_writer_that_outlives_the_event_loop_is_stopped(path: Path) -> None:
    async def work() -> Parcel:
        return Parcel("t1", path, path, growing=True)

    parcel = run(work)
    with pytest.raises(RuntimeError, match="Event loop is closed"):
        parcel.grow(10)


def test_a_file_that_is_cut_short_while_it_is_read_is_noticed(path: Path) -> None:
    path.write_bytes(CONTENT)

    async def work() -> None:
        parcel = Parcel("t1", path, path)
        path.write_bytes(b"short")
        with pytest.raises(OSError, match=r"model\.bin was cut short while it was read"):
            await read(parcel)

    run(work)
