"""How fast weights travel between GPUs: CUDA IPC and NCCL against a raw copy and a raw broadcast.

`python -m benchmarks.weightsync_gpu --json`; sizes by `--mib`. The learner is a process of its own on the
first GPU; this one is the agent and the engine, on the second GPU where there is one. Medians of five.

| way | what is timed | its floor |
|---|---|---|
| fill | the learner: host image -> its GPU, read back, every digest compared | pinned memory -> GPU |
| cuda_ipc | open, verify every chunk, copy to memory of the learner's GPU | device copy there |
| cuda_ipc, to another GPU | the same, to this process's GPU | copy from GPU to GPU |
| nccl | meet, broadcast in the group of the version before, verify | torch's broadcast in one piece |
| nccl, by sockets | on one GPU: to another slot there, for NCCL on another host | the same |
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import distributed
from torch.distributed import TCPStore

from benchmarks.harness import parser, progress, report, table
from weightsync.checksum import verify
from weightsync.communicator import PART, Communicator
from weightsync.cuda import visible_cards
from weightsync.holder import Holder
from weightsync.image import chunk_ranges, write_image
from weightsync.manifest import Manifest
from weightsync.on_gpu import OnGpu
from weightsync.protocol import Source
from weightsync.slot import opened
from weightsync.staging import Staging
from weightsync.transports import nccl
from weightsync.transports import round as broadcasts

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 60.0


class Offered(msgspec.Struct):
    """What the learner's process prints first."""

    manifest: Manifest
    """Of the version on its GPU."""
    cuda_ipc: Source
    """Where other processes can open it."""
    fill_s: list[float]
    """Seconds of each fill, digests compared."""
    pinned_s: list[float]
    """Seconds of each raw copy of the same bytes from pinned memory: the floor."""


class Learner:
    """The learner's process, from this side: each request is a line, and so is each answer."""

    def __init__(self, mib: int, rounds: int) -> None:
        argv = [sys.executable, "-m", "benchmarks.weightsync_gpu", "--hold", f"{mib},{rounds}"]
        card = os.environ["CUDA_VISIBLE_DEVICES"].rpartition(",")[2]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": card}
        if torch.cuda.device_count() == 1:
            environment["NCCL_HOSTID"] = "learner"
        self._process = subprocess.Popen(
            argv, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.offered = msgspec.json.decode(self.answer(), type=Offered)

    def ask(self, request: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{request}\n")
        self._process.stdin.flush()

    def answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def close(self) -> None:
        self._process.communicate()


def hold(mib: int, rounds: int) -> None:
    """The learner's process: a version on the first GPU it sees, and its part in broadcasts."""
    tensors = [torch.randn(1024, 4096, device="cuda").bfloat16().cpu() for _ in range(max(1, mib // 8))]
    weights = {str(number): tensor for number, tensor in enumerate(tensors)}
    image, manifest = write_image(Manifest.of(1, weights), weights)
    holder, on_gpu, seconds = Holder("127.0.0.1"), OnGpu(0, progress), []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        manifest = on_gpu.take(manifest, image)
        seconds.append(time.perf_counter() - began)
    held = holder.keep(manifest, image)
    assert on_gpu.slot is not None
    pinned = torch.empty(PART, dtype=torch.uint8, pin_memory=True)
    room = torch.empty(manifest.size, dtype=torch.uint8, device="cuda")
    raw = [timed(partial(pieces, room, pinned)) for _ in range(rounds + 1)]
    del room
    told = Offered(manifest, on_gpu.sources(held)[0], seconds[1:], raw[1:])
    print(msgspec.json.encode(told).decode(), flush=True)
    (pull,) = [source for source in holder.sources(manifest.label) if source.kind == "peer"]
    broadcasts.GATHER_S = 0.0
    for line in sys.stdin:
        if line.strip() == "round":
            one = nccl.Round("127.0.0.1", on_gpu.slot, manifest, pull, TIMEOUT_S, on_gpu.group)
            print(msgspec.json.encode(one.source).decode(), flush=True)
        elif line.strip() == "group":
            identity = Communicator.identity()
            print(identity.hex(), flush=True)
            Communicator(identity, 0, 2, 0, TIMEOUT_S).close()
        else:
            raw_broadcast(int(line), 0, on_gpu.slot.memory, rounds)
    on_gpu.close()
    holder.close()


def pieces(room: torch.Tensor, pinned: torch.Tensor) -> None:
    """The floor of a fill."""
    for offset, size in chunk_ranges(room.numel(), PART):
        room[offset : offset + size].copy_(pinned[:size], non_blocking=True)


def timed(once: Callable[[], object]) -> float:
    """Seconds, whatever the GPUs have to do for it included."""
    synchronize()
    began = time.perf_counter()
    once()
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    """Waits for all GPUs."""
    for ordinal in range(torch.cuda.device_count()):
        torch.cuda.synchronize(ordinal)


def median_s(rounds: int, once: Callable[[], object]) -> float:
    """The median time of `once`, seconds; the first is not counted."""
    return statistics.median([timed(once) for _ in range(rounds + 1)][1:])


def measure(mib: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of every way and its floor, and of the parts of a way."""
    learner = Learner(mib, rounds)
    offered, guard = learner.offered, learner.offered.cuda_ipc.address.partition(" ")[0]
    fill, pinned = statistics.median(offered.fill_s), statistics.median(offered.pinned_s)
    found = {"fill": {"seconds": fill, "floor": pinned}}
    theirs = torch.cuda.device_count() - 1
    for way, ordinal in {"cuda_ipc": theirs, "cuda_ipc, to another GPU": 0}.items():
        if way == "cuda_ipc" or theirs:
            progress(f"{mib} MiB: {way}")
            found[way] = copied(guard, offered.manifest, ordinal, rounds)
    way = "nccl" if theirs else "nccl, by sockets"
    progress(f"{mib} MiB: {way}")
    found[way] = broadcast(learner, offered.manifest, rounds)
    learner.close()
    return found


def copied(guard: str, manifest: Manifest, ordinal: int, rounds: int) -> dict[str, float]:
    """From the learner's slot to memory of a GPU."""
    room = torch.empty(manifest.size, dtype=torch.uint8, device=f"cuda:{ordinal}")

    def all_of_it() -> None:
        with opened(guard, manifest) as image:
            verify(manifest, image)
            room.copy_(image)

    def opening() -> None:
        with opened(guard, manifest):
            pass

    seconds = median_s(rounds, all_of_it)
    with opened(guard, manifest) as image:
        assert torch.equal(room, image.to(room.device))
        raw = image.clone()
        verifying = median_s(rounds, lambda: verify(manifest, image))
    floor = median_s(rounds, lambda: room.copy_(raw))
    return {"seconds": seconds, "floor": floor, "open": median_s(rounds, opening), "verify": verifying}


def broadcast(learner: Learner, manifest: Manifest, rounds: int) -> dict[str, float]:
    """From the learner's slot to this process's."""
    way = nccl.Nccl(TIMEOUT_S, visible_cards()[:1] if torch.cuda.device_count() > 1 else ["another"])

    def receive() -> None:
        learner.ask("round")
        staging = Staging(manifest, None, lambda: None)
        way.fetch(msgspec.json.decode(learner.answer(), type=Source), manifest.label, staging)
        staging.finish()

    def meet() -> None:
        learner.ask("group")
        Communicator(bytes.fromhex(learner.answer()), 1, 2, 0, TIMEOUT_S).close()

    seconds, group = median_s(rounds, receive), median_s(rounds, meet)
    store = TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
    learner.ask(str(store.port))
    room = torch.empty(manifest.size, dtype=torch.uint8, device="cuda")
    return {"seconds": seconds, "floor": raw_broadcast(store, 1, room, rounds), "group": group}


def raw_broadcast(meet: TCPStore | int, rank: int, memory: torch.Tensor, rounds: int) -> float:
    """The floor of a broadcast; `meet` is the store, or the port of the other's."""
    store = TCPStore("127.0.0.1", meet, 2, False) if isinstance(meet, int) else meet
    torch.cuda.set_device(0)
    distributed.init_process_group("nccl", store=store, rank=rank, world_size=2)
    seconds = median_s(rounds, lambda: distributed.broadcast(memory, 0))
    distributed.destroy_process_group()
    return seconds


def rows_of(sizes: dict[str, dict[str, dict[str, float]]]) -> Iterator[list[object]]:
    """The table's rows."""
    for mib, ways in sizes.items():
        total = int(mib) * (1 << 20) / 1e9
        for way, one in ways.items():
            speed, floor = total / one["seconds"], total / one["floor"]
            yield [way, int(mib), one["seconds"], speed, floor, one["floor"] / one["seconds"]]


def own_gpu_first() -> None:
    """Of two GPUs the second becomes this process's first one, which is what an agent takes.

    Who looks is another process: once asked, the driver keeps to what a process saw.
    """
    look = "from weightsync.cuda import visible_cards; print(*visible_cards())"
    argv = [sys.executable, "-c", look]
    cards = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout.split()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[: min(2, len(cards))]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(reversed(named))


def main() -> None:
    """Entry point."""
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--mib", default="1024,4096", help="sizes in MiB (default: 1024,4096)")
    options.add_argument("--hold", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.hold:
        hold(*map(int, chosen.hold.split(",")))
        return
    own_gpu_first()
    sizes = [64] if chosen.quick else list(map(int, chosen.mib.split(",")))
    rounds = 1 if chosen.quick else 5
    found: dict[str, Any] = {str(mib): measure(mib, rounds) for mib in sizes}
    headings = ["way", "MiB", "seconds", "GB/s", "floor, GB/s", "of the floor"]
    told = {"card": torch.cuda.get_device_name(0), "mib": found}
    report(told, table(headings, list(rows_of(found))), chosen)


if __name__ == "__main__":
    main()
