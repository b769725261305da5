"""A real Redis Cluster of three nodes on this machine.

with Cluster(tmp_path) as cluster:
    Stream.connect(cluster.url, cluster.run_over_all("demo", shards=6), shards=6)
"""

from __future__ import annotations

from collections import Counter
from itertools import count
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry

from buffer.keys import shard_key
from buffer.local_server import free_port
from tests.contract.servers import RawServer
from tests.waiting import wait_until

NODES = 3
SLOTS = 16384
NODE_TIMEOUT_MS = 30_000
"""Long, so that a busy machine makes no node think that another is gone."""


class Cluster:
    """Three primaries, a third of the slots each, no replicas; every write is synced."""

    def __init__(self, folder: Path) -> None:
        self.nodes = [RawServer(folder / str(number), self._settings()) for number in range(NODES)]

    @staticmethod
    def _settings() -> dict[str, object]:
        return {
            "port": free_port(),
            "cluster-port": free_port(),
            "cluster-enabled": "yes",
            "cluster-node-timeout": NODE_TIMEOUT_MS,
            "appendonly": "yes",
            "appendfsync": "always",
        }

    @property
    def url(self) -> str:
        """URL of one of the nodes."""
        return f"redis://127.0.0.1:{self.nodes[0].port}/0"

    def client(self, node: int) -> redis.Redis:
        """A plain client of one node, which follows no redirection."""
        return redis.Redis(port=self.nodes[node].port, retry=Retry(NoBackoff(), 0), socket_timeout=5)

    def owner(self, key: str) -> int:
        """The node that holds a key."""
        return min(key_slot(key.encode()) // (SLOTS // NODES), NODES - 1)

    def run_over_all(self, prefix: str, shards: int) -> str:
        """A run name whose payload shards, a multiple of the nodes, are dealt out to them evenly."""
        names = (f"{prefix}{number}" for number in count())
        even = dict.fromkeys(range(NODES), shards // NODES)
        return next(
            name
            for name in names
            if Counter(self.owner(shard_key(name, shard)) for shard in range(shards)) == even
        )

    def __enter__(self) -> Cluster:
        for node in self.nodes:
            node.start()
        for number in range(NODES):
            client = self.client(number)
            last = SLOTS - 1 if number == NODES - 1 else (number + 1) * (SLOTS // NODES) - 1
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", number * (SLOTS // NODES), last)
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", self.nodes[0].port, self.nodes[0].bus)
            client.close()
        self.wait()
        return self

    def wait(self) -> None:
        """Waits until every node thinks that the cluster is whole."""
        wait_until(lambda: all(map(self._whole, range(NODES))), 30, "the cluster", pause=0.05)

    def _whole(self, number: int) -> bool:
        with self.client(number) as client:
            info = client.execute_command("CLUSTER INFO")
            return info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == NODES

    def notice_after(self, milliseconds: int) -> None:
        """How long a node may be silent before the others take the cluster for down."""
        for number in range(NODES):
            with self.client(number) as client:
                client.config_set("cluster-node-timeout", milliseconds)

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.kill()
