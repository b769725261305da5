"""The stand-ins for flash-linear-attention against transformers' step-by-step recurrence."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3_next.modeling_qwen3_next import (
    l2norm as their_l2norm,
)
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_recurrent_gated_delta_rule,
)

from learner.model.delta_rule import CHUNK, causal_conv1d, chunk_gated_delta_rule, l2norm

LENGTHS = ((1,), (7,), (CHUNK,), (CHUNK + 1, 3, 2 * CHUNK, 1, 5 * CHUNK // 2), (2, 1, 3))


def _bounds(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _random(lengths: tuple[int, ...], decay: float) -> list[torch.Tensor]:
    """q, k, v, g, beta of 3 heads, keys of width 5 and values of width 4."""
    torch.manual_seed(0)
    tokens = sum(lengths)
    q, k = (their_l2norm(torch.randn(1, tokens, 3, 5)) for _ in range(2))
    v, g = torch.randn(1, tokens, 3, 4), -decay * torch.rand(1, tokens, 3)
    return [x.requires_grad_() for x in (q, k, v, g, torch.rand(1, tokens, 3))]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("decay", [0.0, 0.1, 30.0], ids=["none", "slow", "at once"])
def test_the_chunked_rule_equals_the_recurrence(lengths: tuple[int, ...], decay: float) -> None:
    inputs = _random(lengths, decay)
    got, state = chunk_gated_delta_rule(*inputs, cu_seqlens=_bounds(lengths))
    pieces = zip(*(x.split(lengths, dim=1) for x in inputs), strict=True)
    wanted = torch.cat([torch_recurrent_gated_delta_rule(*p, None, False)[0] for p in pieces], dim=1)
    assert state is None
    # A chunk's log decay is summed in fp32, as in the kernels: at -30 a token, half a chunk is -1000.
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-5)
    weights = torch.randn(got.shape)
    gradients = torch.autograd.grad((got * weights).sum(), inputs)
    for ours, theirs in zip(gradients, torch.autograd.grad((wanted * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_half_precision_is_computed_in_fp32() -> None:
    inputs = [x.detach().bfloat16() for x in _random((100,), 0.1)]
    half, _ = chunk_gated_delta_rule(*inputs, cu_seqlens=_bounds((100,)))
    full, _ = chunk_gated_delta_rule(*(x.float() for x in inputs), cu_seqlens=_bounds((100,)))
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, full.bfloat16())


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 6)], ids=["plain", "bias"])
def test_the_convolution_equals_conv1d(lengths: tuple[int, ...], bias: torch.Tensor | None) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, sum(lengths), 6), torch.randn(6, 4)
    got, _ = causal_conv1d(x, weight, bias, activation="silu", cu_seqlens=_bounds(lengths))
    padded = (torch.nn.functional.pad(piece.mT, (3, 0)) for piece in x.split(lengths, dim=1))
    wanted = [torch.nn.functional.conv1d(piece, weight[:, None], bias, groups=6).mT for piece in padded]
    torch.testing.assert_close(got, torch.nn.functional.silu(torch.cat(wanted, dim=1)))


def test_the_norm_equals_theirs() -> None:
    x = torch.randn(2, 3, 5)
    x[0, 0] = 0.0
    torch.testing.assert_close(l2norm(x), their_l2norm(x))
