"""Ways to move groups that need Ray; `make bench` installs what they import (requirements/bench.txt)."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.ways import as_arrays, as_lists
from buffer.schema import Group


def start_ray() -> Any:
    """A Ray on this machine alone. Raises `ImportError` if it is not installed."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    if not ray.is_initialized():
        ray.init(
            address="local",
            num_cpus=8,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            object_store_memory=512 << 20,
        )
    return ray


class RayQueue:
    """A queue in a Ray actor; Ray serialises with cloudpickle. As Python lists, or as arrays."""

    def __init__(self, *, lists: bool) -> None:
        self.ray, self.lists, self.size = start_ray(), lists, 0

        class Queue:
            def __init__(self) -> None:
                self.items: list[Any] = []

            def put(self, item: Any) -> None:
                self.items.append(item)

            def get(self) -> Any:
                return self.items.pop(0)

        self.queue = self.ray.remote(num_cpus=0)(Queue).remote()

    def prepare(self, groups: Sequence[Group]) -> None:
        lists = [as_lists(group) for group in groups]
        self.work = lists if self.lists else [_arrays(group) for group in lists]
        self.size = len(pickle.dumps(self.work[0]))

    def turn(self) -> int:
        for group in self.work:
            self.ray.get(self.queue.put.remote(group))
        found = self.ray.get([self.queue.get.remote() for _ in self.work])
        return sum(as_arrays(group) if self.lists else bool(group) for group in found)

    def close(self) -> None:
        self.ray.kill(self.queue)


def _arrays(group: list[dict[str, Any]]) -> list[dict[str, Any]]:
    as_arrays(group)
    return group


class TransferQueue:
    """TransferQueue with its in-memory storage: one put a group, one get and one clear a batch."""

    def __init__(self) -> None:
        start_ray()
        import torch
        import transfer_queue
        from tensordict import TensorDict

        self.torch, self.tq, self.tensordict, self.size = torch, transfer_queue, TensorDict, 0
        transfer_queue.init()

    def prepare(self, groups: Sequence[Group]) -> None:
        self.work = []
        for place, group in enumerate(groups):
            columns = {
                "tokens": np.stack([sample.tokens for sample in group.samples]),
                "logprobs": np.stack([sample.logprobs for sample in group.samples]),
                "reward": np.array([sample.reward for sample in group.samples], np.float32),
            }
            fields = {name: self.torch.from_numpy(column) for name, column in columns.items()}
            keys = [f"{place}-{sample}" for sample in range(len(group.samples))]
            self.work.append((keys, self.tensordict(fields, batch_size=len(keys))))
            self.size = sum(column.nbytes for column in columns.values())

    def turn(self) -> int:
        for keys, fields in self.work:
            self.tq.kv_batch_put(keys=keys, partition_id="train", fields=fields)
        keys = [key for keys, _ in self.work for key in keys]
        found = self.tq.kv_batch_get(keys=keys, partition_id="train")
        self.tq.kv_clear(keys=keys, partition_id="train")
        return found["tokens"].shape[0] * len(self.work) // len(keys)

    def close(self) -> None:
        self.tq.close()
