from __future__ import annotations

import array
import gzip
import hashlib
import os
import random
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowmesh_core.artifacts import compression
from flowmesh_core.artifacts import tar as tar_module
from flowmesh_core.artifacts.archive import Packed, PackOptions, pack
from flowmesh_core.artifacts.compression import IsalGzip
from flowmesh_core.artifacts.pigz import PigzOptions
from flowmesh_core.artifacts.tar import BLOCK_BYTES, write_tar
from flowmesh_core.artifacts.unpack import UnpackLimits, unpack
from flowmesh_core.config import load_settings
from flowmesh_core.errors import ArchiveError

NOISE = random.Random(3).randbytes(3 << 20)
NAMES = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12
).filter(lambda name: name not in (".", ".."))
FILES = st.tuples(st.binary(max_size=2000), st.booleans())
TREES = st.recursive(
    st.dictionaries(NAMES, FILES, max_size=4),
    lambda inner: st.dictionaries(NAMES, FILES | inner, max_size=4),
    max_leaves=8,
)

# Packs what a script called `pigz` is asked to, and notes how it was called.
PIGZ = f"""#!{sys.executable}
import gzip, sys
from pathlib import Path
Path(__file__).with_suffix(".args").write_text(" ".join(sys.argv[1:]))
sys.stdout.buffer.write(gzip.compress(sys.stdin.buffer.read(), mtime=0))
"""


def plant(folder: Path, tree: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    for name, value in tree.items():
        if isinstance(value, dict):
            plant(folder / name, value)
            continue
        content, executable = value if isinstance(value, tuple) else (value, False)
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o755 if executable else 0o640)


def content_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = str(path.readlink())
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = path.read_bytes(), bool(path.stat().st_mode & stat.S_IXUSR)
    return found


def packed_bytes(folder: Path, **options: Any) -> bytes:
    archive = folder.with_name("packed.tar.gz")
    pack(folder, archive, options=PackOptions(**options))
    return archive.read_bytes()


def members(archive: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(archive) as tar:
        return tar.getmembers()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "final_model"
    plant(folder, {"model.bin": NOISE, "config.json": b"{}", "tokens": {"a.txt": b"a" * 5000}})
    return folder


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return tmp_path / "final_model.tar.gz"


@settings(max_examples=80, deadline=None)
@given(tree=TREES)
def test_what_is_packed_and_unpacked_is_the_same_folder(tree: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "final_model"
        plant(folder, tree)
        archive = Path(root) / "x.tar.gz"
        packed = pack(folder, archive)
        unpacked = unpack(archive, Path(root) / "out", limits=UnpackLimits())
        assert [path.name for path in unpacked.iterdir()] == ["final_model"]
        assert content_of(unpacked / "final_model") == content_of(folder)
        files = [entry for entry in content_of(folder).values() if isinstance(entry, tuple)]
        assert packed.files == len(files)
        assert packed.content_bytes == sum(len(content) for content, _ in files)


@settings(max_examples=30, deadline=None)
@given(tree=TREES, threads=st.integers(1, 4), level=st.integers(0, 9))
def test_the_same_content_gives_the_same_bytes(
    tree: dict[str, Any], threads: int, level: int
) -> None:
    with tempfile.TemporaryDirectory() as root:
        plant(Path(root) / "a" / "m", tree)
        plant(Path(root) / "b" / "m", dict(reversed(tree.items())))
        for path in (Path(root) / "b").rglob("*"):
            os.utime(path, (1, 1))
        first = packed_bytes(Path(root) / "a" / "m", level=level)
        assert packed_bytes(Path(root) / "b" / "m", level=level, threads=threads) == first


@pytest.mark.parametrize("level", [0, 1, 3, 9])
def test_other_programs_read_the_archive_at_every_level(
    folder: Path, archive: Path, tmp_path: Path, level: int
) -> None:
    pack(folder, archive, options=PackOptions(level=level))
    subprocess.run(["gzip", "-t", archive], check=True)
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-xzf", archive, "-C", tmp_path / "out"], check=True)
    assert content_of(tmp_path / "out" / "final_model") == content_of(folder)


def test_size_and_digest_of_the_archive_are_known_without_reading_it_again(
    folder: Path, archive: Path
) -> None:
    packed = pack(folder, archive)
    content = archive.read_bytes()
    assert packed.size_bytes == len(content)
    assert packed.sha256 == hashlib.sha256(content).hexdigest()


def test_files_whose_digest_is_wanted_are_hashed_on_the_way(folder: Path, archive: Path) -> None:
    packed = pack(folder, archive, hashed={"model.bin", "tokens/a.txt", "absent"})
    assert packed.digests == {
        "model.bin": hashlib.sha256(NOISE).hexdigest(),
        "tokens/a.txt": hashlib.sha256(b"a" * 5000).hexdigest(),
    }


def test_owners_times_and_modes_say_nothing_of_this_machine(folder: Path, archive: Path) -> None:
    (folder / "run.sh").write_bytes(b"x")
    (folder / "run.sh").chmod(0o4770)
    pack(folder, archive)
    found = members(archive)
    assert {(m.uid, m.gid, m.uname, m.gname, m.mtime) for m in found} == {(0, 0, "", "", 0)}
    modes = {member.name: member.mode for member in found}
    assert modes["final_model"] == modes["final_model/run.sh"] == 0o755
    assert modes["final_model/model.bin"] == 0o644
    assert [m.name for m in found] == sorted(m.name for m in found)


@settings(max_examples=300, deadline=None)
@given(
    name=st.text(
        st.characters(max_codepoint=0x7F, exclude_characters="\0"), min_size=1, max_size=110
    ).filter(lambda name: not name.endswith("/"))
    | st.sampled_from(["ü", "\udc80", "a" * 99, "a" * 100, "a" * 101]),
    kind=st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE]),
    size_bytes=st.integers(0, 1 << 35) | st.sampled_from([(1 << 33) - 1, 1 << 33]),
)
def test_a_header_written_by_hand_is_the_librarys(name: str, kind: bytes, size_bytes: int) -> None:
    fields = (name, kind, 0o755, size_bytes, "")
    plain = tar_module._plain_header(*fields)
    assert plain in (b"", tar_module._header(*fields))
    if name.isascii() and len(name) < 100 and size_bytes < 1 << 33:
        assert plain, "the common case is fast"


def test_names_beyond_a_plain_header_are_kept(folder: Path, archive: Path) -> None:
    deep = folder / "/".join(["ordner-mit-langem-namen"] * 12)
    deep.mkdir(parents=True)
    name = "gewicht-ü" * 10 + ".bin"
    (deep / name).write_bytes(b"w")
    pack(folder, archive)
    assert f"final_model/{deep.relative_to(folder)}/{name}" in [m.name for m in members(archive)]


def test_a_file_above_eight_gigabytes_keeps_its_size(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(9 << 30)

    def take_first(block: bytearray) -> None:
        seen.append(bytes(block[:4096]))
        raise KeyError("seen enough")

    seen: list[bytes] = []
    with pytest.raises(KeyError, match="seen enough"):
        write_tar(tmp_path, take_first, top="m")
    # Source: POSIX.1-2001 pax; the old field holds 8 GiB at most.
    assert f" size={9 << 30}\n".encode() in seen[0]


@pytest.mark.parametrize("size_bytes", [0, 1, 511, 512, BLOCK_BYTES - 1024, 3 * BLOCK_BYTES + 7])
def test_a_tar_ends_with_a_whole_record_and_holds_zeros_between_files(
    tmp_path: Path, size_bytes: int
) -> None:
    plant(tmp_path / "m", {"a": b"\xff" * size_bytes, "b": b"\xff"})
    blocks: list[bytes] = []
    write_tar(tmp_path / "m", lambda block: blocks.append(bytes(block)), top="m")
    written = b"".join(blocks)
    # Source: POSIX.1-2001 pax; two blocks of zeros, and records of 20 blocks.
    assert len(written) % tarfile.RECORDSIZE == 0
    assert len(written) - len(written.rstrip(b"\0")) < tarfile.RECORDSIZE + 2 * tarfile.BLOCKSIZE
    assert written.count(b"\xff") == size_bytes + 1
    assert written.endswith(bytes(2 * tarfile.BLOCKSIZE))


# Links and what is no file.


def test_a_link_inside_stays_a_link_wherever_it_is_unpacked(
    folder: Path, archive: Path, tmp_path: Path
) -> None:
    (folder / "latest").symlink_to(folder / "tokens")
    (folder / "tokens" / "weights").symlink_to("../model.bin")
    (folder / "self").symlink_to(".")
    pack(folder, archive)
    out = unpack(archive, tmp_path / "out", limits=UnpackLimits()) / "final_model"
    links = {name: str((out / name).readlink()) for name in ("latest", "tokens/weights", "self")}
    assert links == {"latest": "tokens", "tokens/weights": "../model.bin", "self": "."}
    assert (out / "latest" / "a.txt").read_bytes() == b"a" * 5000


def test_a_folder_that_is_reached_through_a_link_is_packed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(folder)
    (folder / "copy").symlink_to("config.json")
    pack(tmp_path / "alias", tmp_path / "a.tar.gz")
    assert "alias/copy" in [m.name for m in members(tmp_path / "a.tar.gz")]


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("/etc/passwd", "leads out of it"),
        ("../outside", "leads out of it"),
        ("tokens/../../outside", "leads out of it"),
        ("../final_model_2/x", "leads out of it"),
        ("absent", "leads nowhere"),
        ("here", "leads nowhere"),
    ],
)
def test_a_link_that_leads_out_or_nowhere_is_refused(
    folder: Path, archive: Path, target: str, reason: str
) -> None:
    (folder.parent / "outside").write_text("secret")
    plant(folder.parent / "final_model_2", {"x": b"secret"})
    (folder / "here").symlink_to(target)
    with pytest.raises(ArchiveError, match=rf"final_model cannot be packed: 'here' .*{reason}"):
        pack(folder, archive)
    assert not archive.exists()


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_what_is_no_file_is_refused_and_blocks_nobody(
    folder: Path, archive: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    if kind == "pipe":
        os.mkfifo("odd")
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("odd")
    with pytest.raises(ArchiveError, match="'odd' is no file, folder or link; remove it"):
        pack(folder, archive)


def test_a_file_that_shrinks_meanwhile_is_noticed(folder: Path, archive: Path) -> None:
    (folder / "z.bin").write_bytes(NOISE)

    def cut(size_bytes: int) -> None:
        if size_bytes > BLOCK_BYTES:  # by now z.bin is being read
            os.truncate(folder / "z.bin", 10)

    (folder / "z.bin").write_bytes(NOISE * 4)
    with pytest.raises(ArchiveError, match=r"'z\.bin' was cut short by \d+ bytes while"):
        pack(folder, archive, on_growth=cut, options=PackOptions(threads=1))
    assert not archive.exists()


# What does not compress, and what does.


def test_noise_is_stored_and_text_is_squeezed(tmp_path: Path) -> None:
    plant(tmp_path / "m", {"noise": NOISE})
    overhead = len(packed_bytes(tmp_path / "m")) - len(NOISE)
    assert 0 < overhead < 4000
    plant(tmp_path / "t", {"text": b"weights and biases " * 100_000})
    assert len(packed_bytes(tmp_path / "t")) < 20_000


def test_noise_is_not_given_to_the_compressor_beyond_a_few_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given_bytes: list[int] = []
    real = compression._squeeze

    def watched(block: Any, level: int) -> bytes:
        given_bytes.append(len(block))
        return real(block, level)

    monkeypatch.setattr(compression, "_squeeze", watched)
    compression._deflate(bytearray(NOISE[:BLOCK_BYTES]), 1)
    assert sum(given_bytes) < BLOCK_BYTES // 20
    compression._deflate(bytearray(BLOCK_BYTES), 1)
    assert max(given_bytes) == BLOCK_BYTES


def test_text_is_squeezed_harder_than_weights_unless_a_level_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    levels: list[int] = []
    real = compression._squeeze

    def watched(block: Any, level: int) -> bytes:
        if len(block) == BLOCK_BYTES:
            levels.append(level)
        return real(block, level)

    monkeypatch.setattr(compression, "_squeeze", watched)
    pick = random.Random(4)
    text = bytearray(" ".join(str(pick.randrange(99)) for _ in range(BLOCK_BYTES)).encode())
    half_noise = bytearray(b"".join(pick.randbytes(7) + b"0" for _ in range(BLOCK_BYTES // 8)))
    for block in (text[:BLOCK_BYTES], half_noise):
        for level in (None, 1, 2):
            compression._deflate(block, level)
    assert levels == [3, 1, 2, 1, 1, 2]


def test_weights_are_no_larger_than_zlib_makes_them(tmp_path: Path) -> None:
    draw = random.Random(5).gauss
    floats = array.array("f", (draw(0, 0.02) for _ in range(300_000))).tobytes()
    weights = bytearray(600_000)
    weights[0::2], weights[1::2] = floats[2::4], floats[3::4]
    plant(tmp_path / "m", {"w.safetensors": bytes(weights)})
    assert len(packed_bytes(tmp_path / "m")) < len(zlib.compress(bytes(weights), 6))


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.lists(
        st.tuples(st.sampled_from([bytes(70_000), b"ab" * 35_000, NOISE]), st.integers(1, 70_000)),
        max_size=6,
    ),
    level=st.integers(0, 9),
)
def test_every_mix_of_blocks_is_one_gzip_file(blocks: list[tuple[bytes, int]], level: int) -> None:
    plain = [bytearray(content[:size]) for content, size in blocks]
    out: list[bytes] = []
    compressor = IsalGzip(out.append, level=level, threads=2)
    try:
        for block in plain:
            compressor.write(bytearray(block))
        compressor.finish()
    finally:
        compressor.close()
    assert gzip.decompress(b"".join(out)) == b"".join(plain)


# Failures, growth, settings.


def test_readers_are_told_of_what_they_can_read_already(folder: Path, archive: Path) -> None:
    sizes: list[int] = []

    def look(size_bytes: int) -> None:
        assert archive.stat().st_size >= size_bytes
        sizes.append(size_bytes)

    packed = pack(folder, archive, on_growth=look)
    assert sizes == sorted(sizes)
    assert len(sizes) > 4
    assert sizes[-1] == packed.size_bytes


def test_a_failure_leaves_neither_an_archive_nor_a_thread(folder: Path, archive: Path) -> None:
    def fail(size_bytes: int) -> None:
        if size_bytes > BLOCK_BYTES:
            raise KeyError("given up")

    with pytest.raises(KeyError, match="given up"):
        pack(folder, archive, on_growth=fail)
    assert not archive.exists()
    assert not [t for t in threading.enumerate() if t.name.startswith("gzip")]


def test_a_disk_that_is_full_is_an_error_that_may_pass(folder: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    link = folder.parent / "full.tar.gz"
    link.symlink_to("/dev/full")
    with pytest.raises(ArchiveError, match=r"final_model cannot be packed: .*No space") as caught:
        pack(folder, link)
    assert caught.value.retriable


@pytest.mark.parametrize("name", ["absent", "file"])
def test_only_folders_are_packed(tmp_path: Path, archive: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArchiveError, match=rf"{name} must be a folder to be packed"):
        pack(tmp_path / name, archive)


def test_the_operators_variables_decide(tmp_path: Path) -> None:
    def options(**variables: str) -> PackOptions:
        return PackOptions.from_settings(load_settings(variables, results_dir=tmp_path))

    assert options() == PackOptions(level=None, pigz=None)
    assert options(MODEL_ARCHIVE_COMPRESSION_LEVEL="0").level == 0
    asked = options(
        MODEL_ARCHIVE_USE_PIGZ="1",
        MODEL_ARCHIVE_COMPRESSION_LEVEL="6",
        MODEL_ARCHIVE_PIGZ_THREADS="3",
        MODEL_ARCHIVE_PIGZ_BIN="/opt/pigz",
    )
    assert asked.pigz == PigzOptions(program="/opt/pigz", level=6, threads=3)
    assert options(FLOWMESH_FSYNC="1").fsync is True


def test_a_synced_archive_was_written_through_before_it_counts_as_whole(
    folder: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    packed = pack(folder, archive, options=PackOptions(fsync=True))
    assert synced == [packed.size_bytes]


# pigz.


@pytest.fixture
def pigz(tmp_path: Path) -> Path:
    program = tmp_path / "bin" / "pigz"
    program.parent.mkdir()
    program.write_text(PIGZ)
    program.chmod(0o755)
    return program


def pack_with(program: Path, folder: Path, archive: Path, **options: Any) -> Packed:
    asked = PigzOptions(program=str(program), **options)
    return pack(folder, archive, options=PackOptions(pigz=asked))


def test_pigz_packs_when_it_is_asked_for(folder: Path, archive: Path, pigz: Path) -> None:
    packed = pack_with(pigz, folder, archive, level=6, threads=2)
    assert pigz.with_suffix(".args").read_text() == "-n -c -6 -p 2"
    assert packed.sha256 == hashlib.sha256(archive.read_bytes()).hexdigest()
    assert "final_model/model.bin" in [m.name for m in members(archive)]


def test_without_pigz_the_archive_is_packed_all_the_same(
    folder: Path, archive: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    packed = pack_with(tmp_path / "absent", folder, archive)
    assert packed.files == 3
    assert "absent is not installed; packing without it" in caplog.text


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("exit 3", "with exit status 3"),
        ("head -c 100; exit 3", "with exit status 3"),
        ("cat >/dev/null; exit 3", "with exit status 3"),
        ("exit 0", "before it had read everything"),
    ],
)
def test_pigz_that_fails_fails_the_packing(
    folder: Path, archive: Path, pigz: Path, script: str, says: str
) -> None:
    pigz.write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(ArchiveError, match=f"pigz ended {says}"):
        pack_with(pigz, folder, archive)
    assert not archive.exists()


def test_a_reader_that_gives_up_ends_pigz(folder: Path, archive: Path, pigz: Path) -> None:
    def fail(_size_bytes: int) -> None:
        raise KeyError("given up")

    options = PackOptions(pigz=PigzOptions(program=str(pigz)))
    with pytest.raises(KeyError, match="given up"):
        pack(folder, archive, options=options, on_growth=fail)
    assert not archive.exists()


MEASURE = """
import sys
from pathlib import Path
from flowmesh_core.artifacts import compression
from flowmesh_core.artifacts import tar as tar_module
from flowmesh_core.artifacts.archive import pack

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

small, large = map(Path, sys.argv[1:])
pack(small, small.with_suffix(".tar.gz"))
before = peak()
pack(large, large.with_suffix(".tar.gz"))
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_folder(tmp_path: Path) -> None:
    plant(tmp_path / "small", {"a": NOISE[:100]})
    plant(tmp_path / "large", {})
    with (tmp_path / "large" / "weights").open("wb") as file:
        for _ in range(85):
            file.write(NOISE)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "small", tmp_path / "large"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40 << 10, "peak memory grew by that many KiB over 255 MiB"
