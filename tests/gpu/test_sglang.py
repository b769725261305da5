"""SGLang itself on a GPU takes versions of 1.7 B parameters by CUDA IPC, and answers by them."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.config import EngineConfig, SamplingConfig
from actors.engine import Engine
from tests.gpu.shapes import CONFIG, Weights, exported
from weightsync.guard import Place
from weightsync.holder import Held
from weightsync.image import write_image
from weightsync.manifest import Manifest
from weightsync.on_gpu import OnGpu

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sgl_kernel") is None, reason="needs SGLang with its kernels"
)

ENGINE = EngineConfig(
    device="cuda",
    dtype="bfloat16",
    max_running_requests=8,
    max_total_tokens=8192,
    context_length=1024,
    start_timeout_s=200.0,
    update_timeout_s=60.0,
    server_args={
        "attention-backend": "triton",
        "sampling-backend": "pytorch",
        "cuda-graph-backend-decode": "disabled",
        "cuda-graph-backend-prefill": "disabled",
        "mem-fraction-static": 0.3,
    },
)
SEQUENCES = [[(7 * at * (row + 3) + row) % 150_000 for at in range(1, 200)] for row in range(4)]


def expected(weights: Weights, dtype: torch.dtype) -> list[np.ndarray]:
    """Log-probabilities of tokens 1.. by transformers on the GPU."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("cuda"):
        model = Qwen3ForCausalLM(Qwen3Config(**CONFIG)).to(dtype).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    found = []
    for tokens in SEQUENCES:
        with torch.no_grad():
            logits = model(torch.tensor([tokens], device="cuda")).logits[0, :-1].float()
        picked = logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:], device="cuda")[:, None])
        found.append(picked[:, 0].cpu().numpy())
    return found


def worst(one: list[np.ndarray], other: list[np.ndarray]) -> tuple[float, float]:
    """(mean, largest) difference."""
    apart = np.concatenate([np.abs(a - b) for a, b in zip(one, other, strict=True)])
    return float(apart.mean()), float(apart.max())


@pytest.fixture(scope="module")
def on_gpu() -> Iterator[OnGpu]:
    made = OnGpu(0, print)
    yield made
    made.close()


def test_versions_reach_sglang_over_gpu_memory(tmp_path: Path, on_gpu: OnGpu) -> None:
    """By shared memory and by CUDA IPC an engine answers the same to the last bit."""
    asyncio.run(_reach(tmp_path, on_gpu))


async def _reach(tmp_path: Path, on_gpu: OnGpu) -> None:
    from transformers import Qwen3Config

    Qwen3Config(**CONFIG).save_pretrained(tmp_path)
    log = Path(os.environ.get("OUT", str(tmp_path))) / "sglang.log"
    began = time.monotonic()
    engine = await Engine.start(tmp_path, ENGINE, name="gpu", seed=0, log=log)
    print(f"\nSGLang is ready after {time.monotonic() - began:.0f} s")
    try:
        scores: dict[tuple[int, str], list[np.ndarray]] = {}
        for number in (0, 1):
            weights = exported(number)
            image, manifest = write_image(Manifest.of(number, weights), weights)
            by_memory = Held(manifest, image)
            loaded = await engine.load_weights(by_memory, check=True)
            print(f"version {number} from host memory, {loaded.way}: pause {loaded.pause_s:.4f} s")
            scores[number, "shm"] = (await engine.score(SEQUENCES))[1]
            await spoiled(engine, weights)
            summed = on_gpu.take(manifest, image)
            assert on_gpu.slot is not None
            held = Held(summed, Place(on_gpu.slot.guard.path))
            for _ in range(5):
                loaded = await engine.load_weights(held, check=True)
                print(f"version {number} by cuda_ipc, {loaded.way}: pause {loaded.pause_s:.4f} s")
            assert loaded.way == "plan"
            scores[number, "cuda_ipc"] = (await engine.score(SEQUENCES))[1]
            assert worst(scores[number, "cuda_ipc"], scores[number, "shm"]) == (0.0, 0.0)
            exact = expected(weights, torch.float32)
            mean, most = worst(scores[number, "cuda_ipc"], exact)
            print(f"version {number}: off transformers in fp32 by {mean:.4f}, at most {most:.4f}")
            usual, most = worst(expected(weights, torch.bfloat16), exact)
            print(f"version {number}: and transformers in bf16 by {usual:.4f}, at most {most:.4f}")
            assert mean < 1.5 * usual
            answers = await engine.generate(
                [5, 6, 7], [1, 2], SamplingConfig(max_new_tokens=16, ignore_eos=True)
            )
            assert [answer.labels for answer in answers] == [[(16, manifest.label)]] * 2
            by_memory.close()
        assert worst(scores[0, "shm"], scores[1, "shm"])[0] > 0.5
    finally:
        await engine.stop()


async def spoiled(engine: Engine, weights: Weights) -> None:
    """Another version, from host memory: what comes after it is not there already."""
    other = {name: tensor.flip(0) for name, tensor in weights.items()}
    image, manifest = write_image(Manifest.of(99, other), other)
    held = Held(manifest, image)
    await engine.load_weights(held, check=False)
    held.close()
