"""Which address of this host the others of a run can reach."""

from __future__ import annotations

import socket
from typing import Any


def address_towards(client: Any) -> str:
    """The address of this host on its way to the Redis of `client`; loopback for a unix socket.

    Who reaches that Redis from elsewhere is taken to reach this address, too.
    """
    nodes = client.get_primaries() if hasattr(client, "get_primaries") else []
    if nodes:
        host, port = nodes[0].host, nodes[0].port
    else:
        options = client.get_connection_kwargs()
        if "host" not in options:
            return "127.0.0.1"
        host, port = options["host"], options["port"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing: it only chooses a route
        return probe.getsockname()[0]
