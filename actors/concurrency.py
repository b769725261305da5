"""How many groups are generated at a time: a number, or one that follows the engine's load.

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
    """Places for groups in flight: `limit` for those being generated, as many again for groups that are
    generated and being scored or handed in, so that the engine goes on meanwhile, and one for a lease in
    advance, so that it goes on at once.

    `limit` may change; places above a lower one are not taken away. Lifecycle of a place: `acquire`, which
    waits for one, `Place.begin`, which waits for the engine, `Place.generated`, `Place.release`.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._freed = limit, asyncio.Event()
        self._short = False
        self.ahead = 0
        """Groups that have not begun."""
        self.taken = 0
        """Groups being generated, at times more than `limit`."""
        self.behind = 0
        """Groups that are generated and not released."""

    @property
    def limit(self) -> int:
        """Groups that may be generated at the same time."""
        return self._limit

    @limit.setter
    def limit(self, value: int) -> None:
        self._limit = value
        self._freed.set()

    @property
    def full(self) -> bool:
        """Whether one more group would have to wait for the engine."""
        return self.ahead + self.taken >= self._limit

    async def acquire(self, *, advance: bool = False) -> Place:
        """Takes a place, once there is one; with `advance` one group may have to wait for the engine."""
        while (
            self.ahead + self.taken >= self._limit + advance
            or self.ahead + self.taken + self.behind >= 2 * self._limit + advance
        ):
            self._short = self._short or self.taken >= self._limit
            await self._change()
        self.ahead += 1
        return Place(self)

    async def room(self) -> None:
        """Waits until a group that has a place may begin."""
        while self.taken >= self._limit:
            await self._change()

    def moved(self, *, ahead: int = 0, taken: int = 0, behind: int = 0) -> None:
        """Changes the counts; `Place` calls it."""
        self.ahead += ahead
        self.taken += taken
        self.behind += behind
        self._freed.set()

    def was_short(self) -> bool:
        """Whether anybody had to wait for the engine since this was asked last."""
        short, self._short = self._short or self.taken >= self._limit, False
        return short

    async def _change(self) -> None:
        self._freed.clear()
        await self._freed.wait()


class Place:
    """One group's place. Made by `Slots.acquire`."""

    def __init__(self, slots: Slots) -> None:
        self._slots, self._among = slots, "ahead"

    async def begin(self) -> None:
        """Waits until the group may be generated."""
        await self._slots.room()
        self._go("taken")

    def generated(self) -> None:
        """The engine has no more to do for the group: another one may be generated."""
        if self._among == "taken":
            self._go("behind")

    def release(self) -> None:
        """Gives the place back, wherever the group is. Once, and the last call."""
        self._slots.moved(**{self._among: -1})

    def _go(self, to: str) -> None:
        self._slots.moved(**{self._among: -1, to: 1})
        self._among = to


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
