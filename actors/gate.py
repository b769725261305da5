"""The gate before an engine: requests pass while it is open; new weights go in while nothing is within."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from actors.errors import EngineError
from weightsync.errors import Untouched

AGAIN_S = 0.05
"""How often those within are asked again to come out: one may have been on its way in at the first time."""


class Gate:
    """Counts the requests under way, and holds new ones back.

    Worked example::

        async with gate.passing():              # a request; waits while the gate is closed
            ...
        async with gate.closed(abort, 60.0):    # `abort` is called until no request is within
            ...                                 # nothing is generated here
    """

    def __init__(self) -> None:
        self.changed: Callable[[], None] = lambda: None
        """Called after every change of `within` and `is_open`."""
        self._open, self._empty = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._empty.set()
        self._within = 0

    @property
    def within(self) -> int:
        """Requests under way."""
        return self._within

    @property
    def is_open(self) -> bool:
        """Whether a request would pass at once."""
        return self._open.is_set()

    @asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        """One request: waits until the gate is open, and is counted until the block ends."""
        await self._open.wait()
        self._within += 1
        self._empty.clear()
        self.changed()
        try:
            yield
        finally:
            self._within -= 1
            if self._within == 0:
                self._empty.set()
            self.changed()

    @asynccontextmanager
    async def closed(
        self, end: Callable[[], Awaitable[None]] | None, timeout_s: float
    ) -> AsyncIterator[None]:
        """Closes the gate, waits until nobody is within, and opens it when the block has ended well.

        It also opens where the weights are known to be the old ones: after `Untouched`, and if somebody does
        not come out. After any other failure within the block nobody knows what would answer.
        `end` is to end the requests within; it is called every `AGAIN_S`. None: they are waited for.
        Raises `EngineError` after `timeout_s`.
        """
        async with self.shut():
            try:
                async with asyncio.timeout(timeout_s):
                    await self._emptied(end)
            except TimeoutError as error:
                self._reopen()
                raise EngineError(
                    f"{self._within} requests did not end within {timeout_s:g} s; "
                    "set engine.pause = 'abort', or raise engine.update_timeout_s above the longest answer"
                ) from error
            yield

    @asynccontextmanager
    async def shut(self) -> AsyncIterator[None]:
        """No request passes within the block, and those within stay there; opens as `closed` does."""
        self._open.clear()
        self.changed()
        try:
            yield
        except Untouched:
            self._reopen()
            raise
        self._reopen()

    def _reopen(self) -> None:
        self._open.set()
        self.changed()

    async def _emptied(self, end: Callable[[], Awaitable[None]] | None) -> None:
        while not self._empty.is_set():
            if end is None:
                await self._empty.wait()
            else:
                await end()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._empty.wait(), AGAIN_S)
