"""The reference model of the KL penalty: a second copy of the weights, kept in CPU memory.

It lends its weights to the model that is being trained for as long as it scores, so it needs no second
model and fits any parallel layout:

    reference = Reference(model)           # a copy of the weights of now
    with reference.in_place(model):
        ...                                # forward passes of the reference model
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Reference:
    """Frozen weights in the order of a model's parameters."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._weights = [parameter.detach().to("cpu", copy=True) for parameter in model.parameters()]

    @contextmanager
    def in_place(self, model: torch.nn.Module) -> Iterator[None]:
        """Within it `model` has these weights, without gradients; afterwards its own, bit for bit."""
        parameters = list(model.parameters())
        own = [parameter.data for parameter in parameters]
        try:
            for parameter, weights in zip(parameters, self._weights, strict=True):
                parameter.data = weights.to(parameter.device)
            with torch.no_grad():
                yield
        finally:
            for parameter, data in zip(parameters, own, strict=True):
                parameter.data = data
