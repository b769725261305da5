"""One configuration for a run: the packages' structs composed, read from TOML and dotted overrides.

load(["run.toml"], ["objective.correction=none", "stream.max_steps=50"])
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from actors.config import EngineConfig, EvaluationConfig, RolloutConfig
from buffer.config import RedisConfig, StreamConfig
from launch.errors import LaunchError
from learner.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SftConfig,
    WeightsConfig,
)
from weightsync.config import WeightSyncConfig


class RunConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """A run. Every field can be set as `section.field=value`."""

    name: str = "run"
    """Name of the run, in Redis and under `runs/`."""
    seed: int = 0
    """Seed of the order of prompts and of every sample."""
    redis: RedisConfig = RedisConfig()
    """The server and how to reach it."""
    model: ModelConfig
    """What is trained."""
    data: DataConfig
    """The questions, and in what mix they are asked."""
    stream: StreamConfig = StreamConfig()
    """How many groups a step, how stale, how many steps."""
    rollout: RolloutConfig = RolloutConfig()
    """How actors make groups of leases."""
    engine: EngineConfig = EngineConfig()
    """What generates for an actor."""
    sft: SftConfig | None = None
    """A supervised warm-up on the data set's answers before step 0; absent: none."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How gradients become updates."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What is maximised, and how stale tokens are corrected for."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the learner's state is saved."""
    weights: WeightsConfig = WeightsConfig()
    """Which versions are kept as Hugging Face folders."""
    weightsync: WeightSyncConfig = WeightSyncConfig()
    """How new weights travel to the engines."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Measuring versions beside training."""


def load(files: Iterable[Path], overrides: Iterable[str], base: Mapping[str, Any] | None = None) -> RunConfig:
    """Later files and overrides win, and all over `base`.

    Raises `LaunchError` naming the field and what is allowed.
    """
    tree: dict[str, Any] = {}
    _merge(tree, base or {})
    for path in files:
        try:
            _merge(tree, tomllib.loads(path.read_text()))
        except OSError as error:
            raise LaunchError(f"config: cannot read {path}: {error.strerror}") from error
        except tomllib.TOMLDecodeError as error:
            raise LaunchError(f"config: {path}: {error}") from error
    for override in overrides:
        _override(tree, override)
    return convert(tree)


def convert(tree: dict[str, Any]) -> RunConfig:
    """The configuration of a nested dictionary. Raises `LaunchError`."""
    try:
        config = msgspec.convert(tree, RunConfig)
    except msgspec.ValidationError as error:
        raise LaunchError(f"config: {_explain(str(error))}") from error
    if not config.name or set(config.name) & set("{}/ \\:"):
        raise LaunchError(f"config: name: got {config.name!r}, expected letters, digits, `-`, `_` or `.`")
    return config


def to_json(config: RunConfig) -> bytes:
    """The resolved configuration, every field included."""
    return msgspec.json.format(msgspec.json.encode(config), indent=2)


def _merge(tree: dict[str, Any], other: Mapping[str, Any]) -> None:
    for name, value in other.items():
        if isinstance(value, dict) and isinstance(tree.get(name), dict):
            _merge(tree[name], value)
        else:
            tree[name] = value


def _override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals:
        raise LaunchError(f"override: got {override!r}, expected section.field=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *sections, field = path.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise LaunchError(f"override: {override!r}: `{section}` is a value, not a section")
    tree[field] = value


def _explain(message: str) -> str:
    """msgspec's message, with the field's full path first and, for an unknown field, the known ones."""
    problem, _, path = message.partition(" - at ")
    section = path.strip("`").removeprefix("$").strip(".")
    text = f"{section + ': ' if section else ''}{problem}"
    if "unknown field" not in problem:
        return text
    struct: Any = RunConfig
    fields = re.sub(r"\[[^]]*\]", "", section)  # an item of a list or a table: `reward[...]`, `sources[0]`
    for name in filter(None, fields.split(".")):
        struct = _struct_in(next(f.type for f in msgspec.structs.fields(struct) if f.encode_name == name))
    return f"{text}; known are {', '.join(struct.__struct_encode_fields__)}"


def _struct_in(kind: Any) -> Any:
    """The struct in a type such as `Struct | None`, `list[Struct]` or `str | dict[str, Struct]`."""
    if hasattr(kind, "__struct_fields__"):
        return kind
    return next(filter(None, map(_struct_in, getattr(kind, "__args__", ()))), None)
