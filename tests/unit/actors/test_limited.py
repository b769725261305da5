"""Worker processes: what a function may do wrong, and what that costs."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.config import LimitsConfig
from actors.errors import LoadError, SampleError
from actors.limited.workers import Workers

HERE = "tests.unit.actors.misbehaving:factory"


def workers(function: str, count: int = 1, deadline_s: float = 20.0, memory_mb: int = 256) -> Workers:
    limits = LimitsConfig(workers=count, deadline_s=deadline_s, memory_mb=memory_mb)
    return Workers(HERE, [function], limits)


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie that nobody waits for has."""
    try:
        return ") Z" in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


async def test_one_process_takes_call_after_call() -> None:
    async with workers("pid") as pool:
        first = await pool.call()
        assert [await pool.call() for _ in range(3)] == [first] * 3
        assert first != os.getpid()
        assert pool.restarts == 0
    assert gone(first)


async def test_json_goes_there_and_back() -> None:
    async with workers("echo") as pool:
        values = ["a\nb\u2028\x00'\"", None, 1.5, {"k": [1]}]
        assert await pool.call(*values) == values


async def test_async_functions_are_awaited_and_processes_work_side_by_side() -> None:
    async with workers("later", count=2) as pool:
        await asyncio.gather(pool.call(0), pool.call(0))
        began = time.monotonic()
        assert await asyncio.gather(pool.call(0.5), pool.call(0.5)) == ["later"] * 2
        assert time.monotonic() - began < 0.9


@pytest.mark.parametrize(
    ("function", "arguments", "cause", "message"),
    [
        ("hang", [], "deadline", "no answer within 0.7 s"),
        ("spin", [], "deadline", "no answer within 0.7 s"),
        ("later", [30], "deadline", "no answer within 0.7 s"),
        ("flood", [1], "deadline", "no answer within 0.7 s"),
        ("flood", [2], "deadline", "no answer within 0.7 s"),
        ("segfault", [], "died", "its process was ended by SIGSEGV"),
        ("leave", [], "died", "its process ended with status 3"),
        ("garble", [], "died", "its process answered b'garbage"),
        ("forge", [], "died", "its process answered call 7, expected 1"),
        ("swallow", [], "memory", "it takes more than 256 MiB"),
    ],
)
async def test_a_failure_costs_one_call_and_its_process(
    function: str, arguments: list[Any], cause: str, message: str
) -> None:
    async with workers(function, deadline_s=0.7 if cause == "deadline" else 30.0) as pool:
        for number in (1, 2):
            with pytest.raises(SampleError, match=message) as caught:
                await pool.call(*arguments)
            assert (caught.value.cause, pool.restarts) == (cause, number)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("broken", r"raised: ZeroDivisionError: division by zero \(misbehaving.py:\d+\)"),
        ("unwritable", "raised: TypeError: Encoding objects of type object is unsupported"),
    ],
)
async def test_what_a_function_raises_is_told_and_its_process_goes_on(function: str, message: str) -> None:
    async with workers(function) as pool:
        with pytest.raises(SampleError, match=message):
            await pool.call()
        assert pool.restarts == 0


async def test_printing_much_is_no_failure() -> None:
    async with workers("flood_and_answer") as pool:
        assert await pool.call() == "dry"


async def test_a_leak_replaces_the_process_before_it_hits_the_limit() -> None:
    async with workers("leak", memory_mb=512) as pool:
        pids = [await pool.call(60) for _ in range(9)]
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [4, 4, 1]


async def test_a_function_that_forks_gets_its_answer_from_the_original() -> None:
    async with workers("fork_copy") as pool:
        assert [await pool.call(), await pool.call()] == [True, True]


@pytest.mark.parametrize("function", ["leave_children_and_hang", "leave_children_and_crash"])
async def test_children_die_with_the_process(function: str, tmp_path: Path) -> None:
    async with workers(function, deadline_s=2) as pool:
        with pytest.raises(SampleError):
            await pool.call(str(tmp_path))
    children = [int(path.name) for path in tmp_path.iterdir()]
    assert len(children) == 4
    await until(lambda: all(map(gone, children)))


@pytest.mark.parametrize("function", ["leave_children", "leave_orphan"])
async def test_processes_left_behind_by_a_good_call_die_too(function: str, tmp_path: Path) -> None:
    async with workers(function) as pool:
        assert await pool.call(str(tmp_path)) == "left"
        assert pool.restarts == 1
        left = [int(path.name) for path in tmp_path.iterdir()]
        await until(lambda: all(map(gone, left)))


async def test_the_event_loop_never_waits() -> None:
    """Start, hang, deadline, kill and restart of four processes: the loop ticks on."""
    gaps, last = [0.0], time.monotonic()

    async def tick() -> None:
        nonlocal last
        while True:
            await asyncio.sleep(0.005)
            gaps.append(time.monotonic() - last)
            last = time.monotonic()

    ticking = asyncio.create_task(tick())
    async with workers("hang_unless", count=4, deadline_s=2) as pool:
        calls = [pool.call("text" if number % 3 else "") for number in range(12)]
        results = await asyncio.gather(*calls, return_exceptions=True)
    ticking.cancel()
    assert [isinstance(result, SampleError) for result in results] == [n % 3 == 0 for n in range(12)]
    assert max(gaps) < 0.5, sorted(gaps)[-5:]


async def test_a_call_that_is_cancelled_frees_its_place_and_ends_its_process() -> None:
    async with workers("hang_unless") as pool:
        assert await pool.call("a") == "a"
        call = asyncio.create_task(pool.call(""))
        await asyncio.sleep(0.2)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await pool.call("b") == "b"
        assert pool.restarts == 1


async def test_processes_end_when_the_actor_does(tmp_path: Path) -> None:
    """Not even kill -9 of the actor leaves them behind, not even one that is busy."""
    code = (
        "import asyncio\n"
        "from tests.unit.actors.test_limited import workers\n"
        f"asyncio.run(workers('tell_and_hang', deadline_s=60).call(r'{tmp_path}/pid'))\n"
    )
    actor = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    await until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    pid = int((tmp_path / "pid").read_text())
    assert not gone(pid)
    actor.kill()
    assert await actor.wait() == -9
    await until(lambda: gone(pid))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("no colon", "expected `module:name`"),
        ("tests.unit.actors.nowhere:factory", "No module named"),
        ("tests.unit.actors.misbehaving:nothing", "has no attribute 'nothing'"),
        ("tests.unit.actors.misbehaving:LEAK", "is list, expected a function or class"),
        ("tests.unit.actors.misbehaving:leave", "the process that loads it failed: died: .* status 3"),
    ],
)
async def test_what_cannot_be_loaded_is_an_error_of_its_own(factory: str, message: str) -> None:
    arguments = [] if factory.endswith("leave") else ["echo"]
    async with Workers(factory, arguments, LimitsConfig(workers=1)) as pool:
        for _ in range(2):
            with pytest.raises(LoadError, match=message):
                await pool.call()
