"""Trials with the real learner: Megatron-Core trains a tiny Qwen3 on what scripted actors generate."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import msgspec

from launch.config import RunConfig
from launch.tiny_model import make_tiny_qwen3
from tests.faults.server import Server
from tests.faults.spawner import Spawner
from tests.faults.trial import Process, Trial

VOCABULARY = 256
"""Token ids that actors speak; the tiny model knows more."""


def make_files(folder: Path) -> tuple[Path, Path]:
    """(model, data set) for real trials."""
    model = make_tiny_qwen3(folder / "model", seed=3)
    source = random.Random(3)
    rows = [{"question": f"{source.randrange(90)}+{n}=", "answer": f"#### {n}"} for n in range(12)]
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model, data


class RealSettings(msgspec.Struct, kw_only=True):
    """What the test tells a real learner."""

    url: str
    log: str
    folder: str
    """The run's folder, with its `config.json`."""
    fork: int | None = None
    """That of `learner.worker.Learner`."""
    full_after: int = 0
    """Checkpoints after which the disk is full; 0: never."""


class RealTrial(Trial):
    """A run of the real learner; `learner` starts it, again and again if need be."""

    def __init__(
        self, files: tuple[Path, Path], server: Server, spawner: Spawner, folder: Path, **settings: Any
    ) -> None:
        """`checkpoint`, `objective`: overrides of those sections."""
        made_up = {"abort": {"mismatch": 0}}  # what scripted actors say of their tokens
        objective, checkpoint = settings.pop("objective", made_up), settings.pop("checkpoint", {})
        super().__init__(server, spawner, folder, **settings)
        self.files = folder / "run"
        """The run's folder."""
        self.files.mkdir()
        model, data = files
        tree = {
            "name": self.run,
            "seed": self.seed,
            "model": {"path": str(model)},
            "data": {"path": str(data)},
            "optimizer": {"lr": 3e-3, "warmup_steps": 0},
            "checkpoint": {"every": 2, **checkpoint},
            "objective": objective,
            "weightsync": {"timeout_s": 1.0},
            "stream": msgspec.to_builtins(self.config),
        }
        self._tree = tree
        self.change()

    def change(self, **rules: Any) -> None:
        """Other rules of the stream, for learners and actors that are started from now on."""
        self.config = msgspec.structs.replace(self.config, **rules)
        self._tree["stream"] = msgspec.to_builtins(self.config)
        config = msgspec.convert(self._tree, RunConfig)
        (self.files / "config.json").write_bytes(msgspec.json.encode(config))

    def learner(self, *, fault: str = "", url: str = "", **settings: Any) -> Process:
        """Starts the learner, on the checkpoints that are there."""
        told = RealSettings(
            url=url or self.server.url,
            log=str(self.folder / f"logs/learner-{len(self.learners)}.jsonl"),
            folder=str(self.files),
            **settings,
        )
        self.learners.append(Process(self._spawner, "real-learner", told, self.folder / "logs", fault))
        return self.learners[-1]

    def actor(self, name: str = "", **settings: Any) -> Process:
        """Starts a scripted actor, to which the learner sends no weights."""
        return super().actor(name, state="starting", vocabulary=VOCABULARY, **settings)

    def versions(self) -> dict[int, str]:
        """Digest of every committed version."""
        held: dict[Any, Any] = self.stream.redis.hgetall(self.stream.key("versions"))
        return {int(version): digest.decode() for version, digest in held.items()}

    def newest(self) -> int:
        """Version of the newest complete checkpoint, 0 for none."""
        return max((int(name.split("-")[1]) for name in self.checkpoints() if name[0] == "s"), default=0)

    def metrics(self) -> list[dict[str, Any]]:
        """Every line of the run's metrics."""
        return [json.loads(line) for line in (self.files / "metrics.jsonl").read_text().splitlines()]

    def checkpoints(self) -> list[str]:
        """Names in the folder of checkpoints."""
        return sorted(path.name for path in (self.files / "checkpoints").glob("*"))
