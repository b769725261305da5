"""Data-parallel readers: each fetches its own share of a manifest; a payload leaves the server once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
import pytest

from buffer.admission import Lease
from buffer.client import Stream
from buffer.codec import encode
from buffer.stream import Frame, Publish, read_frames
from tests.contract.harness import Run, make_group


def publish_large(run: Run, lease: Lease) -> None:
    """A group of noise, about 100 KB, which hardly compresses."""
    noise = np.random.default_rng(lease.position)
    group = make_group(lease.position, answer=8000)
    samples = [
        msgspec.structs.replace(sample, logprobs=-noise.random(8000, dtype=np.float32))
        for sample in group.samples
    ]
    group = msgspec.structs.replace(group, samples=samples)
    payload = encode(group)
    call = Publish.of(group, epoch=run.epochs["a"], token=lease.token, size=len(payload))
    assert run.stream.publish(call, payload).status == "ok"


def read_together(run: Run, ranks: int) -> tuple[list[list[Frame]], int, int]:
    """What each rank reads, how many reads the server answered, and the bytes it sent for them."""
    run.feed(0, 12)
    for lease in run.leases("a", 6):
        publish_large(run, lease)
    manifest = run.assign(0).manifest
    struck = manifest.rows[2].group
    run.strike(0, struck)
    manifest = run.assign(0).manifest
    url = run.stream.redis.connection_pool.connection_kwargs["path"]
    password = run.stream.redis.connection_pool.connection_kwargs["password"]
    readers = [Stream.connect(f"unix://:{password}@{url}", run.stream.run) for _ in range(ranks)]
    before = _sent(run.stream)
    with ThreadPoolExecutor(ranks) as pool:
        shares = pool.map(lambda rank: read_frames(readers[rank], manifest.share(rank, ranks)), range(ranks))
        read = list(shares)
    after = _sent(run.stream)
    for reader in readers:
        reader.close()
    assert struck not in {frame.row.group for share in read for frame in share}
    return read, after[0] - before[0], after[1] - before[1]


def _sent(stream: Stream) -> tuple[int, int]:
    commands: Any = stream.redis.info("commandstats")
    stats: Any = stream.redis.info("stats")
    return commands["cmdstat_xrange"]["calls"], stats["total_net_output_bytes"]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_payload_crosses_the_network_once(ranks: int, stream: Stream) -> None:
    run = Run(stream, batch=6, eta=0).start("a", prompts=0)
    stream.redis.xrange(stream.key("dead"))  # so that the statistics know the command
    shares, reads, sent = read_together(run, ranks)
    groups = [frame.group.id for share in shares for frame in share if frame.group]
    assert len(groups) == len(set(groups)) == reads == 5
    payload = sum(frame.row.size for share in shares for frame in share)
    assert payload > 250_000
    assert payload <= sent <= 1.1 * payload
    tokens = [sum(frame.row.tokens for frame in share) for share in shares]
    assert max(tokens) - min(tokens) <= max(frame.row.tokens for share in shares for frame in share)
    assert sum(tokens) == 5 * 2 * (3 + 8000 - 1), "what training feeds, prompts once a sample"
    assert all(share == sorted(share, key=lambda frame: frame.row.group) for share in shares)
