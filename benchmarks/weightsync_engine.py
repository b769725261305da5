"""How long an engine cannot generate while it takes a version: staged and copied, against the stock push.

`python -m benchmarks.weightsync_engine --json`: one real SGLang server on the CPU with the tiny model, two
tasks that generate without pause, and version after version. Timed is what the actor sees: from closing
the engine's gate to opening it again, ending the requests under way included. What comes before, export
and staging for ours, the broadcast for the stock push, is timed apart.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import torch

from actors.config import EngineConfig, SamplingConfig
from actors.engine import Engine
from benchmarks.harness import parser, progress, report, table
from launch.tiny_model import make_tiny_qwen3
from weightsync.holder import Held, Holder
from weightsync.image import write_image
from weightsync.manifest import Manifest
from weightsync.staging import Staging
from weightsync.transports.shm import Shm
from weightsync.transports.stock import StockGroup

Take = Callable[[Manifest, dict[str, torch.Tensor]], Awaitable[tuple[float, float]]]
"""Has the engine serve a version: (seconds before the pause, seconds of the pause)."""


def versions(folder: Path, count: int, first: int) -> list[tuple[Manifest, dict[str, torch.Tensor]]]:
    """The checkpoint's tensors, a little different each time."""
    from safetensors.torch import load_file

    exported, draw = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    made = []
    for number in range(first, first + count):
        exported = {
            name: tensor + 1e-3 * torch.randn(tensor.shape, generator=draw)
            for name, tensor in exported.items()
        }
        made.append((Manifest.of(number, exported), exported))
    return made


def staged(engine: Engine, holder: Holder) -> Take:
    """Ours, by shared memory."""

    async def take(manifest: Manifest, tensors: dict[str, torch.Tensor]) -> tuple[float, float]:
        began = time.perf_counter()
        image, complete = write_image(manifest, tensors)
        holder.keep(complete, image)
        source = holder.sources(manifest.label)[0]
        staging = Staging(complete, None, lambda: None)
        Shm().fetch(source, manifest.label, staging)
        held = Held(complete, staging.finish())
        before = time.perf_counter() - began
        return before, (await engine.load_weights(held, check=True)).pause_s

    return take


def stock(engine: Engine, group: StockGroup) -> Take:
    """SGLang's own push; the engine receives within the pause."""

    async def take(manifest: Manifest, tensors: dict[str, torch.Tensor]) -> tuple[float, float]:
        began = time.perf_counter()
        update = asyncio.create_task(engine.update_weights(group=group.name, manifest=manifest))
        await asyncio.to_thread(group.send, tensors)
        await update
        return 0.0, time.perf_counter() - began

    return take


async def meet(engine: Engine) -> StockGroup:
    """A group with the engine, as learner and actor make it."""
    loop, joining = asyncio.get_running_loop(), list[Any]()

    def invite(port: int) -> None:
        join = engine.join_group(group="bench", address="127.0.0.1", port=port)
        joining.append(asyncio.run_coroutine_threadsafe(join, loop))

    group = await asyncio.to_thread(
        StockGroup.open, "bench", address="127.0.0.1", timeout_s=60, invite=invite
    )
    await asyncio.wrap_future(joining[0])
    return group


async def measure(count: int) -> dict[str, dict[str, float]]:
    """Milliseconds of both ways, with generation under way."""
    with tempfile.TemporaryDirectory(prefix="slipstream-bench-") as root:
        folder = make_tiny_qwen3(Path(root) / "model", seed=0)
        config = EngineConfig(max_running_requests=16, max_total_tokens=4096)
        progress("starting the engine")
        engine = await Engine.start(folder, config, name="bench", seed=0, log=Path(root) / "engine.log")
        seeds, holder = itertools.count(), Holder("127.0.0.1")

        async def generate() -> None:
            sampling = SamplingConfig(max_new_tokens=200, ignore_eos=True)
            while True:
                await engine.generate([5, 6, 7], [next(seeds) for _ in range(4)], sampling)

        writing = [asyncio.create_task(generate()) for _ in range(2)]
        try:
            group, found = await meet(engine), dict[str, dict[str, float]]()
            for number, (way, take) in enumerate(
                (("staged", staged(engine, holder)), ("stock", stock(engine, group)))
            ):
                progress(way)
                found[way] = await _times(take, versions(folder, count, 1000 * number))
            group.close()
            return found
        finally:
            for task in writing:
                task.cancel()
            await asyncio.gather(*writing, return_exceptions=True)
            await engine.stop()
            holder.close()


async def _times(take: Take, made: list[tuple[Manifest, dict[str, torch.Tensor]]]) -> dict[str, float]:
    pauses, before = list[float](), list[float]()
    for manifest, tensors in made:
        await asyncio.sleep(0.1)
        early, pause = await take(manifest, tensors)
        before.append(1e3 * early)
        pauses.append(1e3 * pause)
    # The first one goes by names, and is shown apart.
    return {
        "first_ms": pauses[0],
        "pause_p50_ms": statistics.median(pauses[1:]),
        "pause_p95_ms": statistics.quantiles(pauses[1:], n=20)[-1],
        "before_p50_ms": statistics.median(before[1:]),
    }


def main() -> None:
    """Entry point."""
    options = parser(__doc__.partition("\n")[0]).parse_args()
    torch.set_num_threads(1)
    found = asyncio.run(measure(4 if options.quick else 51))
    headings = ["way", "first, ms", "pause p50, ms", "pause p95, ms", "before the pause p50, ms"]
    report(found, table(headings, [[way, *one.values()] for way, one in found.items()]), options)


if __name__ == "__main__":
    main()
