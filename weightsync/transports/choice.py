"""Which transports an agent tries, in which order."""

from __future__ import annotations

from weightsync.config import WAYS, WeightSyncConfig
from weightsync.transports.base import Transport
from weightsync.transports.delta import Delta
from weightsync.transports.disk import Disk
from weightsync.transports.gloo import Gloo
from weightsync.transports.peer import Peer
from weightsync.transports.shm import Shm

SILENCE_S = 10.0
"""A holder that sends nothing for so long is given up for another one."""


def transports(config: WeightSyncConfig) -> list[Transport]:
    """The transports of a configuration, the cheapest first; each stands aside where it does not reach.

    A delta needs the version before, and a broadcast all agents at once: who has missed either pulls.
    """
    silence_s = min(SILENCE_S, config.timeout_s)
    made: dict[str, Transport] = {
        "shm": Shm(),
        "delta": Delta(silence_s),
        "peer": Peer(silence_s),
        "disk": Disk(),
        "gloo": Gloo(config.timeout_s),
    }
    if config.transport == "auto":
        kinds = list(WAYS)
    elif config.transport in ("delta", "gloo"):
        kinds = [config.transport, "peer"]
    else:
        kinds = [config.transport]
    return [made[kind] for kind in kinds if kind in made]
