"""Which shapes can be shared by ranks in which way; the reasons why others cannot."""

from __future__ import annotations

from collections.abc import Iterator

from learner.config import ParallelConfig
from learner.errors import ConfigError
from learner.model.shape import Attention, Shape


def check_shape(parallel: ParallelConfig, shape: Shape) -> None:
    """Raise `ConfigError`, naming the field, unless ranks can share a model of `shape` as `parallel` says."""
    if shape.hybrid is not None and parallel != ParallelConfig():
        raise ConfigError(
            f"model.parallel: got {parallel} with a {shape.family} model, of which every rank has all; leave "
            "all sizes 1, more ranks are data parallelism"
        )
    for field, size, what, count in _divisors(parallel, shape):
        if count % size:
            raise ConfigError(
                f"model.parallel.{field}: got {size}, which does not divide the model's {count} {what}; "
                f"choose a divisor of {count}"
            )
    for field in ("expert", "expert_tensor"):
        size = getattr(parallel, field)
        if shape.experts is None and size > 1:
            raise ConfigError(
                f"model.parallel.{field}: got {size} with a {shape.family} model, which has no experts; "
                "leave it 1"
            )


def stage_layers(shape: Shape, parallel: ParallelConfig, stage: int) -> range:
    """Numbers of the layers of a pipeline stage."""
    count = len(shape.layers) // parallel.pipeline
    return range(stage * count, (stage + 1) * count)


def _divisors(parallel: ParallelConfig, shape: Shape) -> Iterator[tuple[str, int, str, int]]:
    """Field, its value, what it must divide, and how many there are of that."""
    yield "pipeline", parallel.pipeline, "layers", len(shape.layers)
    yield "tensor", parallel.tensor, "rows of the vocabulary", shape.vocab_size
    yield "tensor", parallel.tensor, "attention heads", shape.attention.heads
    if isinstance(shape.attention, Attention):
        yield "tensor", parallel.tensor, "key-value heads", shape.attention.groups
    if not all(layer.experts for layer in shape.layers):
        yield "tensor", parallel.tensor, "columns of a dense MLP", shape.dense_width
    if shape.delta_net is not None:
        # Context parallelism exchanges sequences for heads there.
        for what, count in (
            ("key heads of linear attention", shape.delta_net.key_heads),
            ("value heads of linear attention", shape.delta_net.value_heads),
        ):
            yield "tensor", parallel.tensor, what, count
            yield "tensor x context", parallel.tensor * parallel.context, what, count
    if shape.experts is not None:
        yield "expert", parallel.expert, "experts", shape.experts.count
        yield "expert_tensor", parallel.expert_tensor, "columns of an expert", shape.experts.width
        yield "tensor", parallel.tensor, "columns of the shared expert", shape.experts.shared_width
