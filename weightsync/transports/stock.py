"""The stock transport: SGLang's own `update_weights_from_distributed`, fed from the learner.

Learner and engine meet in a two-rank gloo group of their own, outside torch's default group. Each
version is one broadcast of one flat byte tensor, which is what SGLang's ``flattened_bucket`` expects:

    group = StockGroup.open(name, address="127.0.0.1", timeout_s=30, invite=post_init_weights_group)
    post_update_weights(...)        # must not wait for the answer: it comes after the broadcast
    group.send(tensors)             # same tensors, same order as announced
    group.close()
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from datetime import timedelta

import torch
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore

from weightsync.errors import WeightSyncError


class StockGroup:
    """A two-rank gloo group with one engine; this side is rank 0 and sends.

    Lifecycle: `open`, any number of `send`, `close`. After an error only `close` is left. Everything
    ends within the timeout, also when the engine dies on the way.
    """

    def __init__(self, name: str, store: TCPStore, gloo: ProcessGroupGloo, timeout_s: float) -> None:
        """Use `open`."""
        self.name = name
        """The group's name in the engine; an engine takes a name once in its life."""
        self._store, self._gloo = store, gloo
        self._timeout_s = timeout_s

    @classmethod
    def open(cls, name: str, *, address: str, timeout_s: float, invite: Callable[[int], None]) -> StockGroup:
        """Wait at a free port of `address` until the engine has come.

        Args:
            name: the group's name, never used with this engine before.
            address: an address of this host that the engine can reach; nothing listens on others.
            timeout_s: for the meeting, and later for each `send`.
            invite: called once with the port, to tell the engine; it must not wait until it has come.

        Raises `WeightSyncError` if the engine does not come in time.
        """
        timeout = timedelta(seconds=timeout_s)
        try:
            # The store takes over the listening socket: on this address only, and on a port that
            # nobody else can have taken since it was chosen.
            listener = socket.create_server((address, 0))
            port = listener.getsockname()[1]
            store = TCPStore(
                address,
                port,
                world_size=2,
                is_master=True,
                timeout=timeout,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )
            invite(port)
            options = ProcessGroupGloo._Options()
            options._timeout = timeout
            options._devices = [ProcessGroupGloo.create_device(hostname=address)]
            gloo = ProcessGroupGloo(_rendezvous_of(name, store), 0, 2, options)
        except (RuntimeError, OSError) as error:
            raise WeightSyncError(
                f"group {name}: the engine did not come to {address} within {timeout_s:g} s: "
                f"{_first(error)}; see the engine's log, and restart the actor if its engine is gone"
            ) from error
        return cls(name, store, gloo, timeout_s)

    def send(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Broadcast the tensors, in order; the engine must have been told the same names and shapes.

        Raises `WeightSyncError` if the engine is gone or does not take them in time. That it took them
        is no proof that it loaded them: its answer to the update says so.
        """
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        timeout = timedelta(seconds=self._timeout_s)
        options.timeout = timeout
        try:
            self._gloo.broadcast([flatten(tensors)], options).wait(timeout)
        except RuntimeError as error:
            raise WeightSyncError(
                f"group {self.name}: the engine did not take {len(tensors)} tensors within "
                f"{self._timeout_s:g} s: {_first(error)}; restart the actor if its engine is gone"
            ) from error

    def close(self) -> None:
        """Leave the group and free its port."""
        self._gloo.shutdown()
        del self._gloo, self._store


def flatten(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The bytes of all tensors in order, uint8 [total bytes], as SGLang's `FlattenedTensorBucket` lays
    them out: without gaps.

    The engine views each tensor in place, so its offset must be a multiple of its item size; wider
    types first is always right. Raises `WeightSyncError` naming the tensor otherwise.

    >>> flatten({"a": torch.ones(2, dtype=torch.int16), "b": torch.zeros(1, dtype=torch.uint8)}).tolist()
    [1, 0, 1, 0, 0]
    """
    offset = 0
    for name, tensor in tensors.items():
        if offset % tensor.element_size():
            raise WeightSyncError(
                f"tensor {name}: offset got {offset}, expected a multiple of {tensor.element_size()}; "
                "send tensors of wider types first"
            )
        offset += tensor.nbytes
    return torch.cat([tensor.detach().cpu().reshape(-1).view(torch.uint8) for tensor in tensors.values()])


def _rendezvous_of(name: str, store: TCPStore) -> PrefixStore:
    """The part of the store where SGLang's `init_custom_process_group` looks for its peers.

    It prefixes the group's name, then torch's `_new_process_group_helper` does so again and adds the
    device.
    """
    return PrefixStore("cpu/", PrefixStore(f"{name}/", PrefixStore(name, store)))


def _first(error: Exception) -> str:
    """The first line of a message: torch appends C++ stack traces."""
    return str(error).partition("\n")[0]
