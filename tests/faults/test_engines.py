"""Rows 21 and 22: reward functions that hang, crash and flood, and engines that die or answer nonsense.

A real actor, with real processes for its rewards, on a scripted engine and a real Redis.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from actors import engine
from actors.config import AdaptiveConfig, EngineConfig, LimitsConfig, RolloutConfig
from actors.fetch import Settings
from actors.rollout import request_seed
from actors.worker import run_actor
from buffer.client import Stream
from buffer.codec import decode
from buffer.config import StreamConfig
from buffer.ledger import Ledger, violations
from buffer.local_server import LocalServer
from buffer.schema import Group
from launch.tiny_model import make_tiny_qwen3
from tests.contract.harness import Run, digest
from tests.faults.engine_server import token
from weightsync.manifest import Manifest
from weightsync.protocol import Receive, encode_request

SEED = 3
SIZE = 6
GROUPS = 2
HANG, CRASH, FLOOD = (chr(33 + token(seed)) for seed in range(3))
"""Answers that a reward function cannot bear; ids below 94 are the characters from `!` on."""


def obey(text: str, answer: str) -> float:
    """Does what the answer says."""
    if text == HANG:
        time.sleep(600)
    if text == CRASH:
        ctypes.string_at(0)
    while text == FLOOD:
        print("x" * 65536)
    return 1.0


class Trial:
    """A run that a test plays the learner of, with one real actor."""

    def __init__(
        self,
        stream: Stream,
        folder: Path,
        lives: str,
        groups: int = GROUPS,
        request_timeout_s: float = 60.0,
        **rollout: Any,
    ) -> None:
        self.stream, self.folder, self.lives = stream, folder, folder / "lives"
        self.lives.write_text(lives)
        rules = {"batch": 1, "eta": groups - 1, "group_size": SIZE, "attempts_max": 20, "lease_ms": 3_000}
        self.run = Run(stream, **rules)
        self.run.start(prompts=groups)
        model = make_tiny_qwen3(folder / "model", seed=0)
        files = {name: (model / name).read_bytes() for name in ("config.json", "tokenizer.json")}
        stream.redis.hset(stream.key("files"), mapping=files)  # type: ignore[arg-type]
        settings = Settings(
            SEED,
            StreamConfig(group_size=SIZE, groups_per_step=1, max_staleness=groups - 1, lease_s=3.0),
            RolloutConfig(
                concurrency=1,
                limits=LimitsConfig(workers=2, deadline_s=1.0),
                **rollout,
            ),
            EngineConfig(request_timeout_s=request_timeout_s, start_timeout_s=30.0),
        )
        stream.redis.set(stream.key("config"), msgspec.json.encode(settings))

    def let_go(self, more: int) -> None:
        """Lets an engine that is held answer so many requests more."""
        with (self.folder / "go").open("a") as file:
            file.write("." * more)

    def command(self, *_: Any, port: int, **__: Any) -> list[str]:
        """Starts the scripted engine where SGLang's would be started."""
        return [sys.executable, "-m", "tests.faults.engine_server", str(port), str(self.lives)]

    @contextlib.asynccontextmanager
    async def actor(self, url: str) -> AsyncIterator[asyncio.Task[None]]:
        """The actor; it must have ended in order when the block has."""
        async with self.offering():
            working = asyncio.create_task(run_actor(url, self.stream.run, "actor-0", self.folder))
            try:
                yield working
                await asyncio.wait_for(working, 30)
            finally:
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def process(self, url: str) -> AsyncIterator[subprocess.Popen[bytes]]:
        """Another actor, in a process; it is killed at the end of the block."""
        program = (
            "import asyncio, os, pathlib, sys\n"
            "from actors import engine, worker\n"
            "server = [sys.executable, '-m', 'tests.faults.engine_server']\n"
            "engine.command = lambda *_, port, **__: [*server, str(port), sys.argv[2]]\n"
            "logs = pathlib.Path(sys.argv[2]).parent\n"
            "asyncio.run(worker.run_actor(os.environ['SLIPSTREAM_REDIS'], sys.argv[1], 'actor-1', logs))\n"
        )
        argv = [sys.executable, "-c", program, self.stream.run, str(self.lives)]
        async with self.offering():
            with subprocess.Popen(argv, env={**os.environ, "SLIPSTREAM_REDIS": url}) as process:
                try:
                    yield process
                finally:
                    process.kill()

    @contextlib.asynccontextmanager
    async def offering(self) -> AsyncIterator[None]:
        """Within the block every engine that comes up is given the newest version, and every newer one."""
        task = asyncio.create_task(self._offer())
        yield
        task.cancel()

    async def _offer(self) -> None:
        offered: set[tuple[str, int]] = set()
        while True:
            ledger = self.run.snapshot()
            version = ledger.number("version")
            for name, record in ledger.actors.items():
                if record.state == "running" and (record.epoch, version) not in offered:
                    offered.add((record.epoch, version))
                    given = Receive(record.epoch, "group", Manifest(version, digest(version), []))
                    self.stream.redis.rpush(self.stream.key(f"mail:{name}"), encode_request(given))
            await asyncio.sleep(0.02)

    async def until(self, condition: Callable[[Ledger], bool]) -> Ledger:
        """Waits for a condition on the snapshot; the snapshot then."""
        for _ in range(600):
            if condition(ledger := self.run.snapshot()):
                return ledger
            await asyncio.sleep(0.1)
        pytest.fail(f"not within 60 s: {ledger.counts} {ledger.actors}")

    def published(self) -> list[Group]:
        """The groups in the stream."""
        found = [decode(fields[b"g"]) for _, fields in self._entries()]
        return sorted((one for one in found if isinstance(one, Group)), key=lambda group: group.id)

    def _entries(self) -> Any:
        return self.stream.redis.xrange(self.stream.key("stream"))


async def test_row_21_a_reward_hangs_crashes_or_floods(
    stream: Stream, redis_server: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process dies at the deadline or by itself; the sample is counted and left out, never scored 0."""
    bounds = AdaptiveConfig(most=2, every_s=0.05)
    trial = Trial(stream, tmp_path, "good", reward=f"{__name__}:obey", adaptive=bounds)
    monkeypatch.setattr(engine, "command", trial.command)
    bad = {33 + token(seed) for seed in range(3)}
    drawn = [
        [33 + token(request_seed(SEED, position, 0, sample)) for sample in range(SIZE)]
        for position in range(GROUPS)
    ]
    good = [[one for one in group if one not in bad] for group in drawn]
    assert [len(group) for group in good] == [3, 2], "choose a SEED that leaves two or more of each group"
    async with trial.actor(redis_server.socket_url):
        ledger = await trial.until(lambda ledger: ledger.counts.queued == GROUPS)
        invalid = GROUPS * SIZE - sum(map(len, good))
        await trial.until(lambda ledger: ledger.actors["actor-0"].stats["invalid_samples"] == invalid)
        assert trial.run.snapshot().actors["actor-0"].stats["concurrency"] == 2  # the engine is idle
        groups = trial.published()
        trial.run.leave_learner("done")
    assert violations(trial.run.snapshot()) == []
    assert (ledger.counts.queued, ledger.counts.dropped) == (GROUPS, {})
    for group, expected in zip(groups, good, strict=True):
        assert [33 + int(sample.tokens[-1]) for sample in group.samples] == expected
        assert [sample.reward for sample in group.samples] == [1.0] * len(expected)
        assert [(version.number, version.digest) for version in group.versions] == [(0, digest(0))]
    left = [process.cmdline() for process in psutil.Process().children(recursive=True)]
    assert not any("actors.limited.child" in line for line in left), left


async def test_row_22_an_engine_dies_says_nothing_or_no_numbers_or_hangs(
    stream: Stream, redis_server: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each life costs one group, closed as `engine`, and may hand back the one in advance; another engine is
    started, and does them all."""
    lives = ["dies", "nothing", "nan", "silent", "good"]
    trial = Trial(stream, tmp_path, " ".join(lives), request_timeout_s=1.0, reward={})
    monkeypatch.setattr(engine, "command", trial.command)
    async with trial.actor(redis_server.socket_url):
        ledger = await trial.until(lambda ledger: ledger.counts.queued == GROUPS)
        trial.run.leave_learner("done")
    assert violations(trial.run.snapshot()) == []
    assert ledger.counts.dropped.pop("engine") == len(lives) - 1
    assert ledger.counts.dropped.keys() <= {"released"}
    assert trial.lives.read_text() == ""
    assert all(sample.logprobs.tolist() == [-1.0] for group in trial.published() for sample in group.samples)
    assert ledger.actors["actor-0"].epoch.partition(":")[0] == str(len(lives))


@pytest.fixture
def one_ahead(stream: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trial:
    """An actor whose engine answers when it is let go, so that one group is being generated, and one lease is
    held in advance. The next engine answers at once."""
    trial = Trial(stream, tmp_path, "held good", groups=3, reward={})
    monkeypatch.setattr(engine, "command", trial.command)
    trial.let_go(0)
    return trial


async def test_a_lease_in_advance_is_handed_back_by_an_actor_that_drains(
    redis_server: LocalServer, one_ahead: Trial
) -> None:
    """At once: another actor may take it while this one finishes what has begun."""
    async with one_ahead.actor(redis_server.socket_url):
        await one_ahead.until(lambda ledger: ledger.counts.leased == 2)
        os.kill(os.getpid(), signal.SIGTERM)
        ledger = await one_ahead.until(lambda ledger: ledger.counts.leased == 1)
        one_ahead.let_go(1)
    after = one_ahead.run.snapshot()
    assert ([lease.position for lease in ledger.leased], ledger.counts.dropped) == ([0], {"released": 1})
    assert [group.position for group in one_ahead.published()] == [0]
    assert (after.counts.leased, after.sizes["prompts"], violations(after)) == (0, 2, [])


async def test_a_lease_in_advance_of_an_actor_that_is_killed_expires(
    redis_server: LocalServer, one_ahead: Trial
) -> None:
    """As does the other; the next actor does all groups."""
    async with one_ahead.process(redis_server.socket_url) as process:
        await one_ahead.until(lambda ledger: ledger.counts.leased == 2)
        process.kill()
    async with one_ahead.actor(redis_server.socket_url):
        ledger = await one_ahead.until(lambda ledger: ledger.counts.queued == 3)
        one_ahead.run.leave_learner("done")
    assert ledger.counts.dropped == {"expired": 2}
    assert violations(one_ahead.run.snapshot()) == []


async def test_a_lease_in_advance_outlives_new_weights_which_write_its_group(
    redis_server: LocalServer, one_ahead: Trial
) -> None:
    """It is due as it was when it was granted."""
    async with one_ahead.actor(redis_server.socket_url):
        one_ahead.let_go(1)
        await one_ahead.until(lambda ledger: (ledger.counts.queued, ledger.counts.leased) == (1, 2))
        one_ahead.run.assign(0)
        one_ahead.run.commit(1)
        ledger = await one_ahead.until(lambda ledger: ledger.actors["actor-0"].version == 1)
        assert [(lease.version, lease.deadline) for lease in ledger.leased] == [(0, 2), (0, 2)]
        one_ahead.let_go(2)
        ledger = await one_ahead.until(lambda ledger: ledger.counts.queued == 2)
        one_ahead.run.leave_learner("done")
    assert [[one.number for one in group.versions] for group in one_ahead.published()] == [[0], [1], [1]]
    assert (list(ledger.ready.values()), ledger.counts.refused) == ([2, 2], {})
    assert violations(one_ahead.run.snapshot()) == []
