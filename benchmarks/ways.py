"""Ways to move groups from those who generate to those who train: ours, and what others use.

A way takes one batch of groups through put, get and acknowledge: `turn(groups)`. It keeps the bytes that one
group takes in `size`, and ends with arrays at the reader's side, as a learner packs them.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson
import redis

from benchmarks.groups import raw_bytes
from buffer.client import Stream
from buffer.codec import encode
from buffer.schema import Group, Version
from buffer.stream import Publish, read_frames
from tests.contract.harness import Run, digest


class Way(Protocol):
    """One way to move groups."""

    size: int
    """Bytes of one group under way."""

    def prepare(self, groups: Sequence[Group]) -> None:
        """What is not part of the turn: leases, and the form in which an engine's answer is at hand."""

    def turn(self) -> int:
        """Moves the groups prepared; how many arrived as arrays."""

    def close(self) -> None:
        """Ends what was started."""


class Ours:
    """Encode, publish with the ledger; assign, read and decode, commit with payloads deleted."""

    def __init__(self, url: str, batch: int) -> None:
        self.stream = Stream.connect(url, "bench")
        self.stream.load_library()
        self.run = Run(self.stream, batch=batch, eta=1, max_steps=1 << 30, group_size=16).start(
            "a", prompts=0
        )
        self.batch, self.step, self.size = batch, 0, 0

    def prepare(self, groups: Sequence[Group]) -> None:
        self.run.feed(self.step * self.batch, self.batch)
        self.work = []
        for group, lease in zip(groups, self.run.leases("a", self.batch), strict=True):
            group.position, group.attempt = lease.position, lease.attempt
            group.versions = [Version(lease.version, digest(lease.version))]
            self.work.append((group, lease.token))

    def turn(self) -> int:
        for group, token in self.work:
            payload = encode(group)
            call = Publish.of(group, epoch=self.run.epochs["a"], token=token, size=len(payload))
            assert self.stream.publish(call, payload).status == "ok"
        frames = read_frames(self.stream, self.run.assign(self.step).manifest.groups())
        self.size = len(payload)
        self.run.commit(self.step + 1, covered=self.step)
        self.step += 1
        arrived = sum(frame.group is not None for frame in frames)
        self.run.applied("a", self.step)
        return arrived

    def close(self) -> None:
        self.stream.close()


class Raw:
    """The arrays' bytes by XADD, XREADGROUP, XACK and XDEL, no codec, no ledger; `together`: in batches."""

    def __init__(self, url: str, *, together: bool) -> None:
        self.redis, self.together, self.size = redis.Redis.from_url(url), together, 0
        self.key = f"raw-{together}"
        self.redis.xgroup_create(self.key, "g", mkstream=True)

    def prepare(self, groups: Sequence[Group]) -> None:
        self.work = [raw_bytes(group) for group in groups]
        self.size = len(self.work[0])

    def turn(self) -> int:
        if self.together:
            for data in self.work:
                self.redis.xadd(self.key, {"g": data})
            return self._get(len(self.work))
        arrived = 0
        for data in self.work:
            self.redis.xadd(self.key, {"g": data})
            arrived += self._get(1)
        return arrived

    def _get(self, count: int) -> int:
        found: Any = self.redis.xreadgroup("g", "c", {self.key: ">"}, count=count)
        entries = [entry for entry, fields in found[0][1] if len(np.frombuffer(fields[b"g"], np.int32))]
        self.redis.xack(self.key, "g", *entries)
        self.redis.xdel(self.key, *entries)
        return len(entries)

    def close(self) -> None:
        self.redis.close()


def as_lists(group: Group) -> list[dict[str, Any]]:
    """A group as Python lists, the form in which an engine's JSON is parsed."""
    return [
        {"tokens": sample.tokens.tolist(), "logprobs": sample.logprobs.tolist(), "reward": sample.reward}
        for sample in group.samples
    ]


def as_arrays(samples: list[dict[str, Any]]) -> bool:
    """Makes arrays of lists again; whether there were any."""
    for sample in samples:
        sample["tokens"] = np.array(sample["tokens"], np.int32)
        sample["logprobs"] = np.array(sample["logprobs"], np.float32)
    return bool(samples)


class Pickled:
    """Pickled Python lists by XADD and XREAD."""

    def __init__(self, url: str) -> None:
        self.redis, self.size, self.last = redis.Redis.from_url(url), 0, b"0"

    def prepare(self, groups: Sequence[Group]) -> None:
        self.work = [as_lists(group) for group in groups]

    def turn(self) -> int:
        for group in self.work:
            data = pickle.dumps(group)
            self.redis.xadd("pickled", {"g": data})
        self.size = len(data)
        found: Any = self.redis.xread({"pickled": self.last}, count=len(self.work))
        entries = found[0][1]
        self.last = entries[-1][0]
        self.redis.xdel("pickled", *(entry for entry, _ in entries))
        return sum(as_arrays(pickle.loads(fields[b"g"])) for _, fields in entries)

    def close(self) -> None:
        self.redis.close()


class JsonLines:
    """A line of JSON (orjson) a group in a file that is synced after each, as `appendfsync always` does."""

    def __init__(self, *, sync: bool) -> None:
        self.folder, self.sync, self.size = tempfile.TemporaryDirectory(prefix="slipstream-bench-"), sync, 0
        self.path = Path(self.folder.name) / "groups.jsonl"
        self.file = self.path.open("ab")
        self.read = self.path.open("rb")

    def prepare(self, groups: Sequence[Group]) -> None:
        self.work = [as_lists(group) for group in groups]

    def turn(self) -> int:
        for group in self.work:
            line = orjson.dumps(group)
            self.file.write(line + b"\n")
            self.file.flush()
            if self.sync:
                os.fsync(self.file.fileno())
        self.size = len(line)
        return sum(as_arrays(orjson.loads(self.read.readline())) for _ in self.work)

    def close(self) -> None:
        self.file.close()
        self.read.close()
        self.folder.cleanup()
