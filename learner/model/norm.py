"""RMS norms for hosts without Transformer Engine, alone and in front of a linear layer; a whole linear layer.

Parameters have the names that Transformer Engine gives them, so that checkpoints are the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig

LATENT_NORM_EPS = 1e-6
"""Epsilon of the norms inside latent attention, whatever config.json says of the others (transformers'
`DeepseekV3Attention` leaves them at their default)."""


class RMSNorm(torch.nn.Module):
    """x / rms(x) * w over the last dimension, or * (1 + w) where the config says zero-centred."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        """The arguments with which Megatron-Core builds a norm."""
        super().__init__()
        self.weight = _gain(config, hidden_size)
        self.eps = eps
        self.zero_centred = config.layernorm_zero_centered_gamma

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] to the same shape."""
        return _rms_norm(x, self.weight, self.eps, self.zero_centred)


class NormColumnParallelLinear(ColumnParallelLinear):
    """An RMS norm and the column-parallel linear layer that reads it; see `RMSNorm`."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        eps: float | None = None,
        **kwargs: Any,
    ) -> None:
        """The arguments of Megatron-Core's `ColumnParallelLinear`; `eps` if the norm has its own."""
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = _gain(config, input_size)
        self.eps = config.layernorm_epsilon if eps is None else eps

    def forward(self, input_: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[T, B, input_size] to [T, B, output_size] and no bias."""
        zero_centred = self.config.layernorm_zero_centered_gamma
        normed = _rms_norm(input_, self.layer_norm_weight, self.eps, zero_centred)
        return super().forward(normed, **kwargs)


class DuplicatedLinear(torch.nn.Module):
    """A linear layer that every tensor-parallel rank has all of, for its own share of the tokens.

    As with Transformer Engine, the narrow projections of latent attention are such: what leaves them is
    whole, so that norm and rotary embedding can read it. Gradients are summed over the ranks, as a norm's.
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **_: Any) -> None:
        """The arguments with which Megatron-Core builds a linear layer."""
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[T, B, input_size] to [T, B, output_size] and no bias."""
        return torch.matmul(input_, self.weight.t()), None


def _gain(config: TransformerConfig, width: int) -> torch.nn.Parameter:
    gain = torch.nn.Parameter(torch.empty(width, dtype=config.params_dtype))
    gain.sequence_parallel = config.sequence_parallel
    return gain


def _rms_norm(x: torch.Tensor, gain: torch.Tensor, eps: float, zero_centred: bool) -> torch.Tensor:
    return F.rms_norm(x, gain.shape, 1 + gain if zero_centred else gain, eps)
