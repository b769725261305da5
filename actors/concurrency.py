"""How many groups are in flight: a number, or one that follows the engine's load.

As congestion control in TCP and in prime-rl: one more while the engine has room, a share of them fewer
when requests wait in its queue or its key-value cache is nearly full.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import msgspec

from actors.config import AdaptiveConfig
from actors.errors import EngineError

log = logging.getLogger("actor")


class Load(msgspec.Struct, frozen=True):
    """What an engine says of itself."""

    running: int
    """Samples that are being generated."""
    waiting: int
    """Samples that wait in its queue."""
    usage: float
    """Share of the key-value cache, or of the pool of recurrent states, that is taken; 0 to 1."""


class Slots:
    """Places for groups in flight. `limit` may change; those above a lower one are not taken away.

    Lifecycle of a place: `acquire`, which waits for one, then `release`.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._taken, self._freed = limit, 0, asyncio.Event()
        self._short = False

    @property
    def limit(self) -> int:
        """Places there are."""
        return self._limit

    @limit.setter
    def limit(self, value: int) -> None:
        self._limit = value
        self._freed.set()

    @property
    def taken(self) -> int:
        """Places that are taken, at times more than `limit`."""
        return self._taken

    async def acquire(self) -> None:
        """Takes a place, once there is one."""
        while self._taken >= self._limit:
            self._short = True
            self._freed.clear()
            await self._freed.wait()
        self._taken += 1

    def release(self) -> None:
        """Gives a place back."""
        self._taken -= 1
        self._freed.set()

    def was_short(self) -> bool:
        """Whether anybody had to wait for a place since this was asked last."""
        short, self._short = self._short or self._taken >= self._limit, False
        return short


def next_limit(limit: int, load: Load, config: AdaptiveConfig, *, short: bool, group_size: int) -> int:
    """The limit that follows from a load.

    More requests waiting than a group has are an overload; fewer are a group that has just come. Without
    an overload the limit grows only if it was what held groups back (`short`).

    >>> config = AdaptiveConfig(least=2, most=9)
    >>> next_limit(8, Load(64, 0, 0.5), config, short=True, group_size=16)
    9
    >>> next_limit(8, Load(64, 17, 0.5), config, short=True, group_size=16)
    6
    """
    if load.waiting > group_size or load.usage > config.usage_max:
        return max(config.least, int(limit * config.factor))
    return min(config.most, limit + config.add) if short else limit


async def adapt(
    slots: Slots, load: Callable[[], Awaitable[Load]], config: AdaptiveConfig, group_size: int
) -> None:
    """Keeps the limit of `slots` at what the engine bears, until cancelled.

    An engine that does not say its load leaves the limit as it is: if it has failed, its requests tell.
    """
    while True:
        await asyncio.sleep(config.every_s)
        try:
            found = await load()
        except EngineError as error:
            log.warning("the limit of groups in flight stays at %d: %s", slots.limit, error)
            continue
        limit = next_limit(slots.limit, found, config, short=slots.was_short(), group_size=group_size)
        if limit != slots.limit:
            log.info(
                "groups in flight: at most %d, was %d; engine: %d running, %d waiting, %.0f %% of its cache",
                limit,
                slots.limit,
                found.running,
                found.waiting,
                100 * found.usage,
            )
            slots.limit = limit
