"""What a run tells its actors through Redis: its configuration, its model's config and tokenizer."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import msgspec

from actors.config import EngineConfig, Objective, RolloutConfig
from buffer.client import AsyncStream
from buffer.config import StreamConfig
from weightsync.config import WeightSyncConfig

log = logging.getLogger("actor")


class Settings(msgspec.Struct, frozen=True):
    """The part of the run's configuration that concerns an actor."""

    seed: int
    """Of the run; that of every sample follows from it."""
    stream: StreamConfig
    """Group size and bounds that an actor keeps to."""
    rollout: RolloutConfig
    """How groups are made of leases."""
    engine: EngineConfig
    """What generates."""
    weightsync: WeightSyncConfig = WeightSyncConfig()
    """How new weights come."""
    objective: Objective = Objective()
    """Whether routed experts are handed in."""


async def fetch_run(stream: AsyncStream, folder: Path, stop: asyncio.Event) -> Settings | None:
    """Waits for the run's configuration and model files; None if `stop` was set first."""
    told = False
    while not stop.is_set():
        config = await stream.redis.get(stream.key("config"))
        files: dict[Any, Any] = await stream.redis.hgetall(stream.key("files"))
        if config and files:
            for name, content in files.items():
                (folder / name.decode()).write_bytes(content)
            return msgspec.json.decode(config, type=Settings)
        if not told:
            log.info("waiting for the learner of run %s", stream.run)
            told = True
        await asyncio.sleep(0.5)
    return None
