"""Versions really arrive in a real engine, by way of Redis and both sides, while it generates."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import torch

from actors.config import EngineConfig, SamplingConfig
from actors.engine import Completion, Engine
from actors.weights import WeightWorker
from buffer.client import AsyncStream, Stream
from buffer.ledger import Snapshot as Look
from buffer.local_server import LocalServer
from buffer.members import Heartbeat, JoinActor
from launch.tiny_model import make_tiny_qwen3
from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from learner.step import Snapshot, Trainer
from learner.verify import WeightCheck, check_engines
from tests.contract.harness import Run
from weightsync.config import WeightSyncConfig
from weightsync.holder import Holder
from weightsync.manifest import Manifest
from weightsync.offer import Offers

pytestmark = pytest.mark.asyncio(loop_scope="module")

SEQUENCES = [[5, 6, 7, 8, 256], [9, 10, 11, 256], [40, 256]]
PROMPT = [5, 6, 7]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A learner's model, whose weights the engine has never seen."""
    folder = make_tiny_qwen3(tmp_path_factory.mktemp("weights") / "model", seed=3)
    return Trainer(folder, ModelConfig(path=str(folder)), OptimizerConfig(), ObjectiveConfig())


@pytest.fixture(scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    """An engine with dummy weights."""
    folder = make_tiny_qwen3(tmp_path_factory.mktemp("engine") / "model", seed=4)
    config = EngineConfig(max_running_requests=16, max_total_tokens=2048, update_timeout_s=30)
    engine = await Engine.start(folder, config, name="a", seed=0, log=folder / "engine.log")
    yield engine
    await engine.stop()


class Pair:
    """A learner and an actor of one run, without steps: a version is committed by writing it down."""

    def __init__(self, server: LocalServer, engine: Engine, config: WeightSyncConfig) -> None:
        name = f"push-{secrets.token_hex(4)}"
        self.learner, self.actor = (
            Stream.connect(server.socket_url, name),
            AsyncStream.connect(server.socket_url, name),
        )
        self.learner.load_library()
        self.run = Run(self.learner)
        self.run.join_learner()
        epoch = int(self.run.epochs["learner"].partition(":")[0])
        self.offers = Offers(self.learner, learner_epoch=epoch, config=config, log=print)
        self.holder, self.engine, self.config = Holder("127.0.0.1"), engine, config
        self.served: asyncio.Queue[int] = asyncio.Queue()

    async def __aenter__(self) -> Pair:
        joined = await self.actor.call(JoinActor(secrets.token_hex(16), "a", "host"))
        self.worker = WeightWorker(
            self.actor,
            self.engine,
            self.holder,
            self.config,
            actor="a",
            epoch=joined.epoch,
            lag=1,
            applied=self.served.put_nowait,
        )
        await self.actor.call(Heartbeat("a", joined.epoch, "running", "{}", ()))
        self.task = asyncio.create_task(self.worker.run())
        self.offers.__enter__()
        return self

    async def push(self, manifest: Manifest, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Commits a version, offers it, and waits until the engine serves it; what the actor says of it."""
        self.learner.redis.hset(self.learner.key("versions"), str(manifest.version), manifest.digest)
        self.offers.publish(manifest, tensors)
        while await asyncio.wait_for(self.served.get(), 30) != manifest.version:
            continue
        await asyncio.sleep(0)
        return self.worker.figures()

    async def check(self, manifest: Manifest, expected: list[np.ndarray]) -> WeightCheck:
        """Whether the engine scores as `expected`, under the version's label."""
        return await asyncio.to_thread(
            check_engines, self.learner, manifest, SEQUENCES, expected, timeout_s=20
        )

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.offers.__exit__, None, None, None)
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.holder.close()
        await self.actor.close()


@pytest.mark.parametrize("transport", ["shm", "peer"])
async def test_after_a_push_the_engine_scores_as_the_learner_does(
    redis_server: LocalServer, engine: Engine, trainer: Trainer, transport: Any
) -> None:
    tensors = trainer.export()
    manifest = Manifest.of(0, tensors)
    async with Pair(redis_server, engine, WeightSyncConfig(transport=transport)) as pair:
        figures = await pair.push(manifest, tensors)
        assert (figures["weights"], figures["transport"]) == ("serving 0", transport)
        assert pair.learner.call(Look()).actors["a"].version == manifest.version
        check = await pair.check(manifest, trainer.score(SEQUENCES))
    assert check.passed(TOLERANCE), check
    assert check.tokens == sum(len(sequence) - 1 for sequence in SEQUENCES)


@pytest.mark.parametrize("broken", ["lm_head.weight", "model.layers.1.mlp.down_proj.weight"])
async def test_other_weights_than_the_digest_says_fail_the_check(
    redis_server: LocalServer, engine: Engine, trainer: Trainer, broken: str
) -> None:
    tensors = trainer.export()
    manifest = Manifest.of(0, tensors)
    sent = {**tensors, broken: torch.zeros_like(tensors[broken])}
    async with Pair(redis_server, engine, WeightSyncConfig()) as pair:
        await pair.push(manifest, sent)
        check = await pair.check(manifest, trainer.score(SEQUENCES))
    assert not check.passed(TOLERANCE)
    assert check.max_difference["a"] > 100 * TOLERANCE


async def test_fifty_pushes_under_generation_mix_no_version(
    redis_server: LocalServer, engine: Engine, trainer: Trainer
) -> None:
    """After each the engine equals the learner; every token is what the weights of its own label say."""
    answers: list[Completion] = []
    draw, seeds = torch.Generator().manual_seed(1), itertools.count()
    versions: dict[str, Snapshot] = {}

    async def generate() -> None:
        sampling = SamplingConfig(max_new_tokens=40, ignore_eos=True)
        while True:
            answers.extend(await engine.generate(PROMPT, [next(seeds), next(seeds)], sampling))

    async with Pair(redis_server, engine, WeightSyncConfig()) as pair:
        first = trainer.export()
        await pair.push(Manifest.of(0, first), first)
        writing, ways = [asyncio.create_task(generate()) for _ in range(2)], set()
        for version in range(1, 51):
            with torch.no_grad():
                for parameter in trainer._model.parameters():
                    parameter.add_(0.01 * torch.randn(parameter.shape, generator=draw))
            tensors = trainer.export()
            manifest = Manifest.of(version, tensors)
            versions[manifest.label] = trainer.snapshot()
            ways.add((await pair.push(manifest, tensors))["load"])
            check = await pair.check(manifest, trainer.score(SEQUENCES))
            assert check.passed(TOLERANCE), (version, check)
        for task in writing:
            task.cancel()
        await asyncio.gather(*writing, return_exceptions=True)
    assert ways == {"plan"}, "no version goes by names once the engine has seen the layout"
    assert {label for answer in answers for _, label in answer.labels[1:]}, "answers lived through pushes"
    compared = [compare(trainer, answers, label, versions[label]) for label in versions]
    assert sum(count > 0 for count in compared) > 40, "tokens were written under nearly every version"


def compare(trainer: Trainer, answers: list[Completion], label: str, weights: Snapshot) -> int:
    """Scores the tokens that carry a label again, under its weights; how many there are."""
    trainer.restore(weights)
    own = [answer for answer in answers if label in [one for _, one in answer.labels]]
    compared = 0
    for answer, scores in zip(own, trainer.score([PROMPT + answer.tokens for answer in own]), strict=True):
        begin = 0
        for length, one in answer.labels:
            span = slice(begin, begin + length)
            if one == label:
                expected = scores[len(PROMPT) - 1 :][span]
                np.testing.assert_allclose(answer.logprobs[span], expected, atol=TOLERANCE)
                compared += length
            begin += length
    return compared
