"""Generations that live through updates of a real engine: every token is of the version that the record
names, to the token, and an interruption alone changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from importlib.metadata import version as installed
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from actors.config import EngineConfig, SamplingConfig
from actors.engine import Engine
from actors.errors import EngineError
from launch.tiny_model import make_tiny
from tests.e2e.test_engine import meet, reference
from tests.e2e.test_engine_families import perturbed
from weightsync.manifest import Manifest

pytestmark = pytest.mark.asyncio(loop_scope="module")

SGLANG = tuple(int(part) for part in installed("sglang").split(".")[:3])
TOLERANCE = 1e-3
PROMPT = [5, 6, 7, 8, 9]
SEEDS = [1, 2, 3, 4]


class Version(NamedTuple):
    """Weights, as they are sent and as transformers computes with them."""

    manifest: Manifest
    tensors: dict[str, torch.Tensor]
    model: torch.nn.Module


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Version]:
    from transformers import AutoModelForCausalLM

    root, found = tmp_path_factory.mktemp("versions"), []
    made = make_tiny("qwen3_next", root / "made", seed=0)
    for number in range(4):
        folder = perturbed(made, root / str(number), seed=number)
        tensors = load_file(folder / "model.safetensors")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found.append(Version(Manifest.of(number, tensors), tensors, model))
    return found


@pytest.fixture(scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    engine = await start(tmp_path_factory.mktemp("engine"), "abort")
    yield engine
    await engine.stop()


async def start(root: Path, pause: str) -> Engine:
    folder = make_tiny("qwen3_next", root / "model", seed=9)
    config = EngineConfig(max_running_requests=8, max_total_tokens=8192, pause=pause)  # type: ignore[arg-type]
    return await Engine.start(folder, config, name="t", seed=0, log=folder / "engine.log")


async def test_every_span_is_of_its_own_version_and_of_no_other(
    engine: Engine, versions: list[Version]
) -> None:
    await live_through_updates(engine, versions)


@pytest.mark.skipif(
    SGLANG < (0, 5, 21), reason="SGLang from 0.5.21 on goes on by itself: run `make test-sglang`"
)
async def test_the_same_where_the_server_goes_on_by_itself(
    versions: list[Version], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await start(tmp_path, "retract")
    calls = calls_of(engine, monkeypatch)
    await live_through_updates(engine, versions)
    await engine.stop()
    assert calls.count("/generate") == 1
    assert calls.count("/end_weight_update") == len(versions)


@pytest.mark.skipif(SGLANG >= (0, 5, 21), reason="this SGLang can do it")
async def test_a_server_that_cannot_is_refused_at_its_start(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"engine\.pause: got 'retract'.*0\.5\.21 or later"):
        await start(tmp_path, "retract")


async def live_through_updates(engine: Engine, versions: list[Version]) -> None:
    group = await meet(engine, "spans")

    async def serve(version: Version) -> None:
        taking = asyncio.create_task(engine.update_weights(group="spans", manifest=version.manifest))
        await asyncio.to_thread(group.send, version.tensors)
        await taking

    await serve(versions[0])
    sampling = SamplingConfig(max_new_tokens=700, ignore_eos=True)
    generating = asyncio.create_task(engine.generate(PROMPT, SEEDS, sampling))
    for version in versions[1:]:
        await asyncio.sleep(0.3)
        assert not generating.done(), "it was over before it had lived through three updates"
        await serve(version)
    answers = await generating
    group.close()

    boundaries = []
    for answer in answers:
        assert len(answer.tokens) == 700
        assert [label for _, label in answer.labels] == [version.manifest.label for version in versions]
        ends = list(accumulate(length for length, _ in answer.labels))
        spans = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        off = [difference(version, answer.tokens, answer.logprobs) for version in versions]
        for written, span in enumerate(spans):
            for index, found in enumerate(off):
                if index == written:
                    assert found[span].max() < TOLERANCE, (span, found[span].max())
                else:
                    assert found[span].max() > 100 * TOLERANCE, (span, found[span].max())
        # One token further in either direction, and it is another version's.
        boundaries.append([max(off[n][end], off[n + 1][end - 1]) for n, end in enumerate(ends[:-1])])
    assert np.max(boundaries, axis=0).min() > TOLERANCE


def difference(version: Version, tokens: list[int], logprobs: list[float]) -> np.ndarray:
    """How far the log-probability of each token is from that of a version."""
    expected = reference(version.model, PROMPT + tokens)[len(PROMPT) - 1 :]
    return np.abs(np.array(logprobs) - expected)


def calls_of(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that are asked of the server from now on."""
    calls, post = [], engine._calls.post

    async def noting(path: str, *rest: object) -> bytes:
        calls.append(path)
        return await post(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(engine._calls, "post", noting)
    return calls


async def test_an_interruption_without_new_weights_changes_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither for those it runs nor for those in its queue: it runs 8 at a time."""
    sampling, seeds = SamplingConfig(max_new_tokens=40, ignore_eos=True), range(12)
    whole = await engine.generate(PROMPT, seeds, sampling)
    calls = calls_of(engine, monkeypatch)
    generating = asyncio.create_task(engine.generate(PROMPT, seeds, sampling))
    await asyncio.sleep(0.1)
    async with engine.idle():
        assert engine.gate.within == 0
    again = await generating
    assert calls.count("/generate") == 2
    assert [answer.tokens for answer in again] == [answer.tokens for answer in whole]
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
        assert one.labels == other.labels
