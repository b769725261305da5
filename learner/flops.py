"""What a sequence costs to train: its floating-point operations, estimated from the architecture.

Matrix products of forward and backward pass, the latter as twice the former; nothing is counted for
norms, activations and what is computed again. Of a sequence of T tokens with n targets::

    flops = 6 (token T + pair T^2 / 2 + target n)        multiply-adds: 2, times 3 passes
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from learner.model.shape import Attention, DeltaNet, Experts, LatentAttention, Shape


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one forward pass."""

    token: float
    """A token of context: projections, MLPs or chosen experts, the recurrence of linear attention."""
    pair: float
    """A pair of tokens that attend to each other."""
    target: float
    """A target's logits."""

    def flops(self, lengths: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Of sequences of `lengths` fed tokens with `targets` targets each (both integer [S]): float [S]."""
        lengths = lengths.astype(np.float64)
        return 6 * (self.token * lengths + self.pair * lengths**2 / 2 + self.target * targets)


def cost_of(shape: Shape) -> Cost:
    """The cost of a model of this architecture."""
    token = pair = 0.0
    for layer in shape.layers:
        if layer.delta_net:
            assert shape.delta_net is not None
            token += _delta_net(shape.delta_net, shape.hidden_size)
        else:
            projections, attended = _attention(shape.attention, shape.hidden_size)
            token, pair = token + projections, pair + attended
        if layer.experts:
            assert shape.experts is not None
            token += _experts(shape.experts, shape.hidden_size)
        else:
            token += 3 * shape.hidden_size * shape.dense_width
    return Cost(token, pair, shape.hidden_size * shape.vocab_size)


def _attention(attention: Attention | LatentAttention, hidden: int) -> tuple[float, float]:
    """Of a token its projections, of a pair of tokens its score and what it adds to the output."""
    heads = attention.heads
    if isinstance(attention, Attention):
        inputs = (heads * (1 + attention.gated) + 2 * attention.groups) * attention.head_dim
        inner = heads * attention.head_dim
        return hidden * (inputs + inner), 2 * inner
    width = attention.plain_dim + attention.rotary_dim
    query = heads * width * (attention.query_rank or hidden) + hidden * (attention.query_rank or 0)
    down = hidden * (attention.key_rank + attention.rotary_dim)
    up = attention.key_rank * heads * (attention.plain_dim + attention.value_dim)
    return query + down + up + heads * attention.value_dim * hidden, heads * (width + attention.value_dim)


def _delta_net(delta_net: DeltaNet, hidden: int) -> float:
    """Projections and convolution; the state of each value head is read, written and read out."""
    keys, values = delta_net.key_heads * delta_net.key_dim, delta_net.value_heads * delta_net.value_dim
    inputs = 2 * keys + 2 * values + 2 * delta_net.value_heads
    return (
        hidden * (inputs + values) + delta_net.kernel * (2 * keys + values) + 3 * delta_net.key_dim * values
    )


def _experts(experts: Experts, hidden: int) -> float:
    shared = 3 * experts.shared_width + experts.shared_gate
    return hidden * (experts.count + 3 * experts.chosen * experts.width + shared)
