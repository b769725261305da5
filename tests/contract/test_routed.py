"""Routed experts live as long as their group: written before it, read with it, swept when it is done with."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

import buffer.routed
from actors.publish import publish
from buffer.admission import Lease
from buffer.client import AsyncStream, Stream
from buffer.keys import routed_key
from buffer.ledger import violations
from buffer.local_server import LocalServer
from buffer.record import RecordFolder, describe_run, fetch_step
from buffer.routed import detach, store
from buffer.schema import Group
from buffer.stream import Published, read_frames, sweep
from tests.contract.harness import Run, make_group


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three a group."""
    monkeypatch.setattr(buffer.routed, "CHUNK_BYTES", 5 * 12)


@pytest.fixture
def run(stream: Stream) -> Run:
    """A started run in which whatever is trained is covered at once."""
    return Run(stream, batch=2, eta=0).start("a")


@pytest.fixture
async def actor(stream: Stream, redis_server: LocalServer) -> AsyncIterator[AsyncStream]:
    """What an actor publishes through."""
    client = AsyncStream.connect(redis_server.url, stream.run)
    yield client
    await client.close()


def group_of(lease: Lease) -> Group:
    """A valid group for a lease; of sample s every token goes to experts of its own."""
    group = make_group(lease.position, lease.attempt, versions=(lease.version,))
    samples = [
        msgspec.structs.replace(
            sample,
            routed=np.arange(6 * 3 * 2, dtype=np.uint16).reshape(6, 3, 2) + 100 * index + lease.position,
        )
        for index, sample in enumerate(group.samples)
    ]
    return msgspec.structs.replace(group, samples=samples)


async def hand_in(run: Run, actor: AsyncStream, lease: Lease) -> Published:
    return await publish(actor, group_of(lease), epoch=run.epochs["a"], token=lease.token)


def kept(stream: Stream) -> set[str]:
    """Groups of which there are chunks, by the index and by the keys, which must agree."""
    index = {name.decode() for name in stream.redis.hkeys(stream.key("routing"))}  # type: ignore[union-attr]
    keys = {key.decode().rpartition(":")[2] for key in stream.redis.scan_iter(f"{{{stream.run}}}:routed:*")}
    assert index == keys
    return keys


async def test_they_are_read_with_their_group(run: Run, actor: AsyncStream) -> None:
    leases = run.leases("a", 2)
    for lease in leases:
        assert (await hand_in(run, actor, lease)).status == "ok"
    rows = run.assign(0).manifest.groups()
    for lease, row, frame in zip(leases, rows, read_frames(run.stream, rows, routed=True), strict=True):
        _, chunks = detach(group_of(lease))
        assert (frame.problem, frame.chunks) == (None, tuple(chunks))
        for sample, sent in zip(frame.group.samples, group_of(lease).samples, strict=True):
            assert np.array_equal(sample.routed, sent.routed)
        assert row.size == len(frame.payload) + sum(map(len, chunks))
    assert all(s.routed is None for f in read_frames(run.stream, rows) for s in f.group.samples)
    assert violations(run.snapshot()) == []


async def test_they_go_with_their_group(run: Run, actor: AsyncStream) -> None:
    trained, also = run.leases("a", 2)
    for lease in (trained, also):
        await hand_in(run, actor, lease)
    run.assign(0)
    sweep(run.stream)
    assert kept(run.stream) == {trained.group, also.group}, "an assigned group's may still be read"
    run.commit(1, covered=0)
    sweep(run.stream)
    assert kept(run.stream) == set()


async def test_those_of_a_lease_under_way_stay(run: Run, actor: AsyncStream) -> None:
    lease, lost = run.leases("a", 2)
    for one in (lease, lost):
        await store(actor, one.group, detach(group_of(one))[1])
    sweep(run.stream)
    assert kept(run.stream) == {lease.group, lost.group}
    for _ in range(2):
        run.elapse(40_000)
        run.heartbeat("a", lease.token)
    sweep(run.stream)
    assert kept(run.stream) == {lease.group}, "the other lease has expired"


async def test_a_publish_that_is_refused_leaves_none(run: Run, actor: AsyncStream) -> None:
    (lease,) = run.leases("a", 1)
    run.elapse(70_000)
    run.heartbeat("a")
    answer = await hand_in(run, actor, lease)
    assert (answer.status, kept(run.stream)) == ("late", set())


async def test_a_repeat_keeps_them(run: Run, actor: AsyncStream) -> None:
    (lease,) = run.leases("a", 1)
    first, again = [await hand_in(run, actor, lease) for _ in range(2)]
    assert (first.status, again.reason, again.entry) == ("ok", "repeat", first.entry)
    sweep(run.stream)
    assert kept(run.stream) == {lease.group}


async def test_a_group_without_its_experts_is_struck(run: Run, actor: AsyncStream) -> None:
    """`lost` where a chunk is gone, `poison` where the actor sent none or one is damaged."""
    lost, plain = run.leases("a", 2)
    await hand_in(run, actor, lost)
    assert run.publish(plain, "a").status == "ok"
    rows = run.assign(0).manifest.groups()
    name = routed_key(run.stream.run, lost.group, 0)
    chunk = run.stream.redis.hget(name, "1")
    run.stream.redis.hdel(name, "1")
    first, second = read_frames(run.stream, rows, routed=True)
    assert (first.group, first.reason) == (None, "lost")
    assert "chunk 1 of its routed experts is gone" in str(first.problem)
    assert (second.group, second.reason) == (None, "poison")
    assert "the record has none; actor a did not return them" in str(second.problem)
    run.stream.redis.hset(name, "1", chunk[:-1] + bytes([chunk[-1] ^ 1]))  # type: ignore[index]
    (damaged, _) = read_frames(run.stream, rows, routed=True)
    assert (damaged.reason, damaged.problem.field) == ("poison", "routed[1]")


async def test_a_record_holds_them(run: Run, actor: AsyncStream, tmp_path: Path) -> None:
    leases = run.leases("a", 2)
    for lease in leases:
        await hand_in(run, actor, lease)
    run.assign(0)
    run.commit(1)
    folder, ledger = RecordFolder(tmp_path / "record"), run.snapshot()
    folder.begin(describe_run(run.stream, ledger.state["nonce"], ledger.state), {})
    folder.add(fetch_step(run.stream, 0, 0))
    (step,) = folder.steps()
    for lease, group, bare in zip(leases, step.groups(routed=True), step.groups(), strict=True):
        assert [s.routed.tolist() for s in group.samples] == [
            s.routed.tolist() for s in group_of(lease).samples
        ]
        assert [s.routed for s in bare.samples] == [None, None]


async def test_a_record_of_a_run_without_them_says_so(run: Run, tmp_path: Path) -> None:
    run.queue("a", 2)
    run.assign(0)
    run.commit(1)
    step = fetch_step(run.stream, 0, 0)
    assert (step.routed, len(step.groups())) == ({}, 2)
    with pytest.raises(buffer.errors.RecordError, match="the record has none"):
        step.groups(routed=True)
