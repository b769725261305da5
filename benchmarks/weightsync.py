"""How fast weights travel: each transport against the raw medium below it.

`python -m benchmarks.weightsync --json`; sizes by `--mib`. The learner's side is a process of its own,
as in a run, this one is the agent. Every figure is the median of several rounds, each into memory that
was never used before, which on most machines costs more than the copy; the floors pay the same.

| way | what is timed | its floor |
|---|---|---|
| export | tensors -> sealed image with its chunks' digests (the learner's thread) | memcpy into new memory |
| shm | open, verify every chunk | one reading pass of xxh3-128 |
| peer | pull over loopback TCP, verify | the same bytes over a loopback socket, sendfile and recv_into |
| disk | write, fsync, read, verify | write, fsync, read, with nothing else |
| delta | pull what a step changed, apply, verify; making it is timed apart | memcpy into new memory |
| gloo | gather one agent, broadcast chunk by chunk, verify | gloo broadcast in one piece |
| stock | flatten and broadcast over gloo, as SGLang itself is served | gloo broadcast |

Where there are GPUs, the ways of `benchmarks.weightsync_gpu` are measured as well.
"""

from __future__ import annotations

import argparse
import itertools
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import torch
import xxhash

from benchmarks.harness import parser, progress, report, table
from weightsync.cuda import visible_cards
from weightsync.holder import Holder
from weightsync.image import Image, write_image
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


class Held(msgspec.Struct):
    """What the holder's process prints: a version, its sources, and how long it took to make it."""

    manifest: Manifest
    sources: list[Source]
    export_s: list[float]
    delta_s: float
    delta_bytes: int


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


def hold(mib: int, rounds: int) -> None:
    """The learner's process: makes versions 0 and 1, holds them until its input ends."""
    holder, old = Holder("127.0.0.1"), weights(mib, 0)
    parent, before = write_image(Manifest.of(0, old), old)
    holder.keep(before, parent)
    new = stepped(old)
    named = msgspec.structs.replace(Manifest.of(1, new), parent=before.digest)
    seconds = []
    image, manifest = write_image(named, new)
    for _ in range(rounds):
        image.close()
        began = time.perf_counter()
        image, manifest = write_image(named, new)
        seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
    found = deltas(manifest, parent, image)
    delta_s = time.perf_counter() - began
    held = holder.keep(manifest, image, found)
    size = sum(map(len, held.delta))
    told = Held(
        manifest, [*holder.sources(before.label)[:1], *holder.sources(manifest.label)], seconds, delta_s, size
    )
    print(msgspec.json.encode(told).decode(), flush=True)
    sys.stdin.read()


def median_s(rounds: int, once: Callable[[], object]) -> float:
    """The median time of `once`, seconds."""
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        kept = once()
        seconds.append(time.perf_counter() - began)
        if isinstance(kept, Image):
            kept.close()
    return statistics.median(seconds)


def staged(transport: Transport, source: Source, manifest: Manifest, parent: Image | None) -> Image:
    """A version brought here, verified and sealed."""
    staging = Staging(manifest, parent, lambda: None)
    transport.fetch(source, manifest.label, staging)
    return staging.finish()


def memcpy(data: memoryview) -> Image:
    """The floor of everything that makes an image: one write into new memory."""
    image = Image.allocate(len(data))
    image.write(0, data)
    return image


def socket_copy(image: Image) -> Image:
    """The floor of a pull: an image through a loopback socket into new memory."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=_send_image, args=(server, image))
        thread.start()
        with socket.create_connection(server.getsockname()) as client:
            target = Image.allocate(image.size)
            with target.writable() as room, memoryview(room) as view:
                filled = 0
                while filled < image.size:
                    filled += client.recv_into(view[filled : filled + (16 << 20)])
        thread.join()
    return target


def _send_image(server: socket.socket, image: Image) -> None:
    peer, _ = server.accept()
    with peer, os.fdopen(os.dup(image.descriptor), "rb", buffering=0) as file:
        peer.sendfile(file)


def through_gloo(image: Image, manifest: Manifest, holder: Source) -> Image:
    """A broadcast to one agent, both ends in this process."""
    one = gloo.Round("127.0.0.1", manifest, image, holder, 60)
    return staged(gloo.Gloo(60), one.source, manifest, None)


def disk_copy(data: memoryview, path: Path) -> Image:
    """The floor of a folder: write, fsync, read into new memory."""
    with path.open("wb", buffering=0) as file:
        for offset in range(0, len(data), 64 << 20):
            file.write(data[offset : offset + (64 << 20)])
        os.fsync(file.fileno())
    target = Image.allocate(len(data))
    with path.open("rb", buffering=0) as file, target.writable() as room, memoryview(room) as view:
        filled = 0
        while filled < len(data):
            filled += os.readv(file.fileno(), [view[filled:]])
    return target


def gloo_seconds(tensors: dict[str, torch.Tensor], rounds: int) -> tuple[float, float]:
    """(stock push, raw broadcast): seconds to a second process, `flatten` included in the first."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=60), wait_for_workers=False)
    size = sum(tensor.nbytes for tensor in tensors.values())
    argv = [sys.executable, "-m", "benchmarks.weightsync", "--receive", f"{store.port},{size},{2 * rounds}"]
    receiver = subprocess.Popen(argv, cwd=ROOT)
    group = _gloo(store, 0)
    flat = flatten(tensors)
    raw = median_s(rounds, lambda: group.broadcast([flat], _root()).wait())
    stock = median_s(rounds, lambda: group.broadcast([flatten(tensors)], _root()).wait())
    assert receiver.wait(60) == 0
    return stock, raw


def receive(port: int, size: int, times: int) -> None:
    """The engine's process of a gloo push."""
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, False, timedelta(seconds=60))
    group = _gloo(store, 1)
    for _ in range(times):
        group.broadcast([torch.empty(size, dtype=torch.uint8)], _root()).wait()


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
    argv = [sys.executable, "-m", "benchmarks.weightsync", "--hold", f"{mib},{rounds}"]
    process = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    held = msgspec.json.decode(process.stdout.readline(), type=Held)
    before, shm, changed, pull = held.sources
    with tempfile.TemporaryDirectory(prefix="slipstream-bench-", dir=ROOT) as folder:
        found = _measure(Path(folder), held, before, {"shm": shm, "delta": changed, "peer": pull}, rounds)
    process.communicate()
    progress(f"{mib} MiB: stock")
    stock, raw = gloo_seconds(weights(mib, 1), rounds)
    found["stock"] = {"seconds": stock, "floor": raw}
    found["gloo"]["floor"] = raw
    if visible_cards():
        progress(f"{mib} MiB: GPUs")
        argv = [sys.executable, "-m", "benchmarks.weightsync_gpu", "--json", "--mib", str(mib)]
        answer = subprocess.run(argv, check=True, cwd=ROOT, stdout=subprocess.PIPE)
        found |= msgspec.json.decode(answer.stdout.splitlines()[-1])["mib"][str(mib)]
    return found


def _measure(
    folder: Path, held: Held, before: Source, sources: dict[str, Source], rounds: int
) -> dict[str, dict[str, float]]:
    manifest = held.manifest
    image = staged(Shm(), sources["shm"], manifest, None)
    data = memoryview(image.readable())
    parent = Image.open(before.address.partition(" ")[0], manifest.size)
    numbers, found = itertools.count(), dict[str, dict[str, float]]()

    def through_disk() -> Image:
        source = save(folder / str(next(numbers)), manifest, image, 1)
        return staged(Disk(), source, manifest, None)

    def timed(way: str, once: Callable[[], object], floor: Callable[[], object]) -> None:
        progress(f"{manifest.size >> 20} MiB: {way}")
        found[way] = {"seconds": median_s(rounds, once), "floor": median_s(rounds, floor)}

    copying = median_s(rounds, lambda: memcpy(data))
    found["export"] = {"seconds": statistics.median(held.export_s), "floor": copying}
    timed("shm", lambda: staged(Shm(), sources["shm"], manifest, None), lambda: xxhash.xxh3_128_digest(data))
    timed("peer", lambda: staged(Peer(60), sources["peer"], manifest, None), lambda: socket_copy(image))
    timed("disk", through_disk, lambda: disk_copy(data, folder / "floor"))
    broadcasts.GATHER_S = 0.0
    progress(f"{manifest.size >> 20} MiB: gloo")
    found["gloo"] = {"seconds": median_s(rounds, lambda: through_gloo(image, manifest, sources["peer"]))}
    changed = median_s(rounds, lambda: staged(Delta(60), sources["delta"], manifest, parent))
    found["delta"] = {
        "seconds": changed,
        "floor": copying,
        "make_seconds": held.delta_s,
        "bytes_to_full": held.delta_bytes / manifest.size,
    }
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
        help="sizes in MiB (default: 96,1024); 6 of the largest must fit into memory",
    )
    options.add_argument("--hold", help=argparse.SUPPRESS)
    options.add_argument("--receive", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    if chosen.hold:
        hold(*map(int, chosen.hold.split(",")))
        return
    if chosen.receive:
        receive(*map(int, chosen.receive.split(",")))
        return
    sizes = [16] if chosen.quick else list(map(int, chosen.mib.split(",")))
    rounds = 1 if chosen.quick else 5
    found: dict[str, Any] = {str(mib): measure(mib, rounds) for mib in sizes}
    headings = ["way", "MiB", "GB/s", "floor, GB/s", "of the floor"]
    report({"mib": found}, table(headings, rows_of(found)), chosen)


if __name__ == "__main__":
    main()
