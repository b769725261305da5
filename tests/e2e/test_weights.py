"""Versions really arrive in a real engine, by way of Redis and both sides, while it generates."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

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
from launch.tiny_model import make_tiny
from learner.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from learner.step import Snapshot, Trainer
from learner.verify import WeightCheck, check_engines
from tests.contract.harness import Run
from weightsync import agent, offer
from weightsync.config import WeightSyncConfig
from weightsync.holder import Holder
from weightsync.image import chunk_ranges, write_image
from weightsync.manifest import Manifest
from weightsync.offer import Offers

pytestmark = pytest.mark.asyncio(loop_scope="module")

SEQUENCES = [[5, 6, 7, 8, 256], [9, 10, 11, 256], [40, 256]]
PROMPT = [5, 6, 7]
TOLERANCE = 1e-4
CHUNK = 256 << 10
"""Bytes of a chunk where a push is broken off at each."""


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A learner's model, whose weights the engine has never seen."""
    return trainer_of("qwen3", tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    """An engine with dummy weights."""
    engine = await engine_of("qwen3", tmp_path_factory.mktemp("engine"))
    yield engine
    await engine.stop()


def tiny(family: str, folder: Path, seed: int) -> Path:
    """A model without a choice: every expert is chosen, as one of two may be where scores nearly tie."""
    config = make_tiny(family, folder, seed=seed) / "config.json"
    fields = json.loads(config.read_text())
    if "num_experts" in fields:
        config.write_text(json.dumps({**fields, "num_experts_per_tok": fields["num_experts"]}))
    return folder


def trainer_of(family: str, root: Path) -> Trainer:
    folder = tiny(family, root / "model", seed=3)
    return Trainer(folder, ModelConfig(path=str(folder)), OptimizerConfig(), ObjectiveConfig())


async def engine_of(family: str, root: Path) -> Engine:
    folder = tiny(family, root / "model", seed=4)
    config = EngineConfig(max_running_requests=16, max_total_tokens=2048, update_timeout_s=30)
    return await Engine.start(folder, config, name="a", seed=0, log=folder / "engine.log")


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
        self.log = list[str]()
        self.offers = Offers(self.learner, learner_epoch=epoch, config=config, log=self.log.append)
        self.holder, self.engine, self.config = Holder("127.0.0.1"), engine, config
        self.served: asyncio.Queue[int] = asyncio.Queue()

    async def __aenter__(self) -> Pair:
        self.worker, self.task = await self.join("a", self.engine, self.holder, self.served.put_nowait)
        self.offers.__enter__()
        return self

    async def join(
        self, name: str, engine: Engine, holder: Holder, applied: Callable[[int], None]
    ) -> tuple[WeightWorker, asyncio.Task[None]]:
        """An actor of the run and its task."""
        joined = await self.actor.call(JoinActor(secrets.token_hex(16), name, "host"))
        worker = WeightWorker(
            self.actor,
            engine,
            holder,
            self.config,
            actor=name,
            epoch=joined.epoch,
            lag=1,
            applied=applied,
        )
        await self.actor.call(Heartbeat(name, joined.epoch, "running", "{}", ()))
        return worker, asyncio.create_task(worker.run())

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
    await push_fifty_times(redis_server, engine, trainer)


@pytest.mark.accept
async def test_the_same_with_qwen3_next(redis_server: LocalServer, tmp_path: Path) -> None:
    engine = await engine_of("qwen3_next", tmp_path / "engine")
    try:
        await push_fifty_times(redis_server, engine, trainer_of("qwen3_next", tmp_path / "trainer"))
    finally:
        await engine.stop()


async def generate(engine: Engine, seeds: Iterator[int], answers: list[Completion]) -> None:
    """Adds answers, two at a time and of a seed each, until it is cancelled."""
    sampling = SamplingConfig(max_new_tokens=40, ignore_eos=True)
    while True:
        answers.extend(await engine.generate(PROMPT, [next(seeds), next(seeds)], sampling))


async def push_fifty_times(redis_server: LocalServer, engine: Engine, trainer: Trainer) -> None:
    """After each the engine equals the learner; every token is what the weights of its own label say."""
    answers: list[Completion] = []
    draw, seeds = torch.Generator().manual_seed(1), itertools.count()
    versions: dict[str, Snapshot] = {}
    async with Pair(redis_server, engine, WeightSyncConfig()) as pair:
        first = trainer.export()
        await pair.push(Manifest.of(0, first), first)
        writing, ways = [asyncio.create_task(generate(engine, seeds, answers)) for _ in range(2)], set()
        for version in range(1, 51):
            manifest, tensors = step(trainer, version, draw)
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


async def test_row_16_a_push_that_dies_at_every_chunk_mixes_no_version(
    redis_server: LocalServer, engine: Engine, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a push is broken off the engine serves the old version; every token is of its own label."""
    monkeypatch.setattr(agent, "RETRY_S", 0.5)
    monkeypatch.setattr(offer, "write_image", partial(write_image, chunk_bytes=CHUNK))
    answers: list[Completion] = []
    draw, seeds = torch.Generator().manual_seed(2), itertools.count()
    versions: dict[str, Snapshot] = {}
    async with Pair(redis_server, engine, WeightSyncConfig(transport="peer", timeout_s=5)) as pair:
        first = trainer.export()
        old = Manifest.of(0, first)
        versions[old.label] = trainer.snapshot()
        await pair.push(old, first)
        count = -(-sum(tensor.nbytes for tensor in first.values()) // CHUNK)
        send, writing = pair.offers.holder.send, asyncio.create_task(generate(engine, seeds, answers))
        left = -1

        def breaks(connection: socket.socket, image: BinaryIO, first: int, count: int) -> None:
            nonlocal left
            for offset, size in chunk_ranges(count, CHUNK):
                left -= 1
                if left == -1:
                    raise ConnectionAbortedError
                send(connection, image, first + offset, size)

        monkeypatch.setattr(pair.offers.holder, "send", breaks)
        for chunk in range(count):
            left = chunk
            manifest, tensors = step(trainer, chunk + 1, draw)
            versions[manifest.label] = trainer.snapshot()
            pushing = asyncio.create_task(pair.push(manifest, tensors))
            async with asyncio.timeout(30):
                while not pair.worker.figures()["weights"].startswith("behind"):
                    await asyncio.sleep(0.01)
            (one,) = await engine.generate(PROMPT, [next(seeds)], SamplingConfig(max_new_tokens=2))
            assert {label for _, label in one.labels} == {old.label}
            answers.append(one)
            await pushing
            old = manifest
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
    assert count > 5
    # Generation ends with the last push.
    assert all(compare(trainer, answers, label, versions[label]) for label in list(versions)[:-1])


@pytest.mark.accept
async def test_a_hung_engine_delays_no_other_and_is_named_in_time(
    redis_server: LocalServer, engine: Engine, trainer: Trainer, tmp_path: Path
) -> None:
    """SIGSTOP of a whole engine; when it goes on it serves the newest version, and none in between."""
    config = EngineConfig(max_running_requests=16, max_total_tokens=2048, update_timeout_s=30)
    folder = make_tiny("qwen3", tmp_path / "model", seed=5)
    hung = await Engine.start(folder, config, name="hung", seed=0, log=tmp_path / "engine.log")
    served, holder, draw = list[int](), Holder("127.0.0.1"), torch.Generator().manual_seed(3)

    async def times(pair: Pair, numbers: range) -> list[float]:
        """Seconds until `a` serves each of these versions."""
        seconds = []
        for number in numbers:
            manifest, tensors = step(trainer, number, draw)
            began = time.monotonic()
            await pair.push(manifest, tensors)
            seconds.append(time.monotonic() - began)
        return seconds

    async with Pair(redis_server, engine, WeightSyncConfig(timeout_s=2)) as pair:
        _, task = await pair.join("hung", hung, holder, served.append)
        try:
            before = await times(pair, range(4))
            while served[-1:] != [3]:
                await asyncio.sleep(0.01)
            os.killpg(hung.pid, signal.SIGSTOP)
            stopped = time.monotonic()
            during = await times(pair, range(4, 8))
            while not pair.log:
                await asyncio.sleep(0.01)
            named = time.monotonic() - stopped
            os.killpg(hung.pid, signal.SIGCONT)
            while served[-1] != 7:
                await asyncio.sleep(0.01)
        finally:
            task.cancel()
            await asyncio.gather(task, hung.stop(), return_exceptions=True)
            holder.close()
    print(f"pushes to the other before {before}, during {during}; named after {named:.2f} s")
    assert "hung is left behind at version 3" in pair.log[0]
    assert named < 2 + 2
    assert max(during) < 2 * max(before) + 0.5
    assert served.count(4) + served.count(5) + served.count(6) <= 1, "the one under way, no other"


def step(trainer: Trainer, version: int, draw: torch.Generator) -> tuple[Manifest, dict[str, torch.Tensor]]:
    """Moves the learner's weights a little: the version that makes."""
    with torch.no_grad():
        for parameter in trainer._model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=draw))
    tensors = trainer.export()
    return Manifest.of(version, tensors), tensors


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
