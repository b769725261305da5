"""The learner's configuration: what a user may set, with the illegal combinations refused."""

from learner.config.data import DataConfig, SourceConfig
from learner.config.keeping import CheckpointConfig, WeightsConfig
from learner.config.model import ModelConfig, ParallelConfig, Recompute
from learner.config.objective import AbortConfig, KlConfig, ObjectiveConfig
from learner.config.optimizer import OptimizerConfig
from learner.config.sft import SftConfig

__all__ = [
    "AbortConfig",
    "CheckpointConfig",
    "DataConfig",
    "KlConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Recompute",
    "SftConfig",
    "SourceConfig",
    "WeightsConfig",
]
