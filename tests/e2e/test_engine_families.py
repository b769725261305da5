"""Mixtures of experts and gated DeltaNet in real SGLang on the CPU: its numbers are transformers' and the
learner's, in prompts and in answers, for one request and for several, before and after new weights; and a
learner whose routers see things a little differently agrees better when it replays the engine's choices."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.config import EngineConfig, SamplingConfig
from actors.engine import Engine
from launch.tiny_model import make_tiny_qwen3
from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from learner.model.forward import target_logprobs
from learner.packing import pack, row_of_tokens
from learner.step import Trainer
from tests.e2e.test_engine import meet, reference
from tests.unit.learner.test_routing import noisy_routers
from weightsync.holder import Held
from weightsync.image import write_image
from weightsync.manifest import Manifest

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOLERANCE = 1e-4
LENGTHS = (2, 3, 17, 64, 5, 130, 33, 100)
"""Of prompts; the longest come in several parts, see `CONFIG`."""
CONFIG = EngineConfig(
    max_running_requests=16,
    max_total_tokens=4096,
    start_timeout_s=120,
    server_args={"chunked-prefill-size": 48},
)


def perturbed(source: Path, folder: Path, seed: int) -> Path:
    """A copy of a checkpoint in which every tensor is another, norms and biases too."""
    shutil.copytree(source, folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(source / "model.safetensors")
    noisy = {
        name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tensors.items()
    }
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=["qwen3_moe", "qwen3_next"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints of one family, of more than one layer of each kind."""
    root = tmp_path_factory.mktemp(request.param)
    made = make_tiny_qwen3(root / "made", seed=0, layers=4, family=request.param)
    return [perturbed(made, root / str(seed), seed) for seed in (1, 2)]


class Policy:
    """One checkpoint, as transformers and as the learner compute it."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.trainer = Trainer(folder, ModelConfig(path=str(folder)), OptimizerConfig(), ObjectiveConfig())

    def difference(self, sequence: list[int], found: list[float] | np.ndarray) -> float:
        """How far log-probabilities of the last tokens are from either."""
        last = slice(-len(found), None)
        ways = (reference(self.model, sequence), self.trainer.score([sequence])[0])
        return max(float(np.abs(np.asarray(found) - way[last]).max()) for way in ways)


async def worst(engine: Engine, policy: Policy) -> dict[str, float]:
    """Largest difference of prompts, of 64 tokens of one answer, and of eight at the same time."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, length).tolist() for length in LENGTHS]
    sampling = SamplingConfig(max_new_tokens=64, ignore_eos=True)

    async def answer(prompt: list[int], seed: int) -> float:
        (completion,) = await engine.generate(prompt, [seed], sampling)
        assert len(completion.tokens) == 64
        return policy.difference(prompt + completion.tokens, completion.logprobs)

    _, scored = await engine.score(prompts)
    return {
        "prompts": max(map(policy.difference, prompts, scored)),
        "one": await answer(prompts[2], 0),
        "eight": max(await asyncio.gather(*(answer(prompt, n) for n, prompt in enumerate(prompts)))),
    }


async def load_and_compare(engine: Engine, policy: Policy, version: int, way: str) -> None:
    """Has the engine load the policy's weights as a version, in a certain way, and then answer as it does."""
    exported = policy.trainer.export()
    image, complete = write_image(Manifest.of(version, exported), exported)
    loaded = await engine.load_weights(Held(complete, image), check=True)
    assert loaded.way == way, loaded
    found = await worst(engine, policy)
    assert max(found.values()) < TOLERANCE, found


async def replay_mismatch(engine: Engine, folder: Path) -> dict[bool, float]:
    """Mean |log p(engine) - log p(learner)| of answers, by whether `folder` replays the engine's routing."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 256, length).tolist() for length in LENGTHS]
    sampling = SamplingConfig(max_new_tokens=64, ignore_eos=True)
    asked = (engine.generate(prompt, [seed], sampling) for seed, prompt in enumerate(prompts))
    answers = [answer for (answer,) in await asyncio.gather(*asked)]
    said = np.concatenate([answer.logprobs for answer in answers])
    rows = [
        replace(row_of_tokens(prompt + answer.tokens, len(prompt)), routed=answer.routed)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    (batch,) = pack(rows, 2000)
    found = {}
    for replay in (True, False):
        objective = ObjectiveConfig(routing_replay=replay)
        trainer = Trainer(folder, ModelConfig(path=str(folder)), OptimizerConfig(), objective)
        with torch.no_grad():
            values = target_logprobs(trainer._parallel, batch, 256)[0].numpy()
        found[replay] = float(np.abs(values - said).mean())
    return found


async def test_scores_and_answers_equal_transformers_and_the_learner(folders: list[Path]) -> None:
    before, after = map(Policy, folders)
    log = folders[0] / "engine.log"
    engine = await Engine.start(
        folders[0], CONFIG, name="t", seed=0, log=log, load_format="auto", routed=True
    )
    try:
        same = await replay_mismatch(engine, folders[0])
        assert max(same.values()) < TOLERANCE, same
        apart = await replay_mismatch(engine, noisy_routers(folders[0], folders[0].with_name("noisy")))
        assert apart[True] < 0.5 * apart[False], apart
        found = await worst(engine, before)
        assert max(found.values()) < TOLERANCE, found
        tensors = after.trainer.export()
        manifest = Manifest.of(1, tensors)
        group = await meet(engine, "families")
        update = asyncio.create_task(engine.update_weights(group="families", manifest=manifest))
        await asyncio.to_thread(group.send, tensors)
        await update
        group.close()
        found = await worst(engine, after)
        assert max(found.values()) < TOLERANCE, found
        stale = await worst(engine, before)
        assert min(stale.values()) > 100 * TOLERANCE, stale
        for version, policy, way in ((2, before, "names"), (3, after, "plan")):
            await load_and_compare(engine, policy, version, way)
    finally:
        await engine.stop()
