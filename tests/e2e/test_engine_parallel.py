"""A real SGLang engine of two tensor-parallel ranks on the CPU: each takes its shards, they answer as one."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from actors.engine import Engine
from launch.tiny_model import make_tiny
from tests.e2e.test_engine_families import CONFIG, Policy, load_and_compare, perturbed

pytestmark = pytest.mark.accept


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen3_next"])
async def test_two_ranks_take_versions_by_plan_and_answer_like_one(tmp_path: Path, family: str) -> None:
    made = make_tiny(family, tmp_path / "made", seed=0)
    before, after = (Policy(perturbed(made, tmp_path / str(seed), seed)) for seed in (1, 2))
    config = msgspec.structs.replace(CONFIG, server_args={**CONFIG.server_args, "tp-size": 2})
    log = tmp_path / "engine.log"
    engine = await Engine.start(made, config, name="pair", seed=0, log=log, load_format="dummy")
    try:
        for version, policy, way in ((0, before, "names"), (1, after, "plan"), (2, before, "plan")):
            await load_and_compare(engine, policy, version, way)
    finally:
        await engine.stop()
