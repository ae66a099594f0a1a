"""A road to a server that a test can cut: whoever goes straight to the server notices nothing."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
HOST = "127.0.0.1"


class Relay:
    """Carries connections to ``port`` on to a server's port, on a thread of its own.

    While it is cut it hangs up on whoever connects, rather than stop listening: a free port could
    be handed to the very client that connects to it, as its own end.
    """

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._is_cut = False
        self._roads: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relay", daemon=True)
        self._thread.start()
        self._listener = self._do(asyncio.start_server(self._carry, HOST, 0))
        self.port: int = self._listener.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Reset all connections, and each new one until ``restore``."""
        self._do(self._hang_up())

    def restore(self) -> None:
        """Carry new connections again."""
        self._is_cut = False

    def close(self) -> None:
        """Cut it, free the port and end the thread."""
        self._loop.call_soon_threadsafe(self._listener.close)
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _hang_up(self) -> None:
        self._is_cut = True
        roads = list(self._roads)
        for road in roads:
            road.cancel()
        await asyncio.gather(*roads)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.ExitStack() as ending, contextlib.suppress(asyncio.CancelledError, OSError):
            ending.callback(writer.transport.abort)
            if self._is_cut:
                return
            if road := asyncio.current_task():
                self._roads.add(road)
                ending.callback(self._roads.discard, road)
            far_reader, far_writer = await asyncio.open_connection(HOST, self._server_port)
            ending.callback(far_writer.transport.abort)
            await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()
