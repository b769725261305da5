"""The gate before an engine: nothing is within while it is closed, and it opens to known weights only."""

from __future__ import annotations

import asyncio

import pytest

from actors.errors import EngineError
from actors.gate import Gate
from weightsync.errors import Untouched


async def pass_until(gate: Gate, done: asyncio.Event, seen: list[str], name: str) -> None:
    async with gate.passing():
        seen.append(f"{name} in")
        await done.wait()
    seen.append(f"{name} out")


async def test_requests_are_ended_and_new_ones_wait() -> None:
    gate, done, seen = Gate(), asyncio.Event(), []
    running = [asyncio.create_task(pass_until(gate, done, seen, name)) for name in "ab"]
    await asyncio.sleep(0)
    assert (gate.within, gate.is_open) == (2, True)

    async def end() -> None:
        seen.append("end")
        if seen.count("end") == 2:  # the first time one was on its way in
            done.set()

    async with gate.closed(end, 5.0):
        assert (gate.within, gate.is_open) == (0, False)
        late = asyncio.create_task(pass_until(gate, done, seen, "c"))
        await asyncio.sleep(0.01)
        seen.append("updated")
    await asyncio.gather(*running, late)
    assert seen == ["a in", "b in", "end", "end", "a out", "b out", "updated", "c in", "c out"]


async def test_without_an_end_they_are_waited_for() -> None:
    gate, done, seen = Gate(), asyncio.Event(), []
    running = asyncio.create_task(pass_until(gate, done, seen, "a"))
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_later(0.05, done.set)
    async with gate.closed(None, 5.0):
        seen.append("updated")
    await running
    assert seen == ["a in", "a out", "updated"]


async def test_within_a_shut_gate_everybody_stays() -> None:
    gate, done, seen = Gate(), asyncio.Event(), []
    running = asyncio.create_task(pass_until(gate, done, seen, "a"))
    await asyncio.sleep(0)
    async with gate.shut():
        late = asyncio.create_task(pass_until(gate, done, seen, "b"))
        await asyncio.sleep(0.01)
        assert (seen, gate.within, gate.is_open) == (["a in"], 1, False)
    done.set()
    await asyncio.gather(running, late)
    assert sorted(seen) == ["a in", "a out", "b in", "b out"]


@pytest.mark.parametrize(("failure", "opens"), [(Untouched("refused"), True), (EngineError("half"), False)])
async def test_a_shut_gate_opens_to_known_weights_only(failure: Exception, opens: bool) -> None:
    gate = Gate()

    async def update() -> None:
        async with gate.shut():
            raise failure

    with pytest.raises(type(failure)):
        await update()
    assert gate.is_open == opens


async def test_one_that_does_not_come_out_is_named_and_the_gate_opens_again() -> None:
    gate, done = Gate(), asyncio.Event()
    running = asyncio.create_task(pass_until(gate, done, [], "a"))
    await asyncio.sleep(0)
    with pytest.raises(EngineError, match=r"1 requests did not end within 0\.05 s"):
        async with gate.closed(None, 0.05):
            pytest.fail("somebody is within")
    assert gate.is_open
    done.set()
    await running


@pytest.mark.parametrize(("failure", "opens"), [(Untouched, True), (EngineError, False), (ValueError, False)])
async def test_after_a_failure_it_opens_only_if_nothing_was_touched(
    failure: type[Exception], opens: bool
) -> None:
    gate = Gate()
    with pytest.raises(failure, match="no"):
        async with gate.closed(None, 1.0):
            raise failure("no")
    assert gate.is_open == opens
