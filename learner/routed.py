"""Whether a batch's routed experts can be replayed by the model that is trained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from buffer.schema import Group
from learner.errors import BatchError
from learner.model.shape import Shape


def check_routed(groups: Sequence[Group], shape: Shape) -> None:
    """Raises `BatchError` naming group, sample and layer unless each sample has experts that the model has.

    Every number is looked at; that those of a token differ, for each sample's first and last token, which
    tells a layer that was never written from one that was.
    """
    assert shape.experts is not None
    layers = [index for index, layer in enumerate(shape.layers) if layer.experts]
    chosen, count = shape.experts.chosen, shape.experts.count
    for group in groups:
        for index, sample in enumerate(group.samples):
            problem = _problem(
                sample.routed, layers, (len(sample.tokens) - 1, len(shape.layers), chosen), count
            )
            if problem and sample.answer_length:
                raise BatchError(
                    f"group {group.id}, sample {index}: routed experts: {problem}; have engine and learner "
                    "the same model, and does every actor return them (objective.routing_replay)?"
                )


def _problem(
    routed: np.ndarray | None, layers: Sequence[int], shape: tuple[int, int, int], count: int
) -> str | None:
    if routed is None or routed.shape != shape:
        got = "none" if routed is None else list(routed.shape)
        return f"got {got}, expected {list(shape)}: fed tokens, layers, experts"
    for layer in layers:
        largest = int(routed[:, layer].max())
        if largest >= count:
            return f"layer {layer}: got expert {largest}, expected 0 to {count - 1}"
        for place in (0, -1):
            if len(np.unique(routed[place, layer])) < shape[2]:
                return (
                    f"layer {layer}: got {routed[place, layer].tolist()} for a token, expected different ones"
                )
    return None
