"""A version really arrives in a real engine, by way of Redis and both sides; a broken push is seen."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator

import numpy as np
import pytest
import torch

from actors.config import EngineConfig
from actors.engine import Engine
from actors.weights import WeightWorker
from buffer.client import AsyncStream, Stream
from buffer.ledger import Snapshot
from buffer.local_server import LocalServer
from buffer.members import Heartbeat, JoinActor
from buffer.versions import Commit
from launch.tiny_model import make_tiny_qwen3
from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from learner.step import Trainer
from learner.verify import WeightCheck, check_engines
from tests.contract.harness import Run
from weightsync.config import WeightSyncConfig
from weightsync.holder import Holder
from weightsync.manifest import Manifest
from weightsync.offer import Offers

pytestmark = pytest.mark.asyncio(loop_scope="module")

SEQUENCES = [[5, 6, 7, 8, 256], [9, 10, 11, 256], [40, 256]]
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


async def push(
    server: LocalServer,
    engine: Engine,
    manifest: Manifest,
    tensors: dict[str, torch.Tensor],
    expected: list[np.ndarray],
) -> WeightCheck:
    """Offers a version to the engine through a run of its own, then checks the engine against `expected`."""
    name = f"push-{secrets.token_hex(4)}"
    learner, actor = Stream.connect(server.socket_url, name), AsyncStream.connect(server.socket_url, name)
    learner.load_library()
    run = Run(learner)
    run.join_learner()
    learner.call(Commit(run.epochs["learner"], 0, manifest.digest))
    joined = await actor.call(JoinActor(secrets.token_hex(16), "a", "host"))
    await actor.call(Heartbeat("a", joined.epoch, "running", "{}", ()))
    served: asyncio.Queue[int] = asyncio.Queue()
    holder, config = Holder("127.0.0.1"), WeightSyncConfig(timeout_s=30)
    worker = WeightWorker(
        actor, engine, holder, config, actor="a", epoch=joined.epoch, lag=1, applied=served.put_nowait
    )
    task = asyncio.create_task(worker.run())
    epoch = int(run.epochs["learner"].partition(":")[0])
    with Offers(learner, learner_epoch=epoch, config=config, log=print) as offers:
        offers.publish(manifest, tensors)
        assert await asyncio.wait_for(served.get(), 30) == manifest.version
        assert learner.call(Snapshot()).actors["a"].version == manifest.version
        check = await asyncio.to_thread(check_engines, learner, manifest, SEQUENCES, expected, timeout_s=20)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    holder.close()
    await actor.close()
    return check


async def test_after_a_push_the_engine_scores_as_the_learner_does(
    redis_server: LocalServer, engine: Engine, trainer: Trainer
) -> None:
    tensors = trainer.export()
    manifest = Manifest.of(0, tensors)
    check = await push(redis_server, engine, manifest, tensors, trainer.score(SEQUENCES))
    assert check.passed(TOLERANCE), check
    assert check.tokens == sum(len(sequence) - 1 for sequence in SEQUENCES)


@pytest.mark.parametrize("broken", ["lm_head.weight", "model.layers.1.mlp.down_proj.weight"])
async def test_a_push_that_lost_a_tensor_fails_the_check(
    redis_server: LocalServer, engine: Engine, trainer: Trainer, broken: str
) -> None:
    tensors = trainer.export()
    manifest = Manifest.of(0, tensors)
    sent = {**tensors, broken: torch.zeros_like(tensors[broken])}
    check = await push(redis_server, engine, manifest, sent, trainer.score(SEQUENCES))
    assert not check.passed(TOLERANCE)
    assert check.max_difference["a"] > 100 * TOLERANCE
