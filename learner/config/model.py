"""Which model is trained, and how ranks share it."""

from __future__ import annotations

from typing import Literal

import msgspec

from learner.config.bounds import Count, NonNegative
from learner.errors import ConfigError


class ParallelConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """How the ranks of a learner share one model. What is left of them is data parallelism:
    ranks / (tensor * pipeline * context) copies, each of which trains its own groups."""

    tensor: Count = 1
    """Ranks that share every matrix by rows or columns; heads, groups and the vocabulary divide by it. With
    more than 1, activations between the matrices are split by tokens (sequence parallelism)."""
    pipeline: Count = 1
    """Stages of layers, scheduled one forward, one backward; the layers divide by it."""
    context: Count = 1
    """Ranks that share every sequence; each holds 2 of its 2 * context pieces."""
    expert: Count = 1
    """Ranks over which the experts of a layer are dealt; divides their number. It takes ranks of data,
    context and tensor parallelism, not further ones."""
    expert_tensor: Count = 1
    """Ranks that share each expert's matrices, whatever `tensor` is for all others."""
    virtual_pipeline: Count = 1
    """Separate runs of layers on each stage (the interleaved schedule); only 1 can be had."""

    def __post_init__(self) -> None:
        """Refuse the schedule that gives wrong results."""
        if self.virtual_pipeline > 1:
            raise ConfigError(
                f"model.parallel.virtual_pipeline: got {self.virtual_pipeline}, expected 1: Megatron-Core's "
                "interleaved schedule took another micro-batch's length when lengths differed, and packed "
                "micro-batches always differ; use `pipeline` alone"
            )

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the model together."""
        return self.tensor * self.pipeline * self.context


Recompute = Literal["none", "selective", "full"]
"""What a backward pass computes again, see `ModelConfig.recompute`."""


class ModelConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """Which model is trained and how its sequences are packed."""

    path: str
    """Hugging Face checkpoint folder: config.json, safetensors and tokenizer files."""
    micro_batch_tokens: Count = 2048
    """Tokens in one forward pass. A longer sequence gets a micro-batch of its own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and activations; the optimizer's copy, routers and decays are fp32 in any case."""
    recompute: Recompute = "none"
    """What the backward pass computes again instead of keeping it: `selective` the inside of attention, MLPs
    and experts, `full` whole layers, of which then only the inputs are kept. Same gradients, less memory,
    more time."""
    parallel: ParallelConfig = ParallelConfig()
    """How the ranks share it."""
    logits_chunk: Count = 1024
    """Targets whose logits are in memory at once, in fp32 over the vocabulary: the output layer runs over
    so many at a time, and again in the backward pass."""
    peak_tflops: NonNegative = 0.0
    """Dense TFLOP/s of one GPU in `dtype`, for the figure `mfu`; 0: in bf16 by the card's name, if it is
    known (`learner.mfu`)."""

    def alone(self) -> ModelConfig:
        """The same model on one rank."""
        return msgspec.structs.replace(self, parallel=ParallelConfig())
