"""A task's logs: on disk byte for byte, to subscribers without gaps, secrets in neither."""

from __future__ import annotations

import logging
import re
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowmesh_core.events import LOG_CHUNK_BYTES
from flowmesh_core.masking import SecretMask
from flowmesh_core.task_log import OpenFolder, TaskLog

Said = list[tuple[str, int, bytes]]
NO_SECRETS = SecretMask({})
# Two that overlap, one inside the other, and one that is no ASCII.
SECRETS = SecretMask({"SHORT": "abc", "LONG": "abc-def", "TAIL": "c-x", "WIDE": "gehéim"})


def attempt(tmp_path: Path) -> Path:
    folder = tmp_path / ".t1.attempt-1"
    (folder / "logs").mkdir(parents=True)
    return folder


def open_log(
    folder: Path, said: Said, *, mask: SecretMask = NO_SECRETS, max_bytes: int = 1 << 20
) -> TaskLog:
    def publish(stream: str, offset: int, data: bytes) -> None:
        said.append((stream, offset, data))

    return TaskLog(folder, mask=lambda: mask, publish=publish, max_bytes=max_bytes)


def content(folder: Path, stream: str = "stdout") -> bytes:
    return (folder / "logs" / f"{stream}.log").read_bytes()


def joined(said: Said, stream: str = "stdout", start: int = 0) -> bytes:
    """Return what a subscriber has, and check that each piece begins where the last one ended."""
    data = b""
    for name, offset, piece in said:
        if name == stream:
            assert offset == start + len(data)
            assert 0 < len(piece) <= LOG_CHUNK_BYTES
            data += piece
    return data


def test_what_is_written_is_in_its_file_and_published_at_once(tmp_path: Path) -> None:
    folder, said = attempt(tmp_path), Said()
    log = open_log(folder, said)
    log.write("stdout", b"one\n")
    log.write("stderr", b"\xff\x00oops")
    log.write("stdout", b"two")
    assert content(folder) == b"one\ntwo"
    assert content(folder, "stderr") == b"\xff\x00oops"
    assert said == [("stdout", 0, b"one\n"), ("stderr", 0, b"\xff\x00oops"), ("stdout", 4, b"two")]
    log.close()
    assert sorted(path.name for path in (folder / "logs").iterdir()) == ["stderr.log", "stdout.log"]


def test_a_line_has_time_and_level_and_no_secret(tmp_path: Path) -> None:
    folder, said = attempt(tmp_path), Said()
    log = open_log(folder, said, mask=SECRETS)
    log.line("warning", "token abc-def \udc80")
    log.close()
    text = content(folder, "task").decode()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00 WARNING token \$\{env\.LONG\} \\udc80\n", text
    )
    assert joined(said, "task").decode() == text


def test_an_earlier_file_is_continued_where_it_ends(tmp_path: Path) -> None:
    folder, said = attempt(tmp_path), Said()
    (folder / "logs" / "stdout.log").write_bytes(b"before ")
    log = open_log(folder, said)
    log.write("stdout", b"after")
    log.close()
    assert content(folder) == b"before after"
    assert said == [("stdout", 7, b"after")]


def test_a_stream_that_is_no_file_of_ours_is_refused(tmp_path: Path) -> None:
    folder = attempt(tmp_path)
    log = open_log(folder, Said())
    with pytest.raises(ValueError, match=r"stream must be stdout or stderr, got '\.\./up'"):
        log.write("../up", b"x")
    log.close()


# Secrets.

quick = settings(max_examples=300, deadline=None, database=None)


@quick
@given(
    pieces=st.lists(
        st.sampled_from(["abc", "-def", "-x", "gehéim", "é", "a", "b", "c", "\n"]), max_size=12
    ),
    cuts=st.lists(st.integers(0, 60), max_size=8),
)
def test_however_it_is_cut_the_same_text_is_written_without_secrets(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[str], cuts: list[int]
) -> None:
    whole = "".join(pieces).encode()
    folder, said = attempt(tmp_path_factory.mktemp("cut")), Said()
    log = open_log(folder, said, mask=SECRETS)
    edges = [0, *sorted(cuts), len(whole)]
    for start, end in pairwise(edges):
        log.write("stdout", whole[start:end])
    log.close()
    expected = SECRETS.text(whole.decode())
    assert (content(folder).decode() if whole else "") == expected
    assert joined(said).decode() == expected
    assert all(piece.decode() for _, _, piece in said)


def test_a_secret_in_two_pieces_is_seen_by_nobody_in_between(tmp_path: Path) -> None:
    folder, said = attempt(tmp_path), Said()
    log = open_log(folder, said, mask=SecretMask({"TOKEN": "hf_0123456789"}))
    log.write("stdout", b"token: hf_01234")
    assert content(folder) == joined(said) == b"token: "
    log.write("stdout", b"56789, and more\n")
    assert content(folder) == joined(said) == b"token: ${env.TOKEN}, and more\n"
    log.close()


def test_what_looked_like_a_secret_comes_with_the_close(tmp_path: Path) -> None:
    folder, said = attempt(tmp_path), Said()
    log = open_log(folder, said, mask=SECRETS)
    log.write("stdout", b"done: abc")
    assert content(folder) == b"done: "
    log.close()
    assert content(folder) == joined(said) == b"done: ${env.SHORT}"


def test_a_secret_that_is_known_only_later_is_masked_from_then_on(tmp_path: Path) -> None:
    folder = attempt(tmp_path)
    known = NO_SECRETS
    log = TaskLog(folder, mask=lambda: known, publish=lambda *_: None, max_bytes=1 << 20)
    log.line("info", "before")
    known = SECRETS
    log.write("stdout", b"abc ")
    log.close()
    assert content(folder) == b"${env.SHORT} "


# Characters.


def test_a_character_in_two_pieces_reaches_subscribers_whole(tmp_path: Path) -> None:
    folder, said = attempt(tmp_path), Said()
    log = open_log(folder, said)
    for byte in "a€😀".encode():
        log.write("stdout", bytes([byte]))
    assert [piece.decode() for _, _, piece in said] == ["a", "€", "😀"]
    log.write("stdout", b"\xe2\x82")
    assert len(said) == 3
    assert content(folder) == "a€😀".encode() + b"\xe2\x82", "the file waits for nothing"
    log.close()
    assert said[3] == ("stdout", 8, b"\xe2\x82")


def test_a_large_piece_is_published_in_parts_between_characters(tmp_path: Path) -> None:
    folder, said = attempt(tmp_path), Said()
    log = open_log(folder, said)
    data = ("x" + "€" * 60_000).encode()
    log.write("stdout", data)
    log.close()
    assert content(folder) == joined(said) == data
    assert len(said) == 3
    assert all(piece.decode() for _, _, piece in said)


# Size, disk, threads, folders.


@pytest.mark.parametrize("piece", [b"0123456789abcde\n", b"x" * 3000])
def test_a_file_ends_at_its_size_with_a_line_that_says_so(tmp_path: Path, piece: bytes) -> None:
    folder, said = attempt(tmp_path), Said()
    log = open_log(folder, said, max_bytes=1024)
    for _ in range(100):
        log.write("stdout", piece)
    log.write("stderr", b"the job goes on\n")
    written = content(folder)
    assert len(written) == 1024
    last = written.splitlines()[-1].decode()
    assert last.startswith("[flowmesh] the log ends here, at FLOWMESH_TASK_LOG_MAX_BYTES")
    kept = written.index(b"\n[flowmesh]")
    assert written[:kept] == (piece * 100)[:kept]
    assert log.dropped == 100 * len(piece) - kept
    assert joined(said) == written
    assert content(folder, "stderr") == b"the job goes on\n"
    log.close()


@contextmanager
def disk_of(size_bytes: int) -> Iterator[None]:
    """Let no file of this process grow further than that; the system refuses as a disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_loses_logs_with_one_warning_and_raises_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, said = attempt(tmp_path), Said()
    log = open_log(folder, said)
    with disk_of(1000):
        for _ in range(10):
            log.write("stdout", b"x" * 300)
            log.write("stderr", b"y" * 300)
    assert content(folder) == joined(said) == b"x" * 1000
    assert log.dropped == 4000
    log.write("stdout", b"there is room again")
    assert content(folder)[1000:] == joined(said)[1000:] == b"there is room again"
    log.close()
    (warning,) = [entry for entry in caplog.records if entry.levelno >= logging.WARNING]
    assert "cannot be written, what follows may be lost" in warning.getMessage()


def link_out(logs: Path) -> None:
    (logs / "stdout.log").symlink_to(logs.parent.parent / "outside")


@pytest.mark.parametrize("spoil", [Path.rmdir, link_out])
def test_a_folder_that_was_spoilt_raises_nothing(
    tmp_path: Path, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    folder = attempt(tmp_path)
    spoil(folder / "logs")
    log = open_log(folder, said := Said())
    log.write("stdout", b"lost")
    log.write("stdout", b"lost")
    log.close()
    assert said == []
    assert log.dropped == 8
    assert not (tmp_path / "outside").exists()
    assert [entry.levelname for entry in caplog.records] == ["WARNING"]


def test_lines_of_many_threads_stay_whole(tmp_path: Path) -> None:
    folder, said = attempt(tmp_path), Said()
    log = open_log(folder, said)

    def work(name: str) -> None:
        for number in range(200):
            log.line("info", f"{name}-{number}-{name * 50}")
            log.write("stdout", f"{name * 50}\n".encode())

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcdef"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    lines = [line.split(" INFO ")[1] for line in content(folder, "task").decode().splitlines()]
    wanted = [f"{name}-{number}-{name * 50}" for name in "abcdef" for number in range(200)]
    assert sorted(lines) == sorted(wanted)
    printed = content(folder).decode().splitlines()
    assert sorted(printed) == sorted(name * 50 for name in "abcdef" for _ in range(200))
    assert joined(said) == content(folder)
    assert joined(said, "task") == content(folder, "task")


def test_a_folder_may_be_renamed_before_a_file_is_begun(tmp_path: Path) -> None:
    folder = attempt(tmp_path)
    log = open_log(folder, Said())
    log.write("stdout", b"starting\n")
    final = folder.rename(tmp_path / "t1")
    log.write("stdout", b"serving\n")
    log.write("stderr", b"first warning\n")
    log.close()
    assert content(final) == b"starting\nserving\n"
    assert content(final, "stderr") == b"first warning\n"
    assert not folder.exists()


def open_files() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


def test_after_the_close_nothing_is_written_and_no_file_stays_open(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, said = attempt(tmp_path), Said()
    before = open_files()
    log = open_log(folder, said)
    log.write("stdout", b"in time")
    log.line("info", "in time")
    assert open_files() == before + 3
    log.close()
    log.close()
    log.write("stdout", b"late")
    log.write("stderr", b"late")
    log.line("info", "late")
    assert open_files() == before
    assert content(folder) == b"in time"
    assert not (folder / "logs" / "stderr.log").exists()
    assert len(said) == 2
    assert caplog.records == []


def test_an_open_folder_gives_its_files_back_once(tmp_path: Path) -> None:
    folder = OpenFolder(tmp_path)
    assert folder.append("a", b"12") == 2
    assert folder.size("a") == 2
    assert folder.size("b") == 0
    folder.close()
    folder.close()
    assert folder.append("a", b"3") == 0
    assert (tmp_path / "a").read_bytes() == b"12"
