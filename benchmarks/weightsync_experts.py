"""How long an engine with very many tensors cannot generate while it takes a version.

    python -m benchmarks.weightsync_experts [--json] [--quick]

One real SGLang server on the CPU with the shape of Qwen3-Next: four layers, 512 experts in each, small
widths. What costs is the number of tensors: 6,144 of experts, where Qwen3-Next-80B has 73,728. They go in by

| way | how |
|---|---|
| plan | staged, then copied as the loader has seen it once: in the engine's own fused layout |
| names | staged, then by SGLang's own loading of Hugging Face names |
| bucket | SGLang's `update_weights_from_distributed`, one broadcast, by names |
| tensors | the same with one broadcast for each tensor |

Timed is the pause, from closing the engine's gate to opening it again.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from actors.config import EngineConfig, SamplingConfig
from actors.engine import Engine
from benchmarks.harness import parser, progress, report, table
from benchmarks.weightsync_engine import meet
from launch.tiny_model import make_tiny
from weightsync.holder import Held
from weightsync.image import write_image
from weightsync.manifest import Manifest
from weightsync.transports.stock import StockGroup

EXPERTS = 512
ROUNDS = 5
Tensors = dict[str, torch.Tensor]


def widened(folder: Path, experts: int) -> Tensors:
    """Gives the tiny model of a folder so many experts a layer; its tensors, of which the folder has none."""
    from safetensors.torch import load_file

    path, tensors = folder / "config.json", load_file(folder / "model.safetensors")
    config = json.loads(path.read_text())
    few = config["num_experts"]
    path.write_text(json.dumps({**config, "num_experts": experts}))
    (folder / "model.safetensors").unlink()
    made: Tensors = {}
    for name, tensor in tensors.items():
        before, middle, after = name.partition(".mlp.experts.")
        number, _, part = after.partition(".")
        if middle:
            made |= {f"{before}{middle}{more}.{part}": tensor for more in range(int(number), experts, few)}
        else:
            made[name] = tensor.repeat(experts // few, 1) if name.endswith(".mlp.gate.weight") else tensor
    return made


async def pauses(engine: Engine, tensors: Tensors, rounds: int) -> dict[str, list[float]]:
    """Seconds by way. Tensors of another type are another layout, which goes by names again."""
    other = {name: tensor.bfloat16() if "norm" in name else tensor for name, tensor in tensors.items()}
    found: dict[str, list[float]] = {"plan": [], "names": []}
    for number in range(rounds):
        exported = (tensors, other)[number % 2]
        for version in (2 * number, 2 * number + 1):
            image, manifest = write_image(Manifest.of(version, exported), exported)
            loaded = await engine.load_weights(Held(manifest, image), check=True)
            found[loaded.way].append(loaded.pause_s)
            image.close()
            progress(f"{loaded.way}: {loaded.pause_s:.3f} s")
    return found


async def stock(engine: Engine, group: StockGroup, tensors: Tensors, number: int, *, bucket: bool) -> float:
    """Seconds of SGLang's own push."""
    manifest, began = Manifest.of(number, tensors), time.perf_counter()
    body = {
        "names": list(tensors),
        "dtypes": [entry.dtype for entry in manifest.tensors],
        "shapes": [entry.shape for entry in manifest.tensors],
        "group_name": group.name,
        "load_format": "flattened_bucket" if bucket else None,
        "weight_version": manifest.label,
        "flush_cache": False,
    }

    def send() -> None:
        for part in [tensors] if bucket else [{name: tensor} for name, tensor in tensors.items()]:
            group.send(part)

    async with engine.idle():
        # `Engine.update_weights` knows the bucket only.
        update = asyncio.create_task(engine._calls.post("/update_weights_from_distributed", body, 300))
        await asyncio.to_thread(send)
        await update
    seconds = time.perf_counter() - began
    progress(f"{'bucket' if bucket else 'tensors'}: {seconds:.3f} s")
    return seconds


async def measure(experts: int, rounds: int) -> dict[str, object]:
    """Median pauses of all ways."""
    with tempfile.TemporaryDirectory(prefix="slipstream-bench-") as root:
        folder = make_tiny("qwen3_next", Path(root) / "model", seed=0)
        tensors = widened(folder, experts)
        config = EngineConfig(
            max_running_requests=8,
            max_total_tokens=2048,
            start_timeout_s=180,
            update_timeout_s=300,
            server_args={"chunked-prefill-size": 48},
        )
        progress("starting the engine")
        engine = await Engine.start(folder, config, name="bench", seed=0, log=Path(root) / "engine.log")
        try:
            found = await pauses(engine, tensors, rounds)
            group = await meet(engine)
            for way, bucket in (("bucket", True), ("tensors", False)):
                found[way] = [
                    await stock(engine, group, tensors, 100 + number, bucket=bucket)
                    for number in range(rounds)
                ]
            group.close()
            await engine.generate([5, 6, 7], [1], SamplingConfig(max_new_tokens=2))
        finally:
            await engine.stop()
    return {
        "tensors": len(tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "pause_s": {way: statistics.median(seconds) for way, seconds in found.items()},
    }


def main() -> None:
    """Entry point."""
    options = parser(__doc__.partition("\n")[0]).parse_args()
    torch.set_num_threads(1)
    found = asyncio.run(measure(32 if options.quick else EXPERTS, 2 if options.quick else ROUNDS))
    rows = [[way, 1e3 * seconds] for way, seconds in found["pause_s"].items()]
    head = f"{found['tensors']} tensors, {found['bytes'] / 1e6:.0f} MB\n\n"
    report(found, head + table(["way", "pause, ms"], rows), options)


if __name__ == "__main__":
    main()
