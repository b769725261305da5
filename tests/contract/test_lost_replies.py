"""A reply that is lost costs nothing and doubles nothing: the call is made again and is the same call."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
import redis

from buffer.client import AsyncStream, Stream
from buffer.errors import RedisUnavailable
from buffer.ledger import Counts
from buffer.local_server import LocalServer
from buffer.members import Heartbeat, Leave
from tests.contract.harness import Run
from tests.contract.wire import LossyProxy


@pytest.fixture
def proxy(redis_server: LocalServer) -> Iterator[LossyProxy]:
    """A proxy in front of the session's server."""
    lossy = LossyProxy(urlsplit(redis_server.url).port or 0)
    yield lossy
    lossy.close()


@pytest.fixture
def url(redis_server: LocalServer, proxy: LossyProxy) -> str:
    """The server's URL through the proxy."""
    return redis_server.url.replace(str(urlsplit(redis_server.url).port), str(proxy.port))


@pytest.fixture
def run(stream: Stream, proxy: LossyProxy, url: str) -> Iterator[Run]:
    """A started run, reached through the proxy."""
    lossy = Stream.connect(url, stream.run, patience_s=5.0)
    yield Run(lossy, batch=2, eta=0).start("a")
    lossy.close()


def test_no_lease_is_lost_or_doubled(run: Run, proxy: LossyProxy) -> None:
    proxy.lose = 1
    first, second = run.leases("a", 2)
    assert proxy.lose == 0
    assert (first.position, second.position) == (0, 1)
    assert run.snapshot().counts == Counts(admitted=2, leased=2)


def test_no_group_is_lost_or_doubled(run: Run, proxy: LossyProxy) -> None:
    lease = run.admit("a")
    proxy.lose = 2
    answer = run.publish(lease, "a")
    assert (answer.status, proxy.lose) == ("ok", 0)
    ledger = run.snapshot()
    assert ledger.counts == Counts(admitted=1, queued=1)
    assert ledger.sizes["payloads"] == 1
    assert run.stream.redis.xrange(run.stream.key("stream"))[0][0].decode() == answer.entry


def test_no_step_is_lost_or_doubled(run: Run, proxy: LossyProxy) -> None:
    run.queue("a", 2)
    proxy.lose = 1
    assert len(run.assign(0).manifest.groups()) == 2
    proxy.lose = 1
    assert run.commit(1, covered=0) == 1
    proxy.lose = 1
    assert run.applied("a", 1) == 1
    proxy.lose = 1
    assert run.feed(20, 2).queued == 20
    assert proxy.lose == 0
    ledger = run.snapshot()
    assert (ledger.counts, ledger.number("head")) == (Counts(admitted=2, trained=2), 1)


def test_no_epoch_is_skipped(run: Run, proxy: LossyProxy) -> None:
    proxy.lose = 2
    assert run.join_actor("b", "bits") == "1:bits"
    proxy.lose = 1
    assert run.join_learner("bits") == "2:bits"
    lease = run.admit("a")
    proxy.lose = 1
    assert run.leave("a") == 0, "the repeat finds nothing left to release"
    assert run.heartbeat("b", lease.token).lost == [lease.token]
    assert run.snapshot().counts.dropped == {"released": 1}


async def test_an_actors_connection_repeats_alike(run: Run, proxy: LossyProxy, url: str) -> None:
    run.stream.redis.connection_pool.disconnect()  # the proxy serves one client at a time
    actor = AsyncStream.connect(url, run.stream.run, patience_s=5.0)
    proxy.lose = 1
    lease = await actor.call(run.next_admit("a"))
    proxy.lose = 1
    answer = await actor.publish(*run.publish_call(lease, "a"))
    proxy.lose = 1
    beat = await actor.call(Heartbeat("a", run.epochs["a"], "running", "{}", (lease.token,)))
    assert (lease.status, answer.status, beat.lost, proxy.lose) == ("lease", "ok", [lease.token], 0)
    assert await actor.take(actor.key("places"), 1.0) == b"1"
    assert await actor.take(actor.key("mail:a"), 0.05) is None
    proxy.lose, proxy.word = 1, b"BLPOP"
    assert await actor.take(actor.key("places"), 1.0) is None, "a lost answer is no answer"
    await actor.close()
    ledger = run.snapshot()
    assert (ledger.counts, ledger.sizes["payloads"]) == (Counts(admitted=1, queued=1), 1)


async def test_a_plain_write_is_never_repeated(run: Run, proxy: LossyProxy, url: str) -> None:
    """Redis clients repeat by default, and a repeated push is a second message."""
    name = run.stream.key("mail:a")
    proxy.lose, proxy.word = 1, b"RPUSH"
    with pytest.raises(redis.ConnectionError):
        run.stream.redis.rpush(name, "once")
    actor = AsyncStream.connect(url, run.stream.run)
    proxy.lose = 1
    with pytest.raises(redis.ConnectionError):
        await actor.redis.rpush(name, "once")
    await actor.close()
    assert run.stream.redis.llen(name) == 2


async def test_patience_ends_with_a_typed_error(run: Run, proxy: LossyProxy, url: str) -> None:
    run.stream.patience_s = 0.3
    proxy.lose = 1000
    with pytest.raises(RedisUnavailable, match="Redis did not answer for 0 s"):
        run.snapshot()
    proxy.word = b"BLPOP"
    assert run.stream.take(run.stream.key("bell"), 0.1) is None
    run.stream.redis.connection_pool.disconnect()
    proxy.word = b"FCALL"
    actor = AsyncStream.connect(url, run.stream.run, patience_s=0.3)
    with pytest.raises(RedisUnavailable, match="did not answer"):
        await actor.call(Leave("actor", "a", run.epochs["a"]))
    await actor.close()


class Swallowing:
    """A client that answers a cancellation as redis-py may: not at all, or as a lost connection."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.waits = error, 0

    async def blpop(self, *_: object, **__: object) -> None:
        self.waits += 1
        assert self.waits == 1, "waited again after the cancellation"
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if self.error is not None:
                raise self.error from None


@pytest.mark.parametrize("error", [None, redis.exceptions.ConnectionError("closed")], ids=["nothing", "lost"])
async def test_a_cancelled_loop_ends_though_the_client_swallows_it(error: Exception | None) -> None:
    stream = AsyncStream(Swallowing(error), "run")  # type: ignore[arg-type]

    async def forever() -> None:
        while True:
            await stream.take("list", 1)

    task = asyncio.create_task(forever())
    await asyncio.sleep(0.01)
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=2)
    assert done == {task}
    assert task.cancelled()
