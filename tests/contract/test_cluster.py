"""The stream on a real cluster: payloads over all nodes, control keys in one slot, nodes that die."""

from __future__ import annotations

import asyncio
import gc
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis
from redis.connection import AbstractConnection

import buffer.stream
from buffer.acl import ROLES, create_users, rules, user_name, with_user
from buffer.admission import Lease
from buffer.client import AsyncStream, Stream
from buffer.connect import connect, connect_async
from buffer.errors import NoRun, RedisUnavailable, RightMissing, StreamError
from buffer.keys import RUNS, shard_key, shard_of
from buffer.ledger import Snapshot, violations
from buffer.members import Heartbeat
from buffer.session import Session
from buffer.stream import read_frames, sweep
from launch.doctor import examine
from tests.contract.cluster import NODE_TIMEOUT_MS, NODES, Cluster
from tests.contract.harness import Run, digest
from tests.contract.roles import whole_run
from tests.waiting import wait_until

# redis-py drops the connections to a cluster that it looks at anew without closing them.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

SHARDS = 6
names = iter(range(1000))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One cluster for all tests here; each takes a run name of its own."""
    with Cluster(tmp_path_factory.mktemp("cluster")) as started:
        yield started
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def stream(cluster: Cluster) -> Iterator[Stream]:
    """A connection to a fresh run whose shards lie on all nodes."""
    name = cluster.run_over_all(f"run{next(names)}-", SHARDS)
    connected = Stream.connect(cluster.url, name, patience_s=20.0, shards=SHARDS)
    connected.load_library()
    yield connected
    connected.close()


@pytest.fixture
def run(stream: Stream) -> Run:
    """A started run with the actor `a`."""
    return Run(stream, batch=4, eta=1, shards=SHARDS).start("a", prompts=60)


def payloads(cluster: Cluster, run: Run) -> list[int]:
    """How many payloads of the run each node holds."""
    found = [0] * NODES
    for shard in range(SHARDS):
        key = shard_key(run.stream.run, shard)
        with cluster.client(cluster.owner(key)) as client:
            found[cluster.owner(key)] += int(client.xlen(key))  # type: ignore[arg-type]
    return found


def test_every_client_recognises_a_cluster(cluster: Cluster) -> None:
    assert isinstance(connect(cluster.url), redis.RedisCluster)
    assert isinstance(connect_async(cluster.url), redis.asyncio.RedisCluster)


def test_the_doctor_looks_at_every_primary(cluster: Cluster, run: Run) -> None:
    run.stream.redis.sadd(RUNS, run.stream.run)
    with cluster.client(1) as client:
        client.config_set("appendfsync", "everysec")
        wrong = {finding.what for finding in examine(cluster.url) if finding.verdict == "wrong"}
        client.config_set("appendfsync", "always")
    assert wrong == {"default user", f"durability of 127.0.0.1:{cluster.nodes[1].port}"}
    run.stream.redis.srem(RUNS, run.stream.run)


def test_the_library_is_on_every_primary(cluster: Cluster, run: Run) -> None:
    for number in range(NODES):
        with cluster.client(number) as client:
            assert len(client.execute_command("FUNCTION", "LIST", "LIBRARYNAME", "slipstream2")) == 1


def test_control_keys_share_one_node_and_payloads_use_all(cluster: Cluster, run: Run) -> None:
    run.queue("a", 8)
    assert sum(payloads(cluster, run)) == 8
    home, tag = cluster.owner(run.stream.key("state")), f"{{{run.stream.run}}}:*"
    for number in range(NODES):
        with cluster.client(number) as client:
            assert bool(list(client.scan_iter(match=tag))) == (number == home)
    ledger = run.snapshot()
    assert (violations(ledger), ledger.sizes["payloads"]) == ([], 0)
    for row in run.assign(0).manifest.rows:
        assert run.stream.locate(row.entry)[0] == shard_key(run.stream.run, shard_of(row.group, SHARDS))


async def test_a_whole_run(cluster: Cluster, stream: Stream) -> None:
    """The learner's session and an actor's event loop, six steps of it."""
    run = Run(stream, batch=4, eta=1, shards=SHARDS, max_steps=6)
    session = Session.join(stream, run.rules)
    run.epochs["learner"] = session.epoch
    session.commit(0, digest(0))
    run.join_actor("a")
    actor = AsyncStream.connect(cluster.url, stream.run, patience_s=20.0, shards=SHARDS)
    run.feed(0, 40)
    used, trained = [0] * NODES, []
    for step in range(6):
        run.applied("a", step)
        while (lease := await actor.call(run.next_admit("a"))).status == "lease":
            published = await actor.publish(*run.publish_call(lease, "a"))
            assert published.status == "ok"
            assert published.entry.startswith(f"{shard_of(lease.group, SHARDS)}/")
            assert (await actor.call(Heartbeat("a", run.epochs["a"], "running", "{}", ()))).lost == []
        used = [max(pair) for pair in zip(used, payloads(cluster, run), strict=True)]
        rows = session.assign(step).manifest.groups()
        frames = await asyncio.to_thread(read_frames, stream, rows)
        trained += [frame.group.id for frame in frames if frame.group]
        session.commit(step + 1, digest(step + 1))
        session.checkpoint(step + 1, digest(step + 1), step + 1)
    assert await actor.take(actor.key("places"), 1.0) == b"1"
    assert min(used) > 0, "a node never held a payload"
    assert (len(trained), len(set(trained)), session.assign(6).status) == (24, 24, "end")
    ledger = run.snapshot()
    assert (violations(ledger), ledger.counts.trained, ledger.sizes["trash"]) == ([], 24, 24)
    assert (sweep(stream), sum(payloads(cluster, run)), run.snapshot().sizes["trash"]) == (24, 0, 0)
    session.leave("done")
    await actor.close()


async def test_publishes_that_are_refused_leave_no_payload(cluster: Cluster, run: Run) -> None:
    actor = AsyncStream.connect(cluster.url, run.stream.run, shards=SHARDS)

    async def awaited(lease: Lease, *versions: int) -> Any:
        return await actor.publish(*run.publish_call(lease, "a", *versions))

    for publish in (awaited, lambda *args: asyncio.to_thread(run.publish, args[0], "a", *args[1:])):
        kept, late, unsound = run.leases("a", 3)
        first = await publish(kept)
        repeat = await publish(kept)
        assert (first.status, repeat.status, repeat.reason, repeat.entry) == (
            "ok",
            "ok",
            "repeat",
            first.entry,
        )
        run.elapse(70_000)
        run.heartbeat("a")
        assert (await publish(late)).reason == "unknown"
        assert (await publish(unsound)).reason == "unknown"
        (refused,) = run.leases("a", 1)
        assert (await publish(refused, 7)).reason == "engine"
    assert sum(payloads(cluster, run)) == 2
    assert violations(run.snapshot()) == []
    await actor.close()


def test_a_publish_to_no_run_leaves_no_payload_for_long(
    cluster: Cluster, run: Run, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    (lease,) = run.leases("a", 1)
    elsewhere = Stream.connect(
        cluster.url, cluster.run_over_all(f"none{next(names)}-", SHARDS), shards=SHARDS
    )
    with pytest.raises(NoRun):
        elsewhere.publish(*run.publish_call(lease, "a"))
    monkeypatch.setattr(buffer.stream, "ORPHAN_S", 0.0)
    time.sleep(0.01)
    assert sweep(elsewhere) == 1
    elsewhere.close()


def test_a_lost_reply_leaves_an_orphan_which_is_swept(
    cluster: Cluster, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reply to the XADD is lost: the payload is there twice, and the ledger knows one of them."""
    (lease,) = run.leases("a", 1)
    xadd, lost = run.stream.redis.xadd, []

    def loses_one(*args: Any, **options: Any) -> Any:
        entry = xadd(*args, **options)
        if not lost:
            lost.append(entry)
            raise redis.ConnectionError("the reply is lost")
        return entry

    monkeypatch.setattr(run.stream.redis, "xadd", loses_one)
    published = run.publish(lease, "a")
    assert (published.status, sum(payloads(cluster, run))) == ("ok", 2)
    assert sweep(run.stream) == 0, "an entry this young may belong to a publish under way"
    monkeypatch.setattr(buffer.stream, "ORPHAN_S", 0.0)
    time.sleep(0.01)
    assert (sweep(run.stream), sum(payloads(cluster, run)), sweep(run.stream)) == (1, 1, 0)
    run.queue("a", 3)
    frames = read_frames(run.stream, run.assign(0).manifest.groups())
    assert [frame.problem for frame in frames] == [None] * 4


def test_payloads_are_read_in_one_round_trip_a_node(
    cluster: Cluster, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.queue("a", 8)
    rows = run.assign(0).manifest.groups()
    read_frames(run.stream, rows)  # connects
    sent: list[int] = []
    send = AbstractConnection.send_packed_command

    def counted(self: Any, *args: Any, **options: Any) -> None:
        sent.append(self.port)
        send(self, *args, **options)

    monkeypatch.setattr(AbstractConnection, "send_packed_command", counted)
    assert [frame.problem for frame in read_frames(run.stream, rows)] == [None] * len(rows)
    homes = {cluster.nodes[cluster.owner(run.stream.locate(row.entry)[0])].port for row in rows}
    assert sorted(sent) == sorted(homes)


async def _under_load(run: Run, actor: AsyncStream, calls: int) -> dict[str, str]:
    """Groups published on both kinds of client, and the entries that were acknowledged."""
    acknowledged = {}
    for _ in range(calls):
        lease = await actor.call(run.next_admit("a"))
        awaited = await actor.publish(*run.publish_call(lease, "a"))
        other = await asyncio.to_thread(run.admit, "a")
        answer = await asyncio.to_thread(run.publish, other, "a")
        assert (awaited.status, answer.status) == ("ok", "ok")
        acknowledged |= {lease.group: awaited.entry, other.group: answer.entry}
    return acknowledged


def _nothing_is_lost(run: Run, acknowledged: dict[str, str]) -> None:
    ledger = run.snapshot()
    assert (violations(ledger), sorted(ledger.ready)) == ([], sorted(acknowledged))
    rows = [row for step in range(len(acknowledged) // 4) for row in run.assign(step).manifest.rows]
    assert {row.group: row.entry for row in rows} == acknowledged
    assert [frame.problem for frame in read_frames(run.stream, rows)] == [None] * len(rows)


async def test_nodes_that_die_under_load_cost_nothing(cluster: Cluster, stream: Stream) -> None:
    """The control keys' node and another are killed and come back at once, the other without the library."""
    run = Run(stream, batch=4, eta=4, shards=SHARDS)
    session = Session.join(stream, run.rules)
    run.epochs["learner"] = session.epoch
    session.commit(0, digest(0))
    run.join_actor("a")
    run.applied("a", 0)
    run.feed(0, 60)
    actor = AsyncStream.connect(cluster.url, stream.run, patience_s=20.0, shards=SHARDS)
    acknowledged = await _under_load(run, actor, 4)
    home = cluster.owner(stream.key("state"))
    away = (home + 1) % NODES
    with cluster.client(away) as client:
        client.execute_command("FUNCTION", "FLUSH")
    for number in (home, away):
        cluster.nodes[number].kill()
        # On this thread: a server ends with the thread that started it.
        asyncio.get_running_loop().call_later(0.3, cluster.nodes[number].start)
    acknowledged |= await _under_load(run, actor, 4)
    await asyncio.to_thread(cluster.wait)
    session.reconcile()
    with cluster.client(away) as client:
        assert client.execute_command("FUNCTION", "LIST"), "the library is back on the node"
    _nothing_is_lost(run, acknowledged)
    await actor.close()


async def test_a_cluster_that_is_down_for_long_is_waited_for(cluster: Cluster, run: Run) -> None:
    """The other nodes answer CLUSTERDOWN; who has less patience is told so."""
    url, name = cluster.url, run.stream.run
    run.stream.patience_s, home = 30.0, cluster.owner(run.stream.key("state"))
    patient, actor, hasty = (AsyncStream.connect(url, name, patience_s=30.0, shards=SHARDS) for _ in range(3))
    hasty.patience_s = 0.5
    impatient = Stream.connect(url, name, patience_s=0.5, shards=SHARDS)
    for stream in (patient, hasty):
        await stream.call(Snapshot())
    acknowledged = await _under_load(run, actor, 1)
    cluster.notice_after(1000)
    cluster.nodes[home].kill()
    with cluster.client((home + 1) % NODES) as client:
        working = asyncio.create_task(_under_load(run, actor, 1))
        await asyncio.to_thread(
            wait_until, lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "fail", 20, "down"
        )
        with pytest.raises(RedisUnavailable, match="did not answer"):
            await hasty.call(Snapshot())
        with pytest.raises(RedisUnavailable, match="did not answer"):
            await asyncio.to_thread(impatient.call, Snapshot())
        assert await asyncio.to_thread(impatient.take, impatient.key("bell"), 0.1) is None
        assert await hasty.take(hasty.key("places"), 0.1) is None
    assert not working.done()
    cluster.nodes[home].start()
    acknowledged |= await working
    await asyncio.to_thread(cluster.wait)
    cluster.notice_after(NODE_TIMEOUT_MS)
    assert (await patient.call(Snapshot())).number("version") == 0
    _nothing_is_lost(run, acknowledged)
    for awaited in (patient, actor, hasty):
        await awaited.close()
    impatient.close()


def test_shares_cross_the_network_once(cluster: Cluster, run: Run) -> None:
    run.queue("a", 8)
    manifest, ranks = run.assign(0).manifest, 3
    before = _ranges_read(cluster)
    with ThreadPoolExecutor(ranks) as pool:
        streams = [Stream.connect(cluster.url, run.stream.run, shards=SHARDS) for _ in range(ranks)]
        shares = list(
            pool.map(lambda rank: read_frames(streams[rank], manifest.share(rank, ranks)), range(ranks))
        )
    read = [frame.row.group for share in shares for frame in share if frame.group]
    assert sorted(read) == [row.group for row in manifest.groups()]
    assert _ranges_read(cluster) - before == len(read)
    for stream in streams:
        stream.close()


def _ranges_read(cluster: Cluster) -> int:
    total = 0
    for number in range(NODES):
        with cluster.client(number) as client:
            stats: Any = client.info("commandstats")
            total += stats.get("cmdstat_xrange", {"calls": 0})["calls"]
    return total


def _users(cluster: Cluster, admin: Any) -> tuple[str, dict[str, str]]:
    """A fresh run's name and the URLs of its users, by role."""
    name = cluster.run_over_all(f"roles{next(names)}-", SHARDS)
    created = create_users(admin, name)
    assert create_users(admin, name) == {}
    urls = {role.name: with_user(cluster.url, user_name(role, name), created[user_name(role, name)])
            for role in ROLES}  # fmt: skip
    return name, urls


def test_roles_work_on_a_cluster(cluster: Cluster) -> None:
    """Users are made on every primary; another run's shards are out of reach."""
    admin: Any = connect(cluster.url)
    name, urls = _users(cluster, admin)
    assert violations(whole_run(urls, name, admin, shards=SHARDS)) == []
    for role in ("learner", "viewer"):
        stream = Stream.connect(urls[role], name, shards=SHARDS)
        other = shard_key(name if role == "viewer" else f"{name}x", 0)
        with pytest.raises(RightMissing, match=f"Redis user {role}-{name} may not XADD"):
            stream.redis.xadd(other, {"g": "x"})
        stream.close()
    admin.close()


@pytest.mark.parametrize("missing", ["+command", "+cluster|slots", "%RW~{NAME/*}:*", "%R~{NAME/*}:*"])
def test_without_a_clusters_rights_nothing_goes(missing: str, cluster: Cluster) -> None:
    admin: Any = connect(cluster.url)
    name, urls = _users(cluster, admin)
    missing = missing.replace("NAME", name)
    for role in ROLES:
        for node in map(cluster.client, range(NODES)):
            kept = (rule for rule in rules(role, name) if rule != missing)
            node.execute_command("ACL", "SETUSER", user_name(role, name), *kept)
            node.close()
    with pytest.raises(StreamError):
        whole_run(urls, name, admin, shards=SHARDS)
    admin.close()
