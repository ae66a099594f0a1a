"""gzip through the external program pigz, for operators who ask for it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import IO, cast

import attrs

from flowmesh_core.artifacts.tar import BLOCK_BYTES
from flowmesh_core.errors import ArchiveError

__all__ = ["PigzGzip", "PigzOptions"]


@attrs.frozen(kw_only=True)
class PigzOptions:
    """How to call it.

    Attributes:
        program: Name on the path, or a path.
        level: 0 to 9; None leaves it to pigz, whose own is 6.
        threads: None leaves it to pigz, which takes every core.
    """

    program: str = "pigz"
    level: int | None = None
    threads: int | None = None

    @property
    def is_there(self) -> bool:
        """Whether the program can be run here."""
        return shutil.which(self.program) is not None

    def command(self) -> list[str]:
        """Return the command line; no name and no time, so that the bytes stay the same."""
        level = [] if self.level is None else [f"-{self.level}"]
        threads = [] if self.threads is None else ["-p", str(self.threads)]
        return [self.program, "-n", "-c", *level, *threads]


class PigzGzip:
    """gzip with pigz in a process of its own.

    Args:
        sink: Gets the pieces in order, on a thread of ours.
        options: How to call it.

    Raises:
        OSError: It cannot be started.
    """

    def __init__(self, sink: Callable[[bytes], None], options: PigzOptions) -> None:
        self._sink = sink
        self._process = subprocess.Popen(  # noqa: S603 - the operator's own program
            options.command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self._stdin = cast("IO[bytes]", self._process.stdin)
        self._stdout = cast("IO[bytes]", self._process.stdout)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pigz")
        self._reading = self._pool.submit(self._read)

    def _read(self) -> None:
        try:
            while piece := self._stdout.read(BLOCK_BYTES):
                self._sink(piece)
        except BaseException:
            self._process.kill()  # or it would wait for a reader, and its feeder for it
            raise

    def write(self, block: bytearray) -> None:
        """Feed a block; waits while pigz is busy."""
        view = memoryview(block)
        try:
            while view:
                view = view[self._stdin.write(view) :]
        except BrokenPipeError:
            self._conclude()
            raise ArchiveError("pigz ended before it had read everything") from None

    def finish(self) -> None:
        """Wait for the end."""
        self._stdin.close()
        self._conclude()

    def _conclude(self) -> None:
        """Raise what went wrong: with our reader first, since that ends the process too."""
        self._reading.result()
        if self._process.wait():
            raise ArchiveError(f"pigz ended with exit status {self._process.returncode}")

    def close(self) -> None:
        """End the process and free its pipes."""
        self._process.kill()
        self._process.wait()
        self._pool.shutdown()
        self._stdin.close()
        self._stdout.close()
