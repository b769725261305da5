"""Which transports an agent tries, in which order."""

from __future__ import annotations

from collections.abc import Sequence

from weightsync.config import ON_GPU, WAYS, WeightSyncConfig
from weightsync.cuda import visible_cards
from weightsync.errors import NoCuda
from weightsync.transports.base import Transport
from weightsync.transports.cuda_ipc import CudaIpc
from weightsync.transports.delta import Delta
from weightsync.transports.disk import Disk
from weightsync.transports.gloo import Gloo
from weightsync.transports.nccl import Nccl
from weightsync.transports.peer import Peer
from weightsync.transports.shm import Shm

SILENCE_S = 10.0
"""A holder that sends nothing for so long is given up for another one."""
_AFTER = {
    "delta": ["peer"],
    "gloo": ["peer"],
    "cuda_ipc": ["shm", "peer"],
    "nccl": ["cuda_ipc", "shm", "peer"],
}
"""What is tried where a transport that was asked for does not reach."""


def transports(config: WeightSyncConfig, cards: Sequence[str] | None = None) -> list[Transport]:
    """The transports of a configuration, the cheapest first; each stands aside where it does not reach.

    A delta needs the version before, and a broadcast all agents at once: who has missed either pulls. `cards`
    are the GPUs that this process sees, looked up if absent. Raises `NoCuda` for a transport that needs one.
    """
    cards = visible_cards() if cards is None else cards
    if config.transport in ON_GPU and not cards:
        raise NoCuda(
            f'weightsync.transport: got "{config.transport}", but this process sees no CUDA GPU; set "auto", '
            "or let CUDA_VISIBLE_DEVICES of the actor name its engine's"
        )
    silence_s = min(SILENCE_S, config.timeout_s)
    made: dict[str, Transport] = {
        "shm": Shm(),
        "delta": Delta(silence_s),
        "peer": Peer(silence_s),
        "disk": Disk(),
        "gloo": Gloo(config.timeout_s),
    }
    if cards:
        made |= {"cuda_ipc": CudaIpc(cards), "nccl": Nccl(config.timeout_s, cards)}
    named = [config.transport, *_AFTER.get(config.transport, [])]
    kinds = WAYS if config.transport == "auto" else named
    return [made[kind] for kind in kinds if kind in made]
