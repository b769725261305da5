"""How long an engine with very many tensors cannot generate while it takes a version.

    python -m benchmarks.weightsync_experts [--json] [--quick]

One real SGLang server on the CPU with the shape of Qwen3-Next: two layers, 512 experts in each, small
widths. What costs is the number of tensors: 3,072 of experts, where Qwen3-Next-80B has 73,728. They go in by

| way | how |
|---|---|
| plan | staged, then copied as the loader has seen it once: in the engine's own fused layout |
| names | staged, then by SGLang's own loading of Hugging Face names |
| bucket | SGLang's own `update_weights_from_distributed`, all tensors in one flattened bucket over gloo |

Timed is the pause, from closing the engine's gate to opening it again.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
from pathlib import Path

import torch

from actors.config import EngineConfig
from actors.engine import Engine
from benchmarks.harness import parser, progress, report, table
from benchmarks.weightsync_engine import meet, stock
from launch.tiny_model import make_tiny
from weightsync.holder import Held
from weightsync.image import write_image
from weightsync.manifest import Manifest

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
    group = await meet(engine)
    push, found["bucket"] = stock(engine, group), []
    for number in range(rounds):
        _, pause_s = await push(Manifest.of(2 * rounds + number, tensors), tensors)
        found["bucket"].append(pause_s)
        progress(f"bucket: {pause_s:.3f} s")
    group.close()
    return found


async def measure(experts: int, rounds: int) -> dict[str, object]:
    """Median pauses of all ways."""
    with tempfile.TemporaryDirectory(prefix="slipstream-bench-") as root:
        folder = make_tiny("qwen3_next", Path(root) / "model", seed=0)
        tensors = widened(folder, experts)
        config = EngineConfig(
            max_running_requests=8,
            max_total_tokens=2048,
            start_timeout_s=180,
            server_args={"chunked-prefill-size": 48},
        )
        progress("starting the engine")
        engine = await Engine.start(folder, config, name="bench", seed=0, log=Path(root) / "engine.log")
        try:
            found = await pauses(engine, tensors, rounds)
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
