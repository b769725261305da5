"""How fast weights travel: each transport against the raw medium below it.

`python -m benchmarks.weightsync --json`; sizes by `--mib`. The learner's side is a process of its own,
as in a run, this one is the agent. Every figure is the median of several rounds. A way and its floor take
turns, so that whatever else the machine does slows both. Both have the memory of their image in reserve, as
in a run, where it is taken between versions; `refill_seconds` says how long that took. A floor brings the
same bytes into that memory in the simplest loop, in one thread but for a sender's, without digests, chunks
or requests, with its group already made.

| way | what is timed | its floor |
|---|---|---|
| export | tensors -> sealed image, its digests (the learner's thread) | memcpy of them |
| shm | open, verify every chunk, by up to eight threads | one pass of xxh3-128 over the image, newly mapped |
| peer | pull over loopback TCP, a connection for every two cores | one socket: sendfile, recv_into, write |
| disk | write a new file, fsync, read, verify | write, fsync, read, with nothing else |
| delta | pull what a step changed, apply, verify; making it is timed apart | as for peer: the whole version |
| gloo | meet, make a group, broadcast chunk by chunk, verify | gloo broadcast in one piece, then written |
| bucket | flatten, broadcast into a new tensor: SGLang's own update by `flattened_bucket` | broadcast alone |
| stock | a broadcast and a new tensor for each: SGLang's own update without | the same |

Where there are GPUs, the ways of `benchmarks.weightsync_gpu` are measured as well.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import torch
import xxhash

from benchmarks.harness import parser, progress, report, table
from weightsync.cuda import visible_cards
from weightsync.holder import Holder
from weightsync.image import Image, Reserve, write_image
from weightsync.manifest import Manifest
from weightsync.protocol import Source
from weightsync.staging import Staging
from weightsync.transports import gloo
from weightsync.transports import round as broadcasts
from weightsync.transports.base import Transport
from weightsync.transports.delta import Delta, deltas
from weightsync.transports.disk import Disk, save
from weightsync.transports.peer import Peer
from weightsync.transports.shm import Shm
from weightsync.transports.stock import flatten

ROOT = Path(__file__).parents[1]
CHANGED = 0.01
"""Part of the bf16 words that a step changes: PULSE measured about 1 % at usual learning rates."""


RESERVE = Reserve()
"""Of the ways, as a learner and an agent have it."""


class Held(msgspec.Struct):
    """What the holder's process prints: a version, its sources, and how long it took to make it."""

    manifest: Manifest
    """Of the version that is held."""
    sources: list[Source]
    """The first is the version before it by shared memory, then all of this one."""
    export_s: list[float]
    """Of exporting, and of its floor."""
    delta_s: float
    """Seconds to make the delta."""
    delta_bytes: int
    """Its bytes, all chunks together."""
    raw_port: int
    """Where it sends its bytes to whoever connects."""


def weights(mib: int, seed: int) -> dict[str, torch.Tensor]:
    """bf16 tensors of 8 MiB each, which together have `mib` MiB."""
    draw = torch.Generator().manual_seed(seed)
    return {
        f"layers.{number}.weight": torch.randn(1024, 4096, generator=draw).bfloat16()
        for number in range(max(1, mib // 8))
    }


def stepped(before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with a part of the words changed."""
    draw, after = torch.Generator().manual_seed(7), {}
    for name, tensor in before.items():
        changed = torch.rand(tensor.shape, generator=draw) < CHANGED
        after[name] = torch.where(changed, tensor + 0.01, tensor)
    return after


def hold(mib: int, rounds: int, port: int) -> None:
    """The learner's process: makes versions 0 and 1 and holds them until its input ends."""
    holder, old = Holder("127.0.0.1"), weights(mib, 0)
    parent, before = write_image(Manifest.of(0, old), old)
    holder.keep(before, parent)
    new = stepped(old)
    del old
    named = msgspec.structs.replace(Manifest.of(1, new), parent=before.digest)
    image, manifest = write_image(named, new)
    began = time.perf_counter()
    found = deltas(manifest, parent, image)
    delta_s = time.perf_counter() - began
    parts = [memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) for tensor in new.values()]
    RESERVE.allocate(manifest.size).close()  # from the first round on it has what is needed
    exporting = median_s(
        rounds, lambda: write_image(named, new, allocate=RESERVE.allocate)[0], lambda: memcpy(parts)
    )
    held = holder.keep(manifest, image, found)
    size = sum(map(len, held.delta))
    sources = [*holder.sources(before.label)[:1], *holder.sources(manifest.label)]
    raw = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, args=(raw, image), daemon=True).start()
    told = Held(manifest, sources, exporting, delta_s, size, raw.getsockname()[1])
    print(msgspec.json.encode(told).decode(), flush=True)
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, False, timedelta(seconds=60))
    group, whole = _gloo(store, 0), flatten(new)
    for line in sys.stdin:  # each asks for a broadcast
        if line == "round\n":
            offered = gloo.Round("127.0.0.1", manifest, image, sources[-1], 60).source
            print(msgspec.json.encode(offered).decode(), flush=True)
        elif line == "whole\n":
            broadcast(group, [whole])
        elif line == "bucket\n":
            broadcast(group, [flatten(new)])
        else:
            broadcast(group, [tensor.reshape(-1).view(torch.uint8) for tensor in new.values()])


def median_s(
    rounds: int, *ways: Callable[[], object], between: Callable[[], object] = lambda: None
) -> list[float]:
    """The median time of each of `ways`, seconds; they take turns."""
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for way, spent in zip(ways, seconds, strict=True):
            RESERVE.refill()
            between()
            began = time.perf_counter()
            kept = way()
            spent.append(time.perf_counter() - began)
            if isinstance(kept, Image):
                kept.close()
    return [statistics.median(spent) for spent in seconds]


def refill_s(size: int, rounds: int) -> float:
    """Median seconds in which memory for an image of `size` bytes is taken."""
    seconds = []
    for _ in range(rounds):
        reserve = Reserve()
        reserve.allocate(size).close()
        began = time.perf_counter()
        reserve.refill()
        seconds.append(time.perf_counter() - began)
        reserve.close()
    return statistics.median(seconds)


def staged(transport: Transport, source: Source, manifest: Manifest, parent: Image | None) -> Image:
    """A version brought here, verified and sealed."""
    staging = Staging(manifest, parent, lambda: None, RESERVE.allocate)
    transport.fetch(source, manifest.label, staging)
    return staging.finish()


def memcpy(parts: Sequence[memoryview]) -> Image:
    """The floor of everything that makes an image: its parts written into it."""
    image, offset = RESERVE.allocate(sum(map(len, parts))), 0
    for part in parts:
        image.write(offset, part)
        offset += len(part)
    return image


def socket_copy(port: int, size: int) -> Image:
    """The floor of a pull: an image through a loopback socket from the learner's process."""
    target, room, filled = RESERVE.allocate(size), memoryview(bytearray(1 << 20)), 0
    with socket.create_connection(("127.0.0.1", port)) as client:
        while filled < size:
            count = client.recv_into(room)
            target.write(filled, room[:count])
            filled += count
    return target


def serve(server: socket.socket, image: Image) -> None:
    """The other side of it; a thread."""
    while True:
        peer, _ = server.accept()
        with peer, os.fdopen(os.dup(image.descriptor), "rb", buffering=0) as file:
            peer.sendfile(file)


def disk_copy(data: memoryview, path: Path) -> Image:
    """The floor of a folder: write, fsync, read."""
    with path.open("wb", buffering=0) as file:
        for offset in range(0, len(data), 64 << 20):
            file.write(data[offset : offset + (64 << 20)])
        os.fsync(file.fileno())
    target, room, filled = RESERVE.allocate(len(data)), memoryview(bytearray(1 << 20)), 0
    with path.open("rb", buffering=0) as file:
        while count := os.readv(file.fileno(), [room]):
            target.write(filled, room[:count])
            filled += count
    return target


def broadcast(group: torch.distributed.ProcessGroupGloo, tensors: Iterable[torch.Tensor]) -> None:
    """The learner's tensors, uint8, come into those of the other process, one by one."""
    for tensor in tensors:
        group.broadcast([tensor], _root()).wait()


def _gloo(store: torch.distributed.TCPStore, rank: int) -> torch.distributed.ProcessGroupGloo:
    options = torch.distributed.ProcessGroupGloo._Options()
    options._devices = [torch.distributed.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    return torch.distributed.ProcessGroupGloo(store, rank, 2, options)


def _root() -> torch.distributed.BroadcastOptions:
    options = torch.distributed.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return options


def measure(mib: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of every way and its floor, for weights of `mib` MiB."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=60), wait_for_workers=False)
    argv = [sys.executable, "-m", "benchmarks.weightsync", "--hold", f"{mib},{rounds},{store.port}"]
    process = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    asking, answers = process.stdin, process.stdout
    assert asking is not None
    assert answers is not None
    held = msgspec.json.decode(answers.readline(), type=Held)

    group = _gloo(store, 1)

    def asked(line: bytes) -> None:
        asking.write(line)
        asking.flush()

    def through_gloo() -> Image:
        """A broadcast to one agent."""
        asked(b"round\n")
        offered = msgspec.json.decode(answers.readline(), type=Source)
        return staged(gloo.Gloo(60), offered, held.manifest, None)

    def pushed(line: bytes, rooms: Iterable[torch.Tensor]) -> None:
        """The same bytes by torch's broadcast."""
        asked(line)
        broadcast(group, rooms)

    with tempfile.TemporaryDirectory(prefix="slipstream-bench-", dir=ROOT) as folder:
        found = _measure(Path(folder), held, through_gloo, pushed, rounds)
    process.communicate()
    if visible_cards():
        progress(f"{mib} MiB: GPUs")
        argv = [sys.executable, "-m", "benchmarks.weightsync_gpu", "--json", "--mib", str(mib)]
        answer = subprocess.run(argv, check=True, cwd=ROOT, stdout=subprocess.PIPE)
        found |= msgspec.json.decode(answer.stdout.splitlines()[-1])["mib"][str(mib)]
    return found


def _measure(
    folder: Path,
    held: Held,
    through_gloo: Callable[[], Image],
    pushed: Callable[[bytes, Iterable[torch.Tensor]], None],
    rounds: int,
) -> dict[str, dict[str, float]]:
    manifest, (before, shm, changed, pull) = held.manifest, held.sources
    RESERVE.allocate(manifest.size).close()  # as in `hold`
    image = staged(Shm(), shm, manifest, None)
    data = memoryview(image.readable())
    parent = Image.open(before.address.partition(" ")[0], manifest.size)
    found = dict[str, dict[str, float]]()

    files = (folder / str(number) for number in itertools.count())  # a block that was freed is a slow one

    def through_disk() -> Image:
        return staged(Disk(), save(next(files), manifest, image, 1), manifest, None)

    def timed(
        way: str,
        once: Callable[[], object],
        floor: Callable[[], object],
        between: Callable[[], object] = lambda: None,
    ) -> None:
        progress(f"{manifest.size >> 20} MiB: {way}")
        seconds, least = median_s(rounds, once, floor, between=between)
        found[way] = {"seconds": seconds, "floor": least}

    found["export"] = dict(zip(("seconds", "floor"), held.export_s, strict=True))
    found["export"]["refill_seconds"] = refill_s(manifest.size, rounds)
    timed("shm", lambda: staged(Shm(), shm, manifest, None), lambda: xxhash.xxh3_128_digest(image.readable()))
    timed(
        "peer",
        lambda: staged(Peer(60), pull, manifest, None),
        lambda: socket_copy(held.raw_port, manifest.size),
    )
    timed("disk", through_disk, lambda: disk_copy(data, next(files)), os.sync)
    timed(
        "delta",
        lambda: staged(Delta(60), changed, manifest, parent),
        lambda: socket_copy(held.raw_port, manifest.size),
    )
    found["delta"] |= {
        "memcpy_seconds": median_s(rounds, lambda: memcpy([data]))[0],
        "make_seconds": held.delta_s,
        "bytes_to_full": held.delta_bytes / manifest.size,
    }
    room = torch.empty(manifest.size, dtype=torch.uint8)
    sizes = [2 * math.prod(entry.shape) for entry in manifest.tensors]

    def raw_gloo() -> Image:
        pushed(b"whole\n", [room])
        return memcpy([memoryview(room.numpy())])

    def new(sizes: Iterable[int]) -> Iterator[torch.Tensor]:
        return (torch.empty(size, dtype=torch.uint8) for size in sizes)

    pushed(b"whole\n", [room])
    timed("gloo", through_gloo, raw_gloo)
    found["gloo"]["broadcast_seconds"] = median_s(rounds, lambda: pushed(b"whole\n", [room]))[0]
    timed("bucket", lambda: pushed(b"bucket\n", new([manifest.size])), lambda: pushed(b"whole\n", [room]))
    timed("stock", lambda: pushed(b"stock\n", new(sizes)), lambda: pushed(b"whole\n", [room]))
    return found


def rows_of(sizes: dict[str, dict[str, dict[str, float]]]) -> list[list[object]]:
    """The table's rows."""
    return [
        [way, int(mib), speed(mib, one["seconds"]), speed(mib, one["floor"]), one["floor"] / one["seconds"]]
        for mib, ways in sizes.items()
        for way, one in ways.items()
    ]


def speed(mib: str, seconds: float) -> float:
    """GB/s (10^9 bytes)."""
    return int(mib) * (1 << 20) / 1e9 / seconds


def main() -> None:
    """Entry point."""
    options = parser(__doc__.partition("\n")[0])
    options.add_argument(
        "--mib",
        default="96,1024",
        help="sizes in MiB (default: 96,1024); 8 of the largest must fit into memory",
    )
    options.add_argument("--rounds", type=int, default=15, help="of each way and size (default: 15)")
    options.add_argument("--hold", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    broadcasts.GATHER_S = 0.0
    if chosen.hold:
        hold(*map(int, chosen.hold.split(",")))
        return
    sizes = [16] if chosen.quick else list(map(int, chosen.mib.split(",")))
    rounds = 1 if chosen.quick else chosen.rounds
    found: dict[str, Any] = {str(mib): measure(mib, rounds) for mib in sizes}
    headings = ["way", "MiB", "GB/s", "floor, GB/s", "of the floor"]
    report({"mib": found}, table(headings, rows_of(found)), chosen)


if __name__ == "__main__":
    main()
