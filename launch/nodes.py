"""Which ranks of the learner this machine starts, and where all of them meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from buffer.local_server import free_port
from launch.errors import LaunchError


@dataclass(frozen=True)
class Nodes:
    """A learner of `count` nodes with `per_node` processes each.

    >>> [rank["RANK"] for rank in Nodes(2, 2, 1, "10.0.0.7:29500").ranks()]
    ['2', '3']
    >>> Nodes().ranks()
    [{}]
    """

    count: int = 1
    """Machines that train together, at least 1."""
    per_node: int = 1
    """Processes a node: one a GPU, or as many as the CPU has room for."""
    node: int | None = None
    """The node that this machine is, 0 the one with rank 0; None: this machine is all of them."""
    meet: str = ""
    """host:port of node 0 at which the ranks meet; needed if `node` is given."""

    def check(self) -> None:
        """Raises `LaunchError` for options that do not fit together."""
        if self.count < 1 or self.per_node < 1:
            raise LaunchError(
                f"--nodes / --nproc-per-node: got {self.count} / {self.per_node}, expected 1 or more"
            )
        if self.node is not None and not 0 <= self.node < self.count:
            raise LaunchError(
                f"--node: got {self.node}, expected 0 to {self.count - 1} with --nodes {self.count}"
            )
        host, colon, port = self.meet.rpartition(":")
        if self.node is not None and not (host and colon and port.isdigit()):
            raise LaunchError(
                f"--meet: got {self.meet!r} with --node, expected HOST:PORT of node 0, the same on all nodes"
            )
        if self.node is None and self.meet:
            raise LaunchError(
                f"--meet: got {self.meet!r} without --node, which says which node this machine is"
            )

    def ranks(self) -> list[Mapping[str, str]]:
        """The environment of each process that this machine starts: torchrun's variables, nothing for a
        learner of one process."""
        if self.count * self.per_node == 1:
            return [{}]
        host, _, port = (self.meet or f"127.0.0.1:{free_port()}").rpartition(":")
        first = 0 if self.node is None else self.node
        last = self.count if self.node is None else self.node + 1
        shared = {
            "WORLD_SIZE": str(self.count * self.per_node),
            "LOCAL_WORLD_SIZE": str(self.per_node),
            "MASTER_ADDR": host.strip("[]"),
            "MASTER_PORT": port,
        }
        if host == "127.0.0.1":
            shared["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo looks up the host's name, which may not resolve
        return [
            {**shared, "RANK": str(node * self.per_node + local), "LOCAL_RANK": str(local)}
            for node in range(first, last)
            for local in range(self.per_node)
        ]

    @property
    def leads(self) -> bool:
        """Whether rank 0 is on this machine."""
        return not self.node
