"""A TCP proxy before Redis that loses replies, delays, swallows everything, or cuts.

with Proxy(server_port, seed=1) as proxy:
    proxy.lose = 0.01           # of the replies; the server has done the work, the client does not know
    proxy.mode = "black hole"   # connections stay, nothing arrives; "cut": they are refused; "pass"
"""

from __future__ import annotations

import asyncio
import random
import threading
from contextlib import suppress
from typing import Self

_CHUNK = 1 << 20


class Proxy:
    """Listens on `port` of the loopback, in a thread of its own. Attributes may change at any time."""

    def __init__(self, server_port: int, *, seed: int = 0) -> None:
        self.lose, self.delay_s, self.mode = 0.0, 0.0, "pass"
        self.lost = 0
        """Replies lost so far."""
        self.port = 0
        self._server_port, self._random = server_port, random.Random(seed)
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._ready, self._thread = threading.Event(), threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def cut(self) -> None:
        """Closes every connection and refuses new ones, until `mode` is another."""
        self.mode = "cut"
        self._loop.call_soon_threadsafe(self._close_all)

    def close(self) -> None:
        """Ends the proxy."""
        self.mode = "cut"
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        self._close_all()
        # A handler that is cancelled would be reported; without its connections each ends by itself.
        self._loop.run_until_complete(asyncio.gather(*asyncio.all_tasks(self._loop), return_exceptions=True))
        self._loop.close()

    def _close_all(self) -> None:
        for writer in self._open:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.mode == "cut":
            writer.transport.abort()
            return
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, server_writer}
        self._open |= both
        with suppress(OSError):
            await asyncio.gather(
                self._pump(reader, server_writer, replies=False),
                self._pump(server_reader, writer, replies=True),
            )
        self._open -= both
        for one in both:
            one.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, replies: bool
    ) -> None:
        while data := await reader.read(_CHUNK):
            while self.mode == "black hole":
                await asyncio.sleep(0.05)
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            if replies and self.lose and self._random.random() < self.lose:
                self.lost += 1
                break
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError  # one side is done, so is the other
