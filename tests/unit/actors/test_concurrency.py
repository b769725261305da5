"""Groups in flight: a number that follows a scripted engine's load, and places that follow the number."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from actors.concurrency import Load, Place, Slots, adapt, next_limit
from actors.config import AdaptiveConfig, RolloutConfig
from actors.errors import EngineError

CONFIG = AdaptiveConfig(least=2, most=20, every_s=0.001, usage_max=0.8, add=2, factor=0.5)
IDLE, BUSY, FULL = Load(64, 8, 0.5), Load(64, 17, 0.5), Load(64, 0, 0.81)


@pytest.mark.parametrize(
    ("limit", "load", "short", "then"),
    [
        (10, IDLE, True, 12),
        (19, IDLE, True, 20),
        (20, IDLE, True, 20),
        (10, IDLE, False, 10),
        (10, BUSY, True, 5),
        (10, FULL, False, 5),
        (3, BUSY, True, 2),
        (2, BUSY, True, 2),
    ],
)
def test_it_grows_by_steps_and_shrinks_by_shares(limit: int, load: Load, short: bool, then: int) -> None:
    assert next_limit(limit, load, CONFIG, short=short, group_size=16) == then


def test_an_overload_always_takes_at_least_one_place() -> None:
    config = msgspec.structs.replace(CONFIG, factor=0.99)
    assert next_limit(5, BUSY, config, short=True, group_size=16) == 4


async def begun(slots: Slots) -> Place:
    """A place for a group that is being generated."""
    place = await slots.acquire()
    await place.begin()
    return place


async def test_places_follow_the_engine() -> None:
    """An engine that bears 7 groups of 16: the number climbs to it, is halved above it, climbs again."""
    slots, limits, places = Slots(2), list[int](), list[Place]()

    async def load() -> Load:
        limits.append(slots.limit)
        while slots.taken < slots.limit:  # there are leases for every place, and for more
            places.append(await begun(slots))
        while slots.taken > slots.limit:
            places.pop().release()
        waiting = max(0, 16 * (slots.taken - 7))
        return Load(16 * slots.taken - waiting, waiting, 0.1)

    config = msgspec.structs.replace(CONFIG, add=1)
    task = asyncio.create_task(adapt(slots, load, config, 16))
    while len(limits) < 17:
        await asyncio.sleep(0.001)
    task.cancel()
    assert limits[:15] == [2, 3, 4, 5, 6, 7, 8, 9, 4, 5, 6, 7, 8, 9, 4]


async def test_a_place_is_waited_for_and_a_lower_limit_takes_none_away() -> None:
    slots = Slots(2)
    first = await begun(slots)
    assert not slots.was_short()
    await begun(slots)
    waiting = asyncio.create_task(begun(slots))
    await asyncio.sleep(0)
    assert (slots.taken, waiting.done(), slots.was_short()) == (2, False, True)
    slots.limit = 1
    await asyncio.sleep(0)
    first.release()
    await asyncio.sleep(0)
    assert (slots.taken, waiting.done()) == (1, False)
    slots.limit = 3
    await asyncio.wait_for(waiting, 1)
    assert slots.taken == 2


async def test_a_generated_group_leaves_its_place_to_as_many_others_as_there_are_places() -> None:
    """What is slow then is the reward, so the engine's load does not count as what held groups back."""
    slots = Slots(1)
    first = await begun(slots)
    first.generated()
    first.generated()
    assert (slots.taken, slots.behind) == (0, 1)
    second = await asyncio.wait_for(begun(slots), 1)
    second.generated()
    assert not slots.was_short()
    waiting = asyncio.create_task(begun(slots))
    await asyncio.sleep(0)
    assert (slots.taken, slots.behind, waiting.done(), slots.was_short()) == (0, 2, False, False)
    first.release()
    third = await asyncio.wait_for(waiting, 1)
    assert (slots.taken, slots.behind) == (1, 1)
    second.release()
    third.release()
    assert (slots.taken, slots.behind) == (0, 0)


async def test_one_group_in_advance_begins_when_another_is_generated() -> None:
    """It is over the limit of what is generated, not of what is scored; no second one is ahead of it."""
    slots = Slots(1)
    first = await begun(slots)
    assert slots.full
    second = await asyncio.wait_for(slots.acquire(advance=True), 1)
    beginning = asyncio.create_task(second.begin())
    third = asyncio.create_task(slots.acquire(advance=True))
    await asyncio.sleep(0)
    assert (slots.ahead, slots.taken, beginning.done(), third.done()) == (1, 1, False, False)
    first.generated()
    await asyncio.wait_for(beginning, 1)
    third_place = await asyncio.wait_for(third, 1)
    assert (slots.ahead, slots.taken, slots.behind) == (1, 1, 1)
    second.generated()
    fourth = asyncio.create_task(slots.acquire(advance=True))
    await asyncio.sleep(0)
    assert (slots.full, slots.taken, fourth.done()) == (True, 0, False), "two behind, one ahead are all"
    first.release()
    await asyncio.wait_for(fourth, 1)
    third_place.release()
    second.release()
    fourth.result().release()
    assert (slots.ahead, slots.taken, slots.behind, slots.full) == (0, 0, 0, False)


async def test_an_engine_that_does_not_say_its_load_changes_nothing() -> None:
    slots, asked = Slots(2), []

    async def load() -> Load:
        asked.append(slots.limit)
        if len(asked) < 3:
            raise EngineError("no answer")
        return BUSY

    slots.limit = 8
    task = asyncio.create_task(adapt(slots, load, CONFIG, 16))
    while len(asked) < 4:
        await asyncio.sleep(0.001)
    task.cancel()
    assert asked == [8, 8, 8, 4]


@pytest.mark.parametrize("concurrency", [1, 21])
def test_it_begins_within_its_bounds(concurrency: int) -> None:
    with pytest.raises(msgspec.ValidationError, match=f"concurrency: got {concurrency}, expected 2 to 20"):
        msgspec.convert({"concurrency": concurrency, "adaptive": {"least": 2, "most": 20}}, RolloutConfig)
