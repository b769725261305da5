"""Rows 19 and 20: Redis is full; records are poison."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.server import Server
from tests.faults.trial import Process, Trial, until

MIB = 1 << 20


def test_row_19_redis_is_at_maxmemory(own_server: Callable[..., Server], trial: Callable[..., Trial]) -> None:
    """Actors back off and live; the learner trains and commits all that is queued; later all go on."""
    server = own_server()
    run = trial(server, eta=3, batch=3, lease_s=5.0)
    run.learner(fault="learner:committed:3:stop")
    actors = [run.actor(answer=2000), run.actor(answer=2000)]
    run.learners[0].wait_stopped()
    until(lambda: len(run.ledger().ready) >= 6, 20, "two steps are queued")
    used = run.stream.redis.info("memory")["used_memory"]
    run.stream.redis.config_set("maxmemory", used - 100_000)
    run.learners[0].go_on()
    assert run.wait_more(2, seconds=15) < 15
    until(lambda: all(actor.events("full") for actor in actors), 15, "actors say that Redis is full")
    assert all(process.running for process in [*run.learners, *actors])
    run.stream.redis.config_set("maxmemory", 0)
    assert run.wait_more(3, seconds=15) < 15
    ledger = run.finish()
    assert ledger.counts.dropped.get("expired", 0) == 0


@pytest.mark.parametrize("records", [1000, pytest.param(100_000, marks=pytest.mark.faults)])
def test_row_20_poison(own_server: Callable[..., Server], trial: Callable[..., Trial], records: int) -> None:
    """None is trained, nobody crashes, memory stays, and every one is a dead letter with its reason."""
    run = trial(own_server(appendfsync="everysec"), batch=50, eta=2, attempts=1, group_size=2)
    learner = run.learner(checkpoint_every=1, keep=1)
    for seed in range(2):
        run.actor(poison=seed, concurrency=8, group_s=0.0, answer=4)
    run.wait_steps(4)
    before = memory(run, learner)
    until(
        lambda: run.ledger().counts.dropped.get("poison", 0) >= records, 60 + records / 50, "all are struck"
    )
    after = memory(run, learner)
    ledger = run.finish()
    assert ledger.counts.trained == 0
    assert ledger.counts.dead["poison"] == ledger.counts.dropped["poison"] >= records
    reasons = {one["reason"].split(": ")[1] for one in learner.events("struck")}
    assert {"magic", "version", "size", "checksum", "meta", "id", "versions"} <= reasons, reasons
    assert any("not finite" in one["reason"] for one in learner.events("struck"))
    grown = {name: (after[name] - before[name]) / MIB for name in before}
    assert max(grown.values()) < 64, grown


def memory(run: Trial, learner: Process) -> dict[str, int]:
    """Bytes of the learner's resident memory, and of Redis's data."""
    pages = int(Path(f"/proc/{learner.pid}/statm").read_text().split()[1])
    return {"learner": pages * 4096, "redis": run.stream.redis.info("memory")["used_memory"]}
